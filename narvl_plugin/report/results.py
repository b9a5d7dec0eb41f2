"""All systems scored on one test set, as a dictionary for ``results.json`` and as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from narvl_plugin.report.subjects import Row, Scores, Table, TaskReport

LABELS = {
    "teacher_allcand": "Teacher, all answers",
    "teacher_beam5": "Teacher, beam 5",
    "teacher_greedy": "Teacher, greedy",
    "student": "Student",
    "student_distilled": "Student, distilled",
    "student_nodistill": "Student, no distillation",
    "student_ce": "Student, cross entropy",
}
TEACHER_WAYS = {"teacher_allcand": "that scores all answers", "teacher_beam5": "with beam 5"}
"""How the reference teachers search; the texts follow `the teacher`."""
CONFIDENCE_LABELS = {
    "teacher": "Teacher",
    "student_uncalibrated": "Student, temperature 1",
    "student": "Student, calibrated",
}
"""The systems whose confidence `narvl calibrate` measures."""
CONFIDENCE_COLUMNS = {
    "accuracy": "mean_right",
    "mean confidence": "mean_confidence",
    "calibration error": "error",
    "error by chance": "error_by_chance",
    "area below risk": "area",
}
"""Its measurements, by heading."""
_MISSING = "–"


@dataclass(frozen=True)
class SystemResult:
    """One system's outputs (by row of the test file) and their scores.

    Attributes:
        name: the name of the system.
        label: its name in the table.
        outputs: the outputs by row.
        scores: the scores of the outputs.
        latency: percentiles in ms as in ``latency.json``; None if not measured.
        latency_ratios: the p50 latency divided by that of each reference teacher, by its name.
        main: the name of the main score.
        base: the name of the teacher with the base score.
        score_ratio: the main score divided by the base score.
    """

    name: str
    label: str
    outputs: Mapping[int, str]
    scores: Scores
    latency: dict[str, float] | None
    latency_ratios: dict[str, float | None]
    main: str
    base: str
    score_ratio: float | None

    def cells(self) -> list[str]:
        """Format the values in the order of `headings`."""
        p50 = self.latency["p50_ms"] if self.latency else None
        return [
            self.label,
            *(_number(value, 3) for value in self.scores.cells.values()),
            _number(p50, 1),
            *(_number(ratio, 3) for ratio in self.latency_ratios.values()),
            _number(self.score_ratio, 3),
        ]

    def as_json(self) -> dict[str, Any]:
        """Return everything but the outputs as JSON values."""
        return {
            "label": self.label,
            "scores": self.scores.values,
            **self.scores.details,
            "latency": self.latency,
            **{f"latency_ratio_to_{teacher}": ratio for teacher, ratio in self.latency_ratios.items()},
            f"{self.main.lower()}_ratio_to_{self.base}": self.score_ratio,
        }


def _number(value: float | str | None, digits: int) -> str:
    """Format a number, or a dash for None; text stays unchanged."""
    if value is None:
        return _MISSING
    return value if isinstance(value, str) else f"{value:.{digits}f}"


def evaluate(
    subject: TaskReport,
    outputs: Mapping[str, Mapping[int, str]],
    rows: Sequence[Row],
    latencies: Mapping[str, dict[str, float]],
    perplexities: Mapping[str, float],
) -> list[SystemResult]:
    """Score every system and the subject's baselines, which need no model.

    Args:
        subject: the task.
        outputs: the outputs by system name, then by row.
        rows: the rows of the test file for which every system has an output.
        latencies: entries of ``latency.json`` by system name.
        perplexities: the teacher's perplexity of systems' outputs by system name, where it was measured.

    Returns:
        The results in the order of ``LABELS``; then other systems, then baselines.
    """
    order = [name for name in LABELS if name in outputs]
    order += sorted(outputs.keys() - set(order))
    systems = {name: outputs[name] for name in order} | subject.say_baselines(rows)
    scores = subject.score(systems, rows)
    for name, perplexity in perplexities.items():
        scores[name] = replace(scores[name], details={**scores[name].details, "perplexity": perplexity})

    # Only with a list of answers can a teacher score all of them.
    teachers = [name for name in subject.teachers if name in outputs] or [next(iter(subject.teachers))]
    base = scores.get(teachers[0])
    teacher_p50 = {name: latencies[name]["p50_ms"] if name in latencies else None for name in teachers}
    results = []
    for name, said in systems.items():
        latency = latencies.get(name)
        results.append(
            SystemResult(
                name=name,
                label=subject.baselines.get(name) or LABELS.get(name, name),
                outputs=said,
                scores=scores[name],
                latency=latency,
                latency_ratios={
                    teacher: latency["p50_ms"] / p50 if latency and p50 else None
                    for teacher, p50 in teacher_p50.items()
                },
                main=subject.main,
                base=teachers[0],
                score_ratio=_ratio(scores[name].values[subject.main], base.values[subject.main] if base else None),
            )
        )
    return results


def _ratio(value: float, base: float | None) -> float | None:
    """Return a share of a base; None without a base."""
    return value / base if base else None


def headings(subject: TaskReport, results: Sequence[SystemResult]) -> list[str]:
    """Return the headings of the table's columns."""
    first = results[0]
    ratios = [subject.teachers[teacher] for teacher in first.latency_ratios]
    if len(ratios) == 1:
        ratios = ["ratio"]
    return ["system", *first.scores.cells, "p50 ms", *ratios, f"{subject.main}/teacher"]


def notes(
    subject: TaskReport, results: Sequence[SystemResult], rows: Sequence[Row], machine: Mapping[str, Any], left_out: int
) -> list[str]:
    """Return the sentences that a reader needs to compare the numbers with others.

    Args:
        subject: the task.
        results: all systems.
        rows: the scored rows.
        machine: the machine of ``latency.json``.
        left_out: the number of test rows that were not scored.

    Returns:
        The sentences.
    """
    scores = {result.name: result.scores for result in results}
    sentences = subject.notes(rows, scores)
    if left_out:
        sentences.append(f"{left_out:,} test {subject.unit} are left out, because some system has no output for them.")
    latency = next((result.latency for result in results if result.latency), None)
    if latency:
        columns = [subject.teachers[teacher] for teacher in results[0].latency_ratios]
        ways = [f"the teacher {TEACHER_WAYS[teacher]}" for teacher in results[0].latency_ratios]
        ratios = (
            f"ratio: to {ways[0]}"
            if len(ways) == 1
            else "; ".join(f"{column}: to {way}" for column, way in zip(columns, ways, strict=True))
        )
        sentences.append(
            "p50 ms: median time from a row's bytes to text, one image at a time "
            f"({latency['n']:.0f} measurements a system, taken in turns); {ratios}."
        )
    if machine:
        sentences.append(f"Machine: {', '.join(f'{key} {value}' for key, value in machine.items())}.")
    return sentences + subject.closing_notes(scores)


def further_tables(subject: TaskReport, results: Sequence[SystemResult]) -> list[Table]:
    """Return the subject's tables beside the table of all systems."""
    return subject.tables({result.name: (result.label, result.scores) for result in results})


def confidence_tables(calibration: Mapping[str, Any]) -> list[Table]:
    """Return the table of the confidence's calibration, if `narvl calibrate` has measured it."""
    systems = calibration.get("systems")
    if not systems:
        return []
    return [
        Table(
            title=(
                f"Confidence: the student's temperature is {calibration['temperature']:.2f}, log-odds are taken "
                f"{calibration['slope']:.2f} times {calibration['offset']:+.2f}, fitted on "
                f"{calibration['fitted_on']:,} validation rows"
            ),
            headings=("system", *CONFIDENCE_COLUMNS),
            rows=[
                (label, *(f"{systems[name][key]:.3f}" for key in CONFIDENCE_COLUMNS.values()))
                for name, label in CONFIDENCE_LABELS.items()
                if name in systems
            ],
        )
    ]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table as Markdown, with numbers aligned right."""
    lines = [columns, ("---",) + ("---:",) * (len(columns) - 1), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def markdown(
    subject: TaskReport, results: Sequence[SystemResult], sentences: Sequence[str], tables: Sequence[Table]
) -> str:
    """Format the table of all systems, the notes and further tables as Markdown."""
    parts = [
        markdown_table(headings(subject, results), [result.cells() for result in results]),
        "".join(f"- {sentence}\n" for sentence in sentences),
        *(f"{table.title}\n\n{markdown_table(table.headings, table.rows)}" for table in tables),
    ]
    return "\n".join(parts)
