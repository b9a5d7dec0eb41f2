"""Grounding in the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from narvl_plugin.data.boxes import GOOD_IOU, bins_in, from_bins, inside_image, overlaps, parse_box, to_bins
from narvl_plugin.data.images import ImageReader, image_size
from narvl_plugin.errors import BadRow, InputError
from narvl_plugin.report.subjects.base import BEAM_5, Outputs, Region, Row, Scores, TaskReport
from narvl_plugin.tasks.base import BaseTask

WHOLE, MEAN = "whole_image", "mean_box"


@dataclass(frozen=True)
class RegionRow(Row):
    """A phrase for a region.

    Attributes:
        box: the edges of the region, in pixels.
        size: the width and height of the image, in pixels.
    """

    box: tuple[float, ...]
    size: tuple[int, int]

    def share(self, box: Sequence[float]) -> Region:
        """Return a box in pixels as shares of the image's width and height."""
        (left, upper, right, lower), (width, height) = box, self.size
        return left / width, upper / height, right / width, lower / height


class RefcocoReport(TaskReport[RegionRow]):
    """Grounding; the baselines are the whole image and the mean box of the test file."""

    task = "refcoco"
    columns = (0, 2, 3, 4)  # uniq-id, text, box, image
    image_column = 4
    unit = "regions"
    main = "accuracy"
    teachers = BEAM_5
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

    def __init__(self, task: BaseTask | None, test_tsv: Path) -> None:
        if task is None:
            raise InputError(
                "student/checkpoint_last.pt is not there; the sizes of boxes are its options --num-bins, "
                "--max-image-size and --patch-image-size"
            )
        self._cfg: Any = task.cfg
        self._reader = ImageReader(task.cfg.patch_image_size, folder=test_tsv.parent)

    def read(self, number: int, columns: Sequence[str], where: str) -> RegionRow:
        """Return the row; see `TaskReport.read`. A box or an image that cannot be used raises BadRow."""
        unique_id, text, column, image = columns
        size = image_size(self._reader.read_bytes(image, where), where)
        if size is None:
            raise BadRow(f"{where}: the image column holds features that do not tell the size of the image")
        box = tuple(inside_image(parse_box(column, where), size, where).tolist())
        return RegionRow(number, (unique_id,), text, [_in_pixels(box)], box, size)

    def say_baselines(self, rows: Sequence[RegionRow]) -> dict[str, Outputs]:
        """Return two boxes for every row, with the same shares of each image."""
        whole = torch.tensor([0.0, 0.0, 1.0, 1.0])
        mean = torch.tensor([row.share(row.box) for row in rows]).mean(0)
        return {
            name: dict.fromkeys((row.number for row in rows), self._as_bins(box))
            for name, box in ((WHOLE, whole), (MEAN, mean))
        }

    def score(self, systems: Mapping[str, Outputs], rows: Sequence[RegionRow]) -> dict[str, Scores]:
        """Score boxes by their overlap with the correct ones, in pixels of the original images."""
        scores = {}
        for name, said in systems.items():
            boxes = [self._box(row, said[row.number]) for row in rows]
            ious = overlaps(boxes, [row.box for row in rows])
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

    def shown(self, row: RegionRow, output: str) -> str:
        """Return a box in pixels of the image; any other output stays unchanged."""
        box = self._box(row, output)
        return output if box is None else _in_pixels(box)

    def reference_region(self, row: RegionRow) -> Region:
        """Return the correct box."""
        return row.share(row.box)

    def region(self, row: RegionRow, output: str) -> Region | None:
        """Return the box of an output; None if the output is not a box."""
        box = self._box(row, output)
        return None if box is None else row.share(box)

    def _box(self, row: RegionRow, output: str) -> list[float] | None:
        """Return the box of an output in pixels of the image; None if the output is not a box."""
        bins = bins_in(output)
        if bins is None:
            return None
        resized = from_bins(torch.tensor(bins), side=self._cfg.max_image_size, num_bins=self._cfg.num_bins)
        return (resized / self._cfg.patch_image_size * torch.tensor(row.size * 2)).tolist()

    def _as_bins(self, shares: torch.Tensor) -> str:
        """Return a box of shares (4,) of the image in the model's output form."""
        resized = shares * self._cfg.patch_image_size
        bins = to_bins(resized, side=self._cfg.max_image_size, num_bins=self._cfg.num_bins)
        return "".join(f"<bin_{number}>" for number in bins.tolist())


def _in_pixels(box: Sequence[float]) -> str:
    """Format a box in whole pixels."""
    left, upper, right, lower = (round(edge) for edge in box)
    return f"x {left} to {right}, y {upper} to {lower}"
