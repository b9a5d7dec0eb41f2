"""Draws the plots of the pages as SVG. The same data always give the same file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measurements import Measurement

TEACHER, STUDENT, EXPORTED, GREY = "#8a8f98", "#2563eb", "#0f9d76", "#6b7280"
COLOURS = ("#2563eb", "#0f9d76", "#d97706", "#9333ea", "#dc2626", "#0891b2", "#4d7c0f", "#be185d")
SIZE = (5.6, 3.9)
STUDIES = ("queries", "losses", "teachers", "no_teacher", "orders")
"""The studies in run_scripts/studies/. A measurement study_STUDY_PART holds a part of one."""
LEAST_SHARE = 0.02
"""Bins of confidence with fewer answers are not drawn."""

Measurements = Mapping[str, Measurement]


def plots(data: Measurements, tasks: Any, labels: Mapping[str, str]) -> dict[str, str]:
    """Return all plots by file name.

    Args:
        data: the measurements by name.
        tasks: the tasks of the headline table.
        labels: names of systems.

    Returns:
        The SVG texts.
    """
    found = {
        "speed.svg": _speed(data["models_caption"], labels),
        "bound.svg": _bound(data),
        "sweep.svg": _sweep(data["sweep_cpu"]),
    }
    binned = {task.label: task.confidence for task in tasks if task.confidence and task.confidence.get("share")}
    if binned:
        found["confidence.svg"] = _confidence(binned)
    for study in STUDIES:
        start = f"study_{study}_"
        parts = {name.removeprefix(start): part for name, part in data.items() if name.startswith(start)}
        if parts:
            found[f"{study}.svg"] = _study(parts, with_curves=study == "losses")
    found["sets.svg"] = _by_size(data["run_regions"])
    return found


@contextmanager
def _axes(into: dict[str, str], size: tuple[float, float] = SIZE) -> Iterator[Axes]:
    """Yield axes, and put their drawing as SVG text into a dictionary as ``svg``."""
    with _figure(into, size) as figure:
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        yield axes


@contextmanager
def _figure(into: dict[str, str], size: tuple[float, float]) -> Iterator[Figure]:
    """Yield a figure, and put its drawing as SVG text into a dictionary as ``svg``."""
    with matplotlib.rc_context({"svg.hashsalt": "narvl", "font.size": 12, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        stream = StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
        into["svg"] = "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _speed(models: Measurement, labels: Mapping[str, str]) -> str:
    """Draw bars of the median time for an image, longest first."""
    into: dict[str, str] = {}
    rows = [row for row in models if "compiled" not in row["system"] and "int8" not in row["system"]]
    rows.sort(key=lambda row: row["p50_ms"])
    base = models["teacher_beam5"]["p50_ms"]
    with _axes(into) as axes:
        for place, row in enumerate(rows):
            name, ms = row["system"], row["p50_ms"]
            colour = TEACHER if name.startswith("teacher") else EXPORTED if _is_exported(name) else STUDENT
            axes.barh(place, ms, color=colour, height=0.7)
            axes.annotate(
                f"{ms:.1f} ms, {base / ms:.1f} ×", (ms, place), xytext=(5, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(range(len(rows)), [labels[row["system"]] for row in rows])
        axes.set_xlim(0, 1.5 * rows[-1]["p50_ms"])
        axes.set_xlabel("ms for an image, median")
        axes.tick_params(axis="y", length=0)
    return into["svg"]


def _study(parts: Mapping[str, Measurement], with_curves: bool) -> str:
    """Draw the scores of a study: a point for each seed, the mean, and the teacher's mean as a line.

    Args:
        parts: its parts by name; each has a panel.
        with_curves: whether the score in validation over the updates stands beside each.
    """
    into: dict[str, str] = {}
    rows = max(len(part.rows) for part in parts.values())
    with _figure(into, (5.6 if not with_curves else 9.2, 0.6 + len(parts) * (0.75 + 0.36 * rows))) as figure:
        axes = figure.subplots(len(parts), 2 if with_curves else 1, squeeze=False)
        for (name, part), (panel, *beside) in zip(parts.items(), axes, strict=True):
            _points(panel, part)
            panel.set_xlabel(f"{part.raw['main']}: {name.replace('_', ' ')}")
            for panel_of_curves in beside:
                for row, colour in zip(part, cycle(COLOURS), strict=False):
                    panel_of_curves.plot(*zip(*row["curve"], strict=True), "o-", markersize=3, color=colour)
                panel_of_curves.set_xlabel("updates")
                panel_of_curves.set_ylabel(f"{part.raw['main']} in validation")
            for each in (panel, *beside):
                each.spines[["top", "right"]].set_visible(False)
    return into["svg"]


def _by_size(run: Measurement) -> str:
    """Draw the scores of a run's student and teacher over the number of true elements."""
    into: dict[str, str] = {}
    with _axes(into) as axes:
        for system, label, colour in (("student", "student", STUDENT), ("teacher_beam5", "teacher, beam 5", TEACHER)):
            found = {int(name.removeprefix("of_")): score for name, score in run[system].items() if "of_" in name}
            axes.plot(list(found), list(found.values()), "o-", color=colour, label=label)
        axes.set_xticks(sorted(found))
        axes.set_ylim(0, 1)
        axes.set_xlabel("true boxes")
        axes.set_ylabel("share of right sets")
        axes.legend(frameon=False, fontsize=11)
    return into["svg"]


def _points(axes: Axes, part: Measurement) -> None:
    """Draw the scores of the rows of a part, the first row on top."""
    for place, (row, colour) in enumerate(zip(part, cycle(COLOURS), strict=False)):
        axes.plot(row["scores"], [-place] * len(row["scores"]), "o", color=colour, alpha=0.5, markersize=7)
        axes.plot([row["score"]], [-place], "|", color="black", markersize=18, markeredgewidth=2)
    axes.set_yticks(range(0, -len(part.rows), -1), list(part.rows))
    axes.set_ylim(0.6 - len(part.rows), 0.6)
    axes.grid(axis="x", color="#d1d5db", linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    teachers = {row["teacher"] for row in part if "teacher" in row}
    if len(teachers) == 1:
        axes.axvline(*teachers, color=TEACHER, linestyle="--", linewidth=1.4)


def _is_exported(name: str) -> bool:
    """Return whether a system is a graph that narvl export wrote."""
    return any(form in name for form in ("graph", "onnx", "openvino", "torch-export"))


def _bound(data: Measurements) -> str:
    """Draw speed-up and bound over the length of the output, on both machines."""
    into: dict[str, str] = {}
    with _axes(into) as axes:
        for name, label, colour in (("limit_gpu", "H200", COLOURS[1]), ("limit_cpu", "two CPU cores", COLOURS[0])):
            rows = [row for row in data[name] if row["size"] == "base"]
            tokens = [row["tokens"] for row in rows]
            axes.plot(tokens, [row["bound"] for row in rows], "--", color=colour, label=f"{label}: bound")
            speed_ups = [row["speed_up"] for row in rows]
            axes.plot(tokens, speed_ups, "o-", color=colour, label=f"{label}: student")
        axes.axhline(1, color=GREY, linewidth=0.8)
        axes.set_yscale("log", base=2)
        axes.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axes.set_ylim(0.8, 20)
        axes.set_xticks([1, 5, 10, 15, 20])
        axes.set_xlabel("tokens of the output")
        axes.set_ylabel("times as fast as the teacher")
        axes.legend(frameon=False, fontsize=11, ncols=2, loc="lower center", bbox_to_anchor=(0.45, 1))
    return into["svg"]


def _sweep(sweep: Measurement) -> str:
    """Draw the speed-up over the length of the output, a line for each number of queries."""
    into: dict[str, str] = {}
    tokens = [int(count) for count in sweep.raw["teacher_ms"]]
    with _axes(into) as axes:
        for row in sweep:
            speed_ups = [row[f"tokens_{count}"] for count in tokens]
            if row["queries"] == "encoder":
                axes.plot(tokens, speed_ups, "--", color=GREY, label="encoder alone")
            else:
                axes.plot(tokens, speed_ups, "o-", markersize=4, label=f"{row['queries']} queries")
        axes.axhline(1, color=GREY, linewidth=0.8)
        axes.set_xticks([1, 5, 10, 15, 20])
        axes.set_xlabel("tokens of the teacher's output")
        axes.set_ylabel("times as fast as the teacher")
        axes.legend(frameon=False, fontsize=11)
    return into["svg"]


def _confidence(binned: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw the share of correct answers over the confidence, a line for each task."""
    into: dict[str, str] = {}
    with _axes(into) as axes:
        axes.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1)
        for (label, found), colour in zip(binned.items(), COLOURS, strict=False):
            bins = zip(found["confidence"], found["right"], found["share"], strict=True)
            points = [(sure, correct) for sure, correct, share in bins if share >= LEAST_SHARE]
            axes.plot(*zip(*points, strict=True), "o-", markersize=5, color=colour, label=label)
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("confidence")
        axes.set_ylabel("share of correct answers")
        axes.legend(frameon=False, fontsize=11)
    return into["svg"]
