"""How long programs take from their start to their end, each in a fresh process, beside the import of torch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from narvl_plugin.errors import InputError
from narvl_plugin.report.results import markdown_table

TORCH = 'python -c "import torch"'
"""The process that the others are compared with."""
HELPED = ("caption", "distill", "data", "bench")
"""Commands whose help is timed."""


def commands(student: Path | None = None, image: Path | None = None) -> dict[str, list[str]]:
    """Return the command lines to time by what they are called.

    Args:
        student: the checkpoint of a student of captions; without one the model in the box answers.
        image: the image to caption; without one no caption is timed.

    Raises:
        InputError: a student is given without an image.
    """
    if student is not None and image is None:
        raise InputError("--student: give --image, too")
    narvl = [sys.executable, "-m", "narvl"]
    found = {
        TORCH: [sys.executable, "-c", "import torch"],
        'python -c "import narvl_plugin.ctc"': [sys.executable, "-c", "import narvl_plugin.ctc"],
        "narvl path": [*narvl, "path"],
        "narvl --help": [*narvl, "--help"],
        **{f"narvl {command} --help": [*narvl, command, "--help"] for command in HELPED},
    }
    if image is not None:
        checkpoint = [] if student is None else ["--checkpoint", str(student)]
        found["narvl caption IMAGE"] = [*narvl, "caption", str(image), *checkpoint, "--workers", "0"]
        answer = f"import narvl; narvl.load({'' if student is None else repr(str(student))}).caption({str(image)!r})"
        found["narvl.load().caption(IMAGE)"] = [sys.executable, "-c", answer]
    return found


def startup(lines: Mapping[str, Sequence[str]], *, repeats: int) -> dict[str, float]:
    """Time command lines in turns, each in a fresh process.

    Args:
        lines: the command lines by name.
        repeats: how often each is timed, after one turn that is not.

    Returns:
        The median time of each by name, in seconds.

    Raises:
        InputError: a program fails.
    """
    times: dict[str, list[float]] = {name: [] for name in lines}
    for turn in range(repeats + 1):
        for name, line in lines.items():
            start = time.perf_counter()
            done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            if done.returncode:
                raise InputError(f"{name}: failed ({' '.join(done.stderr.split())[-300:]})")
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: median(measured) for name, measured in times.items()}


def table(times: Mapping[str, float]) -> str:
    """Format the result of `startup` as a Markdown table, with ratios to the import of torch."""
    rows = [[name, f"{seconds:.2f}", f"{seconds / times[TORCH]:.2f}"] for name, seconds in times.items()]
    return markdown_table(["program", "s", "of torch's import"], rows)
