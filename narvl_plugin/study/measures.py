"""What a run of a study has measured, read from its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from narvl_plugin.report.about import read_stages
from narvl_plugin.report.build import SCORES_FILE
from narvl_plugin.report.outputs import TrainingLog, read_training_log
from narvl_plugin.report.page import STUDENT
from narvl_plugin.study.running import is_finished

WORDING = ("sentences", "true", "complete", "new_runs", "doubled", "cut", "novel", "perplexity", "object_recall")
"""Measures of captions in results.json: shares, and the perplexity."""


@dataclass(frozen=True)
class Measured:
    """The measures of a run.

    Attributes:
        main: name of the main score.
        curve: name of the validation score in the log of training, and its name in words.
        test: equal for runs with the same test rows.
        rows: the student's main score in each test row.
        values: the measures by name.
        validation: the student's validation score after numbers of updates.
        machine: what the run was timed on, see `narvl_plugin.bench.timing.describe_machine`; empty without latency.
    """

    main: str
    curve: tuple[str, str]
    test: str
    rows: list[float]
    values: dict[str, float]
    validation: list[tuple[int, float]] = field(default_factory=list)
    machine: Mapping[str, Any] = field(default_factory=dict)


def read_measures(folder: Path) -> Measured | None:
    """Read the measures of a run; None if it has not ended.

    Values that it has not measured are left out: latency if it was not timed, truth of captions that are not of scenes.
    """
    if not is_finished(folder) or not (folder / SCORES_FILE).exists():
        return None
    scores, results = _read(folder / SCORES_FILE), _read(folder / "results.json")
    systems, main, base = results["systems"], scores["main"], scores["base"]
    student, teacher = systems[STUDENT], systems.get(base, {})
    calibration = _read(folder / "calibration.json") if (folder / "calibration.json").exists() else {}
    values: dict[str, Any] = {
        "score": student["scores"][main],
        "teacher": teacher.get("scores", {}).get(main),
        "ratio": student.get(f"{main.lower()}_ratio_to_{base}"),
        **{name: student.get(name) for name in WORDING},
        **{f"teacher_{name}": teacher.get(name) for name in WORDING},
        **{f"score_of_{count}": found[main] for count, found in student.get("by_count", {}).items()},
        **{f"teacher_score_of_{count}": found[main] for count, found in teacher.get("by_count", {}).items()},
        "calibration_error": calibration.get("systems", {}).get(STUDENT, {}).get("error"),
        **{name: (student.get("latency") or {}).get(name) for name in ("p50_ms", "batched_ms")},
        "latency_ratio": student.get(f"latency_ratio_to_{base}"),
    }
    log = folder / STUDENT / "train.jsonl"
    curves = read_training_log(log).curves if log.exists() else TrainingLog().curves
    for name in ("blank_share", "repeat_share"):
        if (curve := f"valid_{name}") in curves:
            values[name] = curves[curve][-1][1]
    if "valid_did_not_fit" in curves and (rows := _validation_rows(folder / STUDENT / "train.yaml")):
        values["did_not_fit"] = curves["valid_did_not_fit"][-1][1] / rows
    times = {stage.name: stage.seconds for stage in read_stages(folder / "stages.tsv")}
    values["training_s"] = times.get(STUDENT)
    return Measured(
        main=main,
        curve=tuple(scores["curve"]),
        test=scores["test"],
        rows=scores["systems"][STUDENT],
        values={name: float(value) for name, value in values.items() if value is not None},
        validation=curves.get(scores["curve"][0], []),
        machine=results.get("machine", {}),
    )


def _read(file: Path) -> Mapping[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _validation_rows(configuration: Path) -> int:
    """Return the number of rows of a training's validation file; 0 if the file is not there."""
    if not configuration.exists():
        return 0
    cfg = OmegaConf.load(configuration)
    file = Path(str(OmegaConf.to_container(cfg)["task"]["data"]).split(",")[-1])  # type: ignore[index,call-overload]
    if not file.exists():
        return 0
    with open(file, "rb") as rows:
        return sum(1 for _ in rows)
