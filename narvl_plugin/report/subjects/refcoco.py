"""Grounding in the report."""

from collections.abc import Mapping, Sequence

import torch

from narvl_plugin.data.boxes import GOOD_IOU, overlaps
from narvl_plugin.report.subjects.base import Outputs, Scores
from narvl_plugin.report.subjects.boxes import Box, BoxReport, RegionRow

WHOLE, MEAN = "whole_image", "mean_box"


class RefcocoReport(BoxReport):
    """Grounding; the baselines are the whole image and the mean box of the test file."""

    task = "refcoco"
    unit = "regions"
    main = "accuracy"
    curve = ("valid_score", f"accuracy at IoU {GOOD_IOU}")
    baselines = {WHOLE: "Whole image", MEAN: "Mean box"}
    confidence = (
        f"Confidence is a student's own probability that its box overlaps the correct one with an IoU of at least "
        f"{GOOD_IOU}. A teacher's is the probability of its output, and lower: it is that of exactly this box."
    )
    title = "Boxes in one pass"
    lead = (
        "Which region of the image does a phrase describe? A teacher predicts the four edges of a box one by one. Its "
        "student predicts all of them at once with a fixed set of queries, trained by Query-CTC. This page compares "
        "their quality and speed on images that neither has seen."
    )
    beside = "the overlap of its box with the correct one (IoU: intersection over union)"

    @staticmethod
    def texts_of_boxes(column: str) -> list[str]:
        """Return the text of the one box of a column."""
        return [column]

    def say_baselines(self, rows: Sequence[RegionRow]) -> dict[str, Outputs]:
        """Return two boxes for every row, with the same shares of each image."""
        whole = torch.tensor([0.0, 0.0, 1.0, 1.0])
        mean = torch.tensor([row.share(row.boxes[0]) for row in rows]).mean(0)
        return {
            name: dict.fromkeys((row.number for row in rows), self.as_output(box))
            for name, box in ((WHOLE, whole), (MEAN, mean))
        }

    def score(self, systems: Mapping[str, Outputs], rows: Sequence[RegionRow]) -> dict[str, Scores]:
        """Score boxes by their overlap with the correct ones, in pixels of the original images."""
        scores = {}
        for name, said in systems.items():
            boxes = [self._box(row, said[row.number]) for row in rows]
            ious = overlaps(boxes, [row.boxes[0] for row in rows])
            values = {
                self.main: sum(iou >= GOOD_IOU for iou in ious) / len(rows),
                "mean IoU": sum(ious) / len(rows),
                "no box": boxes.count(None) / len(rows),
            }
            each = {row.number: iou for row, iou in zip(rows, ious, strict=True)}
            scores[name] = Scores(values, dict(values), each)
        return scores

    def main_score(self, score: float) -> float:
        """Return whether a box of this overlap is correct."""
        return float(score >= GOOD_IOU)

    def notes(self, rows: Sequence[RegionRow], scores: Mapping[str, Scores]) -> list[str]:
        """Return the number of regions and the definition of a correct box."""
        return [
            f"{len(rows):,} test regions; accuracy: share of boxes with an IoU of at least {GOOD_IOU}; no box: share "
            "of outputs that are not a box, which count as wrong. Boxes are compared in pixels, as in validation. "
            "fairseq-generate compares bins, so a box close to the threshold may count differently there."
        ]

    def closing_notes(self, scores: Mapping[str, Scores]) -> list[str]:
        """Return the definition of the baselines."""
        return [
            "Whole image, mean box: the same shares of every image; the mean is that of this test file's own boxes."
        ]

    def verdict(self, score: float) -> tuple[str, str]:
        """Return the overlap, and whether it suffices."""
        return f"IoU {score:.2f}", super().verdict(score)[1]

    def _box(self, row: RegionRow, output: str) -> Box | None:
        """Return the box of an output in pixels of the image; None if the output is not a box."""
        boxes = self.boxes(row, output)
        return boxes[0] if boxes is not None and len(boxes) == 1 else None
