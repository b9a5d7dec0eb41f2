"""From the output folder of a run to ``results.json``, ``table.md`` and ``report.html``."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from narvl_plugin.bench import Captioner
from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.evaluation.predictions import read_generated
from narvl_plugin.report.charts import training_charts
from narvl_plugin.report.outputs import (
    TestPicture,
    captions_by_row,
    read_test_pictures,
    read_training_log,
)
from narvl_plugin.report.page import TRAINING_LABELS, render_page
from narvl_plugin.report.results import COLUMNS, SystemResult, evaluate, markdown_table, notes
from narvl_plugin.report.slots import Slot, query_slots

logger = logging.getLogger(__name__)


def build_report(
    out_dir: Path,
    *,
    test_tsv: Path | None = None,
    settings: Mapping[str, str] | None = None,
    task_overrides: Mapping[str, Any] | None = None,
    pictures: int = 24,
) -> dict[str, Any]:
    """Score what a run generated; write ``results.json``, ``table.md`` and, last, ``report.html`` beside it.

    Reads ``generate/*/generate-test.txt`` and, where they are, ``latency.json``, the ``train.jsonl`` of each
    model and ``student/checkpoint_last.pt``; prints the table.

    Args:
        out_dir: the run's folder.
        test_tsv: what was generated from; by default ``data/caption/test.tsv`` in the folder.
        settings: the run's settings, to be shown.
        task_overrides: see ``Captioner.load``.
        pictures: how many test pictures the page shows, evenly spread over the file.

    Returns:
        the content of ``results.json``.

    Raises:
        InputError: for a file that is missing or does not fit the others.
    """
    test_tsv = test_tsv or out_dir / "data" / "caption" / "test.tsv"
    rows = read_test_pictures(test_tsv)
    captions = _read_systems(out_dir, rows)
    scored = [picture for picture in rows if all(picture.row in texts for texts in captions.values())]
    if not scored:
        raise InputError(f"{out_dir / 'generate'}: no picture was captioned by every system; generate again")
    left_out = len(rows) - len(scored)
    if left_out:
        logger.warning("%d of %d test pictures are left out: not every system captioned them", left_out, len(rows))
        kept = {picture.row for picture in scored}
        captions = {name: {row: text for row, text in texts.items() if row in kept} for name, texts in captions.items()}

    measured = _read_latency(out_dir / "latency.json")
    results = evaluate(captions, scored, measured["systems"])
    sentences = notes(results, measured["machine"], left_out)
    content = {
        "systems": {result.name: result.as_json() for result in results},
        "test": {"file": str(test_tsv), "pictures": len(scored), "left_out": left_out},
        "machine": measured["machine"],
        "settings": dict(settings or {}),
    }
    _write(out_dir / "results.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    _write(out_dir / "table.md", markdown_table(results, sentences))

    shown = _spread(scored, pictures)
    paths = {name: out_dir / name / "train.jsonl" for name in TRAINING_LABELS}
    logs = {name: read_training_log(path) for name, path in paths.items() if path.exists()}
    page = render_page(
        results=results,
        notes=sentences,
        charts=training_charts(logs, TRAINING_LABELS),
        pictures=shown,
        slots=_slots(out_dir / "student" / "checkpoint_last.pt", test_tsv, shown, task_overrides),
        test_tsv=test_tsv,
        settings=content["settings"],
    )
    _write(out_dir / "report.html", page)
    print_table(results, sentences)
    return content


def print_table(results: list[SystemResult], sentences: list[str]) -> None:
    """Print the table on the terminal, narrow enough for 80 columns, with the notes below."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for column, name in enumerate(COLUMNS):
        heading = name.replace(" ", "\n").replace("/", "/\n")
        table.add_column(heading, justify="right" if column else "left", no_wrap=True)
    for result in results:
        table.add_row(*result.cells())
    console = Console()
    console.print(table)
    for sentence in sentences:
        console.print(f"- {sentence}", highlight=False, markup=False)


def _read_systems(out_dir: Path, rows: list[TestPicture]) -> dict[str, dict[int, str]]:
    """Read every system's captions by row."""
    paths = sorted(out_dir.glob("generate/*/generate-test.txt"))
    if not paths:
        raise MissingInput(f"{out_dir}/generate/*/generate-test.txt: no such file; run fairseq-generate first")
    return {path.parent.name: captions_by_row(read_generated(path), rows, path) for path in paths}


def _read_latency(path: Path) -> dict[str, Any]:
    """Read measured latencies; none, if there is no such file."""
    if not path.exists():
        logger.warning("%s: no such file; the table has no latencies", path)
        return {"systems": {}, "machine": {}}
    return json.loads(path.read_text(encoding="utf-8"))


def _slots(
    student: Path, test_tsv: Path, shown: list[TestPicture], task_overrides: Mapping[str, Any] | None
) -> list[list[Slot]] | None:
    """Read the student's queries on the shown pictures; None without a checkpoint."""
    if not student.exists():
        logger.warning("%s: no such checkpoint; the page shows no queries", student)
        return None
    captioner = Captioner.load(student, test_tsv, task_overrides=task_overrides)
    return query_slots(captioner, [picture.row for picture in shown])


def _spread(rows: list[TestPicture], count: int) -> list[TestPicture]:
    """Choose rows at even distances, so that nobody picks the good ones."""
    count = min(count, len(rows))
    return [rows[place * len(rows) // count] for place in range(count)]


def _write(path: Path, text: str) -> None:
    """Write a file in one step, so that it is whole wherever it exists."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
