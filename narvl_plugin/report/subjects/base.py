"""The interface of a task to the report."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from narvl_plugin.scoring.base import AnyScorer
from narvl_plugin.tasks.base import BaseTask

Outputs = Mapping[int, str]
"""One system's outputs, by row of the test file."""
Region = tuple[float, float, float, float]
"""Left, upper, right and lower edge of a region, as shares (0 to 1) of the image's width and height."""

BEAM_5 = {"teacher_beam5": "ratio"}
ALL_CANDIDATES_AND_BEAM_5 = {"teacher_allcand": "ratio all", "teacher_beam5": "ratio beam"}
RIGHT = 0.5  # the least score of an output that is marked as correct


@dataclass(frozen=True)
class Row:
    """A row of a test file without its image.

    Attributes:
        number: the number of the row, from 0.
        ids: the ids that fairseq-generate may write for it, the unique one first.
        prompt: the question about the image; empty if all rows ask the same.
        references: correct outputs, as the page shows them.
    """

    number: int
    ids: tuple[str, ...]
    prompt: str
    references: list[str]


@dataclass(frozen=True)
class Scores:
    """The scores of one system's outputs.

    Attributes:
        values: the scores by name, as in results.json; the subject's `main` is one of them.
        cells: the scores by heading of the table, as numbers or as text; None for no value.
        each: the score that the page shows beside an output, by row.
        details: further entries of results.json.
    """

    values: dict[str, float]
    cells: dict[str, float | str | None]
    each: dict[int, float]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A further table.

    Attributes:
        title: its title.
        headings: the headings of the columns.
        rows: rows of cells; the first cell of each is its heading.
    """

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]


RowT = TypeVar("RowT", bound=Row)


class TaskReport(ABC, Generic[RowT]):
    """A task in the report.

    Attributes:
        task: its name in fairseq.
        columns: the columns of a test file that `read` takes, from 0.
        image_column: the column of the image, from 0.
        unit: the name of a row, in the plural.
        main: the main score, a name in `Scores.values`.
        teachers: the reference systems of latency and their headings; the first is the base of scores.
        curve: the name of the validation score in training logs, and its label.
        baselines: labels of systems that need no model, by name.
        title: the title of the page.
        lead: the first paragraph of the page.
        beside: what the page shows beside an output.
        confidence: what the confidence is about, in sentences; empty for a task whose confidence is not reported.
        perplexity_rows: largest number of rows on which the teacher's perplexity of the outputs is measured.
    """

    task: ClassVar[str]
    columns: ClassVar[tuple[int, ...]]
    image_column: ClassVar[int]
    unit: ClassVar[str]
    main: ClassVar[str]
    teachers: ClassVar[dict[str, str]]
    curve: ClassVar[tuple[str, str]]
    baselines: ClassVar[dict[str, str]]
    title: ClassVar[str]
    lead: ClassVar[str]
    beside: ClassVar[str] = "whether it is correct"
    confidence: ClassVar[str] = (
        "Confidence is a system's own probability that its answer is correct. A teacher's is the probability of its "
        "output."
    )
    perplexity_rows: ClassVar[int] = 0

    def __init__(self, task: BaseTask | None, test_tsv: Path) -> None:
        """Create the subject.

        Args:
            task: the student's task; None without its checkpoint.
            test_tsv: the test file. Image paths are relative to its folder.
        """

    @abstractmethod
    def read(self, number: int, columns: Sequence[str], where: str) -> RowT:
        """Return the row of some columns of the test file.

        Args:
            number: the number of the row, from 0.
            columns: the columns.
            where: FILE:ROW, for errors.

        Returns:
            The row.

        Raises:
            BadRow: if the row cannot be used.
        """

    @abstractmethod
    def say_baselines(self, rows: Sequence[RowT]) -> dict[str, Outputs]:
        """Return the outputs of systems that need no model, by name."""

    @abstractmethod
    def score(self, systems: Mapping[str, Outputs], rows: Sequence[RowT]) -> dict[str, Scores]:
        """Score systems that have an output for every row."""

    def notes(self, rows: Sequence[RowT], scores: Mapping[str, Scores]) -> list[str]:
        """Return sentences on the measurement; the first one gives the number of rows."""
        return [f"{len(rows):,} test {self.unit}."]

    def closing_notes(self, scores: Mapping[str, Scores]) -> list[str]:
        """Return sentences on the limits of the scores, below all others."""
        return []

    def tables(self, scores: Mapping[str, tuple[str, Scores]]) -> list[Table]:
        """Return further tables of systems, given their labels and scores by name."""
        return []

    def headlines(self, student: Scores, teacher: Scores | None) -> list[tuple[str, str]]:
        """Return numbers in large type, with captions: the student's scores, and the teacher's if it was scored."""
        compared = and_teacher(teacher.values[self.main] if teacher else None)
        return [(percent(student.values[self.main]), f"{self.main} of the student{compared}")]

    def main_score(self, score: float) -> float:
        """Return the part of a row in the main score, which is the mean over rows, given the row's score."""
        return score

    def verdict(self, score: float) -> tuple[str, str]:
        """Return the text beside an output of this score, and its mark: ``right``, ``wrong`` or empty."""
        return ("right", "right") if score >= RIGHT else ("wrong", "wrong")

    def shown(self, row: RowT, output: str) -> str:
        """Return an output as the page shows it."""
        return output

    def reference_regions(self, row: RowT) -> list[Region] | None:
        """Return the regions of the image that the row refers to; None for tasks without regions."""
        return None

    def regions(self, row: RowT, output: str) -> list[Region]:
        """Return the regions of the image that an output names."""
        return []

    def picture(self, row: RowT, output: str) -> str:
        """Return a drawing of an output as an `<svg>` element; empty for tasks whose outputs are texts or regions."""
        return ""


def percent(share: float) -> str:
    """Format a share from 0 to 1."""
    return f"{100 * share:.1f} %"


def and_teacher(share: float | None) -> str:
    """Return the teacher's share in brackets, to follow the student's; empty without a teacher."""
    return "" if share is None else f" (teacher: {percent(share)})"


def fill(scorer: AnyScorer, references: Sequence[str], outputs: Sequence[str]) -> None:
    """Add references and outputs to a fairseq scorer."""
    for reference, output in zip(references, outputs, strict=True):
        scorer.add_string(reference, output)
