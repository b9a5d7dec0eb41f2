"""The report of a study: study.json with all figures, study.md with a table for each part, study.html with plots."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from narvl_plugin.errors import MissingInput
from narvl_plugin.report.charts import COLOURS, Chart, count_charts, line_chart, points_chart
from narvl_plugin.report.page import page_template
from narvl_plugin.report.results import markdown_table
from narvl_plugin.study.measures import Measured, read_measures
from narvl_plugin.study.plan import SEED, Part, Study, read_study
from narvl_plugin.study.running import STUDY_FILE, cell_folder
from narvl_plugin.study.statistics import LEVEL, RESAMPLES, Difference, RowScores, Summary, difference, summary
from narvl_plugin.whole_files import require_writable, write_whole

FILES = ("study.json", "study.md", "study.html")
MOST_COLUMNS = 9
_MISSING = "–"
_PALETTE = (*dict.fromkeys(COLOURS.values()), "#0b7285", "#c2255c", "#5c940d", "#495057", "#e8a33d")


@dataclass(frozen=True)
class Row:
    """A row of a part's table: runs that differ in their seeds alone.

    Attributes:
        label: its labels in words.
        compared: its label on the axis that is compared; empty without an axis.
        others: its labels on the other axes.
        cells: names of the runs by seed.
        measured: what those that have ended have measured, by seed.
    """

    label: str
    compared: str
    others: tuple[str, ...]
    cells: dict[str, str]
    measured: dict[str, Measured]

    def summaries(self) -> dict[str, Summary]:
        """Return the mean and the spread of each measure."""
        names = dict.fromkeys(name for measured in self.measured.values() for name in measured.values)
        found = {
            name: summary([each.values[name] for each in self.measured.values() if name in each.values])
            for name in names
        }
        return {name: each for name, each in found.items() if each is not None}


@dataclass(frozen=True)
class Table:
    """A part's table.

    Attributes:
        part: the part.
        main: name of the main score; empty if no run has ended.
        rows: its rows.
        differences: for each row, the difference from the row that it is compared with; None for that row itself.
    """

    part: Part
    main: str
    rows: list[Row]
    differences: list[Difference | None]


def report_study(out: Path) -> Study:
    """Compare the runs of a study, and write study.json, study.md and study.html into its folder.

    Args:
        out: the study's folder.

    Returns:
        The study.

    Raises:
        InputError: if the folder is not that of a study.
    """
    if not (out / STUDY_FILE).is_file():
        raise MissingInput(f"{out / STUDY_FILE}: no such file; give the folder of narvl study FILE --out FOLDER")
    for name in FILES:
        require_writable(out / name)
    study = read_study(out / STUDY_FILE)
    cells = study.cells()
    measured = {name: read_measures(cell_folder(out, name)) for name in cells}
    tables = [table_of(part, measured) for part in study.parts]
    content = {
        "question": study.question,
        "parts": {table.part.name: _as_json(table) for table in tables},
        "cells": {
            name: {
                "options": dict(cell.options),
                "finished": (found := measured[name]) is not None,
                "measures": {} if found is None else found.values,
                "machine": {} if found is None else dict(found.machine),
            }
            for name, cell in cells.items()
        },
    }
    write_whole(out / "study.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_whole(out / "study.md", markdown(study, tables))
    write_whole(out / "study.html", page(study, tables))
    return study


# --- Comparisons -----------------------------------------------------------------------------------------------------


def table_of(part: Part, measured: Mapping[str, Measured | None]) -> Table:
    """Return the table of a part, given what its runs have measured, by name."""
    rows: dict[tuple[str, ...], Row] = {}
    for labels, cell in part.cells():
        compared = labels[part.compare] if part.compare else ""
        others = tuple(label for axis, label in labels.items() if axis not in (SEED, part.compare))
        key = (*others, compared)
        label = ", ".join(filter(None, key)) or "all"
        row = rows.setdefault(key, Row(label, compared, others, {}, {}))
        seed = labels.get(SEED, "")
        row.cells[seed] = cell.name
        if (found := measured[cell.name]) is not None:
            row.measured[seed] = found
    ordered = sorted(
        rows.values(), key=lambda row: list(dict.fromkeys(each.others for each in rows.values())).index(row.others)
    )
    bases = {row.others: row for row in ordered if row.compared == part.reference}
    main = next((each.main for row in ordered for each in row.measured.values()), "")
    return Table(part, main, ordered, [_compared(row, bases.get(row.others)) for row in ordered])


def _compared(row: Row, base: Row | None) -> Difference | None:
    if base is None or base is row:
        return None
    pairs = [
        (RowScores(one.test, one.rows), RowScores(other.test, other.rows))
        for seed, one in row.measured.items()
        if (other := base.measured.get(seed)) is not None and other.main == one.main
    ]
    return difference(pairs)


def _as_json(table: Table) -> dict[str, Any]:
    """Return all figures of a table."""
    return {
        "main": table.main,
        "compare": table.part.compare,
        "reference": table.part.reference,
        "rows": [
            {
                "label": row.label,
                "cells": row.cells,
                "finished": len(row.measured),
                "measures": {name: asdict(each) for name, each in row.summaries().items()},
                "validation": _mean_curve(row),
                "difference": None if apart is None else asdict(apart),
            }
            for row, apart in zip(table.rows, table.differences, strict=True)
        ],
    }


# --- Table -----------------------------------------------------------------------------------------------------------


def _shown(each: Summary | None, digits: int = 3, factor: float = 1, unit: str = "") -> str:
    """Format a mean with its spread."""
    if each is None:
        return _MISSING
    spread = "" if each.sd is None else f" ± {factor * each.sd:.{digits}f}"
    return f"{factor * each.mean:.{digits}f}{spread}{unit}"


def _share(each: Summary | None) -> str:
    return _shown(each, 1, 100, " %")


def _mean_share(each: Summary | None) -> str:
    return _MISSING if each is None else f"{each.mean:.1%}".replace("%", " %")


def _milliseconds(each: Summary | None) -> str:
    return _MISSING if each is None else f"{each.mean:.1f}"


_COLUMNS: tuple[tuple[tuple[str, ...], str, Callable[[Summary | None], str]], ...] = (
    (("ratio",), "of the teacher's", _share),
    (("sentences",), "sentences", _share),
    (("true",), "true", _share),
    (("did_not_fit",), "did not fit", _share),
    (("blank_share", "repeat_share"), "blanks / repeats", _mean_share),
    (("p50_ms", "batched_ms"), "ms an image, batch 1 / 32", _milliseconds),
    (("calibration_error",), "calibration error", _shown),
    (("new_runs",), "new runs", _share),
)
"""Measures, and the heading and the form of their column."""


def columns_of(table: Table) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the cells of a part's table. Columns without any value are left out."""
    summaries = [row.summaries() for row in table.rows]
    columns: list[tuple[str, list[str]]] = [(table.part.compare or "runs", [row.label for row in table.rows])]
    columns.append((table.main or "score", [_shown(each.get("score")) for each in summaries]))
    if table.part.compare:
        apart = zip(table.rows, table.differences, strict=True)
        columns.append(
            (
                f"difference from {table.part.reference} [{LEVEL:.0%}]",
                [_difference(row, each, table) for row, each in apart],
            )
        )
    teachers = {(each.mean, each.sd) for found in summaries if (each := found.get("teacher"))}
    for names, heading, form in _COLUMNS:
        found = [[each.get(name) for name in names] for each in summaries]
        if names == ("did_not_fit",) and not any(each and each.mean for [each] in found):
            continue
        if names == ("ratio",) and len(teachers) == 1:
            continue  # as the score
        if any(map(any, found)) and len(columns) < MOST_COLUMNS:
            columns.append((heading, [" / ".join(map(form, each)) for each in found]))
    headings = [heading for heading, _ in columns]
    return headings, [list(cells) for cells in zip(*(cells for _, cells in columns), strict=True)]


def _difference(row: Row, apart: Difference | None, table: Table) -> str:
    """Format the difference of a row."""
    if apart is None:
        return "reference" if row.compared == table.part.reference else _MISSING
    return f"{apart.mean:+.3f} [{apart.low:+.3f}, {apart.high:+.3f}]"


def notes(table: Table) -> list[str]:
    """Return the sentences that a reader of a table needs."""
    numbers = {len(row.cells) for row in table.rows}
    seeds = max(numbers)
    sentences = [
        f"Figures are means ± standard deviations over {seeds} seeds." if seeds > 1 else "Each row is one run."
    ]
    if teachers := _teachers(table):
        sentences.append(teachers)
    made = [each for each in table.differences if each]
    if made:
        sentences.append(
            f"A difference is the mean over seeds and test rows. Its interval holds {LEVEL:.0%} of {RESAMPLES:,} "
            "bootstrap samples of the test rows. Other seeds would vary more."
        )
    if not all(each.paired for each in made):
        sentences.append("Some rows were tested on other test rows than the reference, so that no pairs were formed.")
    if any(row.measured for row in table.rows):
        sentences.append("Blanks, repeats, and targets that did not fit, are shares in validation.")
    left = sum(len(row.cells) - len(row.measured) for row in table.rows)
    if left:
        sentences.append(f"{left} of {sum(len(row.cells) for row in table.rows)} runs have not ended and are left out.")
    return sentences


def _teachers(table: Table) -> str:
    """Return a sentence with the measures of the teacher, if all rows have the same; empty otherwise."""
    found = [row.summaries() for row in table.rows if row.measured]
    values = [(each.get("teacher"), each.get("teacher_sentences"), each.get("teacher_true")) for each in found]
    if not values or len(set(values)) > 1 or values[0][0] is None:
        return ""
    score, whole, true = values[0]
    words = f"The teacher's {table.main} is {_shown(score)}"
    return words + (f", with {_share(whole)} sentences and {_share(true)} true captions." if whole and true else ".")


def markdown(study: Study, tables: Sequence[Table]) -> str:
    """Format the tables as Markdown."""
    parts = [f"# {study.question or 'Study'}\n"]
    for table in tables:
        headings, rows = columns_of(table)
        cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        parts.append(f"## {table.part.name}\n")
        parts.append(markdown_table([heading.replace("|", "\\|") for heading in headings], cells))
        parts.append("".join(f"- {sentence}\n" for sentence in notes(table)))
    return "\n".join(parts)


# --- Page ------------------------------------------------------------------------------------------------------------


def page(study: Study, tables: Sequence[Table]) -> str:
    """Render the page: one file without scripts and without network access."""
    sections = []
    for table in tables:
        headings, rows = columns_of(table)
        is_base = [row.compared == table.part.reference for row in table.rows]
        sections.append(
            {
                "name": table.part.name,
                "headings": headings,
                "rows": list(zip(is_base, rows, strict=True)),
                "notes": notes(table),
                "charts": list(charts(table)),
                "cells": [(row.label, seed, name) for row in table.rows for seed, name in row.cells.items()],
            }
        )
    return page_template("narvl_plugin.study", "study.html.j2").render(question=study.question, sections=sections)


def charts(table: Table) -> Iterator[Chart]:
    """Draw the main score of the compared rows, that by the size of sets, and the validation score over the updates."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in table.rows:
        groups.setdefault(row.others, []).append(row)
    axis = table.part.compare or ""
    for others, rows in groups.items():
        own = f": {', '.join(others)}" if others else ""
        points = {row.compared or row.label: [each.values["score"] for each in row.measured.values()] for row in rows}
        if any(points.values()):
            teachers = [
                each.values["teacher"] for row in rows for each in row.measured.values() if "teacher" in each.values
            ]
            title = f"{table.main} of the student{own}"
            svg = points_chart(
                points,
                ylabel=table.main,
                xlabel=axis,
                description=f"{title}, by {axis or 'run'}",
                base=float(np.mean(teachers)) if teachers else None,
            )
            yield Chart(title, "A point is a run. A bar is the mean over seeds.", svg)
        yield from count_charts(_over_counts(rows), table.main)
        curves = {row.compared or row.label: _mean_curve(row) for row in rows}
        drawn = {
            label: (_PALETTE[place % len(_PALETTE)], curve, "-")
            for place, (label, curve) in enumerate(curves.items())
            if curve
        }
        if drawn:
            name = next(each.curve[1] for row in rows for each in row.measured.values())
            title = f"{name[0].upper()}{name[1:]} in validation{own}"
            svg = line_chart(drawn, ylabel=name, description=f"{title}, over updates")
            yield Chart(title, "Mean over seeds after numbers of updates. Higher is better.", svg)


def _over_counts(rows: Sequence[Row]) -> dict[str, tuple[str, list[tuple[float, float]]]]:
    """Return colours and mean scores by the number of true elements, of the rows and of their teachers, by label."""

    def curve(row: Row, name: str) -> list[tuple[float, float]]:
        found = row.summaries().items()
        return sorted((float(key.removeprefix(name)), each.mean) for key, each in found if key.startswith(name))

    labels = {row.compared or row.label: row for row in rows}
    students = {label: curve(row, "score_of_") for label, row in labels.items()}
    teachers = {f"teacher of {label}": curve(row, "teacher_score_of_") for label, row in labels.items()}
    if len({tuple(each) for each in teachers.values()}) == 1:
        teachers = {"teacher": next(iter(teachers.values()))}
    both = {**students, **teachers}
    return {label: (_PALETTE[place % len(_PALETTE)], each) for place, (label, each) in enumerate(both.items())}


def _mean_curve(row: Row) -> list[tuple[float, float]]:
    """Return the mean over seeds of the validation score, where all seeds have one."""
    curves = [dict(each.validation) for each in row.measured.values() if each.validation]
    if not curves:
        return []
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [(float(place), math.fsum(curve[place] for curve in curves) / len(curves)) for place in common]
