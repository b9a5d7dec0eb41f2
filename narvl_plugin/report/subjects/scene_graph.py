"""Scene graphs in the report."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from narvl_plugin.data.boxes import GOOD_IOU
from narvl_plugin.data.scene_graph import SpelledTriplet, triplets_in
from narvl_plugin.data.triplets import Instance, Triplet, objects_of, read_triplets, triplet_words
from narvl_plugin.report.subjects.base import Outputs, Region, Row, Scores, Table
from narvl_plugin.report.subjects.boxes import BinsReport, share_of
from narvl_plugin.report.svg import triplets_picture
from narvl_plugin.scoring.scene_graph import RANKS
from narvl_plugin.scoring.triplets import is_exact, score_triplets

NONE = "no_triplet"


@dataclass(frozen=True)
class GraphRow(Row):
    """An image with its triplets.

    Attributes:
        triplets: the triplets.
        size: the width and height of the image, in pixels.
    """

    triplets: tuple[Triplet, ...]
    size: tuple[int, int]


class SceneGraphReport(BinsReport[GraphRow]):
    """Scene graphs; the baseline is an empty graph."""

    task = "scene_graph"
    columns = (0, 2, 3)  # uniq-id, triplets, image
    image_column = 3
    unit = "images"
    main = "exact graphs"
    curve = ("valid_score", "exact graphs")
    baselines = {NONE: "No triplet"}
    confidence = (
        "Confidence is a student's own probability that its graph is exact. A teacher's is the probability of the "
        "outputs in its beam that agree with its best."
    )
    title = "Scene graphs in one pass"
    lead = (
        "Which relations do the objects in an image have? A graph is a set of triplets of subject, relation and "
        "object, and each object has its box. A teacher predicts them token by token, in a given order. Its student "
        "predicts all of them at once with a fixed set of queries, trained by Query-CTC on sets. This page compares "
        "their quality and speed on images that neither has seen."
    )
    beside = "whether its graph is exact"

    def read(self, number: int, columns: Sequence[str], where: str) -> GraphRow:
        """Return the row; see `TaskReport.read`. Triplets or an image that cannot be used raise BadRow."""
        unique_id, column, image = columns
        triplets = tuple(read_triplets(column, where))
        return GraphRow(number, (unique_id,), "", [in_words(triplets)], triplets, self.size_of(image, where))

    def say_baselines(self, rows: Sequence[GraphRow]) -> dict[str, Outputs]:
        """Return no triplet for every row."""
        return {NONE: dict.fromkeys((row.number for row in rows), "")}

    def score(self, systems: Mapping[str, Outputs], rows: Sequence[GraphRow]) -> dict[str, Scores]:
        """Score graphs; the details hold the share of exact graphs by the number of true triplets as `by_count`."""
        scores = {}
        for name, said in systems.items():
            found = [self.triplets(row, said[row.number]) for row in rows]
            predicted = [graph or [] for graph in found]
            exact = {
                row.number: float(graph is not None and is_exact(graph, row.triplets))
                for row, graph in zip(rows, found, strict=True)
            }
            values = {self.main: sum(exact.values()) / len(exact)}
            if any(row.triplets for row in rows):
                whole = score_triplets(predicted, [row.triplets for row in rows], RANKS)
                values |= {f"R@{rank}": value for rank, value in whole.recall.items()}
                values |= {f"mR@{rank}": value for rank, value in whole.mean_recall.items()}
            cells: dict[str, float | str | None] = dict(values)
            scores[name] = Scores(values, cells, exact, {"by_count": _by_count(rows, exact)})
        return scores

    def notes(self, rows: Sequence[GraphRow], scores: Mapping[str, Scores]) -> list[str]:
        """Return the number of images and the definitions of the scores."""
        return [
            f"{len(rows):,} test images; exact graphs: share of images whose triplets are all found, and no other. A "
            "triplet is found by one with the same names, whose boxes both have an IoU of at least "
            f"{GOOD_IOU}. R@K: share of an image's triplets that its first K predicted ones find. mR@K: the same by "
            "relation, then as a mean over relations. Images without triplets count in exact graphs alone. Boxes are "
            "compared in pixels, as in validation. fairseq-generate compares bins, so a box close to the threshold may "
            "count differently there."
        ]

    def closing_notes(self, scores: Mapping[str, Scores]) -> list[str]:
        """Return the definition of the baseline."""
        return ["No triplet: an empty graph for every image."]

    def tables(self, scores: Mapping[str, tuple[str, Scores]]) -> list[Table]:
        """Return the share of exact graphs of each system by the number of true triplets."""
        counts: dict[str, Any] = next(iter(scores.values()))[1].details["by_count"]
        return [
            Table(
                title="Exact graphs by the number of true triplets",
                headings=("system", *counts),
                rows=[
                    ("images", *(f"{found['rows']:,}" for found in counts.values())),
                    *(
                        (label, *(f"{found['exact graphs']:.3f}" for found in result.details["by_count"].values()))
                        for label, result in scores.values()
                    ),
                ],
            )
        ]

    def shown(self, row: GraphRow, output: str) -> str:
        """Return the triplets in words, without their boxes; any other output stays unchanged."""
        found = triplets_in(output)
        return output if found is None else in_words(self._placed(row, found))

    def reference_regions(self, row: GraphRow) -> list[Region]:
        """Return the boxes of the true triplets."""
        return self._regions(row, row.triplets)

    def regions(self, row: GraphRow, output: str) -> list[Region]:
        """Return the boxes of an output; none if the output does not consist of triplets."""
        return self._regions(row, self.triplets(row, output) or [])

    @staticmethod
    def _regions(row: GraphRow, triplets: Sequence[Triplet]) -> list[Region]:
        objects, _ = objects_of(triplets)
        return [share_of(one.box, row.size) for one in objects]

    def picture(self, row: GraphRow, output: str) -> str:
        """Return a drawing of the graph, with each object at its place; empty without triplets."""
        return triplets_picture(self.triplets(row, output) or [], row.size)

    def triplets(self, row: GraphRow, output: str) -> list[Triplet] | None:
        """Return the triplets of an output in pixels of the image; None if it does not consist of triplets."""
        found = triplets_in(output)
        return None if found is None else self._placed(row, found)

    def _placed(self, row: GraphRow, found: Sequence[SpelledTriplet]) -> list[Triplet]:
        """Return triplets with boxes in pixels of the image."""
        boxes = self.in_pixels([box for one in found for box in (one.subject_box, one.object_box)], row.size)
        edges = [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes]
        return [
            Triplet(Instance(one.subject, box), one.relation, Instance(one.object, other))
            for one, box, other in zip(found, edges[::2], edges[1::2], strict=True)
        ]


def in_words(triplets: Sequence[Triplet]) -> str:
    """Format triplets without their boxes."""
    return triplet_words(triplets) or "no triplet"


def _by_count(rows: Sequence[GraphRow], exact: Mapping[int, float]) -> dict[str, dict[str, float]]:
    """Return the number of rows and their share of exact graphs, by the number of true triplets."""
    found = defaultdict(list)
    for row in rows:
        found[len(row.triplets)].append(exact[row.number])
    return {
        str(count): {"rows": len(scores), "exact graphs": sum(scores) / len(scores)}
        for count, scores in sorted(found.items())
    }
