"""The HTML page of a run: one file without scripts and without network access."""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image

from narvl_plugin.data.shown_images import data_uri
from narvl_plugin.report.about import About
from narvl_plugin.report.charts import Chart
from narvl_plugin.report.readings import HEAT, AttentionMap, QueryView, Slot
from narvl_plugin.report.results import TEACHER_WAYS, SystemResult, headings
from narvl_plugin.report.subjects import Row, Table, TaskReport
from narvl_plugin.report.subjects.base import Region, percent

TRAINING_LABELS = {
    "teacher": "Teacher",
    "student": "Student",
    "student_distilled": "Student, distilled",
    "student_nodistill": "Student, no distillation",
    "student_ce": "Student, cross entropy",
}
STUDENT = "student"
IMAGE_SIDE = 320  # pixels; twice the size on the page, for screens of high resolution


@dataclass(frozen=True)
class Headline:
    """One number in large type at the top of the page."""

    value: str
    caption: str


@dataclass(frozen=True)
class Output:
    """The output of one system for an image.

    Attributes:
        role: ``teacher`` or ``student``, which sets the colour.
        label: the name of the system.
        text: the output as shown.
        verdict: its score as shown.
        mark: ``right``, ``wrong`` or empty.
        regions: the regions that the output names.
        picture: a drawing of the output as an `<svg>` element, or empty.
    """

    role: str
    label: str
    text: str
    verdict: str
    mark: str
    regions: list[Region]
    picture: str


@dataclass(frozen=True)
class Card:
    """One test row with everything shown beside its image."""

    name: str
    image: str
    prompt: str
    references: list[str]
    regions: list[Region] | None
    outputs: list[Output]
    slots: list[Slot] | None
    looks: list[AttentionMap]
    pale: str
    elements: list[tuple[str, float]]
    nbest: list[tuple[str, float]]


@dataclass(frozen=True)
class Section:
    """Some charts with their heading, and with a paragraph that may be empty."""

    heading: str
    lead: str
    charts: Sequence[Chart]


def headlines(subject: TaskReport, results: Sequence[SystemResult]) -> list[Headline]:
    """Return the main numbers of a run; numbers that were not measured are left out."""
    systems = {result.name: result for result in results}
    teacher, student = systems.get(results[0].base), systems.get(STUDENT)
    numbers = []
    if student and student.score_ratio is not None:
        numbers.append(
            Headline(percent(student.score_ratio), f"of the teacher's {subject.main} reached by the student")
        )
    if student:
        scores = subject.headlines(student.scores, teacher.scores if teacher else None)
        numbers += [Headline(*number) for number in scores]
    for name, ratio in student.latency_ratios.items() if student else ():
        if ratio:
            numbers.append(Headline(f"{1 / ratio:.1f} ×", f"the speed of the teacher {TEACHER_WAYS[name]}"))
    if student and student.latency:
        numbers.append(Headline(f"{student.latency['p50_ms']:.1f} ms", "student, median time for one image"))
    return numbers


def make_cards(
    subject: TaskReport,
    rows: Sequence[Row],
    results: Sequence[SystemResult],
    readings: Sequence[QueryView] | None,
    images: Sequence[Image.Image],
) -> list[Card]:
    """Collect everything shown for each row; the outputs are those of the teacher and the student.

    Args:
        subject: the task.
        rows: the test rows to show.
        results: all systems.
        readings: the student's queries on each row, or None.
        images: the images of the rows.

    Returns:
        A card for each row.
    """
    shown = [result for result in results if result.name in (result.base, STUDENT)]
    if not shown:  # a run of other systems
        shown = [result for result in results if result.name not in subject.baselines]
    return [
        Card(
            name=row.ids[-1],
            image=data_uri(images[place], "jpeg", quality=90),
            prompt=row.prompt,
            references=row.references,
            regions=subject.reference_regions(row),
            outputs=[_output(subject, row, result) for result in shown],
            slots=readings[place].slots if readings else None,
            looks=readings[place].looks if readings else [],
            pale=readings[place].pale if readings else "",
            elements=_shown(subject, row, readings[place].elements if readings else []),
            nbest=_shown(subject, row, readings[place].nbest if readings else []),
        )
        for place, row in enumerate(rows)
    ]


def _shown(subject: TaskReport, row: Row, texts: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Return outputs, or parts of one, as shown."""
    return [(subject.shown(row, text), sure) for text, sure in texts]


def _output(subject: TaskReport, row: Row, result: SystemResult) -> Output:
    """Return a system's output as shown."""
    said = result.outputs[row.number]
    verdict, mark = subject.verdict(result.scores.each[row.number])
    return Output(
        role="student" if result.name.startswith(STUDENT) else "teacher",
        label=result.label,
        text=subject.shown(row, said),
        verdict=verdict,
        mark=mark,
        regions=subject.regions(row, said),
        picture=subject.picture(row, said),
    )


def page_template(package: str, name: str) -> Template:
    """Return the template of a page from a package's folder `templates`. It may include those of this package."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("narvl_plugin.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["markup"] = Markup  # of charts, whose texts are escaped
    return environment.get_template(name)


def render_page(
    *,
    subject: TaskReport,
    results: Sequence[SystemResult],
    notes: Sequence[str],
    tables: Sequence[Table],
    sections: Sequence[Section],
    rows: Sequence[Row],
    readings: Sequence[QueryView] | None,
    images: Sequence[Image.Image],
    about: About,
) -> str:
    """Render the page.

    Args:
        subject: the task.
        results: all systems.
        notes: sentences below the table.
        tables: further tables.
        sections: the charts.
        rows: the test rows to show.
        readings: the student's queries on each row, or None.
        images: the images of the rows.
        about: what is known about the run.

    Returns:
        The HTML page.
    """
    cards = make_cards(subject, rows, results, readings, images)
    return page_template("narvl_plugin.report", "report.html.j2").render(
        subject=subject,
        headlines=headlines(subject, results),
        columns=headings(subject, results),
        results=results,
        notes=notes,
        tables=tables,
        sections=[section for section in sections if section.charts],
        cards=cards,
        has_slots=readings is not None,
        has_others=any(len(card.nbest) > 1 for card in cards),
        heat=[f"rgba({red}, {green}, {blue}, {opacity / 255:.2f})" for red, green, blue, opacity in HEAT],
        about=about,
    )
