"""Scene trees in the report."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from narvl_plugin.data.trees import Node, read_tree, tree_in, write_tree
from narvl_plugin.report.subjects.base import BEAM_5, Outputs, Row, Scores, Table, TaskReport
from narvl_plugin.scoring.trees import edit_distance, score_trees

MOST_FREQUENT = "most_frequent"


@dataclass(frozen=True)
class TreeRow(Row):
    """An image with its tree.

    Attributes:
        tree: the tree.
    """

    tree: Node

    @property
    def number_of_objects(self) -> int:
        """The number of objects of the tree."""
        return sum(len(region.children) for region in self.tree.children)


class SceneTreeReport(TaskReport[TreeRow]):
    """Scene trees; the baseline is the same tree for every image."""

    task = "scene_tree"
    columns = (0, 2)  # uniq-id, tree
    image_column = 3
    unit = "images"
    main = "exact trees"
    teachers = BEAM_5
    curve = ("valid_score", "exact trees")
    baselines = {MOST_FREQUENT: "Most frequent tree"}
    confidence = (
        "Confidence is a student's own probability that its tree is exact. A teacher's is the probability of the "
        "outputs in its beam that are the same tree as its best."
    )
    title = "Scene trees in one pass"
    lead = (
        "Which objects are where in an image? A tree holds the scene, its regions, and the objects in each. A teacher "
        "predicts its text token by token, in a given order. Its student predicts all tokens at once with a fixed set "
        "of queries, trained by Query-CTC on trees. This page compares their quality and speed on images that neither "
        "has seen."
    )
    beside = "the edit distance of its tree"

    def read(self, number: int, columns: Sequence[str], where: str) -> TreeRow:
        """Return the row; see `TaskReport.read`. A tree that cannot be used raises BadRow."""
        unique_id, column = columns
        tree = read_tree(column, where)
        return TreeRow(number, (unique_id,), "", [write_tree(tree)], tree)

    def say_baselines(self, rows: Sequence[TreeRow]) -> dict[str, Outputs]:
        """Return the most frequent tree for every row."""
        ((tree, _),) = Counter(row.tree.canonical() for row in rows).most_common(1)
        return {MOST_FREQUENT: dict.fromkeys((row.number for row in rows), write_tree(tree))}

    def score(self, systems: Mapping[str, Outputs], rows: Sequence[TreeRow]) -> dict[str, Scores]:
        """Score trees; the details hold the share of exact trees by the number of true objects as `by_count`."""
        scores = {}
        for name, said in systems.items():
            predicted = [tree_in(said[row.number]) for row in rows]
            whole = score_trees(predicted, [row.tree for row in rows])
            each = {row.number: float(edit_distance(tree, row.tree)) for row, tree in zip(rows, predicted, strict=True)}
            values = {self.main: whole.exact, "edit distance": whole.edits, "outputs that parse": whole.parsed}
            scores[name] = Scores(values, dict(values), each, {"by_count": self._by_count(rows, each)})
        return scores

    def _by_count(self, rows: Sequence[TreeRow], each: Mapping[int, float]) -> dict[str, dict[str, float]]:
        """Return the number of rows and their share of exact trees, by the number of true objects."""
        found = defaultdict(list)
        for row in rows:
            found[row.number_of_objects].append(self.main_score(each[row.number]))
        return {
            str(count): {"rows": len(exact), self.main: sum(exact) / len(exact)}
            for count, exact in sorted(found.items())
        }

    def main_score(self, score: float) -> float:
        """Return whether a tree is exact: whether its edit distance is 0."""
        return float(score == 0)

    def notes(self, rows: Sequence[TreeRow], scores: Mapping[str, Scores]) -> list[str]:
        """Return the number of images and the definitions of the scores."""
        return [
            f"{len(rows):,} test images; exact trees: share of images whose tree is the true one, with regions and "
            "objects in any order. Edit distance: number of nodes to insert, delete or relabel, as a mean over images; "
            "a node is matched with one of its level alone. Outputs that parse: share of outputs that are trees."
        ]

    def closing_notes(self, scores: Mapping[str, Scores]) -> list[str]:
        """Return the definition of the baseline."""
        return ["Most frequent tree: always the one that is most frequent in this test file itself."]

    def tables(self, scores: Mapping[str, tuple[str, Scores]]) -> list[Table]:
        """Return the share of exact trees of each system by the number of true objects."""
        counts: dict[str, Any] = next(iter(scores.values()))[1].details["by_count"]
        return [
            Table(
                title="Exact trees by the number of true objects",
                headings=("system", *counts),
                rows=[
                    ("images", *(f"{found['rows']:,}" for found in counts.values())),
                    *(
                        (label, *(f"{found[self.main]:.3f}" for found in result.details["by_count"].values()))
                        for label, result in scores.values()
                    ),
                ],
            )
        ]

    def verdict(self, score: float) -> tuple[str, str]:
        """Return the edit distance, and whether it is 0."""
        return ("exact", "right") if score == 0 else (f"edit distance {score:.0f}", "wrong")
