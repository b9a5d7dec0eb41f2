"""Teacher, student and exported students side by side: quality, latency, throughput, and time by stage."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from narvl_plugin.bench.stages import median_stages
from narvl_plugin.bench.timing import (
    STAGED,
    describe_machine,
    images_per_second,
    measure_latency,
    use_threads,
)
from narvl_plugin.errors import InputError
from narvl_plugin.export.runner import Student
from narvl_plugin.inference.predictor import SPLIT, Predictor
from narvl_plugin.report.results import markdown_table
from narvl_plugin.tasks import loading
from narvl_plugin.whole_files import require_writable, write_whole

BATCHES = (8, 32)
"""Batch sizes of the throughput, which is measured beside the latency of one image."""


class ExportedPredictor:
    """An exported student on the rows that a predictor reads.

    Args:
        folder: the output folder of `narvl export`.
        predictor: the predictor whose task, data and device are used.
        threads: the runtime's threads.

    Raises:
        InputError: if the student was exported for another task.
    """

    def __init__(self, folder: Path, predictor: Predictor, threads: int) -> None:
        self.student = Student(folder, threads)
        self.task = predictor.task
        if self.student.settings["task"] != self.task.cfg._name:
            raise InputError(f"{folder}: was exported for {self.student.settings['task']}, not {self.task.cfg._name}")

    def __call__(self, row: int) -> str:
        """Predict one row, from its bytes to text."""
        return self.predict([row])[0]

    def predict(self, rows: Sequence[int]) -> list[str]:
        """Predict some rows in one batch."""
        return [answer.text for answer in self.answers(rows)]

    def hypotheses_of(self, rows: Sequence[int]) -> list[list[dict[str, Any]]]:
        """Predict some rows and return fairseq's form of hypotheses."""
        return [[{"tokens": torch.tensor(answer.tokens)}] for answer in self.answers(rows)]

    def answers(self, rows: Sequence[int]) -> list[Any]:
        """Read the rows' images and texts, and run the student."""
        dataset = self.task.dataset(SPLIT)
        columns = [dict(zip(dataset.column_names, dataset.tsv[row], strict=True)) for row in rows]
        images = [
            dataset.read_image.read_bytes(found["image"], dataset.tsv.where(row))
            for found, row in zip(columns, rows, strict=True)
        ]
        return self.student(images, columns)


def compare(
    out: Path,
    *,
    teacher: Path,
    student: Path,
    data: Path,
    exported: Sequence[Path] = (),
    compiled: bool = False,
    task_overrides: Mapping[str, Any] | None = None,
    images: int = 100,
    warmup: int = 5,
    repeats: int = 3,
    threads: int = 1,
    device: str = "cpu",
) -> dict[str, Any]:
    """Measure all systems on the first rows of a TSV file, in turns.

    Args:
        out: the JSON file to write; a plot with the suffix ``.svg`` is written beside it.
        teacher: the teacher's checkpoint.
        student: the checkpoint of a student of the same task. If a graph lies beside it, the student is measured with
            and without it.
        data: the TSV file with images.
        exported: output folders of `narvl export`.
        compiled: whether to also measure both models with torch.compile, which takes minutes.
        task_overrides: see `latency`.
        images: see `latency`.
        warmup: see `latency`.
        repeats: see `latency`.
        threads: see `latency`.
        device: see `latency`.

    Returns:
        The contents of the file: ``systems``, ``metric``, ``machine``, ``settings``. Each system has ``quality``, the
        numbers of `LatencyStats`, ``images_per_second`` by batch size, ``stages`` (not for exported students) and
        ``encoder_share``.

    Raises:
        InputError: for files or options that cannot be used.
    """
    for file in (out, out.with_suffix(".svg")):
        require_writable(file)
    load = partial(Predictor.load, data=data, task_overrides=task_overrides, device=device)
    asked, parallel = load(teacher, role="teacher"), load(student, role="student")
    loading.require_one_task(teacher, asked.task, student, parallel.task)
    beside, parallel = parallel, _in_torch(parallel)
    searches = parallel.task.student_searches()
    measured = [(asked, asked.task.teacher_searches(), ""), (parallel, searches, "")]
    if beside is not parallel:
        measured.append((beside, searches, "_graph"))
    systems: dict[str, Any] = {}
    for predictor, ways, ending in measured:
        for way, search in ways.items():
            systems[f"{way}{ending}"] = predictor.with_options(search.task_options, **search.generation)
    if compiled:
        systems |= _compiled(systems)
    for folder in exported:
        system = ExportedPredictor(folder, parallel, threads)
        settings = system.student.settings
        systems[f"student_{settings['format']}{'_int8' if settings['int8'] else ''}"] = system
    rows = list(islice(parallel.usable_rows(), images))
    stats = measure_latency(systems, rows, warmup=warmup, repeats=repeats, threads=threads)
    say = {name: system.predict for name, system in systems.items()}
    speeds = {size: images_per_second(say, rows, batch_size=size, repeats=repeats, threads=threads) for size in BATCHES}
    found: dict[str, dict[str, Any]] = {}
    for name, system in systems.items():
        found[name] = {"quality": _quality(system, parallel, rows), **asdict(stats[name])}
        found[name]["images_per_second"] = {str(size): speed[name] for size, speed in speeds.items()}
        if isinstance(system, Predictor) and system.model.exported is None:  # a graph has no stages
            with use_threads(threads):
                found[name]["stages"] = median_stages(system, rows[:STAGED], warmup=1)
    first = found["student_greedy"]["stages"]
    for numbers in found.values():  # all systems have the same encoder
        numbers["encoder_share"] = (first["trunk"] + first["encoder"]) / numbers["p50_ms"]
    result = {
        "systems": found,
        "metric": parallel.task.validation_metrics[0],
        "machine": describe_machine(parallel.device, threads, next(parallel.model.parameters()).dtype),
        "settings": {"data": str(data), "images": len(rows), "warmup": warmup, "repeats": repeats},
    }
    write_whole(out, json.dumps(result, indent=2) + "\n")
    _draw(out.with_suffix(".svg"), result)
    return result


def _in_torch(student: Predictor) -> Predictor:
    """Return the student without the graph beside its checkpoint; the student itself if there is none."""
    if student.model.exported is None:
        return student
    model = copy.copy(student.model)
    model.exported = None
    return Predictor(model, student.task, student.generation, student.device)


def _compiled(systems: Mapping[str, Predictor]) -> dict[str, Predictor]:
    """Return copies of systems with compiled models; systems that share a model share its copy."""
    models = {}
    made = {}
    for name, system in systems.items():
        if system.model.exported is not None:
            continue
        if id(system.model) not in models:
            models[id(system.model)] = copy.deepcopy(system.model)
            models[id(system.model)].compile_for_inference()
        fast = Predictor(models[id(system.model)], system.task, {}, system.device)
        fast.generation = system.generation
        made[f"{name}_compiled"] = fast
    return made


@torch.inference_mode()
def _quality(system: Any, reader: Predictor, rows: Sequence[int]) -> float:
    """Return the mean of the task's first validation score."""
    metric = reader.task.validation_metrics[0]
    scores: list[float] = []
    for start in range(0, len(rows), max(BATCHES)):
        some = rows[start : start + max(BATCHES)]
        scores += reader.task.validation_scores(reader.batch(*some), system.hypotheses_of(some))[metric]
    return sum(scores) / len(scores)


def table(result: Mapping[str, Any]) -> str:
    """Format the result of `compare` as Markdown tables."""
    systems = result["systems"]
    teachers = [name for name in systems if name.startswith("teacher") and not name.endswith("compiled")]
    headings = ["system", result["metric"], "p50 ms", "p95 ms", "spread ms"]
    headings += [f"images/s, batch {size}" for size in BATCHES]
    headings += ["encoder", *(f"of {name}" for name in teachers)]
    rows = []
    for name, found in systems.items():
        cells = [f"{found['quality']:.3f}"] + [f"{found[key]:.1f}" for key in ("p50_ms", "p95_ms", "spread_ms")]
        cells += [f"{found['images_per_second'][str(size)]:.1f}" for size in BATCHES]
        cells += [f"{found['encoder_share']:.2f}"]
        cells += [f"{found['p50_ms'] / systems[teacher]['p50_ms']:.3f}" for teacher in teachers]
        rows.append([name, *cells])
    stages = next(iter(systems.values()))["stages"]
    split = [
        [name, *(f"{found['stages'][stage]:.1f}" for stage in stages)]
        for name, found in systems.items()
        if "stages" in found
    ]
    return f"{markdown_table(headings, rows)}\n{markdown_table(['ms', *stages], split)}"


def _draw(file: Path, result: Mapping[str, Any]) -> None:
    """Draw quality over latency, as SVG."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, found in result["systems"].items():
        colour = "C0" if name.startswith("teacher") else "C1"
        axes.plot(found["p50_ms"], found["quality"], "o", color=colour)
        axes.annotate(name, (found["p50_ms"], found["quality"]), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms for an image, p50")
    axes.set_ylabel(result["metric"])
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="svg", metadata={"Date": None})
