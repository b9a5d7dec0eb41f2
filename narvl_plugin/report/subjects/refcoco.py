"""Grounding in the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from narvl_plugin.data.boxes import GOOD_IOU, bins_in, from_bins, inside_image, overlaps, parse_box, to_bins
from narvl_plugin.data.images import ImageReader, image_size
from narvl_plugin.errors import InputError
from narvl_plugin.report.subjects.base import BEAM_5, Outputs, Region, Row, Scores, Subject
from narvl_plugin.tasks.base import BaseTask

WHOLE, MEAN = "whole_image", "mean_box"


@dataclass(frozen=True)
class RegionRow(Row):
    """Words for a region: its box and the picture's width and height, in pixels."""

    box: tuple[float, ...]
    size: tuple[int, int]

    def share(self, box: Sequence[float]) -> Region:
        """Return a box in pixels as shares of the picture's width and height."""
        (left, upper, right, lower), (width, height) = box, self.size
        return left / width, upper / height, right / width, lower / height


class RefcocoSubject(Subject[RegionRow]):
    """Grounding; the baselines are the whole picture, and the mean box of the test file."""

    task = "refcoco"
    columns = (0, 2, 3, 4)  # uniq-id, text, box, image
    image_column = 4
    unit = "regions"
    main = "accuracy"
    teachers = BEAM_5
    curve = ("valid_score", f"accuracy at IoU {GOOD_IOU}")
    baselines = {WHOLE: "Whole picture", MEAN: "Mean box"}
    title = "Boxes in one pass"
    lead = (
        "Where in the picture is what the words describe? A teacher writes the four edges of a box one by one; its "
        "student says all of them at once with a fixed set of queries, trained by Query-CTC. How good and how fast "
        "both are on pictures that neither has seen."
    )
    beside = "how well its box agrees with the right one (IoU: intersection over union)"

    def __init__(self, task: BaseTask | None, folder: Path) -> None:
        if task is None:
            raise InputError(
                "student/checkpoint_last.pt is not there, which tells how boxes are written: its options --num-bins, "
                "--max-image-size and --patch-image-size"
            )
        self._cfg = task.cfg
        self._reader = ImageReader(task.cfg.patch_image_size, folder=folder)

    def read(self, number: int, columns: Sequence[str], where: str) -> RegionRow:
        """Return the row; raises BadRow for a box or a picture that cannot be used."""
        unique_id, text, column, image = columns
        size = image_size(self._reader.read_bytes(image, where), where)
        box = tuple(inside_image(parse_box(column, where), size, where).tolist())
        return RegionRow(number, (unique_id,), text, [_in_pixels(box)], box, size)

    def say_baselines(self, rows: Sequence[RegionRow]) -> dict[str, Outputs]:
        """Return two boxes for every row, the same shares of each picture."""
        whole = torch.tensor([0.0, 0.0, 1.0, 1.0])
        mean = torch.tensor([row.share(row.box) for row in rows]).mean(0)
        return {
            name: dict.fromkeys((row.number for row in rows), self._as_bins(box))
            for name, box in ((WHOLE, whole), (MEAN, mean))
        }

    def score(self, systems: Mapping[str, Outputs], rows: Sequence[RegionRow]) -> dict[str, Scores]:
        """Score boxes by their overlap with the right ones, in pixels of the pictures as they come."""
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

    def notes(self, rows: Sequence[RegionRow], scores: Mapping[str, Scores]) -> list[str]:
        """Say how many regions there are, and what is right."""
        return [
            f"{len(rows):,} test regions; a box is right (accuracy) from an IoU of {GOOD_IOU} on; no box: share of "
            "outputs that are none, which count as wrong. Boxes are compared with the right ones in pixels, as in "
            "validation; fairseq-generate compares bins, so that a box right at the border may count otherwise there."
        ]

    def closing_notes(self, scores: Mapping[str, Scores]) -> list[str]:
        """Say what the baselines are."""
        return [
            "Whole picture, mean box: the same shares of every picture; the mean is that of this test file's own boxes."
        ]

    def verdict(self, score: float) -> tuple[str, str]:
        """Return the overlap, and whether it is enough."""
        return f"IoU {score:.2f}", super().verdict(score)[1]

    def shown(self, row: RegionRow, output: str) -> str:
        """Return a box in pixels of the picture; anything else as it is."""
        box = self._box(row, output)
        return output if box is None else _in_pixels(box)

    def reference_region(self, row: RegionRow) -> Region:
        """Return the right box."""
        return row.share(row.box)

    def region(self, row: RegionRow, output: str) -> Region | None:
        """Return the box of an output, if it is one."""
        box = self._box(row, output)
        return None if box is None else row.share(box)

    def _box(self, row: RegionRow, output: str) -> list[float] | None:
        """Return the box of an output in pixels of the picture, None if it is none."""
        bins = bins_in(output)
        if bins is None:
            return None
        resized = from_bins(torch.tensor(bins), side=self._cfg.max_image_size, num_bins=self._cfg.num_bins)
        return (resized / self._cfg.patch_image_size * torch.tensor(row.size * 2)).tolist()

    def _as_bins(self, shares: torch.Tensor) -> str:
        """Return a box of shares (4,) of the picture as a model says it."""
        resized = shares * self._cfg.patch_image_size
        bins = to_bins(resized, side=self._cfg.max_image_size, num_bins=self._cfg.num_bins)
        return "".join(f"<bin_{number}>" for number in bins.tolist())


def _in_pixels(box: Sequence[float]) -> str:
    """Write a box in whole pixels."""
    left, upper, right, lower = (round(edge) for edge in box)
    return f"x {left} to {right}, y {upper} to {lower}"
