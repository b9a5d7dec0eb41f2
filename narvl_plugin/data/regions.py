"""Regions: from an image and a phrase to the boxes of all regions that the phrase describes, or none."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from random import Random
from typing import Any

import torch

from narvl_plugin.data.grounding import GroundingDataset
from narvl_plugin.data.text import REFERENCE_SEPARATOR
from narvl_plugin.errors import BadRow

MOST_BOXES = 5
"""Largest number of boxes of a row."""


class RegionsDataset(GroundingDataset):
    """Rows of (id, image, text, boxes), selected in this order. The target is four `<bin_k>` for each box.

    The column of boxes is up to `MOST_BOXES` times `x0,y0,x1,y1`, joined by `&&`. It is empty if the text describes
    nothing in the image; the target is then `</s>` alone. Boxes with equal bins are one box of the target.

    The target has the boxes in the reading order of their upper left corners: from top to bottom, and from left to
    right where y0 is equal. With `random_order`, each epoch of a training learns another order of each row.

    Legend: B batch, K boxes of a row.

    The `region_coords` of a batch are a list of B tensors (K, 4).

    Attributes:
        random_order: whether a training learns the boxes in random orders.
    """

    column_names = ("id", "image", "text", "boxes")
    placeholders = {"text": "", "boxes": ""}
    prompt = "refcoco"  # so that a vocabulary need not know another one

    def __init__(self, *args: Any, random_order: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.random_order = random_order

    def parse(self, column: str, where: str, parse_one: Callable[[str, str], torch.Tensor]) -> torch.Tensor:
        """Return the boxes of a column, float32 (K, 4), see `GroundingDataset.parse`."""
        texts = column.split(REFERENCE_SEPARATOR) if column.strip() else []
        if len(texts) > MOST_BOXES:
            raise BadRow(f"{where}: has {len(texts)} boxes, and this task reads at most {MOST_BOXES}; delete some")
        return torch.stack([parse_one(text, where) for text in texts]) if texts else torch.empty(0, 4)

    def join(self, boxes: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the boxes (K, 4) of B rows as they are."""
        return boxes

    def in_order(self, row: int, bins: torch.Tensor) -> torch.Tensor:
        """Return the boxes of a row's target in the order in which this epoch learns them: (K, 4) -> (at most K, 4)."""
        boxes = sorted(set(map(tuple, bins.tolist())), key=lambda box: (box[1], box[0], box))
        if self.random_order and self.training:
            boxes = Random(f"{self.epoch}/{row}").sample(boxes, len(boxes))
        return torch.tensor(boxes, dtype=torch.int64).reshape(-1, 4)

    def possible_targets(self, row: int, columns: list[str]) -> list[torch.Tensor]:
        """Return the targets of a row in any of the epochs, int64 (T,) each.

        Raises:
            BadRow: if the boxes or the image cannot be used.
        """
        target = self.target_tokens(row, columns)
        if not (self.random_order and self.training):
            return [target]
        return [torch.cat(order) for order in permutations(target.split(4))]
