"""Regions: from an image and a phrase to the boxes of all regions that the phrase describes, or none."""

from __future__ import annotations

from collections.abc import Callable

import torch

from narvl_plugin.data.grounding import GroundingDataset
from narvl_plugin.data.text import REFERENCE_SEPARATOR
from narvl_plugin.errors import BadRow

MOST_BOXES = 5
"""Largest number of boxes of a row."""


class RegionsDataset(GroundingDataset):
    """Rows of (id, image, text, boxes), selected in this order. The target is four `<bin_k>` for each box.

    The column of boxes is up to `MOST_BOXES` times `x0,y0,x1,y1`, joined by `&&`. It is empty if the text describes
    nothing in the image; the target is then `</s>` alone. The target keeps the column's order of boxes.

    Legend: B batch, K boxes of a row.

    The `region_coords` of a batch are a list of B tensors (K, 4).
    """

    column_names = ("id", "image", "text", "boxes")
    placeholders = {"text": "", "boxes": ""}
    prompt = "refcoco"  # so that a vocabulary need not know another one

    def parse(self, column: str, where: str, parse_one: Callable[[str, str], torch.Tensor]) -> torch.Tensor:
        """Return the boxes of a column, float32 (K, 4), see `GroundingDataset.parse`."""
        texts = column.split(REFERENCE_SEPARATOR) if column.strip() else []
        if len(texts) > MOST_BOXES:
            raise BadRow(f"{where}: has {len(texts)} boxes, and this task reads at most {MOST_BOXES}; delete some")
        return torch.stack([parse_one(text, where) for text in texts]) if texts else torch.empty(0, 4)

    def join(self, boxes: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the boxes (K, 4) of B rows as they are."""
        return boxes
