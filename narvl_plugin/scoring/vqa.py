"""Soft accuracy of answers, normalised as in the VQA challenge; and the fairseq scorer `vqa`."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from narvl_plugin.data.vqa_answers import normalise_answer
from narvl_plugin.data.vqa_gen import parse_answers
from narvl_plugin.errors import BadRow, InputError
from narvl_plugin.scoring.base import Scorer, ScorerConfig


def soft_accuracy(said: str, answers: Mapping[str, float]) -> float:
    """Return the confidence of an answer among the correct ones, or 0.

    Confidences of answers that are equal after normalisation add up, to at most 1. OFA's confidences are 0.3, 0.6, 0.9
    and 1 for one, two, three and more of ten annotators. The result is then the challenge's own accuracy.
    """
    said = normalise_answer(said)
    return min(1.0, sum(confidence for answer, confidence in answers.items() if normalise_answer(answer) == said))


def answer_type(answers: Mapping[str, float]) -> str:
    """Return the type of a question by its best answer, in VQA v2's terms: `yes/no`, `number` or `other`."""
    best = normalise_answer(max(answers, key=answers.__getitem__))
    if best in ("yes", "no"):
        return "yes/no"
    return "number" if re.fullmatch(r"\d+(\.\d+)?", best) else "other"


def read_references(references: Iterable[str]) -> Iterator[dict[str, float]]:
    """Yield the answers with their confidences from reference strings, which are columns of answers.

    Raises:
        InputError: for an unreadable reference; references are numbered from 1.
    """
    for number, reference in enumerate(references, start=1):
        try:
            yield parse_answers(reference, f"reference {number}")
        except BadRow as error:
            raise InputError(
                f"{error}; references must come from the split test, and the vocabulary of --bpe-dir must also be "
                "trained on the column of answers"
            ) from error


@dataclass
class VqaConfig(ScorerConfig):
    """The scorer `vqa` has no settings."""


class VqaScorer(Scorer[VqaConfig]):
    """fairseq scorer; the reference string is a column of answers, `confidence|!+answer&&…`."""

    def accuracies(self) -> dict[str, list[float]]:
        """Return the soft accuracy of each question by its type.

        Raises:
            InputError: for unreadable references.
            ValueError: if there is nothing to score.
        """
        scores = defaultdict(list)
        for answers, said in zip(read_references(self.ref), self.pred, strict=True):
            scores[answer_type(answers)].append(soft_accuracy(said, answers))
        if not scores:
            raise ValueError("no answers to score")
        return dict(scores)

    def score(self) -> float:
        """Return the mean soft accuracy, the metric of question answering."""
        return _mean([score for scores in self.accuracies().values() for score in scores])

    def result_string(self) -> str:
        """Format the soft accuracy of all questions and of each type in one line."""
        by_type = sorted(self.accuracies().items())
        parts = [f"{name} {_mean(scores):.4f} ({len(scores)})" for name, scores in by_type]
        return f"soft accuracy {self.score():.4f} ({len(self.ref)} questions), {', '.join(parts)}"


def _mean(scores: list[float]) -> float:
    return sum(scores) / len(scores)
