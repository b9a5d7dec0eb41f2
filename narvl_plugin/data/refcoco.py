"""Grounding: from an image and a phrase for a region to the region's box."""

from __future__ import annotations

from collections.abc import Callable

import torch

from narvl_plugin.data.grounding import GroundingDataset


class RefcocoDataset(GroundingDataset):
    """Rows of (id, image, text, `x0,y0,x1,y1`), selected in this order. The target is four `<bin_k>`.

    The `region_coords` of a batch are (B, 4).
    """

    column_names = ("id", "image", "text", "box")
    placeholders = {"text": "", "box": "0,0,1,1"}
    prompt = "refcoco"

    def parse(self, column: str, where: str, parse_one: Callable[[str, str], torch.Tensor]) -> torch.Tensor:
        """Return the box of a column, float32 (4,), see `GroundingDataset.parse`."""
        return parse_one(column, where)

    def join(self, boxes: list[torch.Tensor]) -> torch.Tensor:
        """Return the boxes (4,) of B rows as a tensor (B, 4)."""
        return torch.stack(boxes)
