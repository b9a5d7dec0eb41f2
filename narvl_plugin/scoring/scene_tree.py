"""The fairseq scorer `scene_tree`: trees as bracketed text."""

from __future__ import annotations

from dataclasses import dataclass

from narvl_plugin.data.trees import tree_in
from narvl_plugin.scoring.base import Scorer, ScorerConfig
from narvl_plugin.scoring.trees import TreeScores, score_trees


@dataclass
class SceneTreeConfig(ScorerConfig):
    """The scorer `scene_tree` has no settings."""


class SceneTreeScorer(Scorer[SceneTreeConfig]):
    """fairseq scorer; reference and hypothesis are trees. Any other hypothesis lacks all nodes of the true tree."""

    def scores(self) -> TreeScores:
        """Return the scores of all rows.

        Raises:
            ValueError: for a reference that is no tree, and without any row.
        """
        references = []
        for number, text in enumerate(self.ref, start=1):
            tree = tree_in(text)
            if tree is None:
                raise ValueError(f"reference {number} is {text!r:.200}, and no tree; score with --task scene_tree")
            references.append(tree)
        return score_trees([tree_in(text) for text in self.pred], references)

    def score(self) -> float:
        """Return the share of exact trees."""
        return self.scores().exact

    def result_string(self) -> str:
        """Format the scores in one line."""
        exact, edits, parsed = self.scores()
        scores = f"exact trees {exact:.4f}, edit distance {edits:.4f}, outputs that parse {parsed:.4f}"
        return f"{scores}, {len(self.ref)} rows"
