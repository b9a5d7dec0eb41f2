"""The fairseq scorer `entailment`: accuracy and a confusion matrix."""

from collections import Counter
from dataclasses import dataclass

from narvl_plugin.data.text import ENTAILMENT_ANSWERS
from narvl_plugin.scoring.base import Scorer, ScorerConfig

OTHER = "other"


@dataclass
class EntailmentConfig(ScorerConfig):
    """The scorer `entailment` has no settings."""


class EntailmentScorer(Scorer[EntailmentConfig]):
    """fairseq scorer; reference and hypothesis are yes, no or maybe each. Any other hypothesis is wrong."""

    def confusion(self) -> dict[str, Counter[str]]:
        """Count hypotheses by reference; any other text counts as `other`.

        Returns:
            The counts of the hypotheses, by reference.

        Raises:
            ValueError: for a reference that is not one of the answers.
        """
        answers = list(ENTAILMENT_ANSWERS.values())
        counts: dict[str, Counter[str]] = {answer: Counter() for answer in answers}
        for reference, said in zip(self.ref, self.pred, strict=True):
            if reference not in counts:
                raise ValueError(
                    f"the reference {reference!r} is none of {', '.join(answers)}; score with --task snli_ve"
                )
            counts[reference][said if said in answers else OTHER] += 1
        return counts

    def score(self) -> float:
        """Return the accuracy, the metric of entailment."""
        if not self.ref:
            raise ValueError("no answers to score")
        return sum(counts[answer] for answer, counts in self.confusion().items()) / len(self.ref)

    def result_string(self) -> str:
        """Format the accuracy and the confusion matrix in one line."""
        rows = [
            f"{answer}: {', '.join(f'{counts[said]} {said}' for said in (*ENTAILMENT_ANSWERS.values(), OTHER))}"
            for answer, counts in self.confusion().items()
        ]
        return f"accuracy {self.score():.4f} ({len(self.ref)} rows); {'; '.join(rows)}"
