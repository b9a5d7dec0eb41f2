"""How close a student comes to the limit of the machine's arithmetic: its time beside that of its FLOPs alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from narvl_plugin.bench.timing import in_turns
from narvl_plugin.ctc import greedy
from narvl_plugin.models import build
from narvl_plugin.models.narvl import NarvlModel

MATRIX = 2048
"""Side of the square matrices whose product gives the time of a FLOP."""
LABELS = 59_458
PROMPT = 10
"""Number of tokens that are read beside the image."""


@dataclass(frozen=True)
class Distance:
    """Median times of one image, in ms.

    Attributes:
        gflop: the GFLOPs of encoder and decoder.
        gflops: the rate of the matrix product, in GFLOPs a second.
        floor: the time of all FLOPs at the rate of the matrix product.
        plain: the time of a full forward pass.
        optimised: the time after `optimize_for_inference`.
        encoder: the encoder's part of it.
        decoder: the part of the decoder and its collapse.
        others: the times in bfloat16, with torch.compile and of exported graphs, if measured.
    """

    gflop: float
    gflops: float
    floor: float
    plain: float
    optimised: float
    encoder: float
    decoder: float
    others: dict[str, float]


@torch.no_grad()
def distance_to_floor(
    *,
    size: str = "base",
    side: int = 480,
    queries: int = 20,
    repeats: int = 5,
    threads: int = 1,
    bfloat16: bool = False,
    compiled: bool = False,
    exported: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> Distance:
    """Time a student with random weights on a random image, in turns with a matrix product.

    Args:
        size: the size of the student.
        side: the side of the image in pixels.
        queries: the number of queries N.
        repeats: see `in_turns`.
        threads: see `in_turns`.
        bfloat16: whether to also time the student in bfloat16.
        compiled: whether to also time the student with torch.compile.
        exported: formats of `narvl export` to also time, on a CPU only.
        device: the device to run on.

    Returns:
        The times and the rate.
    """
    torch.manual_seed(1)
    built = build(f"narvl_{size}", vocab_size=LABELS, num_queries=queries)
    student = cast(NarvlModel, built.eval().requires_grad_(False).to(device))
    inputs = {
        "src_tokens": torch.randint(4, LABELS - 1, (1, PROMPT), device=device),
        "patch_images": torch.randn(1, 3, side, side, device=device),
    }
    optimised = copy.deepcopy(student)
    optimised.optimize_for_inference()
    gflop = gflop_of_pass(student, inputs)
    read = optimised.encoder(**inputs)
    left, right = torch.randn(2, MATRIX, MATRIX, device=device)

    def plain() -> None:
        student.clear_memos()
        _answer(student, inputs)

    calls: dict[str, Callable[[], object]] = {
        "matrix": lambda: left @ right,
        "plain": plain,
        "optimised": lambda: _answer(optimised, inputs),
        "encoder": lambda: optimised.encoder(**inputs),
        "decoder": lambda: greedy(optimised.decoder(None, read)[0], blank=optimised.blank),
    }
    if bfloat16:
        rounded = copy.deepcopy(optimised)
        rounded.multiply_in_bfloat16()
        calls["bfloat16"] = lambda: _answer(rounded, inputs)
    if compiled:
        fast = copy.deepcopy(optimised)
        fast.compile_for_inference()
        calls["compiled"] = lambda: _answer(fast, inputs)
    with TemporaryDirectory() as folder:
        for to in exported:
            calls[to] = partial(_export(copy.deepcopy(student), side, Path(folder), to, threads), inputs)
        times = in_turns(calls, repeats=repeats, threads=threads, device=device)
    rate = 2 * MATRIX**3 / 1e9 / (times.pop("matrix") / 1000)
    own = {name: times.pop(name) for name in ("plain", "optimised", "encoder", "decoder")}
    return Distance(gflop=gflop, gflops=rate, floor=1000 * gflop / rate, **own, others=times)


def gflop_of_pass(student: NarvlModel, inputs: dict[str, Tensor]) -> float:
    """Return the GFLOPs of a student's pass, which is not optimised: products of packed layers would not count."""
    student(**inputs)  # caches its biases, which do not belong to the floor
    with FlopCounterMode(display=False) as counter:
        student(**inputs)
    return counter.get_total_flops() / 1e9


def _export(
    student: NarvlModel, side: int, folder: Path, to: str, threads: int
) -> Callable[[dict[str, Tensor]], object]:
    """Export a student as a graph, and return a function that runs it."""
    from narvl_plugin.export import StudentGraph, runner, write_graph

    graph = StudentGraph(student, side=side, length=PROMPT, padded=False)
    example = torch.randn(2, 3, side, side), torch.randint(4, LABELS - 1, (2, PROMPT))
    write_graph(graph.eval(), example, folder, to)
    run = runner.RUNTIMES[to](folder, threads)
    return lambda inputs: run(inputs["patch_images"].numpy(), inputs["src_tokens"].numpy())


def _answer(student: NarvlModel, inputs: dict[str, Tensor]) -> object:
    """Run the student up to its tokens."""
    return greedy(student(**inputs)[0], blank=student.blank)
