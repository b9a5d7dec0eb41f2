"""GQA's accuracy of answers, which compares their spelling; and the fairseq scorer `gqa`."""

from dataclasses import dataclass

from narvl_plugin.scoring.base import Scorer, ScorerConfig
from narvl_plugin.scoring.vqa import read_references


def same_answer(said: str, answer: str) -> bool:
    """Tell whether two answers are equal apart from case and surrounding spaces, which GQA's answers do not have."""
    return said.strip().lower() == answer.strip().lower()


@dataclass
class GqaConfig(ScorerConfig):
    """The scorer `gqa` has no settings."""


class GqaScorer(Scorer[GqaConfig]):
    """fairseq scorer; the reference string is a column of answers, `confidence|!+answer&&…`. The best answer counts."""

    def score(self) -> float:
        """Return the accuracy, the metric of GQA.

        Raises:
            InputError: for unreadable references.
            ValueError: if there is nothing to score.
        """
        if not self.ref:
            raise ValueError("no answers to score")
        best = [max(answers, key=answers.__getitem__) for answers in read_references(self.ref)]
        return sum(map(same_answer, self.pred, best)) / len(best)

    def result_string(self) -> str:
        """Format the accuracy in one line."""
        return f"accuracy {self.score():.4f} ({len(self.ref)} questions)"
