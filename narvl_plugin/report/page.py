"""The HTML page of a run: one file, no scripts, nothing from the network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from narvl_plugin.report.outputs import picture_data_uris
from narvl_plugin.report.results import TEACHER_WAYS, SystemResult, headings
from narvl_plugin.report.slots import Slot
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
    slots: list[list[Slot]] | None,
    test_tsv: Path,
) -> list[Card]:
    """Put together what is known of each row; the outputs shown are the teacher's and the student's."""
    shown = [result for result in results if result.name in (result.base, STUDENT)]
    if not shown:  # a run of other systems
        shown = [result for result in results if result.name not in subject.baselines]
    images = picture_data_uris(test_tsv, subject.image_column, [row.number for row in rows], PICTURE_SIDE)
    return [
        Card(
            name=row.ids[-1],
            image=images[place],
            prompt=row.prompt,
            references=row.references,
            region=subject.reference_region(row),
            outputs=[_output(subject, row, result) for result in shown],
            slots=slots[place] if slots else None,
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
    charts: Sequence[tuple[str, str]],
    rows: Sequence[Row],
    slots: list[list[Slot]] | None,
    test_tsv: Path,
    settings: Mapping[str, str],
) -> str:
    """Write the page.

    Args:
        subject: the task.
        results: all systems.
        notes: sentences below the table.
        tables: further tables.
        charts: title and ``<svg>`` element of each training curve.
        rows: test rows to show.
        slots: the student's queries on them, or None.
        test_tsv: file that holds the pictures.
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
        charts=[(title, Markup(svg)) for title, svg in charts],
        cards=make_cards(subject, rows, results, slots, test_tsv),
        has_slots=slots is not None,
        settings=settings,
    )
