"""How the speed-up depends on the number of queries and on the length of what is said: measured, point by point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from narvl_plugin.bench import in_turns
from narvl_plugin.bench_limit import MOST_QUERIES, Pair, speed_up_axes
from narvl_plugin.errors import InputError


@dataclass(frozen=True)
class Sweep:
    """Times of one picture in ms: of the encoder, of a teacher by the tokens it says, of a student by its queries."""

    size: str
    beam: int
    encoder_ms: float
    teacher_ms: dict[int, float]
    student_ms: dict[int, float]

    def speed_up(self, length: int, queries: int) -> float:
        """Return how many times as fast as its teacher the student is."""
        return self.teacher_ms[length] / self.student_ms[queries]

    def as_json(self) -> dict[str, Any]:
        """Return all of it by name."""
        return asdict(self)


@torch.no_grad()
def sweep(
    pair: Pair, size: str, *, lengths: Sequence[int], queries: Sequence[int], beam: int, repeats: int, threads: int
) -> Sweep:
    """Time a teacher for each length and a student for each number of queries, all in turns.

    Raises InputError for more queries than the student has.
    """
    if max(queries) > MOST_QUERIES:
        raise InputError(f"--queries {max(queries)}: the student measured here has {MOST_QUERIES}")
    inputs = pair.inputs(1)
    calls: dict[tuple[str, int], Callable[[], object]] = {("encoder", 0): partial(pair.encode, inputs)}
    for length in lengths:
        calls["teacher", length] = partial(pair.search, pair.teacher, inputs, beam, length)
    for number in queries:
        calls["student", number] = partial(pair.answer_from_pictures, inputs, number)
    times = in_turns(calls, repeats=repeats, threads=threads, device=pair.device)
    by_name: dict[str, dict[int, float]] = {"encoder": {}, "teacher": {}, "student": {}}
    for (name, number), ms in times.items():
        by_name[name][number] = ms
    return Sweep(size, beam, by_name["encoder"][0], by_name["teacher"], by_name["student"])


def table(found: Sweep) -> str:
    """Write times and speed-ups, a row for each number of queries, a column for each length."""
    lengths = list(found.teacher_ms)
    rows = [["N", "ms", *(f"n = {length}" for length in lengths)]]
    rows.append(["teacher, ms", "–", *(f"{found.teacher_ms[length]:.1f}" for length in lengths)])
    rows.append(["encoder", f"{found.encoder_ms:.1f}"])
    rows[-1] += [f"{found.teacher_ms[length] / found.encoder_ms:.2f}" for length in lengths]
    for queries, ms in found.student_ms.items():
        speed_ups = [f"{found.speed_up(length, queries):.2f}" for length in lengths]
        rows.append([str(queries), f"{ms:.1f}", *speed_ups])
    rows.insert(1, ["---", *["---:"] * (len(lengths) + 1)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(file: Path, found: Sweep) -> None:
    """Draw the speed-up over the length, a line for each number of queries and one for the encoder alone, as SVG."""
    with speed_up_axes(file, found.beam) as axes:
        lengths = list(found.teacher_ms)
        bound = [found.teacher_ms[length] / found.encoder_ms for length in lengths]
        axes.plot(lengths, bound, "--", color="grey", marker=".", label="encoder alone")
        for queries in found.student_ms:
            speed_ups = [found.speed_up(length, queries) for length in lengths]
            axes.plot(lengths, speed_ups, marker=".", label=f"{queries} queries")
