"""All that a GPU is measured for, in one run of at most six minutes: loss, one image, batches, training, its input."""

from __future__ import annotations

import base64
import gc
import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from narvl_plugin.bench.floor import MATRIX, gflop_of_pass
from narvl_plugin.bench.limit import WORDS, Pair
from narvl_plugin.bench.loss import loss_costs
from narvl_plugin.bench.timing import describe_machine, in_turns
from narvl_plugin.bench.training import QUERIES, TrainingStep, step_costs, wait_for_batches
from narvl_plugin.data.text import train_sentencepiece
from narvl_plugin.generation.parallel_generator import ParallelGenerator
from narvl_plugin.models.captured import Graphs
from narvl_plugin.models.registered import build
from narvl_plugin.report.results import markdown_table
from narvl_plugin.whole_files import require_writable, write_whole

SECONDS = 330.0
"""Time of a whole run. Six minutes are left after the start of the program."""
GPU_MATRIX = 8192
"""Side of the square matrices whose product gives the rate of a GPU."""
BEAM, LENGTH = 5, 10
"""The teacher's search: its width, and the number of tokens of its output."""
WORKERS = 8
IMAGE = (640, 480)
"""Size of the images that the input pipeline reads, in pixels."""
DISTINCT = 16
"""Number of different images in the file of the input pipeline."""


@dataclass(frozen=True)
class Scale:
    """What is measured.

    Attributes:
        size: the size of the models.
        side: the side of the images in pixels.
        repeats: see `in_turns`.
        labels: the number of labels of the loss.
        batches: the batch sizes of the throughput.
        training_batch: the batch size of the training step, and of the steps that wait for their input.
        waits: the number of batches whose waiting time is measured.
    """

    size: str = "base"
    side: int = 480
    repeats: int = 10
    labels: int = WORDS + 1
    batches: tuple[int, ...] = (32, 256)
    training_batch: int = 32
    waits: int = 10


def measure(out: Path, scale: Scale, *, device: torch.device | str, seconds: float = SECONDS) -> dict[str, Any]:
    """Measure all parts one after the other, and write the file after each.

    A part that might not end in time, or needs more memory than there is, is left out. It then holds the reason by the
    name of ``skipped``.

    Args:
        out: the JSON file to write.
        scale: what is measured.
        device: the device. On a GPU, models are in bfloat16.
        seconds: the time of the run.

    Returns:
        The contents of the file: ``machine``, ``settings``, ``parts`` by name, and ``seconds``.
    """
    require_writable(out)
    began = time.perf_counter()
    device = torch.device(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    threads = torch.get_num_threads()
    result: dict[str, Any] = {
        "machine": describe_machine(device, threads, dtype),
        "settings": asdict(scale) | {"beam": BEAM, "length": LENGTH, "queries": QUERIES, "workers": WORKERS},
        "parts": {},
    }
    # The seconds that each part takes on a GPU at most, with the time to draw its weights.
    parts: dict[str, tuple[float, Callable[[], dict[str, Any]]]] = {
        "loss": (30, partial(loss, scale, device)),
        "matrix": (10, partial(matrix, scale, device, dtype)),
        "one_image": (75, partial(one_image, scale, device, dtype)),
        "batches": (60, partial(batches, scale, device, dtype)),
        "training": (75, partial(training, scale, device)),
        "input": (75, partial(input_pipeline, scale, device)),
    }
    for name, (needed, part) in parts.items():
        left = seconds - (time.perf_counter() - began)
        try:
            if left < needed:
                late = f"{left:.0f} of {seconds:.0f} s were left, and it may take {needed:.0f}"
                result["parts"][name] = {"skipped": late}
            else:
                result["parts"][name] = part()
        except torch.OutOfMemoryError as error:
            result["parts"][name] = {"skipped": str(error)}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        result["seconds"] = time.perf_counter() - began
        add_shares(result["parts"])
        write_whole(out, json.dumps(result, indent=2) + "\n")
    return result


# --- Parts -----------------------------------------------------------------------------------------------------------


def loss(scale: Scale, device: torch.device) -> dict[str, Any]:
    """Return the costs of the loss and of torch's, see `loss_costs`, and the ratio of their times."""
    costs = loss_costs(labels=scale.labels, repeats=scale.repeats, device=str(device))
    found: dict[str, Any] = {name: asdict(cost) for name, cost in costs.items()}
    return found | {"of_torch": costs["query_ctc"].ms / costs["torch"].ms}


def matrix(scale: Scale, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the rate of a matrix product, in GFLOPs a second."""
    side = GPU_MATRIX if device.type == "cuda" else MATRIX
    left, right = torch.randn(2, side, side, device=device, dtype=dtype)
    times = in_turns({"matrix": lambda: left @ right}, repeats=scale.repeats, threads=_threads(), device=device)
    return {"side": side, "gflops": 2 * side**3 / 1e6 / times["matrix"]}


@torch.no_grad()
def one_image(scale: Scale, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the times of one image: of student, encoder and teacher, with and without CUDA graphs.

    Of the teacher, the encoder and each step of the decoder are a graph. Beams are chosen between them, as always.
    """
    pair = Pair(scale.size, side=scale.side, device=device, dtype=dtype, queries=QUERIES)
    sample = _sample(pair, 1)
    generator = ParallelGenerator([pair.student], pair.dictionary)
    graphs = {model: Graphs() for model in ("student", "encoder", "teacher")}

    def encode(**given: Any) -> Any:
        return pair.student.encoder(**given).features

    def student(chosen: Graphs | None) -> object:
        pair.student.use_graphs(chosen)
        return generator.generate([pair.student], sample)

    def teacher(chosen: Graphs | None) -> object:
        pair.teacher.use_graphs(chosen)
        return pair.search(pair.teacher, sample["net_input"], BEAM, LENGTH)

    calls: dict[str, Callable[[], object]] = {
        "student": lambda: student(None),
        "student_captured": lambda: student(graphs["student"]),
        "encoder": lambda: encode(**sample["net_input"]),
        "encoder_captured": lambda: graphs["encoder"].run(pair.student, "encoder", encode, sample["net_input"]),
        "teacher": lambda: teacher(None),
        "teacher_captured": lambda: teacher(graphs["teacher"]),
    }
    for _ in range(2):  # a graph is recorded at the second call
        for call in calls.values():
            call()
    times = in_turns(calls, repeats=scale.repeats, threads=_threads(), device=device)
    return {
        "ms": times,
        "captured": {name: len(one) for name, one in graphs.items()},
        "speed_up": times["teacher"] / times["student"],
        "speed_up_captured": times["teacher_captured"] / times["student_captured"],
        "bound": times["teacher"] / times["encoder"],
        "bound_captured": times["teacher_captured"] / times["encoder_captured"],
        "gflop": _gflop(scale, device),
    }


@torch.no_grad()
def batches(scale: Scale, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the student's throughput by batch size, from pixels on the device to hypotheses."""
    pair = Pair(scale.size, side=scale.side, device=device, dtype=dtype, queries=QUERIES)
    generator = ParallelGenerator([pair.student], pair.dictionary)
    repeats = min(3, scale.repeats)
    found: dict[str, Any] = {"gflop": _gflop(scale, device), "images_per_second": {}}
    for size in scale.batches:
        sample = _sample(pair, size)
        call = partial(generator.generate, [pair.student], sample)
        times = in_turns({"student": call}, repeats=repeats, threads=_threads(), device=device)
        found["images_per_second"][str(size)] = 1000 * size / times["student"]
    return found


def training(scale: Scale, device: torch.device) -> dict[str, Any]:
    """Return the cost of a training step, with the batch of the scale and with the largest one that fits."""
    step = TrainingStep(
        scale.size,
        side=scale.side,
        batch=2,
        optimizer="fused_adam",
        bfloat16=device.type == "cuda",
        device=device,
    )
    with FlopCounterMode(display=False) as counter:
        step()
    largest = largest_batch(step) if device.type == "cuda" else None
    found: dict[str, Any] = {"gflop_of_sample": counter.get_total_flops() / 1e9 / 2, "largest_batch": largest}
    for batch in [scale.training_batch, *([largest] if largest else [])]:
        step.draw(batch)
        cost = step_costs({"step": step}, repeats=min(5, scale.repeats), threads=_threads())["step"]
        found[f"batch_{batch}"] = {**asdict(cost), "samples_per_second": cost.samples_per_second}
    return found


def largest_batch(step: TrainingStep, *, share: float = 0.95) -> int:
    """Return the largest batch whose training step fits into the memory of a GPU.

    The memory of two small steps tells it, and a step with it is taken.

    Args:
        step: the step; its batch is drawn anew.
        share: the share of the memory that may be used.
    """
    peaks = {}
    for batch in (8, 16):
        step.draw(batch)
        step()  # makes the optimizer's state
        torch.cuda.reset_peak_memory_stats(step.device)
        step()
        peaks[batch] = torch.cuda.max_memory_allocated(step.device)
    total = share * torch.cuda.mem_get_info(step.device)[1]
    batch = fitting(peaks, total)
    while batch > 1:
        try:
            step.draw(batch)
            step()
            return batch
        except torch.OutOfMemoryError:
            batch = int(0.95 * batch)
            gc.collect()
            torch.cuda.empty_cache()
    return batch


def fitting(peaks: dict[int, int], total: float) -> int:
    """Return the largest batch that fits, if memory is linear in it.

    Args:
        peaks: the memory of two batch sizes, in bytes.
        total: the available memory, in bytes.
    """
    (small, less), (large, more) = sorted(peaks.items())
    of_sample = (more - less) / (large - small)
    return int((total - less) / of_sample + small)


def input_pipeline(scale: Scale, device: torch.device) -> dict[str, Any]:
    """Return how long training steps wait for images that are read from a TSV file by several workers."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        data = write_images(folder / "train.tsv", scale.training_batch * (scale.waits + 1))
        train_sentencepiece(data, [2], folder, 500)
        wait = wait_for_batches(
            data,
            task="caption",
            bpe_dir=folder,
            size=scale.size,
            side=scale.side,
            batch=scale.training_batch,
            batches=scale.waits,
            threads=_threads(),
            optimizer="fused_adam",
            workers=WORKERS,
            bfloat16=device.type == "cuda",
            device=device,
        )
    return {**asdict(wait), "share": wait.share, "image": IMAGE}


def write_images(file: Path, rows: int) -> Path:
    """Write a TSV file of captions with synthetic images in JPEG, in which a few images repeat. Return the file."""
    generator = np.random.default_rng(1)
    images = []
    for _ in range(DISTINCT):
        coarse = Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8))
        written = io.BytesIO()
        coarse.resize(IMAGE, Image.Resampling.BICUBIC).save(written, format="JPEG", quality=90)
        images.append(base64.b64encode(written.getvalue()).decode())
    with file.open("w", encoding="utf-8") as lines:
        for row in range(rows):
            caption = f"a red square beside {row % 7} blue circles"
            lines.write("\t".join([str(row), f"image{row}", caption, "", images[row % DISTINCT]]) + "\n")
    return file


def _sample(pair: Pair, batch: int) -> dict[str, Any]:
    """Return a batch as the data sets make it: the CPU knows that nothing is padded."""
    return {"net_input": pair.inputs(batch) | {"padded": np.zeros(batch, dtype=bool)}}


@cache
def _gflop(scale: Scale, device: torch.device) -> float:
    """Return the GFLOPs of a student's pass over one image."""
    student: Any = build(f"narvl_{scale.size}", vocab_size=WORDS + 1, num_queries=QUERIES).to(device).eval()
    side = scale.side
    inputs = {
        "src_tokens": torch.full((1, 10), 4, device=device),
        "patch_images": torch.randn(1, 3, side, side, device=device),
    }
    with torch.no_grad():
        return gflop_of_pass(student, inputs)


def _threads() -> int:
    return torch.get_num_threads()


# --- Shares ----------------------------------------------------------------------------------------------------------


def add_shares(parts: dict[str, dict[str, Any]]) -> None:
    """Add to the parts what follows from the rate of the matrix product: the floor, and shares of the rate."""
    rate = parts.get("matrix", {}).get("gflops")
    if rate is None:
        return
    image, throughput, steps = (parts.get(name, {}) for name in ("one_image", "batches", "training"))
    if "gflop" in image:
        image["floor_ms"] = 1000 * image["gflop"] / rate
    if "gflop" in throughput:
        throughput["share_of_rate"] = {
            size: throughput["gflop"] * speed / rate for size, speed in throughput["images_per_second"].items()
        }
    for name, cost in steps.items():
        if name.startswith("batch_"):
            cost["share_of_rate"] = steps["gflop_of_sample"] * cost["samples_per_second"] / rate


def table(result: dict[str, Any]) -> str:
    """Format a result: a table of what was measured, with the reason where it was not."""
    rows: list[list[str]] = []

    def add(part: str, what: str, value: object) -> None:
        rows.append([part, what, f"{value:.4g}" if isinstance(value, float) else str(value)])

    def walk(part: str, prefix: str, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                walk(part, f"{prefix}{name} ", value)
            else:
                add(part, prefix + name, value)

    for part, values in result["parts"].items():
        walk(part, "", values)
    add("run", "seconds", float(result["seconds"]))
    return markdown_table(["part", "what", "measured"], rows)
