"""Answers to questions in the report."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from narvl_plugin.data.vqa_gen import parse_answers
from narvl_plugin.report.subjects.base import ALL_CANDIDATES_AND_BEAM_5, Outputs, Row, Scores, TaskReport, fill
from narvl_plugin.scoring.vqa import VqaConfig, VqaScorer, answer_type, soft_accuracy

MOST_FREQUENT = "most_frequent"
TYPES = ("yes/no", "number", "other")


@dataclass(frozen=True)
class QuestionRow(Row):
    """A question with its answers.

    Attributes:
        answers: the confidence by answer.
        column: the column of the test file that holds the answers.
    """

    answers: dict[str, float]
    column: str


class VqaGenReport(TaskReport[QuestionRow]):
    """Visual question answering; the baseline gives every question the same answer."""

    task = "vqa_gen"
    columns = (0, 2, 3)  # question-id, question, answers
    image_column = 5
    unit = "questions"
    main = "accuracy"
    teachers = ALL_CANDIDATES_AND_BEAM_5
    curve = ("valid_vqa_score", "soft accuracy")
    baselines = {MOST_FREQUENT: "Most frequent answer"}
    confidence = (
        f"{TaskReport.confidence} An answer that only some people gave counts as correct in part, by its soft accuracy."
    )
    title = "Answers in one pass"
    lead = (
        "A teacher answers questions about images token by token, or scores every answer of a list. Its student "
        "predicts all tokens of its answer at once with a fixed set of queries, trained by Query-CTC. This page "
        "compares their quality and speed on questions that neither has seen."
    )

    def read(self, number: int, columns: Sequence[str], where: str) -> QuestionRow:
        """Return the row; see `TaskReport.read`. Answers of another form raise BadRow."""
        unique_id, question, column = columns
        answers = parse_answers(column, where)
        best_first = sorted(answers.items(), key=lambda pair: -pair[1])
        shown = [answer if confidence == 1 else f"{answer} ({confidence:g})" for answer, confidence in best_first]
        return QuestionRow(number, (unique_id,), question, shown, answers, column)

    def say_baselines(self, rows: Sequence[QuestionRow]) -> dict[str, Outputs]:
        """Return the answer that is most often the best one, for every question."""
        ((answer, _),) = Counter(max(row.answers, key=row.answers.__getitem__) for row in rows).most_common(1)
        return {MOST_FREQUENT: dict.fromkeys((row.number for row in rows), answer)}

    def score(self, systems: Mapping[str, Outputs], rows: Sequence[QuestionRow]) -> dict[str, Scores]:
        """Score answers by soft accuracy, over all questions and over those of each type."""
        scores = {}
        for name, said in systems.items():
            scorer = VqaScorer(VqaConfig())
            fill(scorer, [row.column for row in rows], [said[row.number] for row in rows])
            by_type = {kind: sum(values) / len(values) for kind, values in scorer.accuracies().items()}
            values = {self.main: scorer.score()} | {kind: by_type[kind] for kind in TYPES if kind in by_type}
            scores[name] = Scores(
                values=values,
                cells={heading: values.get(heading) for heading in (self.main, *TYPES)},
                each={row.number: soft_accuracy(said[row.number], row.answers) for row in rows},
            )
        return scores

    def notes(self, rows: Sequence[QuestionRow], scores: Mapping[str, Scores]) -> list[str]:
        """Return the number of questions of each type, and the definition of accuracy."""
        counts = Counter(answer_type(row.answers) for row in rows)
        parts = ", ".join(f"{counts[kind]:,} {kind}" for kind in TYPES)
        return [
            f"{len(rows):,} test questions ({parts}, by the best answer); accuracy: mean confidence of the predicted "
            "answer among the answers of the question, 0 for any other answer (soft accuracy)."
        ]

    def closing_notes(self, scores: Mapping[str, Scores]) -> list[str]:
        """Return the source of the baseline's answer."""
        return ["Most frequent answer: always the one that is most often the best in this test file itself."]

    def verdict(self, score: float) -> tuple[str, str]:
        """Return the confidence of an answer that is only partly correct, else whether it is correct."""
        text, mark = super().verdict(score)
        return (text if score in (0, 1) else f"soft accuracy {score:.2f}"), mark
