"""The fairseq scorer `scene_graph`: triplets in the form of a model's outputs, with boxes in bins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from narvl_plugin.data.scene_graph import SpelledTriplet, triplets_in
from narvl_plugin.data.triplets import Instance, Triplet
from narvl_plugin.scoring.base import Scorer, ScorerConfig
from narvl_plugin.scoring.triplets import GraphScores, score_triplets

RANKS = (5, 10)
"""The K of R@K and mR@K. A graph has six triplets at most."""


@dataclass
class SceneGraphConfig(ScorerConfig):
    """The scorer `scene_graph` has no settings."""


class SceneGraphScorer(Scorer[SceneGraphConfig]):
    """fairseq scorer; reference and hypothesis are triplets as a model of the task predicts them.

    Any other hypothesis has no triplet, and is never exact. A reference is rounded to bins, so a box close to the
    threshold may count differently than in validation.
    """

    def scores(self) -> GraphScores:
        """Return the scores of all rows.

        Raises:
            ValueError: for a reference that is not a set of triplets, and if there are no triplets to score against.
        """
        references = [triplets_in(text) for text in self.ref]
        for number, (text, read) in enumerate(zip(self.ref, references, strict=True), start=1):
            if read is None:
                raise ValueError(
                    f"reference {number} is {text!r:.200}, and not triplets; score with --task scene_graph"
                )
        found = [triplets_in(text) for text in self.pred]
        scores = score_triplets([_graph(one or []) for one in found], [_graph(one or []) for one in references], RANKS)
        wrong = sum(one is None and not true for one, true in zip(found, references, strict=True))
        return scores._replace(exact=scores.exact - wrong / len(found))

    def score(self) -> float:
        """Return the share of exact graphs."""
        return self.scores().exact

    def result_string(self) -> str:
        """Format the scores and the number of hypotheses that are no triplets in one line."""
        scores = self.scores()
        invalid = sum(triplets_in(text) is None for text in self.pred)
        ranked = [
            f"{name}@{rank} {value:.4f}, "
            for name, values in (("R", scores.recall), ("mR", scores.mean_recall))
            for rank, value in values.items()
        ]
        return (
            f"exact graphs {scores.exact:.4f}, {''.join(ranked)}{len(self.ref)} rows, {invalid} hypotheses are no "
            "triplets"
        )


def _graph(spelled: Sequence[SpelledTriplet]) -> list[Triplet]:
    """Return triplets with bins as edges."""
    return [
        Triplet(_instance(one.subject, one.subject_box), one.relation, _instance(one.object, one.object_box))
        for one in spelled
    ]


def _instance(noun: str, box: Sequence[int]) -> Instance:
    x0, y0, x1, y1 = map(float, box)
    return Instance(noun, (x0, y0, x1, y1))
