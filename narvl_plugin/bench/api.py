"""What the API adds to a model: an image of Pillow to a `Prediction`, beside the parts that it cannot do without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from narvl_plugin.api import load
from narvl_plugin.api.exported import ExportedEngine
from narvl_plugin.api.model import Decoding, Model
from narvl_plugin.api.trained import TrainedEngine
from narvl_plugin.bench.timing import LatencyStats, measure_latency
from narvl_plugin.data.any_image import AnyImageReader
from narvl_plugin.errors import InputError
from narvl_plugin.export.runner import Student
from narvl_plugin.inference.calibration import CachedLogits
from narvl_plugin.report.results import markdown_table

TEXTS = {"answer": "what is it?", "locate": "the left one", "entails": "there is a thing"}
"""The text beside the image, by verb."""
SIDE = 96
"""Side of the images, in pixels."""
PARTS = ("image transform", "network", "search", "text")


def compare(
    checkpoint: Path | None, exported: Path | None, *, images: int, repeats: int, threads: int
) -> dict[str, LatencyStats]:
    """Time the API and its parts on the same images, in turns.

    Args:
        checkpoint: a student; None is the model in the box.
        exported: a folder of `narvl export`, to time it beside the same through its run.py.
        images: number of images, of random pixels.
        repeats: passes over all images.
        threads: torch's threads, and the runtime's.

    Returns:
        The times by name: of each verb `VERB`, and `VERB: PART` of `PARTS`; of an exported student `exported VERB` and
        `run.py`.

    Raises:
        InputError: if a model cannot be used.
    """
    draw = np.random.default_rng(1)
    pictures = [Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(images)]
    systems: dict[str, Callable[[Image.Image], str]] = {}
    model = load(checkpoint, device="cpu")
    for verb in model.verbs:
        systems[verb] = partial(_answer, model, verb)
        systems |= {f"{verb}: {part}": run for part, run in _parts(model, verb, pictures[0]).items()}
    found = measure_latency(systems, pictures, warmup=3, repeats=repeats, threads=threads)
    if exported is not None:
        found |= _exported(exported, pictures, repeats, threads)
    return found


def _answer(model: Model, verb: str, image: Any) -> str:
    return str(model.predict(verb, image, TEXTS.get(verb)).text)


def _parts(model: Model, verb: str, image: Image.Image) -> dict[str, Callable[[Image.Image], str]]:
    """Return the parts that the API cannot do without, by `PARTS`; those behind the image run on one image."""
    engine = model.engine(verb)
    if not isinstance(engine, TrainedEngine):
        raise InputError(f"{model.name}: is exported; give a checkpoint, and the folder by --exported")
    predictor, options = engine.predictor, engine.predictor.task.options
    reader = AnyImageReader(options.patch_image_size, imagenet_normalisation=options.imagenet_normalisation)
    batch = engine.batch([engine.prepare(image, TEXTS.get(verb, ""), "image")])
    student: Any = predictor.model
    student.exported = None  # the whole and its parts run in torch
    predictor.task.choose_member(student)
    searching = engine.searching(model.decoding_for(verb))
    with torch.inference_mode():
        logits = student(**batch["net_input"])[0]
        tokens = searching.search(batch, CachedLogits(student, logits, student.temperature))[0][0]["tokens"]

    @torch.inference_mode()
    def network(_: Image.Image) -> str:
        predictor.task.choose_member(student)
        student(**batch["net_input"])
        return ""

    def search(_: Image.Image) -> str:
        predictor.task.choose_member(student)
        searching.search(batch, CachedLogits(student, logits, student.temperature))
        return ""

    def transform(image: Image.Image) -> str:
        return str(reader.read(image, "image").size)

    return dict(zip(PARTS, (transform, network, search, lambda _: predictor.task.codec.decode(tokens)), strict=True))


def _exported(folder: Path, pictures: Sequence[Image.Image], repeats: int, threads: int) -> dict[str, LatencyStats]:
    """Time an exported student through the API and through its run.py, from the bytes of a file to text."""
    files = []
    for picture in pictures:
        stream = BytesIO()
        picture.save(stream, "PNG")
        files.append(stream.getvalue())
    engine = ExportedEngine(folder, threads)
    model = Model(str(folder), {engine.verb: engine}, Decoding(), 1)
    student = Student(folder, threads)
    fields = {name: TEXTS[engine.verb] for name in student.fields}
    return measure_latency(
        {
            f"exported {engine.verb}": partial(_answer, model, engine.verb),
            "run.py": lambda data: student([data], [fields])[0].text,
        },
        files,
        warmup=3,
        repeats=repeats,
        threads=threads,
    )


def table(times: Mapping[str, LatencyStats]) -> str:
    """Format the result of `compare` as a Markdown table, with ratios of the API to its parts and to run.py."""
    rows = []
    for name, stats in times.items():
        if ": " in name or name == "run.py":
            continue
        parts = [times[f"{name}: {part}"].p50_ms for part in PARTS if f"{name}: {part}" in times]
        beside = sum(parts) if parts else times["run.py"].p50_ms
        shown = [f"{part:.2f}" for part in parts] or ["–"] * len(PARTS)
        own = [f"{stats.p50_ms:.2f}", f"{stats.p95_ms:.2f}"]
        rows.append([name, *own, *shown, f"{beside:.2f}", f"{stats.p50_ms / beside:.3f}"])
    return markdown_table(["verb", "p50 ms", "p95 ms", *PARTS, "sum, or run.py", "ratio"], rows)
