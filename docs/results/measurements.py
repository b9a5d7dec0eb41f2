"""Reads the measurements in ``data/``: tables, and what benchmarks and reports wrote, all in one form.

A file is a table, ``{"question", "runs", "columns", "rows"}``, whose first column names the rows, or wraps an unchanged
result, ``{"question", "kind", "run", "result"}``. ``kind`` is one of `KINDS`. A result is JSON, or the text that a
benchmark printed. Either may hold ``"facts"``: sizes of the measurement that a page names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
RUN = ("command", "seed", "commit", "date", "machine", "torch", "note")
"""What is known of each run; None where it is not known."""
TEACHERS = ("teacher_allcand", "teacher_beam5")
"""Teachers that scores are compared with; a report lists the better one first."""
LENGTHS = (1, 3, 5, 10, 20)
"""Numbers of tokens for which `narvl bench limit` prints the speed-up."""


@dataclass(frozen=True)
class Measurement:
    """A table of measurements.

    Attributes:
        name: its name in templates.
        question: the question that it helps to answer.
        runs: how it was measured, with the keys of `RUN`.
        rows: the rows by their first cell.
        facts: sizes of the measurement, by name.
        raw: the unchanged result; None for a table.
    """

    name: str
    question: str
    runs: list[Row]
    rows: dict[str, Row]
    facts: Row
    raw: Any = None

    def __getitem__(self, key: str) -> Row:
        """Return the row of a name."""
        return self.rows[key]

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows."""
        return iter(self.rows.values())

    def __contains__(self, key: str) -> bool:
        """Return whether a row of that name is there."""
        return key in self.rows


def read_all(folder: Path) -> dict[str, Measurement]:
    """Return all measurements of a folder by name.

    A result may hold several tables. Those after the first are named after the file and themselves, such as
    ``run_caption_confidence``, and replace a file of that name.

    Args:
        folder: the folder of JSON files.

    Returns:
        The measurements.
    """
    tables: dict[str, Measurement] = {}
    results: dict[str, Measurement] = {}
    for file in sorted(folder.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        found = tables if "rows" in content else results
        found |= {table.name: table for table in read(file.stem, content)}
    return tables | results


def read(name: str, content: dict[str, Any]) -> Iterator[Measurement]:
    """Yield the tables of a file.

    Args:
        name: the file's name without its suffix.
        content: its content.

    Yields:
        The tables.

    Raises:
        ValueError: if the file has neither form.
    """
    question, facts = content["question"], content.get("facts", {})
    if "rows" in content:
        rows = [dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]
        yield _measurement(name, question, content["runs"], rows, facts)
        return
    kind, result = content.get("kind"), content["result"]
    if kind not in KINDS:
        raise ValueError(f"{name}.json: kind {kind!r} is unknown; choose one of {', '.join(KINDS)}")
    machine = result.get("machine", {}) if isinstance(result, dict) else {}
    known = {"commit": machine.get("commit"), "torch": machine.get("torch"), "machine": _machine(machine)}
    run = {**known, **{key: value for key, value in content["run"].items() if value is not None}}
    for part, table in KINDS[kind](result).items():
        yield _measurement(f"{name}_{part}" if part else name, question, [run], table, facts, result)


def _measurement(
    name: str, question: str, runs: Sequence[Row], rows: Sequence[Row], facts: Row, raw: Any = None
) -> Measurement:
    """Return a table, with its rows by their first cell."""
    by_name = {str(next(iter(row.values()))): row for row in rows}
    if len(by_name) < len(rows):
        raise ValueError(f"{name}: two rows have one name; the first column names the rows")
    return Measurement(name, question, [{key: run.get(key) for key in RUN} for run in runs], by_name, facts, raw)


def _machine(machine: Row) -> str | None:
    """Return the machine of a result in words."""
    if not machine:
        return None
    threads = f"{machine['threads']} {'thread' if machine['threads'] == 1 else 'threads'}"
    return f"{machine['processor']}, {machine['cores']} cores, {threads}, {machine['precision']}"


# --- Results as JSON -------------------------------------------------------------------------------------------------

Tables = dict[str, list[Row]]


def _by_count(found: Row) -> Iterator[tuple[str, float]]:
    """Yield a system's main score by the number of true elements."""
    for number, scores in found.get("by_count", {}).items():
        yield number, next(share for name, share in scores.items() if name != "rows")


def _report(result: Any) -> Tables:
    """Return the tables of a run's ``results.json``: systems, confidence, settings."""
    systems: list[Row] = []
    for name, found in result["systems"].items():
        scores = found["scores"]
        score = next((scores[name] for name in ("CIDEr", "accuracy") if name in scores), next(iter(scores.values())))
        p50 = found["latency"] and found["latency"]["p50_ms"]
        recall = found.get("object_recall")
        wording = ("sentences", "true", "complete", "new_runs", "novel", "references_novel")
        truth = {key: found.get(key) for key in wording}
        row = {"system": name, "score": score, **scores, **truth, "object_recall": recall, "p50_ms": p50}
        systems.append(row | {f"of_{number}": share for number, share in _by_count(found)})
    teachers = [row["score"] for row in systems if row["system"] in TEACHERS]
    for row in systems:
        row["ratio"] = row["score"] / teachers[0] if teachers else None
    confidence = (result.get("calibration") or {}).get("systems", {})
    named = {
        "images": "TRAIN",
        "nouns": "NOUNS",
        "pixels": "PATCH_IMAGE_SIZE",
        "teacher_updates": "TEACHER_UPDATES",
        "student_updates": "STUDENT_UPDATES",
        "rows": "BATCH",
    }
    given = result.get("settings", {})
    settings = {name: int(given[key]) if given.get(key) else None for name, key in named.items()}
    return {
        "": systems,
        "confidence": [{"system": name, **found} for name, found in confidence.items()],
        "settings": [{"key": "settings", **settings, "minutes": result.get("minutes")}],
    }


def _latency(result: Any) -> Tables:
    """Return the tables of ``narvl bench latency``."""
    return {
        "": [{"system": name, **found} for name, found in result["systems"].items()],
        "stages": [{"system": name, **found} for name, found in result["stages"].items()],
    }


def _models(result: Any) -> Tables:
    """Return the tables of ``narvl bench models``."""
    kept = ("quality", "p50_ms", "p95_ms", "spread_ms")
    systems = []
    for name, found in result["systems"].items():
        batches = {f"batch_{size}": speed for size, speed in found["images_per_second"].items()}
        share = {"encoder_share": found["encoder_share"]}
        systems.append({"system": name, **{key: found[key] for key in kept}, **batches, **share})
    staged = {name: found["stages"] for name, found in result["systems"].items() if "stages" in found}
    return {"": systems, "stages": [{"system": name, **stages} for name, stages in staged.items()]}


def _decoding(result: Any) -> Tables:
    """Return the table of ``narvl bench decoding``."""
    return {"": [{"way": name, **found} for name, found in result["ways"].items()]}


def _limit(result: Any) -> Tables:
    """Return the tables of ``narvl bench limit``: speed-up and bound by size and length, and the measured parts."""
    curve, parts = [], []
    for size, found in result["sizes"].items():
        of = found["parts"]
        encoder = _dot(of["encoder"], (1, 1))
        for tokens in LENGTHS:
            teacher = encoder + _dot(of["search"], (1, 1, tokens + 1, (tokens + 1) * 5))
            student = encoder + _dot(of["student"], (1, 1, 2 * tokens))
            ratios = {"speed_up": teacher / student, "bound": teacher / encoder}
            curve.append({"point": f"{size}/{tokens}", "size": size, "tokens": tokens, **ratios})
        steps = {f"step_{beam}_ms": of["search"][2] + of["search"][3] * beam for beam in (1, 5)}
        parallel = _dot(of["student"], (1, 1, 20))
        times = {"encoder_ms": encoder, **steps, "parallel_ms": parallel}
        parts.append({"size": size, **times, "median_error": found["median_error"]})
    return {"": curve, "parts": parts}


def _dot(coefficients: Sequence[float], features: Sequence[float]) -> float:
    """Return the sum of products."""
    return sum(one * other for one, other in zip(coefficients, features, strict=True))


def _sweep(result: Any) -> Tables:
    """Return the table of ``narvl bench sweep``: a student's speed-up by its queries and the teacher's tokens."""
    students = {"encoder": result["encoder_ms"], **result["student_ms"]}
    rows = []
    for queries, ms in students.items():
        speed_ups = {f"tokens_{tokens}": teacher / ms for tokens, teacher in result["teacher_ms"].items()}
        rows.append({"queries": queries, "ms": ms, **speed_ups})
    return {"": rows}


def _study(result: Any) -> Tables:
    """Return the table of a part of a study: for each row, means, standard deviations, and the score of each seed."""
    rows = []
    for row in result["rows"]:
        means = {name: found["mean"] for name, found in row["measures"].items()}
        spreads = {f"{name}_sd": found["sd"] for name, found in row["measures"].items()}
        apart = {f"difference_{key}": value for key, value in (row["difference"] or {}).items()}
        rows.append({"row": row["label"], **means, **spreads, **apart, "scores": row["scores"], "curve": row["curve"]})
    return {"": rows}


def _serve(result: Any) -> Tables:
    """Return the table of ``narvl bench serve``."""
    speeds = result["images_per_second"]
    rows: list[Row] = []
    for name, speed in speeds.items():
        found = result["systems"].get(name, {})
        memory = [one for one in found.get("memory_mb", []) if one is not None]
        wrong = found["unexpected_statuses"] + found["other_answers"] if found else None
        row = {"system": name, "images_per_second": speed, "ratio": speed / speeds["one_process"], "wrong": wrong}
        row |= {key: found.get(key) for key in ("p50_ms", "p95_ms", "lost")}
        row["memory_first_mb"], row["memory_last_mb"] = (memory[0], memory[-1]) if memory else (None, None)
        rows.append(row)
    return {"": rows}


# --- Results as printed text -----------------------------------------------------------------------------------------


def _number(cell: str) -> Any:
    """Return a cell's number, or None for a dash; other text stays."""
    cell = cell.strip()
    if cell in ("–", ""):
        return None
    try:
        return float(cell)
    except ValueError:
        return cell


def _printed_table(text: str, headings: dict[str, str]) -> list[Row]:
    """Return the rows of a Markdown table, with its headings renamed."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    columns = [headings.get(heading, heading) for heading in split[0]]
    rows = (dict(zip(columns, [row[0], *map(_number, row[1:])], strict=True)) for row in split[2:])
    return list(rows)


def _floor(text: str) -> Tables:
    """Return the table of ``narvl bench floor``."""
    rows = [{"what": "floor", "ms": float(re.findall(r"floor (\d+) ms", text)[0]), "of_floor": 1.0}]
    for name, ms, of_floor in re.findall(r"^(\w[\w-]*): ([\d.]+) ms, ([\d.]+) of the floor", text, re.MULTILINE):
        rows.append({"what": name, "ms": float(ms), "of_floor": float(of_floor)})
    return {"": rows}


def _loss(text: str) -> Tables:
    """Return the table of ``narvl bench loss``."""
    form = r"^(\w+): ([\d.]+) ms, (?:(\d+) MiB, )?error of the gradient (\S+)"
    return {
        "": [
            {"loss": name, "ms": float(ms), "extra_mb": float(extra) if extra else None, "error": float(error)}
            for name, ms, extra, error in re.findall(form, text, re.MULTILINE)
        ]
    }


def _training(text: str) -> Tables:
    """Return the tables of ``narvl bench training``: shares of a step's parts, and the wait for batches."""
    rows = []
    for name, parts in re.findall(r"^(\w+): (forward .*)$", text, re.MULTILINE):
        shares = {part: float(share) for part, share in re.findall(r"(\w+) [\d.]+ ms \(([\d.]+)%\)", parts)}
        (speed, kept) = re.findall(rf"^{name}: .*\(([\d.]+) of \w+\), (\d+) MiB kept", text, re.MULTILINE)[0]
        rows.append({"step": name, **shares, "speed": float(speed), "kept_mb": float(kept)})
    form = r"^(.*), \d+ worker: ([\d.]+) ms wait per batch, ([\d.]+) ms per step, share of waiting ([\d.]+)%"
    waits = [
        {"data": Path(data).name, "wait_ms": float(wait), "step_ms": float(step), "share": float(share) / 100}
        for data, wait, step, share in re.findall(form, text, re.MULTILINE)
    ]
    return {"": rows} | ({"waits": waits} if waits else {})


def _api(text: str) -> Tables:
    """Return the table of ``narvl bench api``."""
    names = {"p50 ms": "p50_ms", "p95 ms": "p95_ms", "sum, or run.py": "beside_ms"}
    return {"": _printed_table(text, names)}


def _startup(text: str) -> Tables:
    """Return the table of ``narvl bench startup``."""
    return {"": _printed_table(text, {"s": "seconds"})}


KINDS: dict[str, Callable[[Any], Tables]] = {
    "report": _report,
    "latency": _latency,
    "models": _models,
    "decoding": _decoding,
    "limit": _limit,
    "sweep": _sweep,
    "serve": _serve,
    "study": _study,
    "floor": _floor,
    "loss": _loss,
    "training": _training,
    "api": _api,
    "startup": _startup,
}
"""How each kind of result is read. Results of floor, loss, training, api and startup are printed text."""
