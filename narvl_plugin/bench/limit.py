"""The bounds of a parallel decoder's speed-up: times as sums of the times of parts.

A teacher reads a batch of B images and outputs n tokens, with `b` beams each, in n + 1 steps (the last predicts
`</s>`). A student reads the batch and runs N queries once:

    T_AR  = E(B) + S(B, n, b)      S = s0 + s1 B + (n + 1) (s2 + s3 B b)
    T_NAR = E(B) + P(B, N)         P = p0 + p1 B + p2 B N, with the collapse of the most probable path
                                   E = e0 + e1 B

s1 and p1 project the image's positions to keys and values, once in either model. s2 is the constant cost of a step,
for reading the weights and starting kernels. s3 is the cost of a beam. A student cannot be faster than its encoder:
T_AR / T_NAR < T_AR / E. This bound grows with the length of the teacher's output.

The coefficients are fitted to the times of the parts, measured separately. Their predictions are then compared with
whole runs of teacher and student. These runs have lengths, beams, batches and queries that the fit has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from narvl_plugin.bench.timing import in_turns
from narvl_plugin.ctc import greedy
from narvl_plugin.generation.teacher import ensemble_of
from narvl_plugin.importing import leaving_logging_alone
from narvl_plugin.models.encoder import EncoderOutput
from narvl_plugin.models.narvl import NarvlModel
from narvl_plugin.models.ofa import OfaModel
from narvl_plugin.models.registered import build

with leaving_logging_alone():
    from fairseq.data import Dictionary
    from fairseq.sequence_generator import SequenceGenerator

WORDS = 59_457
PROMPT = 10
"""Number of tokens that are read beside the image."""
MOST_QUERIES = 32
Features = Callable[..., tuple[float, ...]]


class Case(NamedTuple):
    """A workload: B images, n tokens from a search with `beam` beams, N queries."""

    batch: int
    beam: int
    length: int
    queries: int


UNSEEN = (Case(1, 1, 8, 16), Case(1, 5, 12, 20), Case(2, 3, 6, 12), Case(2, 5, 16, 24), Case(3, 2, 10, 20))
"""Cases that the fit does not use."""
_BATCHES, _BEAMS, _LENGTHS, _QUERIES = (1, 4), (1, 5), (4, 20), (8, 32)


@dataclass(frozen=True)
class Parts:
    """The coefficients of E, S and P above, in ms."""

    encoder: tuple[float, ...]
    search: tuple[float, ...]
    student: tuple[float, ...]

    def teacher_ms(self, case: Case) -> float:
        """Return T_AR."""
        return self.encoder_ms(case.batch) + _dot(self.search, _of_search(case.batch, case.beam, case.length))

    def student_ms(self, case: Case) -> float:
        """Return T_NAR."""
        return self.encoder_ms(case.batch) + _dot(self.student, _of_student(case.batch, case.queries))

    def encoder_ms(self, batch: int) -> float:
        """Return E."""
        return _dot(self.encoder, _of_encoder(batch))

    def speed_up(self, case: Case) -> float:
        """Return T_AR / T_NAR."""
        return self.teacher_ms(case) / self.student_ms(case)

    def bound(self, case: Case) -> float:
        """Return T_AR / E, which no parallel decoder exceeds."""
        return self.teacher_ms(case) / self.encoder_ms(case.batch)


def _of_encoder(batch: int) -> tuple[float, ...]:
    return 1, batch


def _of_search(batch: int, beam: int, length: int) -> tuple[float, ...]:
    return 1, batch, length + 1, (length + 1) * batch * beam


def _of_student(batch: int, queries: int) -> tuple[float, ...]:
    return 1, batch, batch * queries


def _dot(coefficients: Sequence[float], features: Sequence[float]) -> float:
    return float(np.dot(coefficients, features))


@dataclass(frozen=True)
class Check:
    """A whole run of teacher and student, with the times predicted from their parts, in ms."""

    case: Case
    teacher_ms: float
    student_ms: float
    predicted_teacher_ms: float
    predicted_student_ms: float

    @property
    def speed_up(self) -> float:
        """The measured ratio."""
        return self.teacher_ms / self.student_ms

    @property
    def error(self) -> float:
        """The relative error of the predicted ratio."""
        return abs(self.predicted_teacher_ms / self.predicted_student_ms / self.speed_up - 1)


@dataclass(frozen=True)
class Limit:
    """The parts of one size on one machine, and the checks."""

    size: str
    parts: Parts
    checks: list[Check]

    @property
    def error(self) -> float:
        """The median error of the checks."""
        return median(check.error for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Return all values by name."""
        return {**asdict(self), "median_error": self.error}


class Pair:
    """A teacher and a student of one size with random weights, and their inputs.

    Args:
        size: the size of both, such as ``base``.
        side: the side of the images in pixels.
        device: the device to run on.
        dtype: the type of weights and images.
        queries: the student's number of queries.
    """

    def __init__(
        self,
        size: str,
        *,
        side: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        queries: int = MOST_QUERIES,
    ) -> None:
        torch.manual_seed(1)
        self.device, self.dtype, self.side = torch.device(device), dtype, side
        teacher = build(f"ofa_{size}", vocab_size=WORDS)
        student = build(f"narvl_{size}", vocab_size=WORDS + 1, num_queries=queries)
        assert isinstance(student, NarvlModel)
        self.teacher, self.student = self._ready(teacher), self._ready(student)
        self.dictionary = Dictionary()
        for number in range(WORDS - len(self.dictionary)):
            self.dictionary.add_symbol(str(number))

    def _ready(self, model: nn.Module) -> Any:
        model.optimize_for_inference()  # type: ignore[operator]  # `build` returns either model, typed as a module
        model.use_graphs(None)  # type: ignore[operator]  # only small batches would use them
        return model.to(self.device, self.dtype)

    def inputs(self, batch: int) -> dict[str, Tensor]:
        """Draw random images and prompts."""
        images = torch.randn(batch, 3, self.side, self.side)
        prompts = torch.randint(4, WORDS, (batch, PROMPT))
        return {"src_tokens": prompts.to(self.device), "patch_images": images.to(self.device, self.dtype)}

    def encode(self, inputs: dict[str, Tensor]) -> EncoderOutput:
        """Run the encoder, which has the same shape in both models."""
        return self.student.encoder(**inputs)

    def search(self, model: nn.Module, inputs: dict[str, Tensor], beam: int, length: int) -> object:
        """Search for an output of exactly `length` tokens."""
        generator = SequenceGenerator(
            ensemble_of([model]), self.dictionary, beam_size=beam, max_len_a=0, max_len_b=length, min_len=length
        )
        return generator.generate([model], {"net_input": inputs})

    def answer(self, read: EncoderOutput, queries: int) -> object:
        """Run the student's decoder and collapse its most probable path."""
        logits, _ = self.student.decoder(None, read, slice(0, queries))
        return greedy(logits, blank=self.student.blank)

    def answer_from_images(self, inputs: dict[str, Tensor], queries: int) -> object:
        """Run the student's encoder and decoder, and collapse its most probable path."""
        return self.answer(self.student.encoder(**inputs), queries)

    def teacher_that_has_read(self, inputs: dict[str, Tensor]) -> nn.Module:
        """Return the teacher with an encoder that returns a result computed before."""
        return _HasRead(self.teacher, self.teacher.encoder(**inputs))


class _HasRead(nn.Module):
    """A teacher that encodes nothing, because it returns a result."""

    def __init__(self, teacher: OfaModel, read: EncoderOutput):
        super().__init__()
        self.encoder, self.decoder = teacher.encoder, teacher.decoder
        self.read = read
        self.get_normalized_probs = teacher.get_normalized_probs

    def encode(self, source: dict[str, Tensor]) -> EncoderOutput:
        """Return the result."""
        return self.read


@torch.no_grad()
def limit(pair: Pair, size: str, *, repeats: int = 3, threads: int = 1) -> Limit:
    """Measure the parts in turns, fit the coefficients, and compare them with whole runs.

    Args:
        pair: the teacher and the student.
        size: their size.
        repeats: see `in_turns`.
        threads: see `in_turns`.

    Returns:
        The fitted parts and the checks.
    """
    inputs = {batch: pair.inputs(batch) for batch in {*_BATCHES, *(case.batch for case in UNSEEN)}}
    calls: dict[Any, Callable[[], object]] = {}
    for batch in _BATCHES:
        calls["encoder", batch] = partial(pair.encode, inputs[batch])
        reader = pair.teacher_that_has_read(inputs[batch])
        for beam, length in product(_BEAMS, _LENGTHS):
            calls["search", batch, beam, length] = partial(pair.search, reader, inputs[batch], beam, length)
        for queries in _QUERIES:
            calls["student", batch, queries] = partial(pair.answer, pair.encode(inputs[batch]), queries)
    for case in UNSEEN:
        given = inputs[case.batch]
        calls["whole teacher", *case] = partial(pair.search, pair.teacher, given, case.beam, case.length)
        calls["whole student", *case] = partial(pair.answer_from_images, given, case.queries)
    times = in_turns(calls, repeats=repeats, threads=threads, device=pair.device)

    def fit(part: str, features: Features) -> tuple[float, ...]:
        points = [(features(*name[1:]), ms) for name, ms in times.items() if name[0] == part]
        return _fit([found for found, _ in points], [ms for _, ms in points])

    parts = Parts(fit("encoder", _of_encoder), fit("search", _of_search), fit("student", _of_student))
    checks = [
        Check(
            case,
            times["whole teacher", *case],
            times["whole student", *case],
            parts.teacher_ms(case),
            parts.student_ms(case),
        )
        for case in UNSEEN
    ]
    return Limit(size, parts, checks)


def _fit(features: Sequence[Sequence[float]], times: Sequence[float]) -> tuple[float, ...]:
    """Return the coefficients with the least squared relative error."""
    rows = np.asarray(features) / np.asarray(times)[:, None]
    return tuple(map(float, np.linalg.lstsq(rows, np.ones(len(rows)))[0]))


@dataclass(frozen=True)
class Processor:
    """The speed of a machine.

    Attributes:
        flops: FLOPs a second.
        bandwidth: bytes a second from its memory.
        launch: seconds to start a kernel.
        bytes_per_number: the size of a number.
    """

    flops: float
    bandwidth: float
    launch: float
    bytes_per_number: int = 2

    def __post_init__(self) -> None:
        if min(self.flops, self.bandwidth) <= 0 or self.launch < 0:
            raise ValueError(f"{self}: rates must be above 0")


_CHANNELS = {"mkldnn._linear_pointwise": -1, "mkldnn._convolution_pointwise": 1}
"""Products with packed weights, whose FLOPs torch does not count, and the dimension of their outputs' channels."""


class Work(TorchDispatchMode):
    """Counts the kernels that run within it, and sums the time that a processor needs for them.

    A kernel takes the longer of the times for its arithmetic and for its memory traffic. All together take at least the
    time to start them one by one.
    """

    def __init__(self, processor: Processor) -> None:
        super().__init__()
        self.processor = processor
        self.kernels = 0
        self.busy = 0.0

    @property
    def ms(self) -> float:
        """The derived time."""
        return 1000 * max(self.busy, self.kernels * self.processor.launch)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it, unless it only returns a view."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view:
            return result
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        moved = self.processor.bytes_per_number * sum(tensor.numel() for tensor in tensors)
        if channels := _CHANNELS.get(str(func.overloadpacket)):
            flops = 2 * result.numel() * args[1].numel() // result.shape[channels]
        else:
            count = flop_registry.get(func.overloadpacket)
            flops = count(*args, **kwargs, out_val=result) if count else 0
        self.kernels += 1
        self.busy += max(flops / self.processor.flops, moved / self.processor.bandwidth)
        return result


@torch.no_grad()
def derive(pair: Pair, processor: Processor) -> Parts:
    """Derive the parts of another machine for a batch of one image, from the kernels that run here."""
    inputs = pair.inputs(1)
    reader = pair.teacher_that_has_read(inputs)
    read = pair.encode(inputs)

    def ms(call: Callable[[], object]) -> float:
        call()  # fills the caches, which the second call reuses
        with Work(processor) as work:
            call()
        return work.ms

    search = [
        (_of_search(1, beam, length), ms(partial(pair.search, reader, inputs, beam, length)))
        for beam, length in product(_BEAMS, _LENGTHS)
    ]
    student = [(_of_student(1, queries), ms(partial(pair.answer, read, queries))) for queries in _QUERIES]
    return Parts(
        (0.0, ms(partial(pair.encode, inputs))),
        _fit([features for features, _ in search], [time for _, time in search]),
        _fit([features for features, _ in student], [time for _, time in student]),
    )


def table(measured: Limit, derived: Parts) -> str:
    """Format the parts, the bound by length and beam beside that derived for another machine, and the checks."""
    parts = measured.parts
    lines = [f"E {parts.encoder_ms(1):.1f} ms"]
    for beam in (1, 5):
        lines.append(f"s({beam}) {parts.search[2] + parts.search[3] * beam:.2f} ms a step")
    lines.append(f"P(20) + C {_dot(parts.student, _of_student(1, 20)):.1f} ms")
    lines.append("case: teacher and student measured (predicted) in ms, speed-up measured (predicted), bound")
    for check in measured.checks:
        batch, beam, length, queries = check.case
        lines.append(
            f"B {batch}, beam {beam}, n {length}, N {queries}: "
            f"{check.teacher_ms:.1f} ({check.predicted_teacher_ms:.1f}), "
            f"{check.student_ms:.1f} ({check.predicted_student_ms:.1f}), "
            f"{check.speed_up:.2f} ({parts.speed_up(check.case):.2f}), {parts.bound(check.case):.2f}"
        )
    lines.append(f"median error of the predicted speed-up {measured.error:.3f}")
    lines.append("B 1, beam 5, N 2 n: speed-up and bound here; derived for the GPU, not measured")
    for length in (1, 3, 5, 10, 20):
        case = Case(1, 5, length, 2 * length)
        lines.append(
            f"n {length}: {parts.speed_up(case):.2f}, {parts.bound(case):.2f}; "
            f"{derived.speed_up(case):.2f}, {derived.bound(case):.2f}"
        )
    return "\n".join(lines)


def draw(file: Path, limits: Mapping[str, Parts], *, beam: int, longest: int = 32) -> None:
    """Draw the bound and the predicted speed-up over the output's length as SVG, with two queries a token.

    Args:
        file: the SVG file to write.
        limits: the parts to draw, by label.
        beam: the teacher's beam width.
        longest: the greatest length.
    """
    with speed_up_axes(file, beam) as axes:
        lengths = range(1, longest + 1)
        for number, (label, parts) in enumerate(limits.items()):
            cases = [Case(1, beam, length, 2 * length) for length in lengths]
            axes.plot(lengths, [parts.bound(case) for case in cases], "--", color=f"C{number}", label=f"{label}: bound")
            axes.plot(lengths, [parts.speed_up(case) for case in cases], color=f"C{number}", label=label)
        axes.axhline(1, color="grey", linewidth=0.6)


@contextmanager
def speed_up_axes(file: Path, beam: int) -> Iterator[Axes]:
    """Yield axes for speed-ups over the output's length, and write the drawing as SVG."""
    with matplotlib.rc_context({"svg.hashsalt": "narvl", "font.size": 10}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        yield axes
        axes.set_xlabel(f"tokens of the teacher's output, with a beam of {beam}")
        axes.set_ylabel("times as fast as the teacher")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(file, format="svg", metadata={"Date": None})
