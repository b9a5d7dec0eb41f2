"""Visual entailment in the report."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from narvl_plugin.data.text import ENTAILMENT_ANSWERS
from narvl_plugin.errors import BadRow
from narvl_plugin.report.subjects.base import (
    ALL_CANDIDATES_AND_BEAM_5,
    Outputs,
    Row,
    Scores,
    Table,
    TaskReport,
    fill,
)
from narvl_plugin.scoring.entailment import OTHER, EntailmentConfig, EntailmentScorer
from narvl_plugin.tasks.base import BaseTask

MOST_FREQUENT = "most_frequent"


@dataclass(frozen=True)
class HypothesisRow(Row):
    """A hypothesis with its answer: yes, no or maybe."""

    answer: str


class SnliVeReport(TaskReport[HypothesisRow]):
    """Visual entailment; the baseline gives every hypothesis the same answer."""

    task = "snli_ve"
    columns = (0, 3, 4, 5)  # uniq-id, hypothesis, caption, label
    image_column = 2
    unit = "hypotheses"
    main = "accuracy"
    teachers = ALL_CANDIDATES_AND_BEAM_5
    curve = ("valid_snli_score", "accuracy")
    baselines = {MOST_FREQUENT: "Most frequent answer"}
    title = "Entailment in one pass"
    lead = (
        "Does an image entail a hypothesis? Yes, no or maybe. A teacher scores the three answers token by token. Its "
        "student predicts its answer at once with a fixed set of queries, trained by Query-CTC. This page compares "
        "their quality and speed on images that neither has seen."
    )

    def __init__(self, task: BaseTask | None, test_tsv: Path) -> None:
        self._with_caption = task is not None and bool(getattr(task.cfg, "add_caption"))  # noqa: B009 - an option of this task alone

    def read(self, number: int, columns: Sequence[str], where: str) -> HypothesisRow:
        """Return the row; see `TaskReport.read`. An unknown label raises BadRow."""
        unique_id, hypothesis, caption, label = columns
        if label not in ENTAILMENT_ANSWERS:
            raise BadRow(f"{where}: the label {label!r} is unknown; expected {', '.join(ENTAILMENT_ANSWERS)}")
        answer = ENTAILMENT_ANSWERS[label]
        prompt = f"{caption} → {hypothesis}" if self._with_caption else hypothesis
        return HypothesisRow(number, (unique_id,), prompt, [f"{answer} ({label})"], answer)

    def say_baselines(self, rows: Sequence[HypothesisRow]) -> dict[str, Outputs]:
        """Return the most frequent answer to every hypothesis."""
        ((answer, _),) = Counter(row.answer for row in rows).most_common(1)
        return {MOST_FREQUENT: dict.fromkeys((row.number for row in rows), answer)}

    def score(self, systems: Mapping[str, Outputs], rows: Sequence[HypothesisRow]) -> dict[str, Scores]:
        """Score answers by accuracy; the details hold the confusion matrix as `confusion`."""
        scores = {}
        for name, said in systems.items():
            scorer = EntailmentScorer(EntailmentConfig())
            fill(scorer, [row.answer for row in rows], [said[row.number] for row in rows])
            values = {self.main: scorer.score()}
            confusion = {answer: dict(counts) for answer, counts in scorer.confusion().items()}
            each = {row.number: float(said[row.number] == row.answer) for row in rows}
            scores[name] = Scores(values, dict(values), each, {"confusion": confusion})
        return scores

    def closing_notes(self, scores: Mapping[str, Scores]) -> list[str]:
        """Return the source and the limits of the baseline's answer."""
        return [
            "Most frequent answer: always the one that is most frequent in this test file itself. It is a weak "
            "baseline: the wording of a hypothesis alone often reveals its label. A higher accuracy does not show "
            "that the image is looked at."
        ]

    def tables(self, scores: Mapping[str, tuple[str, Scores]]) -> list[Table]:
        """Return the confusion matrix of each system that is a model."""
        answers = tuple(ENTAILMENT_ANSWERS.values())
        said = (*answers, OTHER)
        return [
            Table(
                title=f"{label}: right answer by row, given answer by column",
                headings=("", *said),
                rows=[
                    (right, *(str(result.details["confusion"][right].get(answer, 0)) for answer in said))
                    for right in answers
                ],
            )
            for name, (label, result) in scores.items()
            if name not in self.baselines
        ]
