"""The HTML page of a run: one file, no scripts, nothing from the network."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from narvl_plugin.report.outputs import TestPicture, picture_data_uris
from narvl_plugin.report.results import BASELINE, COLUMNS, NOUNS_ONLY, SystemResult
from narvl_plugin.report.slots import Slot

TRAINING_LABELS = {
    "teacher": "Teacher",
    "student": "Student",
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
    """What one system said about a picture, and the CIDEr of it."""

    role: str
    label: str
    text: str
    cider: float


@dataclass(frozen=True)
class Card:
    """One test picture with all that is shown beside it."""

    name: str
    image: str
    references: list[str]
    outputs: list[Output]
    slots: list[Slot] | None


def headlines(results: list[SystemResult]) -> list[Headline]:
    """Give the few numbers that a run is judged by, as far as they were measured."""
    systems = {result.name: result for result in results}
    teacher, student = systems.get(BASELINE), systems.get(STUDENT)
    numbers = []
    if student and student.cider_ratio is not None:
        numbers.append(Headline(f"{student.cider_ratio:.1%}", "of the teacher's CIDEr reached by the student"))
    if student and student.latency_ratio:
        numbers.append(Headline(f"{1 / student.latency_ratio:.1f} ×", "the speed of the teacher with beam 5"))
    if student and student.latency:
        numbers.append(Headline(f"{student.latency['p50_ms']:.1f} ms", "student, median time for one picture"))
    if teacher and teacher.object_recall is not None:
        numbers.append(Headline(f"{teacher.object_recall:.1%}", "of the objects are named by the teacher"))
    if student and student.object_recall is not None:
        numbers.append(Headline(f"{student.object_recall:.1%}", "of the objects are named by the student"))
    return numbers


def make_cards(
    pictures: list[TestPicture], results: list[SystemResult], slots: list[list[Slot]] | None, test_tsv: Path
) -> list[Card]:
    """Put together what is known of each picture; the outputs shown are the teacher's and the student's."""
    shown = [result for result in results if result.name in (BASELINE, STUDENT)]
    if not shown:  # a run of other systems
        shown = [result for result in results if result.name != NOUNS_ONLY]
    images = picture_data_uris(test_tsv, [picture.row for picture in pictures], PICTURE_SIDE)
    cards = []
    for place, picture in enumerate(pictures):
        outputs = [
            Output(
                role="student" if result.name.startswith(STUDENT) else "teacher",
                label=result.label,
                text=result.captions[picture.row],
                cider=result.scores.cider_each[str(picture.row)],
            )
            for result in shown
        ]
        cards.append(
            Card(picture.image_id, images[place], picture.references, outputs, slots[place] if slots else None)
        )
    return cards


def render_page(
    *,
    results: list[SystemResult],
    notes: list[str],
    charts: list[tuple[str, str]],
    pictures: list[TestPicture],
    slots: list[list[Slot]] | None,
    test_tsv: Path,
    settings: Mapping[str, str],
) -> str:
    """Write the page.

    Args:
        results: all systems.
        notes: sentences below the table.
        charts: title and ``<svg>`` element of each training curve.
        pictures: test pictures to show.
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
        headlines=headlines(results),
        columns=COLUMNS,
        results=results,
        notes=notes,
        charts=[(title, Markup(svg)) for title, svg in charts],
        cards=make_cards(pictures, results, slots, test_tsv),
        has_slots=slots is not None,
        settings=settings,
    )
