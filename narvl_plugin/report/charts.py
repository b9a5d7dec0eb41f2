"""Charts of training and of confidence, as SVG inside an HTML page, without network access."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from narvl_plugin.report.outputs import TrainingLog
from narvl_plugin.report.results import CONFIDENCE_LABELS

TEACHER = "teacher"
COLOURS = {
    TEACHER: "#1f5fa8",
    "student": "#d9480f",
    "student_distilled": "#7048b6",
    "student_nodistill": "#7048b6",
    "student_ce": "#2b8a3e",
}
CONFIDENCE_STYLES = {
    "teacher": (COLOURS[TEACHER], "-"),
    "student_uncalibrated": (COLOURS["student"], ":"),
    "student": (COLOURS["student"], "-"),
}
_INK, _RULE = "#1c2430", "#d5dae1"
_STYLE: dict[Any, Any] = {  # matplotlib types its keys as literals
    "svg.fonttype": "none",
    "svg.hashsalt": "narvl",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))

Curve = Sequence[tuple[float, float]]


def line_chart(
    curves: Mapping[str, tuple[str, Curve, str]], *, ylabel: str, description: str, xlabel: str | None = None
) -> str:
    """Draw curves.

    Args:
        curves: the colour, the points (x, value) and the line style, by label.
        ylabel: the name of the values.
        description: the text for screen readers.
        xlabel: the name of x, a share from 0 to 1; without it, x is the number of updates.

    Returns:
        An ``<svg>`` element.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 3.1), layout="constrained")
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
        if xlabel is None:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        else:
            axes.set_xlim(0, 1.02)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=_RULE, linewidth=0.6)
        axes.legend(frameon=False, fontsize=9)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata=_NO_METADATA)
    return _for_html(stream.getvalue(), description)


def _for_html(svg: str, description: str) -> str:
    """Remove the parts of a separate file (XML header, fixed size) and add a description."""
    svg = svg[svg.index("<svg") :]
    opening, rest = svg.split(">", 1)
    opening = re.sub(r'\s(?:width|height|xmlns(?::\w+)?)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{description}">{rest}'


def training_charts(
    logs: Mapping[str, TrainingLog], labels: Mapping[str, str], score: tuple[str, str]
) -> list[tuple[str, str]]:
    """Draw the training logs: losses (negative log-likelihood), validation score, share of blanks.

    Args:
        logs: the logs by folder name, a key of ``COLOURS``.
        labels: the labels of the systems, by folder name.
        score: the curve of the validation score, and its name.

    Returns:
        Pairs of title and ``<svg>`` element; charts without any point are left out.
    """
    teachers = {name: log for name, log in logs.items() if name == TEACHER}
    students = {name: log for name, log in logs.items() if name != TEACHER}
    score_curve, score_name = score
    plans = [
        ("Teacher: loss", teachers, {"nll_loss": "-", "valid_nll_loss": "--"}, "bits per token"),
        ("Students: loss", students, {"nll_loss": "-", "valid_nll_loss": "--"}, "bits per token"),
        (f"Validation {score_name}", logs, {score_curve: "-"}, score_name),
        ("Queries that predict the blank", students, {"blank_share": "-"}, "share of queries"),
    ]
    charts = []
    for title, chosen, styles, ylabel in plans:
        curves = {}
        for name, log in chosen.items():
            for curve, style in styles.items():
                if curve in log.curves:
                    suffix = ", validation" if curve == "valid_nll_loss" else ""
                    curves[labels[name] + suffix] = (COLOURS[name], log.curves[curve], style)
        if curves:
            charts.append((title, line_chart(curves, ylabel=ylabel, description=f"{title} over updates")))
    return charts


def confidence_charts(measured: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Draw the accuracy of systems by their confidence, and their error rate among their most confident answers.

    Args:
        measured: by system, `Reliability` as `narvl calibrate` writes it.

    Returns:
        Pairs of title and ``<svg>`` element.
    """
    reliability: dict[str, tuple[str, Curve, str]] = {"perfect calibration": (_RULE, [(0.0, 0.0), (1.0, 1.0)], "-")}
    risk = {}
    for name, (colour, style) in CONFIDENCE_STYLES.items():
        if name not in measured:
            continue
        label, values = CONFIDENCE_LABELS[name], measured[name]
        reliability[label] = (colour, list(zip(values["confidence"], values["right"], strict=True)), style)
        risk[label] = (colour, list(zip(values["coverage"], values["risk"], strict=True)), style)
    titles = ("Accuracy by confidence", "Error rate among the most confident answers")
    return [
        (titles[0], line_chart(reliability, xlabel="confidence", ylabel="accuracy", description=titles[0])),
        (titles[1], line_chart(risk, xlabel="share answered", ylabel="error rate", description=titles[1])),
    ]
