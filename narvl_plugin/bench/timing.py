"""Latency and throughput of models, from a row's bytes to text."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from narvl_plugin.bench.stages import median_stages
from narvl_plugin.devices import wait_for
from narvl_plugin.errors import InputError
from narvl_plugin.inference.predictor import SPLIT, Predictor, teacher_searches
from narvl_plugin.tasks import loading
from narvl_plugin.whole_files import require_writable, write_whole

RGB = 3
STAGED = 20
"""Pictures of which each is timed stage by stage."""

Image = TypeVar("Image")
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class LatencyStats:
    """Wall-clock times of one system in milliseconds: percentiles and mean over ``n`` measurements.

    spread_ms: how far the medians of the repeats lie apart, the largest from the smallest.
    """

    p50_ms: float
    p95_ms: float
    mean_ms: float
    n: int
    spread_ms: float = 0.0


def measure_latency(
    systems: Mapping[Name, Callable[[Image], str]],
    images: Sequence[Image],
    *,
    warmup: int,
    repeats: int,
    threads: int,
) -> dict[Name, LatencyStats]:
    """Time several systems on the same pictures, in turns picture by picture (A B A B …).

    In turns, so that another program that slows the machine for a while slows all systems alike.

    Args:
        systems: by name, from a picture to what is said of it; a text on the CPU, so that nothing is left running.
        images: whatever the systems take.
        warmup: untimed pictures of each system beforehand.
        repeats: how many times to go through all pictures.
        threads: torch's threads within an operation, during the measurement.

    Raises:
        ValueError: when there is nothing to measure.
    """
    if not systems or not images or repeats < 1:
        raise ValueError(f"nothing to measure: {len(systems)} systems, {len(images)} pictures, {repeats} repeats")
    times: dict[Name, list[float]] = {name: [] for name in systems}
    with use_threads(threads):
        for system in systems.values():
            for turn in range(warmup):
                system(images[turn % len(images)])
        for _ in range(repeats):
            for image in images:
                for name, system in systems.items():
                    start = time.perf_counter()
                    system(image)
                    times[name].append(1000 * (time.perf_counter() - start))
    return {name: _stats(measured, repeats) for name, measured in times.items()}


def images_per_second(
    systems: Mapping[Name, Callable[[Sequence[int]], list[str]]],
    rows: Sequence[int],
    *,
    batch_size: int,
    repeats: int,
    threads: int,
) -> dict[Name, float]:
    """Measure several systems in turns, batch by batch, and return the pictures a second of each in its median batch.

    All batches are whole: where rows run out, the first ones come again. The other arguments are those of
    `measure_latency`.
    """
    again = cycle(rows)
    batches = [list(islice(again, batch_size)) for _ in range(0, len(rows), batch_size)]
    calls = {name: partial(_call_batch, system) for name, system in systems.items()}
    stats = measure_latency(calls, batches, warmup=1, repeats=repeats, threads=threads)
    return {name: 1000 * batch_size / measured.p50_ms for name, measured in stats.items()}


def _call_batch(system: Callable[[Sequence[int]], list[str]], rows: Sequence[int]) -> str:
    """Have a system answer some rows."""
    return "\n".join(system(rows))


def in_turns(
    systems: Mapping[Name, Callable[[], object]], *, repeats: int, threads: int, device: torch.device | str = "cpu"
) -> dict[Name, float]:
    """Return the median time of each of some systems that take turns on a device, in ms; the first turn warms up."""

    def call(system: Callable[[], object], _: None) -> str:
        system()
        wait_for(device)
        return ""

    calls = {name: partial(call, system) for name, system in systems.items()}
    stats = measure_latency(calls, [None], warmup=1, repeats=repeats, threads=threads)
    return {name: measured.p50_ms for name, measured in stats.items()}


def _stats(milliseconds: list[float], repeats: int) -> LatencyStats:
    """Sum up measurements, those of each repeat in a row."""
    p50, p95 = np.percentile(milliseconds, [50, 95])
    spread = np.ptp(np.median(np.reshape(milliseconds, (repeats, -1)), axis=1))
    return LatencyStats(float(p50), float(p95), float(np.mean(milliseconds)), len(milliseconds), float(spread))


@contextmanager
def use_threads(count: int) -> Iterator[None]:
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
    """Measure teacher, in the ways of `teacher_searches`, and student on the first rows of a TSV file.

    Args:
        out: the JSON file to write, in one step at the end.
        teacher, student: checkpoints of one task.
        data: TSV file with pictures, not precomputed features, so that the vision trunk counts.
        generation: generation options but for the beam, where they are not those of the checkpoints' --eval-args.
        task_overrides: see ``Predictor.load``.
        images: how many rows; bad rows that the task skips are passed over.
        warmup, repeats, threads: see ``measure_latency``.
        device: ``cpu`` or ``cuda``.

    Returns:
        what was written: ``systems`` (``LatencyStats`` by name), ``stages`` (by name, the median of each of
        ``bench_stages.STAGES`` in ms), ``machine``, ``settings``.

    Raises:
        InputError: for files or options that cannot be used.
    """
    require_writable(out)
    load = partial(Predictor.load, data=data, task_overrides=task_overrides, device=device)
    asked, parallel = load(teacher, role="teacher"), load(student, role="student")
    loading.require_one_task(teacher, asked.task, student, parallel.task)
    systems = {
        name: asked.with_options(search.task_options, **{**(generation or {}), **search.generation})
        for name, search in teacher_searches(asked.task).items()
    }
    systems["student"] = parallel.with_options({}, **(generation or {}))
    dataset = asked.task.dataset(SPLIT)
    usable = (row for row in range(len(dataset)) if dataset[row] is not None)  # the task may forgive bad rows
    rows = list(islice(usable, images))
    if rows and asked.batch(rows[0])["net_input"]["patch_images"].size(1) != RGB:
        raise InputError(f"{data}: holds precomputed features; measure on pictures, so that the vision trunk counts")
    stats = measure_latency(systems, rows, warmup=warmup, repeats=repeats, threads=threads)
    with use_threads(threads):
        staged = {name: median_stages(system, rows[:STAGED], warmup=1) for name, system in systems.items()}
    dtype = next(asked.model.parameters()).dtype
    report = {
        "systems": {name: asdict(values) for name, values in stats.items()},
        "stages": staged,
        "machine": describe_machine(asked.device, threads, dtype),
        "settings": {
            **{name: value for name, value in {**asked.generation, **(generation or {})}.items() if name != "beam"},
            **{"data": str(data), "images": len(rows), "warmup": warmup, "repeats": repeats},
        },
    }
    write_whole(out, json.dumps(report, indent=2) + "\n")
    return report
