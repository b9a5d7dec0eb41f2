"""How near a student comes to what the machine's arithmetic allows: its time beside that of its FLOPs alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from narvl_plugin.bench.timing import in_turns
from narvl_plugin.ctc import greedy
from narvl_plugin.models import build
from narvl_plugin.models.narvl import NarvlModel

MATRIX = 2048
"""Side of the square matrices whose product says what a FLOP costs."""
LABELS = 59_458
PROMPT = 10
"""Tokens that are read beside the picture."""


@dataclass(frozen=True)
class Distance:
    """Median times of one picture, in ms.

    floor: total FLOPs at the rate of the matrix product; plain: all that a forward pass computes; optimised: after
    `optimize_for_inference`, and what of it is the encoder's and the decoder's with its collapse; others: the same in
    bfloat16, by torch.compile and by exported graphs, as far as they were asked for. gflop: of encoder and decoder;
    gflops: the rate, in a second.
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
    """Time a student with random weights on a random picture of `side` pixels, in turns with a matrix product.

    exported: formats of `narvl export`, on CPU only.
    """
    torch.manual_seed(1)
    student = build(f"narvl_{size}", vocab_size=LABELS, num_queries=queries).eval().requires_grad_(False).to(device)
    inputs = {
        "src_tokens": torch.randint(4, LABELS - 1, (1, PROMPT), device=device),
        "patch_images": torch.randn(1, 3, side, side, device=device),
    }
    optimised = copy.deepcopy(student)
    optimised.optimize_for_inference()
    student(**inputs)  # keeps its biases, which are no part of the floor
    with FlopCounterMode(display=False) as counter:  # of plain layers: it does not know the products of packed ones
        student(**inputs)
    read = optimised.encoder(**inputs)
    left, right = torch.randn(2, MATRIX, MATRIX, device=device)

    def plain() -> None:
        for kept in (student.encoder._kept, student.decoder._kept, student.decoder._kept_start):
            kept.forget()
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
    gflop = counter.get_total_flops() / 1e9
    rate = 2 * MATRIX**3 / 1e9 / (times.pop("matrix") / 1000)
    own = {name: times.pop(name) for name in ("plain", "optimised", "encoder", "decoder")}
    return Distance(gflop=gflop, gflops=rate, floor=1000 * gflop / rate, **own, others=times)


def _export(
    student: NarvlModel, side: int, folder: Path, to: str, threads: int
) -> Callable[[dict[str, Tensor]], object]:
    """Write a student as a graph, and return what runs it."""
    from narvl_plugin.export import StudentGraph, runner, write_graph

    graph = StudentGraph(student, side=side, length=PROMPT, padded=False)
    example = torch.randn(2, 3, side, side), torch.randint(4, LABELS - 1, (2, PROMPT))
    write_graph(graph.eval(), example, folder, to)
    run = runner.RUNTIMES[to](folder, threads)
    return lambda inputs: run(inputs["patch_images"].numpy(), inputs["src_tokens"].numpy())


def _answer(student: NarvlModel, inputs: dict[str, Tensor]) -> object:
    """Run the student to its tokens."""
    return greedy(student(**inputs)[0], blank=student.blank)
