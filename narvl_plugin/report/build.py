"""From the output folder of a run to ``results.json``, ``table.md`` and ``report.html``."""

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from narvl_plugin.checkpoints.record import Checkpoint
from narvl_plugin.errors import InputError, MissingInput, harmless
from narvl_plugin.evaluation.predictions import read_generated
from narvl_plugin.inference.perplexity import perplexities
from narvl_plugin.inference.predictor import Predictor
from narvl_plugin.report.about import about, count_parameters, read_stages
from narvl_plugin.report.charts import COLOURS, TEACHER, Targets, confidence_charts, count_charts, training_charts
from narvl_plugin.report.outputs import outputs_by_row, read_images, read_rows, read_training_log
from narvl_plugin.report.page import IMAGE_SIDE, STUDENT, TRAINING_LABELS, Section, render_page
from narvl_plugin.report.readings import QueryView, view_queries
from narvl_plugin.report.results import (
    SystemResult,
    confidence_tables,
    evaluate,
    further_tables,
    headings,
    markdown,
    notes,
)
from narvl_plugin.report.subjects import TASK_REPORTS, Row, TaskReport
from narvl_plugin.tasks import loading
from narvl_plugin.whole_files import require_writable, write_whole

logger = logging.getLogger(__name__)

SCORES_FILE = "scores.json"
"""Name of the file with the main score of each row, by which runs can be compared in pairs."""


def build_report(
    out_dir: Path,
    *,
    task: str = "caption",
    test_tsv: Path | None = None,
    settings: Mapping[str, str] | None = None,
    task_overrides: Mapping[str, Any] | None = None,
    student_options: Mapping[str, Any] | None = None,
    num_images: int = 24,
) -> dict[str, Any]:
    """Score the outputs of a run, and report on them.

    It writes ``scores.json``, ``results.json``, ``table.md`` and, last, ``report.html`` into the folder.

    It reads ``generate/*/generate-test.txt``. If they exist, it also reads ``latency.json``, ``calibration.json``,
    ``stages.tsv``, the ``train.jsonl`` of each model, and ``checkpoint_last.pt`` of teacher and student. It prints the
    table.

    Args:
        out_dir: the run's folder.
        task: one of ``TASK_REPORTS``.
        test_tsv: the test file in OFA's columns; by default ``data/TASK/test.tsv`` in the folder.
        settings: the run's settings, to be shown.
        task_overrides: see `Predictor.load`.
        student_options: further options of the student's task, with which it has generated.
        num_images: the number of test images that the page shows, evenly spread over the file.

    Returns:
        The content of ``results.json``.

    Raises:
        InputError: for a file that is missing or does not fit the others.
    """
    if task not in TASK_REPORTS:
        raise InputError(f"--task {task}: choose one of {', '.join(TASK_REPORTS)}")
    for name in (SCORES_FILE, "results.json", "table.md", "report.html"):
        require_writable(out_dir / name)
    test_tsv = test_tsv or out_dir / "data" / task / "test.tsv"
    options = {**(task_overrides or {}), **(student_options or {})}
    student = _load_student(out_dir / "student" / "checkpoint_last.pt", test_tsv, task, options)
    subject = TASK_REPORTS[task](student.task if student else None, test_tsv)
    rows = read_rows(test_tsv, subject)
    outputs = _read_systems(out_dir, rows)
    scored = [row for row in rows if all(row.number in said for said in outputs.values())]
    if not scored:
        raise InputError(f"{out_dir / 'generate'}: every row lacks some system's output; generate again")
    left_out = len(rows) - len(scored)
    if left_out:
        logger.warning("%d of %d test rows are left out: not every system has an output", left_out, len(rows))

    measured = _read_latency(out_dir / "latency.json")
    judged = [row.number for row in _spread(scored, subject.perplexity_rows)]
    perplexity = _perplexities(out_dir / "teacher" / "checkpoint_last.pt", student, task_overrides, outputs, judged)
    results = evaluate(subject, outputs, scored, measured["systems"], perplexity)
    sentences = notes(subject, results, scored, measured["machine"], left_out)
    calibration = _read_calibration(out_dir / "calibration.json")
    with _blaming(out_dir / "calibration.json"):
        confidence = confidence_tables(calibration)
        calibration_charts = confidence_charts(calibration["systems"]) if calibration else []
    if not subject.confidence:
        confidence, calibration_charts = [], []
    settings = dict(settings or {})
    parameters = _count_parameters(student, out_dir)
    stages = read_stages(out_dir / "stages.tsv")
    tables = further_tables(subject, results) + confidence
    content = {
        "systems": {result.name: result.as_json() for result in results},
        "test": {"file": str(test_tsv), subject.unit: len(scored), "left_out": left_out},
        "machine": measured["machine"],
        "calibration": calibration,
        "settings": settings,
        "parameters": parameters,
        "stages": [asdict(stage) for stage in stages],
    }
    write_whole(out_dir / SCORES_FILE, json.dumps(_row_scores(subject, results, scored)) + "\n")
    write_whole(out_dir / "results.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_whole(out_dir / "table.md", markdown(subject, results, sentences, tables))

    shown = _spread(scored, num_images)
    images = read_images(test_tsv, subject.image_column, [row.number for row in shown], IMAGE_SIDE)
    paths = {name: out_dir / name / "train.jsonl" for name in TRAINING_LABELS}
    logs = {name: read_training_log(path) for name, path in paths.items() if path.exists()}
    page = render_page(
        subject=subject,
        results=results,
        notes=sentences,
        tables=tables,
        sections=[
            Section("Training", "", training_charts(logs, TRAINING_LABELS, subject.curve, _targets(settings, student))),
            Section("Confidence", subject.confidence, calibration_charts),
            Section("Sizes of sets", "", count_charts(_by_count(subject, results), subject.main)),
        ],
        rows=shown,
        readings=_readings(student, shown, images),
        images=images,
        about=about(settings, parameters, measured["machine"], stages),
    )
    write_whole(out_dir / "report.html", page)
    print_table(headings(subject, results), results, sentences)
    return content


def _by_count(subject: TaskReport, results: Sequence[SystemResult]) -> dict[str, tuple[str, list[tuple[int, float]]]]:
    """Return the colours and the main scores by the number of true elements, of teacher and students, by label."""
    return {
        result.label: (
            COLOURS.get(result.name, COLOURS[TEACHER]),
            [(int(count), found[subject.main]) for count, found in result.scores.details.get("by_count", {}).items()],
        )
        for result in results
        if result.name == result.base or result.name.startswith(STUDENT)
    }


def _row_scores(subject: TaskReport, results: Sequence[SystemResult], rows: Sequence[Row]) -> dict[str, Any]:
    """Return the main score of each row and system, whose means are the systems' main scores.

    Two runs were tested on the same rows if their `test` is equal.
    """
    content = "\n".join(f"{row.number}\t{row.ids[0]}\t{row.prompt}\t{row.references}" for row in rows)
    return {
        "task": subject.task,
        "main": subject.main,
        "base": results[0].base,
        "curve": subject.curve,
        "test": hashlib.sha256(content.encode()).hexdigest(),
        "systems": {
            result.name: [round(subject.main_score(result.scores.each[row.number]), 6) for row in rows]
            for result in results
        },
    }


def print_table(columns: Sequence[str], results: Sequence[SystemResult], sentences: Sequence[str]) -> None:
    """Print the table on the terminal, at most 80 columns wide, with the notes below."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for column, name in enumerate(columns):
        heading = name.replace(" ", "\n").replace("/", "/\n")
        table.add_column(heading, justify="right" if column else "left", no_wrap=column > 0)
    for result in results:
        table.add_row(*(Text(harmless(cell)) for cell in result.cells()))
    console = Console()
    console.print(table)
    for sentence in sentences:
        console.print(f"- {harmless(sentence)}", highlight=False, markup=False)


def _read_systems(out_dir: Path, rows: Sequence[Row]) -> dict[str, dict[int, str]]:
    """Read every system's outputs by row."""
    paths = sorted(out_dir.glob("generate/*/generate-test.txt"))
    if not paths:
        raise MissingInput(f"{out_dir}/generate/*/generate-test.txt: no such file; run fairseq-generate first")
    return {path.parent.name: outputs_by_row(read_generated(path), rows, path) for path in paths}


def _read_latency(path: Path) -> dict[str, Any]:
    """Read the measured latencies; empty if there is no such file."""
    if not path.exists():
        logger.warning("%s: no such file; the table has no latencies", path)
        return {"systems": {}, "machine": {}}
    measured = _read_json(path)
    with _blaming(path):
        numbers = [found[key] for found in measured["systems"].values() for key in ("p50_ms", "n")]
        if not all(map(math.isfinite, numbers)) or not isinstance(measured["machine"], dict):
            raise ValueError("a value is not a finite number")
    return measured


def _load_student(
    checkpoint: Path, test_tsv: Path, task: str, task_overrides: Mapping[str, Any] | None
) -> Predictor | None:
    """Load the run's student; None without a checkpoint."""
    if not checkpoint.exists():
        logger.warning("%s: no such checkpoint; the page shows no queries", checkpoint)
        return None
    student = Predictor.load(checkpoint, test_tsv, task_overrides=task_overrides, role="student")
    if student.task.cfg._name != task:
        raise InputError(f"{checkpoint}: was trained for {student.task.cfg._name}, and the report is --task {task}")
    return student


def _perplexities(
    checkpoint: Path,
    student: Predictor | None,
    task_overrides: Mapping[str, Any] | None,
    outputs: Mapping[str, Mapping[int, str]],
    rows: Sequence[int],
) -> dict[str, float]:
    """Return the teacher's perplexity of outputs; empty without a teacher of the student's task, or without rows."""
    if student is None or not rows or not checkpoint.exists():
        return {}
    try:
        file = Path(student.dataset.tsv.path)
        teacher = Predictor.load(checkpoint, file, task_overrides=task_overrides, role="teacher")
        loading.require_one_task(checkpoint, teacher.task, Path(STUDENT), student.task)
        return perplexities(teacher, outputs, rows)
    except InputError as error:  # the teacher may read fewer tokens than the student outputs
        logger.warning("the teacher's perplexity is not measured: %s", error)
        return {}


def _count_parameters(student: Predictor | None, out_dir: Path) -> dict[str, dict[str, int]]:
    """Count the parameters of teacher and student; a checkpoint that does not fit the student's task is left out."""
    counts = {}
    for name in ("teacher", STUDENT):
        checkpoint = out_dir / name / "checkpoint_last.pt"
        if student is None or not checkpoint.exists():
            continue
        try:
            counts[name] = count_parameters(copy(student.task).model_of(Checkpoint.read(checkpoint)))
        except InputError as error:
            logger.warning("the parameters of the %s are not counted: %s", name, error)
    return counts


def _targets(settings: Mapping[str, str], student: Predictor | None) -> dict[str, Targets]:
    """Return what the students of the run scripts learned, as far as the settings and the student's options tell."""
    taught = {"1": True, "0": False}.get(settings.get("DISTIL", ""))
    any_of_row = None if student is None else bool(getattr(student.task.cfg, "any_reference", False))
    found = {STUDENT: taught, "student_ce": taught, "student_distilled": True, "student_nodistill": False}
    return {name: Targets(taught, any_of_row) for name, taught in found.items()}


def _read_calibration(path: Path) -> dict[str, Any]:
    """Read the results of `narvl calibrate`; empty if there is no such file."""
    return _read_json(path) if path.exists() else {}


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: if the file does not hold one.
    """
    with _blaming(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}")
    return content


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Raise InputError, naming the file, for any error that its content causes within the block."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise InputError(
            f"{path}: is not as narvl writes it ({type(error).__name__}: {error}); measure again"
        ) from error


def _readings(student: Predictor | None, shown: Sequence[Row], images: Sequence[Image.Image]) -> list[QueryView] | None:
    """Read the student's queries on the shown rows; None without a student."""
    return None if student is None else view_queries(student, [row.number for row in shown], images)


def _spread(rows: Sequence[Row], count: int) -> list[Row]:
    """Choose evenly spaced rows; a choice by hand could favour good ones."""
    count = min(count, len(rows))
    return [rows[place * len(rows) // count] for place in range(count)]
