"""The page on studies."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import ROOT, Newcomer, Page

from narvl_plugin.study.plan import read_study
from narvl_plugin.study.statistics import LEVEL, RESAMPLES

PAGE = Page("docs/how-to/study.md")


def test_every_block_is_tested() -> None:
    PAGE.require_tests()


@pytest.mark.integration
@PAGE.block("# queries.yaml", "file")
@PAGE.block("narvl study queries.yaml", "command")
@PAGE.block("narvl study report", "again")
def test_a_study(
    file: str, command: str, again: str, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in of narvl run: tests/test_study.py runs a study for real."""
    stand_in = shlex.join([sys.executable, "-S", str(ROOT / "tests" / "study_run.py")])
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "narvl").write_text(
        f'#!/bin/sh\n[ "$1" = run ] || exec {programs / "narvl"} "$@"\nexec {stand_in} "$@"\n'
    )
    (tmp_path / "bin" / "narvl").chmod(0o755)
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    newcomer = Newcomer(tmp_path, tmp_path / "bin")
    (tmp_path / "queries.yaml").write_text(file)
    newcomer.types(command)
    assert len((tmp_path / "record").read_text().splitlines()) == 6 + 3, "six runs and three teachers"
    out = tmp_path / "runs" / "queries"
    for name in re.findall(r"^\| `(study\.\w+)` ", PAGE.text, flags=re.MULTILINE):
        (out / name).unlink()
    newcomer.types(again)
    (part,) = json.loads((out / "study.json").read_text())["parts"].values()
    assert [(row["label"], row["finished"]) for row in part["rows"]] == [("20", 3), ("30", 3)]
    (told,) = read_study(out / "study.yaml").parts
    without = re.sub(r"^    (compare|reference):.*\n", "", file, flags=re.MULTILINE)
    (tmp_path / "queries.yaml").write_text(without)
    assert read_study(tmp_path / "queries.yaml").parts == (told,), "the defaults are others than the page tells"


@pytest.mark.integration
@PAGE.block("narvl run recipe=caption", "command")
def test_one_more_student(command: str, newcomer: Newcomer, recorded: Callable[[], list[list[str]]]) -> None:
    """With stand-ins of the programs."""
    newcomer.types("bash run_scripts/caption.sh until=distil")
    assert "student" not in {file.name for file in (newcomer.folder / "runs" / "caption_quick_seed1").iterdir()}
    recorded()
    found = f'PATH="$PWD/.venv/bin:$PATH" {command.rstrip()}'
    newcomer.types(found)
    calls = recorded()
    assert [call[:2] for call in calls if call[0] == "narvl"] == [
        ["narvl", name] for name in ("calibrate", "ngrams", "bench", "report")
    ]
    out = newcomer.folder / "runs" / "wide"
    assert {file.name for file in out.iterdir() if file.is_symlink()} == {"data", "vocab", "features", "teacher"}
    assert all((file / "generate-test.txt").exists() for file in (out / "generate").iterdir())
    assert (out / "report.html").exists()
    with pytest.raises(
        AssertionError, match=r"was begun with other settings: BEAM \(was '5', now '4'\). Only options of"
    ):
        newcomer.types(f"{found.replace('runs/wide', 'runs/other')} BEAM=4")
    with pytest.raises(AssertionError, match="SHARED=.*queries: no such file or folder"):
        newcomer.types(found.replace("runs/caption_quick_seed1", "runs/queries").replace("runs/wide", "runs/other"))


def test_facts_about_studies() -> None:
    assert f"{LEVEL:.0%}".replace("%", " %") in PAGE.text and f"{RESAMPLES:,} bootstrap samples" in PAGE.text


@pytest.mark.integration
def test_a_launcher_of_hydra(newcomer: Newcomer, recorded: Callable[[], list[list[str]]]) -> None:
    """The one that comes with Hydra and starts runs in its own process, with stand-ins of the programs of runs."""
    (newcomer.folder / "two.yaml").write_text(
        "parts: {captions: {run: {recipe: caption, processes: 1}, axes: {student.model.num_queries: [24, 30]}}}\n"
    )
    command = f"{newcomer.programs / 'narvl'} study two.yaml --out 'runs/a=b, c' --launcher basic"
    newcomer.types(f'PATH="$PWD/.venv/bin:$PATH" {command}')
    assert [call[1] for call in recorded()].count("report") == 2
    assert len(list(newcomer.folder.glob("runs/*/cells/*/report.html"))) == 2
    newcomer.types(f'PATH="$PWD/.venv/bin:$PATH" {command}')
    assert not (newcomer.folder / "record").exists(), "a finished run was repeated"
