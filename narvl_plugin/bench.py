"""Latency of captioners, one picture at a time, from a row's bytes to text."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from fairseq import utils
from fairseq.dataclass.configs import FairseqConfig, GenerationConfig
from fairseq.models import BaseFairseqModel

from narvl_plugin import checkpoints
from narvl_plugin.errors import InputError
from narvl_plugin.tasks.base import BaseTask

SPLIT = "test"
RGB = 3

Image = TypeVar("Image")


class Captioner:
    """A checkpoint that turns rows of one TSV file into text, as fairseq-generate does.

    Attributes:
        model: teacher or student, in evaluation mode.
        task: the task it was trained on.
    """

    def __init__(
        self, model: BaseFairseqModel, task: BaseTask, generation: GenerationConfig, device: torch.device
    ) -> None:
        self.model = model
        self.task = task
        self.device = device
        self._generator = task.build_generator([model], generation)

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        data: Path,
        *,
        generation: Mapping[str, Any] | None = None,
        task_overrides: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ) -> "Captioner":
        """Load a checkpoint and open a TSV file as its test split.

        Args:
            checkpoint: a file of fairseq-train, teacher or student.
            data: the TSV file.
            generation: fairseq's generation options by name, such as ``{"beam": 5}``.
            task_overrides: task options that differ from the checkpoint's, such as ``{"bpe_dir": "vocab"}``.
            device: where to run.

        Raises:
            MissingInput, InputError: when the checkpoint, its vocabulary or the file cannot be used.
        """
        options = _generation_config(generation or {})
        overrides = {**(task_overrides or {}), "data": str(data)}
        (model,), task, _ = checkpoints.load(checkpoint, task_overrides=overrides, device=device)
        task.load_dataset(SPLIT)
        model.prepare_for_inference_(FairseqConfig(generation=options))
        return cls(model, task, options, torch.device(device))

    def with_generation(self, **generation: Any) -> "Captioner":
        """Give the same model and data with other generation options."""
        return Captioner(self.model, self.task, _generation_config(generation), self.device)

    def batch(self, row: int) -> dict[str, Any]:
        """Read one row (from 0) and make a batch of it alone.

        Raises:
            BadRow: when the row cannot be used.
            InputError: when the task skips it.
        """
        dataset = self.task.dataset(SPLIT)
        batch = dataset.collater([dataset[row]])
        if not batch:
            raise InputError(f"row {row + 1} of the test file is bad; leave it out")
        return utils.move_to_cuda(batch, self.device) if self.device.type == "cuda" else batch

    @torch.inference_mode()
    def __call__(self, row: int) -> str:
        """Caption one row: read, decode and resize its picture, run the model, search, write the words."""
        ((best, *_),) = self.task.inference_step(self._generator, [self.model], self.batch(row))
        return self.task.codec.decode(best["tokens"])

    def label_text(self, label: int) -> str:
        """Write one output label; special symbols, which are no words, by their name."""
        return self.task.codec.decode([label]) or self.task.target_dictionary[label]


def _generation_config(options: Mapping[str, Any]) -> GenerationConfig:
    """Make fairseq's generation options, refusing names that it does not have."""
    config = GenerationConfig()
    for name, value in options.items():
        if not hasattr(config, name):
            raise InputError(f"fairseq has no generation option {name}={value!r}; see fairseq-generate --help")
        setattr(config, name, value)
    return config


@dataclass(frozen=True)
class LatencyStats:
    """Wall-clock times of one system in milliseconds: percentiles and mean over ``n`` measurements."""

    p50_ms: float
    p95_ms: float
    mean_ms: float
    n: int


def measure_latency(
    systems: Mapping[str, Callable[[Image], str]],
    images: Sequence[Image],
    *,
    warmup: int,
    repeats: int,
    threads: int,
) -> dict[str, LatencyStats]:
    """Time several captioners on the same pictures, in turns picture by picture (A B A B …).

    In turns, so that another program that slows the machine for a while slows all systems alike.

    Args:
        systems: by name, from a picture to its caption; a text on the CPU, so that nothing is left running.
        images: whatever the systems take.
        warmup: untimed pictures of each system beforehand.
        repeats: how many times to go through all pictures.
        threads: torch's threads within an operation, during the measurement.

    Raises:
        ValueError: when there is nothing to measure.
    """
    if not systems or not images or repeats < 1:
        raise ValueError(f"nothing to measure: {len(systems)} systems, {len(images)} pictures, {repeats} repeats")
    times: dict[str, list[float]] = {name: [] for name in systems}
    with _threads(threads):
        for system in systems.values():
            for turn in range(warmup):
                system(images[turn % len(images)])
        for _ in range(repeats):
            for image in images:
                for name, system in systems.items():
                    start = time.perf_counter()
                    system(image)
                    times[name].append(1000 * (time.perf_counter() - start))
    return {name: _stats(measured) for name, measured in times.items()}


def _stats(milliseconds: list[float]) -> LatencyStats:
    """Sum up measurements."""
    p50, p95 = np.percentile(milliseconds, [50, 95])
    return LatencyStats(float(p50), float(p95), float(np.mean(milliseconds)), len(milliseconds))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use this many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe_machine(device: torch.device, threads: int, dtype: torch.dtype) -> dict[str, Any]:
    """Say what latencies depend on: processor, cores, threads, versions, precision, commit of this code."""
    machine: dict[str, Any] = {
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "precision": str(dtype).removeprefix("torch."),
    }
    commit = _commit()
    return machine | ({"commit": commit} if commit else {})


def _cpu_model() -> str:
    """Name the processor, from Linux's own list where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Give the git commit that this code was checked out from, marked where files differ from it."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def latency(
    out: Path,
    *,
    teacher: Path,
    student: Path,
    data: Path,
    generation: Mapping[str, Any] | None = None,
    task_overrides: Mapping[str, Any] | None = None,
    images: int = 100,
    warmup: int = 5,
    repeats: int = 3,
    threads: int = 1,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure teacher (beam 5 and greedy) and student on the first rows of a TSV file and write a JSON file.

    Args:
        out: the file to write, in one step at the end.
        teacher, student: checkpoints.
        data: TSV file with pictures, not precomputed features, so that the vision trunk counts.
        generation: the teacher's generation options but for the beam.
        task_overrides: see ``Captioner.load``.
        images: how many rows; bad rows that the task skips are passed over.
        warmup, repeats, threads: see ``measure_latency``.
        device: ``cpu`` or ``cuda``.

    Returns:
        what was written: ``systems`` (``LatencyStats`` by name), ``machine``, ``settings``.

    Raises:
        InputError: for files or options that cannot be used.
    """
    options = dict(generation or {})
    load = partial(Captioner.load, data=data, task_overrides=task_overrides, device=device)
    slow = load(teacher, generation={**options, "beam": 5})
    systems = {
        "teacher_beam5": slow,
        "teacher_greedy": slow.with_generation(**options, beam=1),
        "student": load(student),
    }
    dataset = slow.task.dataset(SPLIT)
    usable = (row for row in range(len(dataset)) if dataset[row] is not None)  # the task may forgive bad rows
    rows = list(islice(usable, images))
    if rows and slow.batch(rows[0])["net_input"]["patch_images"].size(1) != RGB:
        raise InputError(f"{data}: holds precomputed features; measure on pictures, so that the vision trunk counts")
    stats = measure_latency(systems, rows, warmup=warmup, repeats=repeats, threads=threads)
    dtype = next(slow.model.parameters()).dtype
    report = {
        "systems": {name: asdict(values) for name, values in stats.items()},
        "machine": describe_machine(slow.device, threads, dtype),
        "settings": {"data": str(data), "images": len(rows), "warmup": warmup, "repeats": repeats, **options},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    part.replace(out)
    return report
