"""The HTML page of a run: one file, no scripts, nothing from the network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from narvl_plugin.report.outputs import data_uri
from narvl_plugin.report.readings import Look, Reading, Slot
from narvl_plugin.report.results import TEACHER_WAYS, SystemResult, headings
from narvl_plugin.report.subjects import Row, Subject, Table
from narvl_plugin.report.subjects.base import Region

TRAINING_LABELS = {
    "teacher": "Teacher",
    "student": "Student",
    "student_distilled": "Student, distilled",
    "student_nodistill": "Student, no distillation",
    "student_ce": "Student, cross entropy",
}
STUDENT = "student"
PICTURE_SIDE = 320  # pixels; twice what the page shows, for sharp screens


@dataclass(frozen=True)
class Headline:
    """One number that stands large at the top of the page."""

    value: str
    caption: str


@dataclass(frozen=True)
class Output:
    """What one system said about a picture, how good that is (`mark`: right, wrong or none), and where."""

    role: str
    label: str
    text: str
    verdict: str
    mark: str
    region: Region | None


@dataclass(frozen=True)
class Card:
    """One test row with all that is shown beside its picture."""

    name: str
    image: str
    prompt: str
    references: list[str]
    region: Region | None
    outputs: list[Output]
    slots: list[Slot] | None
    looks: list[Look]
    nbest: list[tuple[str, float]]


def headlines(subject: Subject, results: Sequence[SystemResult]) -> list[Headline]:
    """Give the few numbers that a run is judged by, as far as they were measured."""
    systems = {result.name: result for result in results}
    teacher, student = systems.get(results[0].base), systems.get(STUDENT)
    numbers = []
    if student and student.score_ratio is not None:
        numbers.append(
            Headline(f"{student.score_ratio:.1%}", f"of the teacher's {subject.main} reached by the student")
        )
    for name, ratio in student.latency_ratios.items() if student else ():
        if ratio:
            numbers.append(Headline(f"{1 / ratio:.1f} ×", f"the speed of the teacher {TEACHER_WAYS[name]}"))
    if student and student.latency:
        numbers.append(Headline(f"{student.latency['p50_ms']:.1f} ms", "student, median time for one picture"))
    for label, result in (("teacher", teacher), ("student", student)):
        if result:
            numbers += [Headline(*number) for number in subject.headlines(label, result.scores)]
    return numbers


def make_cards(
    subject: Subject,
    rows: Sequence[Row],
    results: Sequence[SystemResult],
    readings: Sequence[Reading] | None,
    pictures: Sequence[Image.Image],
) -> list[Card]:
    """Put together what is known of each row; the outputs shown are the teacher's and the student's."""
    shown = [result for result in results if result.name in (result.base, STUDENT)]
    if not shown:  # a run of other systems
        shown = [result for result in results if result.name not in subject.baselines]
    return [
        Card(
            name=row.ids[-1],
            image=data_uri(pictures[place], quality=90),
            prompt=row.prompt,
            references=row.references,
            region=subject.reference_region(row),
            outputs=[_output(subject, row, result) for result in shown],
            slots=readings[place].slots if readings else None,
            looks=readings[place].looks if readings else [],
            nbest=[(subject.shown(row, text), sure) for text, sure in readings[place].nbest] if readings else [],
        )
        for place, row in enumerate(rows)
    ]


def _output(subject: Subject, row: Row, result: SystemResult) -> Output:
    """Return what is shown of a system's output."""
    said = result.outputs[row.number]
    verdict, mark = subject.verdict(result.scores.each[row.number])
    return Output(
        role="student" if result.name.startswith(STUDENT) else "teacher",
        label=result.label,
        text=subject.shown(row, said),
        verdict=verdict,
        mark=mark,
        region=subject.region(row, said),
    )


def render_page(
    *,
    subject: Subject,
    results: Sequence[SystemResult],
    notes: Sequence[str],
    tables: Sequence[Table],
    charts: Mapping[str, Sequence[tuple[str, str]]],
    rows: Sequence[Row],
    readings: Sequence[Reading] | None,
    pictures: Sequence[Image.Image],
    settings: Mapping[str, str],
) -> str:
    """Write the page.

    Args:
        subject: the task.
        results: all systems.
        notes: sentences below the table.
        tables: further tables.
        charts: title and ``<svg>`` element of each chart, by heading.
        rows: test rows to show.
        readings: what the student's queries say about them, or None.
        pictures: those of the rows.
        settings: of the run.
    """
    environment = Environment(
        loader=PackageLoader("narvl_plugin.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        subject=subject,
        headlines=headlines(subject, results),
        columns=headings(subject, results),
        results=results,
        notes=notes,
        tables=tables,
        charts={heading: [(title, Markup(svg)) for title, svg in drawn] for heading, drawn in charts.items() if drawn},
        cards=make_cards(subject, rows, results, readings, pictures),
        has_slots=readings is not None,
        settings=settings,
    )
