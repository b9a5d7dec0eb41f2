"""Charts of training and of confidence, as SVG inside an HTML page, without network access."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from narvl_plugin.report.outputs import TrainingLog
from narvl_plugin.report.results import CONFIDENCE_LABELS
from narvl_plugin.report.svg import GUIDE, INK, NO_METADATA, RULE, STYLE, for_html

TEACHER = "teacher"
COLOURS = {
    TEACHER: "#1f5fa8",
    "student": "#d9480f",
    "student_distilled": "#7048b6",
    "student_nodistill": "#7048b6",
    "student_ce": "#2b8a3e",
}
CONFIDENCESTYLES = {
    "teacher": (COLOURS[TEACHER], "-"),
    "student_uncalibrated": (COLOURS["student"], ":"),
    "student": (COLOURS["student"], "-"),
}
LONG_LABEL = 20
"""Characters of the longest label of a legend with two columns."""
LEAST_CHANGE = 0.02
"""Share of queries: a curve of blanks that changes less is left out."""
_BITS = "bits per token"
Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: its title.
        note: what it shows, in sentences.
        svg: an ``<svg>`` element; empty if there is nothing to draw.
    """

    title: str
    note: str
    svg: str


@dataclass(frozen=True)
class Targets:
    """The outputs that a student learned.

    Attributes:
        taught: whether a teacher wrote them; None if unknown.
        any_of_row: whether any of a row's outputs was correct in training; None if unknown.
    """

    taught: bool | None = None
    any_of_row: bool | None = None

    @property
    def as_in_validation(self) -> bool:
        """Whether a loss in training has the targets of validation: one output of the data a row."""
        return self.taught is False and self.any_of_row is False

    @property
    def in_words(self) -> str:
        """The target of a row, to follow "the loss of"."""
        writer = {True: "that the teacher wrote", False: "that the data has", None: "that the training file has"}
        number = {True: "any of the outputs", False: "one of the outputs", None: "the outputs"}
        return f"{number[self.any_of_row]} {writer[self.taught]} for a row"


def line_chart(
    curves: Mapping[str, tuple[str, Curve, str]], *, ylabel: str, description: str, xlabel: str | None = None
) -> str:
    """Draw curves.

    Args:
        curves: the colour, the points (x, value) and the line style, by label.
        ylabel: the name of the values.
        description: the text for screen readers.
        xlabel: the name of x, a share from 0 to 1 or a count; without it, x is the number of updates.

    Returns:
        An ``<svg>`` element.
    """
    with matplotlib.rc_context(STYLE):
        columns = 1 if max(map(len, curves)) > LONG_LABEL else 2
        height = 3.0 + 0.22 * -(-len(curves) // columns)  # the legend lies above the axes
        figure = Figure(figsize=(4.3, height), layout="constrained")
        axes = figure.add_subplot()
        for label, (colour, points, style) in curves.items():
            places, values = zip(*points, strict=True)
            marker = "o" if len(points) < 25 else None
            axes.plot(
                places,
                values,
                style,
                color=colour,
                label=label,
                linewidth=1.8,
                marker=marker,
                markersize=3.5,
            )
        axes.set_xlabel(xlabel or "updates")
        axes.set_ylabel(ylabel)
        are_counts = any(place > 1 for _, points, _ in curves.values() for place, _ in points)
        if xlabel is None or are_counts:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.set_ylim(bottom=0)
        else:
            axes.set_xlim(0, 1.02)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=11, handlelength=1.6)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata=NO_METADATA)
    return for_html(stream.getvalue(), description)


def points_chart(
    groups: Mapping[str, Sequence[float]], *, ylabel: str, xlabel: str, description: str, base: float | None = None
) -> str:
    """Draw a point for each value of each group, and the mean of each group.

    Args:
        groups: the values by label, in the order of the labels from left to right.
        ylabel: the name of the values.
        xlabel: the name of the labels.
        description: the text for screen readers.
        base: a value to draw as a line for comparison, such as the teacher's.

    Returns:
        An ``<svg>`` element.
    """
    with matplotlib.rc_context(STYLE):
        long = max(map(len, groups)) > 8
        figure = Figure(figsize=(4.3, 3.8 if long else 3.2), layout="constrained")
        axes = figure.add_subplot()
        places = [place for place, values in enumerate(groups.values()) for _ in values]
        flat = [value for values in groups.values() for value in values]
        axes.plot(places, flat, "o", color=COLOURS["student"], alpha=0.45, markersize=6, label="a run")
        means = [(place, sum(values) / len(values)) for place, values in enumerate(groups.values()) if values]
        axes.plot(*zip(*means, strict=True), "_", color=INK, markersize=22, markeredgewidth=2, label="mean")
        if base is not None:
            axes.axhline(base, color=COLOURS[TEACHER], linewidth=1.4, linestyle="--", label="teacher, mean")
        angle: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if long else {}
        axes.set_xticks(range(len(groups)), list(groups), **angle)
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=11, handlelength=1.2)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata=NO_METADATA)
    return for_html(stream.getvalue(), description)


def training_charts(
    logs: Mapping[str, TrainingLog],
    labels: Mapping[str, str],
    score: tuple[str, str],
    targets: Mapping[str, Targets],
) -> list[Chart]:
    """Draw the training logs: validation score, losses (negative log-likelihood), share of blanks.

    A loss in training and a loss in validation share a chart only if they measure the same.

    Args:
        logs: the logs by folder name, a key of ``COLOURS``.
        labels: the labels of the systems, by folder name.
        score: the curve of the validation score, and its name.
        targets: what the students learned, by folder name; unknown for those that are missing.

    Returns:
        The charts; those without any point are left out, and so is a share of blanks that does not change.
    """
    teachers = [name for name in logs if name == TEACHER]
    students = [name for name in logs if name != TEACHER]
    learned = {name: targets.get(name, Targets()) for name in students}
    alike = [name for name in students if learned[name].as_in_validation]
    apart = [name for name in students if name not in alike]
    trained_on = " or ".join(dict.fromkeys(learned[name].in_words for name in apart))
    telling = [name for name in students if _varies(logs[name].curves.get("blank_share", ()))]
    curve, score_name = score

    def draw(title: str, note: str, names: Sequence[str], curves: Mapping[str, tuple[str, str]], ylabel: str) -> Chart:
        """Draw curves of some systems, each with its line style and with what follows the system in the legend."""
        drawn = {
            labels[name] + suffix: (COLOURS[name], logs[name].curves[curve], style)
            for name in names
            for curve, (style, suffix) in curves.items()
            if curve in logs[name].curves
        }
        svg = line_chart(drawn, ylabel=ylabel, description=f"{title}, over updates") if drawn else ""
        return Chart(title, note, svg)

    both = {"nll_loss": ("-", ", training"), "valid_nll_loss": ("--", ", validation")}
    same = "Bits per token of one correct output a row. Dropout acts in training only."
    charts = [
        draw(
            f"{score_name[0].upper()}{score_name[1:]} in validation",
            "Score of the outputs for the validation file. Higher is better.",
            list(logs),
            {curve: ("-", "")},
            score_name,
        ),
        draw("Teacher: loss", same, teachers, both, _BITS),
        draw("Student: loss", same, alike, both, _BITS),
        draw(
            "Student: loss in training",
            f"Bits per token of {trained_on}.",
            apart,
            {"nll_loss": ("-", "")},
            _BITS,
        ),
        draw(
            "Student: loss in validation",
            "Bits per token of the first output that the data has for a row. Training measures another quantity. "
            "This one may rise while the score rises.",
            apart,
            {"valid_nll_loss": ("--", "")},
            _BITS,
        ),
        draw(
            "Blanks",
            "Share of a student's queries whose most probable label is the blank, in training. A blank adds no token.",
            telling,
            {"blank_share": ("-", "")},
            "share of queries",
        ),
    ]
    return [chart for chart in charts if chart.svg]


def _varies(points: Curve) -> bool:
    """Return whether the values of a curve differ enough to be seen."""
    values = [value for _, value in points]
    return bool(values) and max(values) - min(values) >= LEAST_CHANGE


def confidence_charts(measured: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    """Draw the accuracy of systems by their confidence, and their error rate among their most confident answers.

    Args:
        measured: by system, `Reliability` as `narvl calibrate` writes it.

    Returns:
        Two charts.
    """
    reliability: dict[str, tuple[str, Curve, str]] = {"perfect calibration": (GUIDE, [(0.0, 0.0), (1.0, 1.0)], "-")}
    risk = {}
    for name, (colour, style) in CONFIDENCESTYLES.items():
        if name not in measured:
            continue
        label, values = CONFIDENCE_LABELS[name], measured[name]
        reliability[label] = (colour, list(zip(values["confidence"], values["right"], strict=True)), style)
        risk[label] = (colour, list(zip(values["coverage"], values["risk"], strict=True)), style)
    titles = ("Accuracy by confidence", "Error rate among the most confident answers")
    return [
        Chart(
            titles[0],
            "Share of correct answers among those of about the same confidence. Best is the diagonal.",
            line_chart(reliability, xlabel="confidence", ylabel="accuracy", description=titles[0]),
        ),
        Chart(
            titles[1],
            "Share of wrong answers if a system answers only where it is most confident. Lower is better.",
            line_chart(risk, xlabel="share answered", ylabel="error rate", description=titles[1]),
        ),
    ]


def count_charts(scores: Mapping[str, tuple[str, Curve]], main: str) -> list[Chart]:
    """Draw a score over the number of elements of a set; nothing without such scores.

    Args:
        scores: the colour and the points (number of elements, score), by label.
        main: the name of the score.
    """
    curves = {label: (colour, curve, "-") for label, (colour, curve) in scores.items() if len(curve) > 1}
    if not curves:
        return []
    title = f"{main[0].upper()}{main[1:]} by the number of true elements"
    svg = line_chart(curves, xlabel="true elements", ylabel=main, description=title)
    return [Chart(title, "Higher is better.", svg)]
