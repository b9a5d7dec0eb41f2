"""Accuracy of answers as GQA judges them, as they are spelt; and the fairseq scorer `gqa`."""

from dataclasses import dataclass

from fairseq.dataclass import FairseqDataclass
from fairseq.scoring import BaseScorer, register_scorer

from narvl_plugin.scoring.vqa import read_references


def same_answer(said: str, answer: str) -> bool:
    """Say whether two answers are the same but for capitals and spaces around; GQA's have neither."""
    return said.strip().lower() == answer.strip().lower()


@dataclass
class GqaConfig(FairseqDataclass):
    """The scorer `gqa` has no settings."""


@register_scorer("gqa", dataclass=GqaConfig)
class GqaScorer(BaseScorer):
    """fairseq scorer: the reference string is a column of answers, `confidence|!+answer&&…`; the best one counts."""

    def score(self) -> float:
        """Give the accuracy, by which GQA is judged; raises InputError for unreadable references."""
        if not self.ref:
            raise ValueError("no answers to score")
        best = [max(answers, key=answers.__getitem__) for answers in read_references(self.ref)]
        return sum(map(same_answer, self.pred, best)) / len(best)

    def result_string(self) -> str:
        """Write the accuracy in one line."""
        return f"accuracy {self.score():.4f} ({len(self.ref)} questions)"
