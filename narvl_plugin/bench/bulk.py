"""Bulk inference on many small images: one process beside Ray, in turns."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, NamedTuple

import torch
from PIL import Image

from narvl_plugin.bench.serving import memory_mb
from narvl_plugin.bench.timing import describe_machine
from narvl_plugin.errors import InputError
from narvl_plugin.report.results import markdown_table
from narvl_plugin.whole_files import require_writable, write_whole

SIDE = 32
"""Side of the images, in pixels."""
IN_A_TAR = 1000
"""Images in an archive, which is a shard."""
RUN = """
import json, sys, time
from contextlib import nullcontext
from pathlib import Path
from narvl_plugin.bulk.answers import Predicting
from narvl_plugin.bulk.commands import predict_shards
from narvl_plugin.bulk.engines import Runner, connected

if __name__ == "__main__":
    images, out, checkpoint, device, batch_size, engine, actors = json.loads(sys.argv[1])
    job = Predicting(
        verb="caption", suffix=".tsv", checkpoint=checkpoint and Path(checkpoint), device=device, batch_size=batch_size
    )
    start = time.perf_counter()
    with connected(None) if engine == "ray" else nullcontext():
        began = time.perf_counter() - start
        totals, _ = predict_shards([images], Path(out), job, Runner(engine, actors=actors))
    print(json.dumps([totals.rows, totals.seconds, began]))
"""
"""A run in a process of its own, as the program's, whose memory is measured."""


class Turn(NamedTuple):
    """What one run took.

    Attributes:
        speed: images per second, from the load of the model on.
        start: the seconds before, in which Ray starts.
        memory_mb: the largest memory of all processes together, in MiB.
    """

    speed: float
    start: float
    memory_mb: float


def bulk(
    out: Path,
    *,
    student: Path | None = None,
    images: int = 5000,
    actors: int = 1,
    batch_size: int = 8,
    repeats: int = 3,
    threads: int = 1,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure both engines on the same images, in turns. Their outputs are compared byte by byte.

    Args:
        out: the JSON file to write.
        student: the checkpoint; None is the model in the box.
        images: the number of images, of random pixels, in tar archives.
        actors: actors of Ray. With one, the ratio of both is what Ray adds to an image.
        batch_size: images in one pass.
        repeats: the number of turns.
        threads: torch's threads.
        device: torch's name of the device.

    Returns:
        The contents of the file.

    Raises:
        InputError: if a run fails, or both engines write different bytes.
    """
    require_writable(out)
    turns: dict[str, list[Turn]] = {"local": [], "ray": []}
    with tempfile.TemporaryDirectory() as folder:
        inputs = _draw(Path(folder) / "images", images)
        written: dict[str, dict[str, bytes]] = {}
        for turn in range(repeats):
            for engine in turns:
                target = Path(folder) / f"{engine}{turn}"
                options = [inputs, str(target), student and str(student), device, batch_size, engine]
                turns[engine].append(_run([*options, actors if engine == "ray" else None], threads))
                written[engine] = {file.name: file.read_bytes() for file in target.glob("*.tsv")}
            if written["local"] != written["ray"]:
                raise InputError("both engines write different bytes")
    speeds = {engine: [turn.speed for turn in measured] for engine, measured in turns.items()}
    result = {
        "images_per_second": {engine: median(measured) for engine, measured in speeds.items()},
        "start_seconds": {engine: median(turn.start for turn in measured) for engine, measured in turns.items()},
        "memory_mb": {engine: max(turn.memory_mb for turn in measured) for engine, measured in turns.items()},
        "time_ratio": median(one / other for one, other in zip(speeds["local"], speeds["ray"], strict=True)),
        "machine": describe_machine(torch.device(device), threads, torch.float32),
        "settings": {
            **{"student": student and str(student), "images": images, "actors": actors, "batch_size": batch_size},
            "repeats": repeats,
        },
    }
    write_whole(out, json.dumps(result, indent=2) + "\n")
    return result


def _draw(folder: Path, number: int) -> str:
    """Write archives of images into a new folder, and return the pattern of their names."""
    folder.mkdir()
    draw = Random(1)
    for first in range(0, number, IN_A_TAR):
        with tarfile.open(folder / f"{first:09}.tar", "w") as archive:
            for place in range(first, min(first + IN_A_TAR, number)):
                stream = io.BytesIO()
                Image.frombytes("RGB", (SIDE, SIDE), draw.randbytes(3 * SIDE * SIDE)).save(stream, "JPEG")
                header = tarfile.TarInfo(f"{place:09}.jpg")
                header.size = stream.tell()
                stream.seek(0)
                archive.addfile(header, stream)
    return f"{folder}/*.tar"


def _run(options: list[Any], threads: int) -> Turn:
    """Run an engine in a process of its own."""
    command = [sys.executable, "-c", RUN, json.dumps(options)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
        _peak(process.pid) as peak,
    ):
        found, _ = process.communicate()
        errors.seek(0)
        said = errors.read()
    if process.returncode:
        raise InputError(f"{options[-2]}: failed ({' '.join(said.split())[-500:]})")
    rows, seconds, start = json.loads(found.splitlines()[-1])
    return Turn(rows / seconds, start, max(peak, default=float("nan")))


@contextmanager
def _peak(pid: int) -> Iterator[list[float]]:
    """Measure the resident memory of a process and all below it, ten times a second, in MiB; see `memory_mb`."""
    found: list[float] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            if (memory := memory_mb(pid)) is not None:
                found.append(memory)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def table(result: Mapping[str, Any]) -> str:
    """Format the result of `bulk` as a Markdown table."""
    speeds, memory, starts = result["images_per_second"], result["memory_mb"], result["start_seconds"]
    ratios = {"local": 1.0, "ray": result["time_ratio"]}
    rows = [
        [engine, f"{speed:.1f}", f"{1000 / speed:.2f}", f"{ratios[engine]:.3f}"]
        + [f"{starts[engine]:.1f}", f"{memory[engine]:.0f}"]
        for engine, speed in speeds.items()
    ]
    return markdown_table(["engine", "images/s", "ms an image", "of local", "start, s", "memory, MiB"], rows)
