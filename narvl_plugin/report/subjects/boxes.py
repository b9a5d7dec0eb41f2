"""What tasks of boxes share in the report: boxes of rows and of outputs, in pixels and as shares of the image."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from narvl_plugin.data.boxes import boxes_in, from_bins, inside_image, parse_box, to_bins
from narvl_plugin.data.images import ImageReader, image_size
from narvl_plugin.errors import BadRow, InputError
from narvl_plugin.report.subjects.base import BEAM_5, Region, Row, RowT, TaskReport
from narvl_plugin.tasks.base import BaseTask

Box = tuple[float, ...]
"""Left, upper, right and lower edge, in pixels."""


@dataclass(frozen=True)
class RegionRow(Row):
    """A phrase with its regions.

    Attributes:
        boxes: the regions.
        size: the width and height of the image, in pixels.
    """

    boxes: tuple[Box, ...]
    size: tuple[int, int]

    def share(self, box: Sequence[float]) -> Region:
        """Return a box in pixels as shares of the image's width and height."""
        return share_of(box, self.size)


def share_of(box: Sequence[float], size: tuple[int, int]) -> Region:
    """Return a box in pixels as shares of an image's width and height."""
    (left, upper, right, lower), (width, height) = box, size
    return left / width, upper / height, right / width, lower / height


class BinsReport(TaskReport[RowT]):
    """A task whose outputs hold boxes in bins."""

    teachers = BEAM_5

    def __init__(self, task: BaseTask | None, test_tsv: Path) -> None:
        if task is None:
            raise InputError(
                "student/checkpoint_last.pt is not there; the sizes of boxes are its options --num-bins, "
                "--max-image-size and --patch-image-size"
            )
        self._cfg: Any = task.cfg
        self._reader = ImageReader(task.cfg.patch_image_size, folder=test_tsv.parent)

    def size_of(self, image: str, where: str) -> tuple[int, int]:
        """Return the width and height of the image of a column, in pixels.

        Raises:
            BadRow: if they are unknown.
        """
        size = image_size(self._reader.read_bytes(image, where), where)
        if size is None:
            raise BadRow(f"{where}: the image column holds features that do not tell the size of the image")
        return size

    def in_pixels(self, boxes: Sequence[Sequence[int]], size: tuple[int, int]) -> list[Box]:
        """Return boxes in bins as boxes in pixels of an image of some width and height."""
        bins = torch.tensor(boxes, dtype=torch.int64).reshape(-1, 4)
        resized = from_bins(bins, side=self._cfg.max_image_size, num_bins=self._cfg.num_bins)
        return [tuple(box) for box in (resized / self._cfg.patch_image_size * torch.tensor(size * 2)).tolist()]


class BoxReport(BinsReport[RegionRow]):
    """A task of boxes."""

    columns = (0, 2, 3, 4)  # uniq-id, text, boxes, image
    image_column = 4

    @staticmethod
    @abstractmethod
    def texts_of_boxes(column: str) -> list[str]:
        """Return the text of each box of a column."""

    def read(self, number: int, columns: Sequence[str], where: str) -> RegionRow:
        """Return the row; see `TaskReport.read`. A box or an image that cannot be used raises BadRow."""
        unique_id, text, column, image = columns
        size = self.size_of(image, where)
        boxes = tuple(
            tuple(inside_image(parse_box(box, where), size, where).tolist()) for box in self.texts_of_boxes(column)
        )
        return RegionRow(number, (unique_id,), text, [in_words(boxes)], boxes, size)

    def shown(self, row: RegionRow, output: str) -> str:
        """Return boxes in pixels of the image; any other output stays unchanged."""
        boxes = self.boxes(row, output)
        return output if boxes is None else in_words(boxes)

    def reference_regions(self, row: RegionRow) -> list[Region]:
        """Return the correct boxes."""
        return [row.share(box) for box in row.boxes]

    def regions(self, row: RegionRow, output: str) -> list[Region]:
        """Return the boxes of an output; none if the output does not consist of boxes."""
        return [row.share(box) for box in self.boxes(row, output) or []]

    def boxes(self, row: RegionRow, output: str) -> list[Box] | None:
        """Return the boxes of an output in pixels of the image; None if the output does not consist of boxes."""
        found = boxes_in(output)
        return None if found is None else self.in_pixels(found, row.size)

    def as_output(self, shares: torch.Tensor) -> str:
        """Return a box of shares (4,) of the image in the model's output form."""
        resized = shares * self._cfg.patch_image_size
        bins = to_bins(resized, side=self._cfg.max_image_size, num_bins=self._cfg.num_bins)
        return "".join(f"<bin_{number}>" for number in bins.tolist())


def in_words(boxes: Sequence[Box]) -> str:
    """Format boxes in whole pixels."""
    edges = ([round(edge) for edge in box] for box in boxes)
    texts = [f"x {left} to {right}, y {upper} to {lower}" for left, upper, right, lower in edges]
    return "; ".join(texts) or "no region"
