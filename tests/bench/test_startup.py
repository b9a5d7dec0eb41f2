"""Programs are timed in fresh processes, beside the import of torch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from narvl_plugin.bench.startup import TORCH, commands, startup, table
from narvl_plugin.errors import InputError


def test_times_are_compared_with_the_import_of_torch() -> None:
    lines = {TORCH: [sys.executable, "-c", "import time; time.sleep(0.2)"], "narvl": [sys.executable, "-c", "pass"]}
    times = startup(lines, repeats=2)
    assert times[TORCH] > 0.2 > times["narvl"] > 0
    rows = table(times).splitlines()
    assert rows[0] == "| program | s | of torch's import |"
    assert rows[2].endswith("| 1.00 |")


def test_a_program_that_fails_is_named() -> None:
    with pytest.raises(InputError, match="(?s)narvl gone: failed .*No such command"):
        startup({"narvl gone": [sys.executable, "-m", "narvl", "gone"]}, repeats=1)


def test_a_caption_needs_a_student_and_an_image() -> None:
    assert "narvl caption IMAGE" in commands(Path("s.pt"), Path("i.png"))
    with pytest.raises(InputError, match="--student: give --image, too"):
        commands(Path("s.pt"), None)
