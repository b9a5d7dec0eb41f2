"""Studies: their files, the names of runs, what runs share, statistics, and a study that is killed and goes on."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from narvl_plugin.errors import InputError
from narvl_plugin.pipeline.settings import find_tree
from narvl_plugin.study.cells import Cell
from narvl_plugin.study.plan import Study, read_study
from narvl_plugin.study.running import Job, jobs_of
from narvl_plugin.study.statistics import RowScores, difference, summary

ROOT = Path(__file__).parents[1]
STAND_IN = ROOT / "tests" / "study_run.py"
STUDIES = sorted((ROOT / "run_scripts" / "studies").glob("*.yaml"))
TWO_BY_TWO = """\
question: How many queries?
parts:
  captions:
    run: {recipe: caption, preset: smoke, processes: 1, timed: 1}
    axes:
      queries: {"24": {student.model.num_queries: 24}, "30": {student.model.num_queries: 30}}
      seed: [1, 2]
"""


def study_of(folder: Path, text: str) -> Study:
    """Read a study from a text."""
    (folder / "study.yaml").write_text(text)
    return read_study(folder / "study.yaml")


# --- Files -----------------------------------------------------------------------------------------------------------


def test_axes_are_crossed(tmp_path: Path) -> None:
    (part,) = study_of(tmp_path, TWO_BY_TWO).parts
    assert (part.compare, part.reference) == ("queries", "24")
    found = [(labels["queries"], labels["seed"], dict(cell.options)) for labels, cell in part.cells()]
    common = {"preset": "smoke", "processes": 1, "timed": 1}
    assert found == [
        ("24", "1", {**common, "student.model.num_queries": 24}),
        ("24", "2", {**common, "seed": 2, "student.model.num_queries": 24}),
        ("30", "1", {**common, "student.model.num_queries": 30}),
        ("30", "2", {**common, "seed": 2, "student.model.num_queries": 30}),
    ]


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("parts:", "part:", "part: is no key here; those are question, parts"),
        ("    run:", "    runs:", "parts.captions: runs: is no key here; those are run, axes, compare, reference"),
        ("timed: 1", "time: 1", "parts.captions.run: time: is no option of narvl run"),
        ("timed: 1", "timed: x", "parts.captions.run: timed: Value 'x'"),
        ("timed: 1", "out: x", "parts.captions.run: out: is set by the study"),
        ("timed: 1", "student: {}", "parts.captions.run: student: is no option of narvl run"),
        ("timed: 1", "student.queries: 1", "parts.captions.run: student.queries: is no option of narvl run"),
        ('"30": {', "24: {", "parts.captions.axes.queries: 24: is there twice"),
        ('"30": {', '"24": {', "is not YAML"),
        ("[1, 2]", "[1, 1]", "parts.captions.axes.seed: 1: is there twice"),
        ("[1, 2]", "[]", "parts.captions.axes.seed: holds no value"),
        ("[1, 2]", "1", "parts.captions.axes.seed: is neither a list"),
        ("seed: [1, 2]", "number: [1, 2]", "parts.captions.axes.number: is no option of narvl run"),
        ("seed: [1, 2]", "student.model.num_queries: [1, 2]", "num_queries is set by the axis queries, too"),
        (
            "seed: [1, 2]",
            "seed: [1, 2]\n    compare: seed",
            "parts.captions.compare: seed: choose one of the axes queries",
        ),
        ("seed: [1, 2]", "seed: [1, 2]\n    reference: 20", "parts.captions.reference: 20: choose one of 24, 30"),
        ("question: How many queries?", "question: [1]", "question: is no text"),
        ("question: How many queries?", "- x", "is not YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    assert old in TWO_BY_TWO
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "study.yaml"))) as error:
        study_of(tmp_path, TWO_BY_TWO.replace(old, new))
    assert complaint in str(error.value)


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_studies_of_the_repository_have_only_runs_that_can_be(file: Path, tmp_path: Path) -> None:
    """Those of one seed: the others differ in it alone."""
    seeds, text = "seed: [1, 2, 3]", file.read_text()
    assert seeds in text
    study = study_of(tmp_path, text.replace(seeds, "seed: [1]"))
    shared, jobs = jobs_of(study.cells(), tmp_path, find_tree(None))
    assert study.question
    assert len(shared) < len(jobs)
    for part in study.parts:
        names = [cell.name for _, cell in part.cells()]
        assert len(set(names)) == len(names), "two rows are one run"


def test_there_are_studies() -> None:
    assert [file.stem for file in STUDIES] == ["losses", "no_teacher", "orders", "queries", "sentences", "teachers"]


# --- Names and what runs share ---------------------------------------------------------------------------------------


def test_a_name_follows_from_the_options_alone() -> None:
    one = Cell.of({"recipe": "refcoco", "student.optimization.lr": [0.001], "seed": 1, "preset": "quick"})
    other = Cell.of({"student.optimization.lr": [0.001], "recipe": "refcoco"})
    assert one == other
    assert re.fullmatch(r"refcoco_quick_seed1_lr-_0.001_[0-9a-f]{8}", one.name)
    assert Cell.of({**other.options, "student.optimization.lr": [0.01]}).name != one.name
    assert len(Cell.of({f"student.model.option_{number}": "x/y" * 9 for number in range(9)}).name) < 120


def test_runs_that_differ_in_the_student_alone_share_a_teacher(tmp_path: Path) -> None:
    """Equal runs of two parts are one. What one of them needs to be distilled is distilled for all."""
    text = """\
parts:
  one:
    run: {recipe: refcoco, preset: smoke, processes: 1}
    axes: {distil: [false, true], seed: [1, 2], timed: [1, 2]}
  other:
    run: {recipe: refcoco, preset: smoke, processes: 1}
    axes: {student.model.num_queries: [7, 8]}
  third:
    run: {recipe: refcoco, preset: smoke, processes: 1, student.model.num_queries: 7}
    axes: {seed: [1, 2], teacher.optimization.max_update: [3]}
  fourth:
    run: {recipe: refcoco, preset: smoke, processes: 1}
    axes: {student.model.num_queries: [8, 9]}
"""
    shared, jobs = jobs_of(study_of(tmp_path, text).cells(), tmp_path, find_tree(None))
    assert len(jobs) == 8 + 2 + 2 + 1
    assert [("teacher.optimization.max_update" in job.options, job.options.get("seed", 1)) for job in shared] == [
        (False, 1),
        (False, 2),
        (True, 1),
        (True, 2),
    ]
    assert [job.options.get("baselines", False) for job in shared] == [True, True, False, False]
    for job in jobs:
        assert job.after is not None
        assert job.options["shared"] == str(job.after.folder)
        assert job.options["out"] == str(tmp_path / "cells" / job.name)


def test_what_a_student_teaches_itself_leaves_its_teachers_as_they_are() -> None:
    assert Cell.of({"teachers": 3, "self_distil": "mbr"}).shared == Cell.of({"teachers": 3})


def test_a_run_that_cannot_be_is_named(tmp_path: Path) -> None:
    study = study_of(tmp_path, TWO_BY_TWO.replace("timed: 1", "size: base"))
    with pytest.raises(InputError, match=r"caption_base_smoke_seed1.*: ARCH=narvl_base: give BPE"):
        jobs_of(study.cells(), tmp_path, find_tree(None))


# --- Statistics ------------------------------------------------------------------------------------------------------


def test_means_and_spreads() -> None:
    found = summary([1.0, 2.0, 4.0])
    assert found is not None
    assert (found.mean, found.sd, found.number) == (pytest.approx(7 / 3), pytest.approx(1.5275252), 3)
    lone = summary([2.0])
    assert lone is not None and lone.sd is None
    assert summary([]) is None


def test_a_difference_in_pairs_is_known_better_than_one_without() -> None:
    """Of rows that differ much from each other, and little between two runs."""
    generator = np.random.default_rng(1)
    pairs, apart = [], []
    for seed in range(3):
        base = generator.normal(size=400)
        better = base + 0.1 + 0.2 * generator.normal(size=400)
        pairs.append((RowScores(f"{seed}", better.tolist()), RowScores(f"{seed}", base.tolist())))
        apart.append((RowScores(f"{seed} here", better.tolist()), RowScores(f"{seed}", base.tolist())))
    paired, unpaired = difference(pairs), difference(apart)
    assert paired is not None and unpaired is not None
    assert paired.mean == pytest.approx(unpaired.mean) == pytest.approx(0.1, abs=0.03)
    assert (paired.paired, unpaired.paired, paired.seeds) == (True, False, 3)
    # The standard error is 0.2 / sqrt(1200), and that of unpaired rows sqrt(2 / 1200) or so.
    assert paired.high - paired.low == pytest.approx(2 * 1.96 * 0.2 / 1200**0.5, rel=0.15)
    assert unpaired.high - unpaired.low == pytest.approx(2 * 1.96 * (2.04 / 1200) ** 0.5, rel=0.15)
    assert paired.low < paired.mean < paired.high
    assert difference(pairs) == paired
    assert difference([]) is None


# --- Running ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Put a stand-in of `narvl run` into PATH, and give a function that reads which runs it was asked for."""
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "narvl").write_text(f'#!/bin/sh\nexec {sys.executable} -S {shlex.quote(str(STAND_IN))} "$@"\n')
    (folder / "narvl").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def read() -> list[str]:
        file = tmp_path / "record"
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        file.unlink(missing_ok=True)
        return [next(word for word in words if word.startswith("cell=")) for words in calls]

    return read


def study(*words: str, **options: Any) -> subprocess.Popen[str]:
    """Start narvl study in a process group of its own."""
    command = [sys.executable, str(ROOT / "narvl.py"), "study", *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
    )


def done(*words: str) -> tuple[int, str, str]:
    """Run narvl study to its end. Return its status, output and errors."""
    program = study(*words)
    output, errors = program.communicate(timeout=120)
    return program.returncode, output, errors


@pytest.mark.integration
def test_a_study_that_is_stopped_goes_on_and_ends_as_an_unbroken_one(
    tmp_path: Path, stand_in: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, and interrupted, in its second run."""
    file, out, whole = tmp_path / "two.yaml", tmp_path / "out", tmp_path / "whole"
    file.write_text(TWO_BY_TWO)
    status, _, errors = done(str(file), "--out", str(whole))
    assert status == 0, errors
    assert len(stand_in()) == 2 + 4

    ends = ((signal.SIGKILL, -9, ""), (signal.SIGINT, 130, "interrupted; start the same command again to go on\n"))
    asked = []
    for number, status, complaint in ends:
        monkeypatch.setenv("HANG", "24 2")
        hangs = tmp_path / "record.hangs"
        program = study(str(file), "--out", str(out))
        deadline = time.monotonic() + 60
        while not hangs.exists():
            assert time.monotonic() < deadline and program.poll() is None
            time.sleep(0.02)
        os.killpg(program.pid, number)
        _, errors = program.communicate(timeout=60)
        assert (program.returncode, errors) == (status, complaint)
        hangs.unlink()
        asked += stand_in()
    monkeypatch.delenv("HANG")
    status, output, errors = done(str(file), "--out", str(out))
    assert status == 0, errors
    assert "1 of 4 cells are done\ncell 2 of 4: caption_smoke_seed2" in output
    asked += stand_in()
    assert len(asked) == 2 + 2 + 1 + 3, "the second run is started three times, and all else once"
    assert (out / "study.json").read_text() == (whole / "study.json").read_text()
    for name in ("study.md", "study.html"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()

    status, output, errors = done(str(file), "--out", str(out))
    assert (status, stand_in()) == (0, [])
    assert "4 of 4 cells are done" in output

    content = json.loads((out / "study.json").read_text())
    reference, other = content["parts"]["captions"]["rows"]
    assert (reference["label"], other["label"], other["finished"]) == ("24", "30", 2)
    scores = {name: cell["measures"]["score"] for name, cell in content["cells"].items()}
    for row in (reference, other):
        values = [scores[name] for name in row["cells"].values()]
        assert row["measures"]["score"]["mean"] == pytest.approx(np.mean(values))
        assert row["measures"]["score"]["sd"] == pytest.approx(np.std(values, ddof=1))
    by_count = {name: each["mean"] for name, each in reference["measures"].items() if "score_of_" in name}
    assert by_count.pop("score_of_0") == pytest.approx(reference["measures"]["score"]["mean"])
    assert by_count == {"score_of_2": 0.25, "teacher_score_of_0": 3.0, "teacher_score_of_2": 2.0}
    assert reference["difference"] is None
    assert reference["validation"] == [[2.0, 0.2], [4.0, 0.4]]  # the mean of both seeds
    apart = other["measures"]["score"]["mean"] - reference["measures"]["score"]["mean"]
    assert other["difference"]["mean"] == pytest.approx(apart)
    assert other["difference"]["paired"]
    table = (out / "study.md").read_text()
    assert "# How many queries?" in table
    assert "| difference from 24 [95%] | true | blanks / repeats | ms an image, batch 1 / 32 |\n" in table
    assert "| 50.0 ± 0.0 % | 50.0 % / 10.0 % | 2.0 / 0.5 |" in table
    assert "- The teacher's CIDEr is 3.000 ± 0.000, with 100.0 ± 0.0 % sentences and" in table
    assert "means ± standard deviations over 2 seeds" in table
    page = (out / "study.html").read_text()
    assert page.count("<svg") == 3
    assert "CIDEr by the number of true elements" in page
    assert not re.search(r"https?://(?!www\.w3\.org)", page)


@pytest.mark.integration
def test_a_run_that_fails_is_named_at_the_end_and_the_others_go_on(
    tmp_path: Path, stand_in: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "two.yaml", tmp_path / "out"
    file.write_text(TWO_BY_TWO)
    monkeypatch.setenv("FAIL", "24 2")
    status, _, errors = done(str(file), "--out", str(out))
    assert status == 1
    assert re.fullmatch(
        r"caption_smoke_seed2_\S+num_queries-24_\S+ failed: broken \(full log: .*/log\.txt\)\nStart the same .*\n",
        errors,
    )
    assert len(stand_in()) == 6
    assert "1 of 4 runs have not ended and are left out." in (out / "study.md").read_text()
    content = json.loads((out / "study.json").read_text())
    assert content["parts"]["captions"]["rows"][1]["difference"]["seeds"] == 1

    monkeypatch.delenv("FAIL")
    assert done("--out", str(out), str(file))[0] == 0
    assert len(stand_in()) == 1
    before = (out / "study.json").read_text()
    assert done("report", str(out))[0] == 0
    assert (out / "study.json").read_text() == before
    status, _, errors = done("report", str(tmp_path))
    assert (status, errors.split(": ", 1)[0]) == (1, "narvl")
    assert "study.yaml: no such file; give the folder of narvl study" in errors


@pytest.mark.integration
def test_a_teacher_that_fails_fails_its_students(
    tmp_path: Path, stand_in: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "two.yaml", tmp_path / "out"
    file.write_text(TWO_BY_TWO)
    monkeypatch.setenv("FAIL", "0 2")
    status, _, errors = done(str(file), "--out", str(out))
    assert status == 1
    assert len(re.findall(r"failed, since its teacher failed \(full log: \S+/shared/caption_smoke_seed2", errors)) == 2
    assert len(stand_in()) == 2 + 2


@pytest.mark.integration
def test_a_launcher_gets_all_runs_at_once(tmp_path: Path, stand_in: Callable[[], list[str]]) -> None:
    file, out = tmp_path / "two.yaml", tmp_path / "out"
    file.write_text(TWO_BY_TWO)
    status, _, errors = done(str(file), "--out", str(out), "--launcher", "joblib")
    assert status == 0, errors
    teachers, cells = stand_in()
    assert (teachers.count("cell.yaml"), cells.count("cell.yaml")) == (2, 4)
    assert json.loads((out / "study.json").read_text())["parts"]["captions"]["rows"][1]["finished"] == 2


def test_a_job_is_equal_whether_it_has_failed_or_not(tmp_path: Path) -> None:
    assert Job("a", tmp_path, {}) == Job("a", tmp_path, {}, failed="x")


@pytest.mark.integration
def test_a_real_study_is_killed_and_goes_on(tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two students of each of two teachers, at smoke size. What has ended stays as it is."""
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    file, out = tmp_path / "two.yaml", tmp_path / "out"
    file.write_text(TWO_BY_TWO)
    second = next(iter(list(read_study(file).cells())[1:]))
    program = study(str(file), "--out", str(out))
    deadline = time.monotonic() + 600
    while not (out / "cells" / second / "student" / "train.log").exists():
        assert time.monotonic() < deadline and program.poll() is None
        time.sleep(0.05)
    os.killpg(program.pid, signal.SIGKILL)
    program.communicate()
    ended = [path for path in (out / "shared").rglob("*") if path.is_file()]
    ended += [path for path in next((out / "cells").glob("*seed1*")).rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in ended if path.name not in (".lock", "log.txt")}

    status, output, errors = done_patiently(str(file), "--out", str(out))
    assert status == 0, output + errors
    assert output.splitlines()[:2] == ["2 of 2 teachers are done", "1 of 4 cells are done"]
    assert all(path.stat().st_mtime_ns == moment for path, moment in before.items())
    content = json.loads((out / "study.json").read_text())
    assert [row["finished"] for row in content["parts"]["captions"]["rows"]] == [2, 2]
    for cell in content["cells"].values():
        assert {
            "score",
            "teacher",
            "calibration_error",
            "p50_ms",
            "batched_ms",
            "latency_ratio",
            "blank_share",
            "repeat_share",
            "did_not_fit",
        } <= cell["measures"].keys()
    assert len(list(out.glob("cells/*/teacher"))) == 4
    assert len({path.resolve() for path in out.glob("cells/*/teacher")}) == 2


def done_patiently(*words: str) -> tuple[int, str, str]:
    """Run narvl study to its end, however busy the machine is."""
    program = study(*words)
    output, errors = program.communicate()
    return program.returncode, output, errors
