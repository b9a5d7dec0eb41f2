"""What a report must know of a task."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from fairseq.scoring import BaseScorer

from narvl_plugin.tasks.base import BaseTask

Outputs = Mapping[int, str]
"""What one system says, by row of the test file."""
Region = tuple[float, float, float, float]
"""Left, upper, right and lower edge of a region, as shares (0 to 1) of the picture's width and height."""

BEAM_5 = {"teacher_beam5": "ratio"}
ALL_CANDIDATES_AND_BEAM_5 = {"teacher_allcand": "ratio all", "teacher_beam5": "ratio beam"}
RIGHT = 0.5  # the score from which an output is marked as right


@dataclass(frozen=True)
class Row:
    """A row of a test file, less its picture.

    Attributes:
        number: of the row, from 0.
        ids: those by which fairseq-generate may name it, the unique one first.
        prompt: what is asked about the picture; empty where all rows ask the same.
        references: right outputs, as the page shows them.
    """

    number: int
    ids: tuple[str, ...]
    prompt: str
    references: list[str]


@dataclass(frozen=True)
class Scores:
    """What one system's outputs are worth.

    Attributes:
        values: by name, as results.json holds them; the subject's `main` is one of them.
        cells: by heading of the table; None where there is no value.
        each: the score that the page shows beside an output, by row.
        details: further entries of results.json.
    """

    values: dict[str, float]
    cells: dict[str, float | None]
    each: dict[int, float]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A further table: a title, headings, and rows of cells, the first of each its heading."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]


RowT = TypeVar("RowT", bound=Row)


class Subject(ABC, Generic[RowT]):
    """A task as the report sees it.

    Attributes:
        task: its name with fairseq.
        columns: numbers (from 0) of the columns of a test file that `read` takes; `image_column` is the picture's.
        unit: what a row is, in the plural.
        main: the score that systems are compared by, a name in `Scores.values`.
        teachers: the systems that latency is compared with, and the headings; the first is the base of scores.
        curve: name of the validation score in training logs, and what it is called.
        baselines: labels of systems that need no model, by name.
        title, lead: the page's.
        beside: what the page shows beside an output.
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
    beside: ClassVar[str] = "whether it is right"

    def __init__(self, task: BaseTask | None, folder: Path) -> None:
        """Take the student's task, None without its checkpoint, and the folder that paths of pictures count from."""

    @abstractmethod
    def read(self, number: int, columns: Sequence[str], where: str) -> RowT:
        """Return the row of some columns of the test file; raises BadRow, naming `where` (FILE:ROW)."""

    @abstractmethod
    def say_baselines(self, rows: Sequence[RowT]) -> dict[str, Outputs]:
        """Return what systems say that need no model, by name."""

    @abstractmethod
    def score(self, systems: Mapping[str, Outputs], rows: Sequence[RowT]) -> dict[str, Scores]:
        """Score systems that all say something about all rows."""

    def notes(self, rows: Sequence[RowT], scores: Mapping[str, Scores]) -> list[str]:
        """Return sentences on what was measured; the first says how many rows there are."""
        return [f"{len(rows):,} test {self.unit}."]

    def closing_notes(self, scores: Mapping[str, Scores]) -> list[str]:
        """Return sentences on what the scores do not say, below all others."""
        return []

    def tables(self, scores: Mapping[str, tuple[str, Scores]]) -> list[Table]:
        """Return further tables, of systems by name with their labels."""
        return []

    def headlines(self, label: str, scores: Scores) -> list[tuple[str, str]]:
        """Return numbers that stand large on the page, with captions, of the teacher or the student (`label`)."""
        return [(f"{scores.values[self.main]:.1%}", f"{self.main} of the {label}")]

    def verdict(self, score: float) -> tuple[str, str]:
        """Return what stands beside an output of this score, and its mark: right, wrong, or none."""
        return ("right", "right") if score >= RIGHT else ("wrong", "wrong")

    def shown(self, row: RowT, output: str) -> str:
        """Return an output as the page shows it."""
        return output

    def reference_region(self, row: RowT) -> Region | None:
        """Return the region of the picture that the row is about, if it is about one."""
        return None

    def region(self, row: RowT, output: str) -> Region | None:
        """Return the region of the picture that an output names, if it names one."""
        return None


def fill(scorer: BaseScorer, references: Sequence[str], outputs: Sequence[str]) -> None:
    """Give a scorer of fairseq the references and outputs to score."""
    for reference, output in zip(references, outputs, strict=True):
        scorer.add_string(reference, output)
