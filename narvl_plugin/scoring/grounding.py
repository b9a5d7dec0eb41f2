"""Grounding: the overlap of boxes with those of the references; and the fairseq scorer `grounding`."""

from dataclasses import dataclass

from narvl_plugin.data.boxes import GOOD_IOU, bins_in, overlaps
from narvl_plugin.scoring.base import Scorer, ScorerConfig


@dataclass
class GroundingConfig(ScorerConfig):
    """The scorer `grounding` has no settings."""


class GroundingScorer(Scorer[GroundingConfig]):
    """fairseq scorer; reference and hypothesis are four `<bin_k>` each. Any other hypothesis is wrong.

    Bins of the two axes may have different sizes, which does not change the overlap. A reference is rounded to bins, so
    a box close to the threshold may count differently than in validation.
    """

    def overlaps(self) -> list[float]:
        """Return the IoU of each hypothesis.

        Raises:
            ValueError: for a reference that is not a box, and if there is nothing to score.
        """
        references = []
        for number, text in enumerate(self.ref, start=1):
            box = bins_in(text)
            if box is None:
                raise ValueError(f"reference {number} is {text!r}, and not four <bin_k>; score with --task refcoco")
            references.append(box)
        if not references:
            raise ValueError("no boxes to score")
        return overlaps([bins_in(text) for text in self.pred], references)

    def score(self) -> float:
        """Return the share of boxes with an IoU of at least 0.5, the metric of grounding."""
        scores = self.overlaps()
        return sum(score >= GOOD_IOU for score in scores) / len(scores)

    def result_string(self) -> str:
        """Format accuracy, mean IoU and the number of hypotheses that are not a box in one line."""
        scores = self.overlaps()
        no_box = sum(bins_in(text) is None for text in self.pred)
        return (
            f"accuracy {self.score():.4f} at IoU {GOOD_IOU}, mean IoU {sum(scores) / len(scores):.4f} "
            f"({len(scores)} boxes, {no_box} hypotheses are no box)"
        )
