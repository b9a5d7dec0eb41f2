"""What an image of a large job costs, measured on a sample of the images."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

from narvl_plugin.api.files import as_row
from narvl_plugin.api.loading import load
from narvl_plugin.bench.plan import Costs, Plan
from narvl_plugin.bench.timing import use_threads
from narvl_plugin.data.image_files import find_images
from narvl_plugin.report.results import markdown_table


def measure(
    images: Sequence[str],
    *,
    checkpoint: Path | None = None,
    bpe_dir: Path | None = None,
    batch_size: int = 32,
    beam: int | None = None,
    repeats: int = 3,
    threads: int = 1,
    device: str | None = None,
) -> tuple[Costs, int]:
    """Measure what a caption costs, on a sample of the images.

    Reading is measured as the time of a CPU core, so other work on the machine disturbs it little. The model's time is
    that of a whole batch, search and text included.

    Args:
        images: files, folders and patterns, see `find_images`.
        checkpoint: the model; None is the model in the box.
        bpe_dir: the vocabulary's folder, if not the checkpoint's.
        batch_size: images in one pass: the first ones. A smaller sample is repeated.
        beam: the width of the beam, if not the checkpoint's.
        repeats: the number of turns; the median counts.
        threads: torch's threads.
        device: torch's name of the device; None is a GPU if there is one.

    Returns:
        The costs, and the number of images in the sample.

    Raises:
        MissingInput, InputError: if images or checkpoint cannot be used.
        BadRow: if a file is no readable image.
    """
    files = find_images([Path(place) for place in images])
    with use_threads(threads):
        start = time.perf_counter()
        model = load(checkpoint, bpe_dir=bpe_dir, device=device, beam=beam)
        engine, decoding = model.engine("caption"), model.decoding_for("caption")
        loaded = time.perf_counter() - start

        def read() -> list[Any]:
            return [engine.prepare(file, "", str(file)) for file in files.values()]

        prepared = read()
        core = median(_seconds(read, time.thread_time) for _ in range(repeats)) / len(files)
        batch = list(islice(cycle(prepared), batch_size))
        predictions = engine.predict(batch, decoding)  # also warms up
        passes = [_seconds(lambda: engine.predict(batch, decoding), time.perf_counter) for _ in range(repeats)]
    lines = [f"{as_row(name, one)}\n" for name, one in zip(cycle(files), predictions, strict=False)]
    return Costs(
        device_ms=1000 * median(passes) / batch_size,
        core_ms=1000 * core,
        image_bytes=sum(file.stat().st_size for file in files.values()) / len(files),
        output_bytes=sum(len(line.encode()) for line in lines) / len(lines),
        start_seconds=loaded,
    ), len(files)


def _seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start


def describe(costs: Costs) -> str:
    """Format what one image costs, and what one device takes."""
    return (
        f"an image: {costs.device_ms:.2f} ms of the device, {costs.core_ms:.2f} ms of a core to read its "
        f"{costs.image_bytes / 1000:.1f} kB, {costs.output_bytes:.0f} bytes of output\n"
        f"a device: {costs.images_per_second:.1f} images/s, {costs.megabytes_per_second:.2f} MB/s, "
        f"{costs.cores:.2f} cores to read, {costs.start_seconds:.1f} s to load the model"
    )


def table(plans: Sequence[Plan]) -> str:
    """Format plans of one job as a Markdown table, with a row for each number of devices."""
    rows = [
        [
            f"{plan.devices:,}",
            f"{plan.hours:,.2f}",
            f"{100 * plan.waiting:.1f} %",
            f"{plan.gigabytes_per_second:,.3f}",
            f"{plan.cores:,.1f}",
            f"{plan.writer_ms:,.1f}",
            f"{plan.repeated_seconds:,.1f}",
        ]
        for plan in plans
    ]
    head = ["devices", "hours", "without work", "GB/s", "cores to read", "ms between shards", "s lost with a machine"]
    return markdown_table(head, rows)
