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
from tqdm import tqdm

from narvl_plugin.bench.stages import median_stages
from narvl_plugin.devices import wait_for
from narvl_plugin.errors import InputError
from narvl_plugin.inference.predictor import Predictor
from narvl_plugin.tasks import loading
from narvl_plugin.whole_files import require_writable, write_whole

RGB = 3
STAGED = 20
"""Number of images that are timed stage by stage."""
BATCH = 32
"""Number of images in a batch that is timed as a whole."""
TURN = 5
"""Number of images that a system answers before it is the next one's turn."""

Image = TypeVar("Image")
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class LatencyStats:
    """Wall-clock times of one system.

    Attributes:
        p50_ms: the median, in ms.
        p95_ms: the 95th percentile, in ms.
        mean_ms: the mean, in ms.
        n: the number of measurements.
        spread_ms: the difference between the largest and smallest median of the repeats, in ms.
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
    turn: int = TURN,
) -> dict[Name, LatencyStats]:
    """Time several systems on the same images, in turns of a few images.

    A temporary load on the machine then slows all systems equally. In a turn of several images, one more comes first
    and is not timed: in use a model answers again and again, with its weights and code in the processor's caches.

    Args:
        systems: functions from an image to text, by name; a text is on the CPU, so all work is complete.
        images: the inputs of the systems.
        warmup: the number of untimed images for each system beforehand.
        repeats: the number of passes over all images.
        threads: torch's threads within an operation, during the measurement.
        turn: the number of images that a system answers in a turn.

    Returns:
        The times by name.

    Raises:
        ValueError: if there is nothing to measure.
    """
    if not systems or not images or repeats < 1:
        raise ValueError(f"nothing to measure: {len(systems)} systems, {len(images)} images, {repeats} repeats")
    times: dict[Name, list[float]] = {name: [] for name in systems}
    with use_threads(threads):
        for system in systems.values():
            for number in range(warmup):
                system(images[number % len(images)])
        every = list(images) * repeats
        for first in tqdm(range(0, len(every), turn), desc="time", unit="turn", disable=None, leave=False):
            these = every[first : first + turn]
            for name, system in systems.items():
                if turn > 1:
                    system(these[-1])
                for image in these:
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
    """Measure several systems in turns, batch by batch, and return each one's images a second in its median batch.

    All batches are full: the first rows fill the last batch.

    Args:
        systems: functions from rows to texts, by name.
        rows: the rows to predict.
        batch_size: the number of rows in a batch.
        repeats: see `measure_latency`.
        threads: see `measure_latency`.

    Returns:
        The speeds by name.
    """
    again = cycle(rows)
    batches = [list(islice(again, batch_size)) for _ in range(0, len(rows), batch_size)]
    calls = {name: partial(_call_batch, system) for name, system in systems.items()}
    stats = measure_latency(calls, batches, warmup=1, repeats=repeats, threads=threads, turn=1)
    return {name: 1000 * batch_size / measured.p50_ms for name, measured in stats.items()}


def _call_batch(system: Callable[[Sequence[int]], list[str]], rows: Sequence[int]) -> str:
    """Run a system on some rows."""
    return "\n".join(system(rows))


def in_turns(
    systems: Mapping[Name, Callable[[], object]], *, repeats: int, threads: int, device: torch.device | str = "cpu"
) -> dict[Name, float]:
    """Return the median time of systems that take turns on a device, in ms; the first turn is a warm-up.

    Args:
        systems: functions by name.
        repeats: the number of timed turns.
        threads: torch's threads.
        device: the device to synchronise with.

    Returns:
        The times by name.
    """

    def call(system: Callable[[], object], _: None) -> str:
        system()
        wait_for(device)
        return ""

    calls = {name: partial(call, system) for name, system in systems.items()}
    stats = measure_latency(calls, [None], warmup=1, repeats=repeats, threads=threads, turn=1)
    return {name: measured.p50_ms for name, measured in stats.items()}


def _stats(milliseconds: list[float], repeats: int) -> LatencyStats:
    """Summarise measurements; those of each repeat are consecutive."""
    p50, p95 = np.percentile(milliseconds, [50, 95])
    spread = np.ptp(np.median(np.reshape(milliseconds, (repeats, -1)), axis=1))
    return LatencyStats(float(p50), float(p95), float(np.mean(milliseconds)), len(milliseconds), float(spread))


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Set torch's number of threads within a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe_machine(device: torch.device, threads: int, dtype: torch.dtype) -> dict[str, Any]:
    """Describe what latencies depend on: processor, cores, threads, versions, precision, commit of this code."""
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
    """Return the name of the processor, from /proc/cpuinfo if it exists."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Return the git commit of this code, marked if files differ from it; None without git."""
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
    student_options: Mapping[str, Any] | None = None,
    images: int = 100,
    warmup: int = 5,
    repeats: int = 3,
    threads: int = 1,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure a student, and its teacher with each of `BaseTask.teacher_searches`, on the first rows of a TSV file.

    Args:
        out: the JSON file to write, in one step at the end.
        teacher: the teacher's checkpoint.
        student: the checkpoint of a student of the same task.
        data: the TSV file with images; precomputed features would exclude the vision backbone.
        generation: generation options other than the beam; the default is the checkpoints' --eval-args.
        task_overrides: see `Predictor.load`.
        student_options: further options of the student's task, such as `ngram_automaton`.
        images: the number of rows; bad rows that the task skips do not count.
        warmup: see `measure_latency`.
        repeats: see `measure_latency`.
        threads: see `measure_latency`.
        device: ``cpu`` or ``cuda``.

    Returns:
        The contents of the file: ``systems`` (by name, the numbers of `LatencyStats`, and ``batched_ms``, the median
        time of a batch of `BATCH` images divided by their number), ``stages`` (by name, the median of each stage of
        `narvl_plugin.bench.stages` in ms), ``machine``, ``settings``.

    Raises:
        InputError: for files or options that cannot be used.
    """
    require_writable(out)
    load = partial(Predictor.load, data=data, task_overrides=task_overrides, device=device)
    asked = load(teacher, role="teacher")
    parallel = load(student, role="student", task_overrides={**(task_overrides or {}), **(student_options or {})})
    loading.require_one_task(teacher, asked.task, student, parallel.task)
    systems = {
        name: asked.with_options(search.task_options, **{**(generation or {}), **search.generation})
        for name, search in asked.task.teacher_searches().items()
    }
    systems["student"] = parallel.with_options({}, **(generation or {}))
    rows = list(islice(asked.usable_rows(), images))
    if rows and asked.batch(rows[0])["net_input"]["patch_images"].size(1) != RGB:
        raise InputError(f"{data}: holds precomputed features; measure on images, to include the vision backbone")
    stats = measure_latency(systems, rows, warmup=warmup, repeats=repeats, threads=threads)
    predict = {name: system.predict for name, system in systems.items()}
    speeds = images_per_second(predict, rows[:BATCH], batch_size=BATCH, repeats=repeats, threads=threads)
    with use_threads(threads):
        staged = {name: median_stages(system, rows[:STAGED], warmup=1) for name, system in systems.items()}
    dtype = next(asked.model.parameters()).dtype
    report = {
        "systems": {name: asdict(values) | {"batched_ms": 1000 / speeds[name]} for name, values in stats.items()},
        "stages": staged,
        "machine": describe_machine(asked.device, threads, dtype),
        "settings": {
            **{name: value for name, value in {**asked.generation, **(generation or {})}.items() if name != "beam"},
            **{"data": str(data), "images": len(rows), "warmup": warmup, "repeats": repeats},
        },
    }
    write_whole(out, json.dumps(report, indent=2) + "\n")
    return report
