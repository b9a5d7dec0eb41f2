"""Sets of regions in the report."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from narvl_plugin.data.boxes import GOOD_IOU, NO_BOX
from narvl_plugin.data.text import REFERENCE_SEPARATOR
from narvl_plugin.report.subjects.base import Outputs, Scores, Table
from narvl_plugin.report.subjects.boxes import Box, BoxReport, RegionRow
from narvl_plugin.scoring.regions import f1, score_regions

NONE, WHOLE = "no_region", "whole_image"


class RegionsReport(BoxReport):
    """Sets of regions; the baselines are no region, and the whole image."""

    task = "regions"
    unit = "phrases"
    main = "precision"
    curve = ("valid_score", "precision at F1 = 1")
    baselines = {NONE: "No region", WHOLE: "Whole image"}
    confidence = (
        "Confidence is a student's own probability that its boxes are all that the phrase describes, each with an IoU "
        f"of at least {GOOD_IOU}. A teacher's is the probability of the outputs in its beam that agree with its best."
    )
    title = "Sets of boxes in one pass"
    lead = (
        "Which regions of the image does a phrase describe? There may be several, or none. A teacher predicts the "
        "edges of their boxes one by one, in a given order. Its student predicts all of them at once with a fixed set "
        "of queries, trained by Query-CTC on sets. This page compares their quality and speed on images that neither "
        "has seen."
    )
    beside = "the F1 of its boxes"

    @staticmethod
    def texts_of_boxes(column: str) -> list[str]:
        """Return the text of each box of a column."""
        return column.split(REFERENCE_SEPARATOR) if column.strip() else []

    def say_baselines(self, rows: Sequence[RegionRow]) -> dict[str, Outputs]:
        """Return no box for every row, and the box of the whole image."""
        whole = self.as_output(torch.tensor([0.0, 0.0, 1.0, 1.0]))
        return {name: dict.fromkeys((row.number for row in rows), said) for name, said in ((NONE, ""), (WHOLE, whole))}

    def score(self, systems: Mapping[str, Outputs], rows: Sequence[RegionRow]) -> dict[str, Scores]:
        """Score sets of boxes; the details hold the scores by the number of true boxes as `by_count`."""
        true = [_tensor(row.boxes) for row in rows]
        scores = {}
        for name, said in systems.items():
            boxes = [self.boxes(row, said[row.number]) for row in rows]
            predicted = [_tensor([NO_BOX] if found is None else found) for found in boxes]
            whole = score_regions(predicted, true)
            of_rows = {"N-acc": whole.n_acc, "T-acc": whole.t_acc}
            values = {self.main: whole.precision, "mean F1": whole.mean_f1}
            values |= {name: value for name, value in of_rows.items() if value is not None}
            each = {row.number: f1(*pair) for row, *pair in zip(rows, predicted, true, strict=True)}
            cells: dict[str, float | str | None] = {self.main: whole.precision, "mean F1": whole.mean_f1, **of_rows}
            scores[name] = Scores(values, cells, each, {"by_count": self._by_count(rows, each)})
        return scores

    def _by_count(self, rows: Sequence[RegionRow], each: Mapping[int, float]) -> dict[str, dict[str, float]]:
        """Return the number of rows and their mean scores, by the number of true boxes."""
        found = defaultdict(list)
        for row in rows:
            found[len(row.boxes)].append(each[row.number])
        return {
            str(count): {
                "rows": len(scores),
                self.main: sum(map(self.main_score, scores)) / len(scores),
                "mean F1": sum(scores) / len(scores),
            }
            for count, scores in sorted(found.items())
        }

    def main_score(self, score: float) -> float:
        """Return whether all boxes are found, and no other: whether this F1 is 1."""
        return float(score == 1)

    def notes(self, rows: Sequence[RegionRow], scores: Mapping[str, Scores]) -> list[str]:
        """Return the number of phrases and the definitions of the scores."""
        return [
            f"{len(rows):,} test phrases; precision: share of phrases with F1 = 1, whose boxes are all found, and no "
            f"other; a box is found by one with an IoU of at least {GOOD_IOU}. N-acc: of the phrases without a region, "
            "the share without a predicted box. T-acc: of the others, the share with a predicted box. Boxes are "
            "compared in pixels, as in validation. fairseq-generate compares bins, so a box close to the threshold may "
            "count differently there."
        ]

    def closing_notes(self, scores: Mapping[str, Scores]) -> list[str]:
        """Return the definition of the baselines."""
        return ["No region, whole image: the same answer to every phrase."]

    def tables(self, scores: Mapping[str, tuple[str, Scores]]) -> list[Table]:
        """Return the precision of each system by the number of true boxes."""
        counts: dict[str, Any] = next(iter(scores.values()))[1].details["by_count"]
        numbers = ("phrases", *(f"{found['rows']:,}" for found in counts.values()))
        return [
            Table(
                title="Precision by the number of true boxes",
                headings=("system", *counts),
                rows=[
                    numbers,
                    *(
                        (label, *(f"{found[self.main]:.3f}" for found in result.details["by_count"].values()))
                        for label, result in scores.values()
                    ),
                ],
            )
        ]

    def verdict(self, score: float) -> tuple[str, str]:
        """Return the F1, and whether it is 1."""
        return f"F1 {score:.2f}", "right" if score == 1 else "wrong"


def _tensor(boxes: Sequence[Box]) -> torch.Tensor:
    """Return boxes as (P, 4)."""
    return torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4)
