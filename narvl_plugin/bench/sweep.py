"""The speed-up by number of queries and output length, measured point by point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from narvl_plugin.bench.limit import MOST_QUERIES, Pair, speed_up_axes
from narvl_plugin.bench.timing import in_turns
from narvl_plugin.errors import InputError
from narvl_plugin.report.results import markdown_table


@dataclass(frozen=True)
class Sweep:
    """Times of one image in ms.

    Attributes:
        size: the size of the models.
        beam: the teacher's beam width.
        encoder_ms: the time of the encoder.
        teacher_ms: the teacher's time by the number of its tokens.
        student_ms: the student's time by the number of its queries.
    """

    size: str
    beam: int
    encoder_ms: float
    teacher_ms: dict[int, float]
    student_ms: dict[int, float]

    def speed_ups(self, ms: float) -> list[float]:
        """Return the speed-up of a time over the teacher, for each of the teacher's lengths."""
        return [teacher_ms / ms for teacher_ms in self.teacher_ms.values()]


@torch.no_grad()
def sweep(
    pair: Pair, size: str, *, lengths: Sequence[int], queries: Sequence[int], beam: int, repeats: int, threads: int
) -> Sweep:
    """Time a teacher for each length and a student for each number of queries, all in turns.

    Args:
        pair: the teacher and the student.
        size: their size.
        lengths: numbers of tokens of the teacher's output.
        queries: numbers of the student's queries.
        beam: the teacher's beam width.
        repeats: see `in_turns`.
        threads: see `in_turns`.

    Returns:
        The times.

    Raises:
        InputError: for more queries than the student has.
    """
    if max(queries) > MOST_QUERIES:
        raise InputError(f"--queries {max(queries)}: the student measured here has {MOST_QUERIES}")
    inputs = pair.inputs(1)
    calls: dict[tuple[str, int], Callable[[], object]] = {("encoder", 0): partial(pair.encode, inputs)}
    for length in lengths:
        calls["teacher", length] = partial(pair.search, pair.teacher, inputs, beam, length)
    for number in queries:
        calls["student", number] = partial(pair.answer_from_images, inputs, number)
    times = in_turns(calls, repeats=repeats, threads=threads, device=pair.device)
    encoder_ms, teacher_ms, student_ms = (
        {number: ms for (name, number), ms in times.items() if name == part}
        for part in ("encoder", "teacher", "student")
    )
    return Sweep(size, beam, encoder_ms[0], teacher_ms, student_ms)


def table(found: Sweep) -> str:
    """Format times and speed-ups as Markdown, a row for each number of queries, a column for each length."""
    headings = ["N", "ms", *(f"n = {length}" for length in found.teacher_ms)]
    rows = [
        ["teacher, ms", "–", *(f"{ms:.1f}" for ms in found.teacher_ms.values())],
        ["encoder", *_cells(found, found.encoder_ms)],
        *([str(queries), *_cells(found, ms)] for queries, ms in found.student_ms.items()),
    ]
    return markdown_table(headings, rows)


def _cells(found: Sweep, ms: float) -> list[str]:
    return [f"{ms:.1f}", *(f"{ratio:.2f}" for ratio in found.speed_ups(ms))]


def draw(file: Path, found: Sweep) -> None:
    """Draw the speed-up over the length as SVG, a line for each number of queries and one for the encoder alone."""
    with speed_up_axes(file, found.beam) as axes:
        lengths = list(found.teacher_ms)
        axes.plot(lengths, found.speed_ups(found.encoder_ms), "--", color="grey", marker=".", label="encoder alone")
        for queries, ms in found.student_ms.items():
            axes.plot(lengths, found.speed_ups(ms), marker=".", label=f"{queries} queries")
