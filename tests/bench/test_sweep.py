"""The sweep over queries and lengths: what is timed, and what the table says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from narvl_plugin.bench.limit import Pair
from narvl_plugin.bench.sweep import Sweep, sweep, table
from narvl_plugin.cli.app import app
from narvl_plugin.errors import InputError


def test_table_has_ratios_to_the_teacher_and_to_the_encoder() -> None:
    found = Sweep("nano", beam=5, encoder_ms=10, teacher_ms={2: 40, 8: 100}, student_ms={4: 20, 16: 25})
    assert table(found).splitlines() == [
        "| N | ms | n = 2 | n = 8 |",
        "| --- | ---: | ---: | ---: |",
        "| teacher, ms | – | 40.0 | 100.0 |",
        "| encoder | 10.0 | 4.00 | 10.00 |",
        "| 4 | 20.0 | 2.00 | 5.00 |",
        "| 16 | 25.0 | 1.60 | 4.00 |",
    ]


def test_each_is_asked_for_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair("nano", side=64)
    monkeypatch.setattr(pair, "encode", lambda inputs: ("encoder", 0))
    monkeypatch.setattr(pair, "search", lambda model, inputs, beam, length: ("teacher", length + 100 * beam))
    monkeypatch.setattr(pair, "answer_from_images", lambda inputs, queries: ("student", queries))
    monkeypatch.setattr(
        "narvl_plugin.bench.sweep.in_turns", lambda calls, **_: {name: call()[1] for name, call in calls.items()}
    )
    found = sweep(pair, "nano", lengths=[2, 8], queries=[4, 16], beam=3, repeats=1, threads=1)
    assert found == Sweep("nano", 3, 0, {2: 302, 8: 308}, {4: 4, 16: 16})
    with pytest.raises(InputError, match="--queries 33: the student measured here has 32"):
        sweep(pair, "nano", lengths=[2], queries=[4, 33], beam=3, repeats=1, threads=1)


@pytest.mark.integration
def test_command_measures_and_writes(tmp_path: Path) -> None:
    words = [
        "bench",
        "sweep",
        "--size",
        "nano",
        "--side",
        "64",
        "--repeats",
        "1",
        "--lengths",
        "1,3",
        "--queries",
        "2,6",
    ]
    done = CliRunner().invoke(app, [*words, "--threads", "1", "--out", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert set(written["teacher_ms"]) == {"1", "3"} and set(written["student_ms"]) == {"2", "6"}
    assert all(
        ms > 0 for ms in (written["encoder_ms"], *written["teacher_ms"].values(), *written["student_ms"].values())
    )
    assert "<svg" in (tmp_path / "sweep.svg").read_text()


@pytest.mark.parametrize("given", ["3,", "a", "0", "2,-1"])
def test_what_is_no_number_is_refused(given: str) -> None:
    with pytest.raises(InputError, match=f"--lengths {given}: give numbers from 1 on"):
        CliRunner().invoke(app, ["bench", "sweep", "--lengths", given], catch_exceptions=False)
