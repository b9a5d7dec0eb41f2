"""Boxes of regions: from a TSV column to `<bin_k>` symbols and back, and how well two of them agree.

A box is x0, y0, x1, y1: its left, upper, right and lower edge, in pixels from the image's upper left corner.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from narvl_plugin.errors import BadRow, InputError

logger = logging.getLogger(__name__)

# Annotators draw boxes by hand and data sets round them: an edge this far outside, in pixels, is moved in.
TOLERANCE = 1.0
ROUNDED = 1.01
"""How far beyond 1, or 100 percent, shares of an image are found, as a factor: they were rounded or drawn by hand."""
TINY, LARGE = 2, 200
"""Longer side, in pixels, up to which a box of one pixel is plausible, and from which one of 100 is small."""
GOOD_IOU = 0.5
"""The IoU from which on a box counts as correct."""
NO_BOX = (0.0, 0.0, 0.0, 0.0)
"""Covers nothing."""
_FOUR_BINS = re.compile(r"\s*".join([r"<bin_([0-9]{1,9})>"] * 4))
_EDGES = re.compile(r"[-+.0-9eE, ]+")  # Python's float would take 1_0 and other scripts' digits, too


def parse_box(column: str, where: str) -> Tensor:
    """Return the box of a column `x0,y0,x1,y1`, float32 (4,); raises BadRow if it is none or is empty."""
    box = parse_edges(column, where)
    if not bool((box[:2] < box[2:]).all()):
        raise BadRow(
            f"{where}: the box {column} is empty; expected x0,y0,x1,y1 with x0 < x1 and y0 < y1 (not x,y,width,height)"
        )
    return box


def parse_edges(column: str, where: str) -> Tensor:
    """Return the four numbers of a column, float32 (4,), in whatever order; raises BadRow if it holds others."""
    try:
        box = torch.tensor([float(edge) for edge in column.split(",")] if _EDGES.fullmatch(column) else [])
    except ValueError:
        box = torch.empty(0)
    if len(box) != 4 or not bool(box.isfinite().all()):
        raise BadRow(f"{where}: {column!r} is no box; expected x0,y0,x1,y1 in pixels (check --selected-cols)")
    return box


def may_be_percent(boxes: Tensor) -> bool:
    """Say whether all edges of boxes (N, 4) could be shares of their images, of 1 or of 100."""
    return bool((boxes.abs() <= 100 * ROUNDED).all())


def check_units(boxes: Tensor, sizes: Sequence[tuple[int, int]], path: str) -> None:
    """Refuse a file whose boxes are shares of their images (0 to 1), and warn where they may be percent.

    Boxes are shares if all of them lie within 1 pixel of the images' upper left corner, and not all images are tiny.
    Whole numbers (0,0,1,1) count as others do; only where a file has one box, and it is 0,0,1,1, this is a warning.
    Boxes may be percent if all of them lie within 100 pixels of that corner, and all images are more than twice as
    large.

    Args:
        boxes: the first boxes of the file, (N, 4).
        sizes: width and height of some of their images, in pixels; where none is known, nothing is said.
        path: names the file.

    Raises:
        InputError: the boxes are shares.
    """
    if not len(boxes) or not sizes or not may_be_percent(boxes):
        return
    smallest, largest = min(sizes, key=max), max(sizes, key=max)
    example = ",".join(f"{edge:g}" for edge in boxes[0].tolist())

    def message(reach: int, size: tuple[int, int], unit: str, advice: str) -> str:
        return (
            f"{path}: all of its first {len(boxes)} boxes lie within {reach} pixels of the image's corner, such as "
            f"{example}, and an image has {size[0]} x {size[1]} pixels; if they are {unit} of the image, multiply x by "
            f"its width{advice} and y by its height{advice}"
        )

    if (boxes.abs() <= ROUNDED).all():
        if max(largest) > TINY:
            shares = message(1, largest, "shares", "")
            if len(boxes) > 1 or not torch.equal(boxes, boxes.round()):
                raise InputError(shares)
            logger.warning("%s", shares)
    elif max(smallest) > LARGE:
        logger.warning("%s", message(100, smallest, "percent", " / 100"))


def inside_image(box: Tensor, size: tuple[int, int], where: str) -> Tensor:
    """Return the box (4,) with its edges on the image of `size` (width, height).

    Raises BadRow if an edge lies outside by more than a pixel.
    """
    width, height = size
    clipped = box.minimum(torch.tensor([width, height, width, height])).clamp(min=0)
    if bool((box - clipped).abs().max() > TOLERANCE) or not bool((clipped[:2] < clipped[2:]).all()):
        edges = ",".join(f"{edge:g}" for edge in box.tolist())
        raise BadRow(f"{where}: the box {edges} lies outside the image of {width} x {height} pixels; mend the box")
    return clipped


def to_bins(boxes: Tensor, *, side: int, num_bins: int) -> Tensor:
    """Return the number of the bin of each coordinate (0 to `side` pixels), int64 of the same shape."""
    return (boxes / side * (num_bins - 1)).round().long()


def from_bins(bins: Tensor, *, side: int, num_bins: int) -> Tensor:
    """Return the coordinates in the middle of bins, float32 of the same shape; the inverse of `to_bins`."""
    return bins / (num_bins - 1) * side


def bins_in(text: str) -> list[int] | None:
    """Return the four numbers of a text that is exactly `<bin_a><bin_b><bin_c><bin_d>`, else None."""
    match = _FOUR_BINS.fullmatch(text.strip())
    return None if match is None else [int(number) for number in match.groups()]


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the area of the intersection over that of the union, 0 to 1: (…, 4), (…, 4) -> (…), broadcast.

    A box whose edges are the wrong way round covers nothing. The scale of either axis does not matter.
    """
    corner, opposite = boxes[..., :2].maximum(others[..., :2]), boxes[..., 2:].minimum(others[..., 2:])
    common = _area(corner, opposite)
    union = _area(boxes[..., :2], boxes[..., 2:]) + _area(others[..., :2], others[..., 2:]) - common
    return torch.where(union > 0, common / union, 0.0)


def _area(corner: Tensor, opposite: Tensor) -> Tensor:
    return (opposite - corner).clamp(min=0).prod(-1)


def overlaps(boxes: Sequence[Sequence[float] | None], references: Sequence[Sequence[float]]) -> list[float]:
    """Return the IoU of each of B boxes, of four edges, with its reference; 0 for None, which is no box."""
    found = torch.tensor([box or NO_BOX for box in boxes], dtype=torch.float32)
    return iou(found, torch.tensor(references, dtype=torch.float32)).tolist()
