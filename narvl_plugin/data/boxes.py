"""Boxes of regions: conversion between TSV columns and `<bin_k>` symbols, checks, and overlap.

A box is x0, y0, x1, y1: its left, upper, right and lower edge, in pixels from the image's upper left corner.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from narvl_plugin.errors import BadRow, InputError

logger = logging.getLogger(__name__)

TOLERANCE = 1.0
"""Largest distance of an edge outside the image, in pixels, that is corrected: boxes are drawn by hand and rounded."""
ROUNDED = 1.01
"""Factor by which edges as shares of an image may exceed 1, or 100 percent: they are drawn by hand and rounded."""
TINY, LARGE = 2, 200
"""Longer side of an image, in pixels, up to which boxes of 1 pixel are plausible, and from which 100 are small."""
GOOD_IOU = 0.5
"""Smallest IoU of a correct box."""
LARGEST_EDGE = 1e9
"""Largest distance of an edge from the image's corner, in pixels, in a file from elsewhere."""
NO_BOX = (0.0, 0.0, 0.0, 0.0)
"""A box that covers nothing."""
_BIN = re.compile(r"<bin_([0-9]{1,9})>")
_BINS = re.compile(rf"(?:\s*{_BIN.pattern})*\s*")
_EDGES = re.compile(r"[-+.0-9eE, ]+")  # Python's float also accepts 1_0 and digits of other scripts


def parse_box(column: str, where: str) -> Tensor:
    """Return the box of a column `x0,y0,x1,y1`.

    Args:
        column: the column.
        where: FILE:ROW, for errors.

    Returns:
        float32 (4,).

    Raises:
        BadRow: if the column is not a box, or the box is empty.
    """
    box = parse_edges(column, where)
    if not bool((box[:2] < box[2:]).all()):
        raise BadRow(
            f"{where}: the box {column} is empty; expected x0,y0,x1,y1 with x0 < x1 and y0 < y1 (not x,y,width,height)"
        )
    return box


def parse_edges(column: str, where: str) -> Tensor:
    """Return the four numbers of a column, in any order.

    Args:
        column: the column.
        where: FILE:ROW, for errors.

    Returns:
        float32 (4,).

    Raises:
        BadRow: if the column does not hold four numbers.
    """
    try:
        box = torch.tensor([float(edge) for edge in column.split(",")] if _EDGES.fullmatch(column) else [])
    except ValueError:
        box = torch.empty(0)
    if len(box) != 4 or not bool(box.isfinite().all()):
        raise BadRow(f"{where}: {column!r} is no box; expected x0,y0,x1,y1 in pixels (check --selected-cols)")
    return box


def format_box(box: Sequence[float]) -> str:
    """Return a box as the column `x0,y0,x1,y1`, with at most two decimals."""
    return ",".join(f"{edge:.2f}".rstrip("0").rstrip(".") for edge in box)


def is_box(value: Any) -> bool:
    """Return whether a value of JSON is a list of four numbers in the range of edges."""
    if not isinstance(value, list) or len(value) != 4:
        return False
    numbers = [edge for edge in value if isinstance(edge, (int, float)) and not isinstance(edge, bool)]
    return len(numbers) == 4 and all(abs(edge) <= LARGEST_EDGE for edge in numbers)


def may_be_percent(boxes: Tensor) -> bool:
    """Return whether all edges of boxes (N, 4) could be shares or percentages of their images."""
    return bool((boxes.abs() <= 100 * ROUNDED).all())


def check_units(boxes: Tensor, sizes: Sequence[tuple[int, int]], path: str) -> None:
    """Refuse a file whose boxes are shares of their images (0 to 1), and warn if they may be percentages.

    Boxes are shares if all of them lie within 1 pixel of the images' upper left corner, unless all images are tiny.
    A file with the single box 0,0,1,1 is only warned of.
    Boxes may be percentages if all of them lie within 100 pixels of that corner, and all images are more than twice
    as large.

    Args:
        boxes: (N, 4), the first boxes of the file.
        sizes: width and height of some of their images, in pixels. If none is known, nothing is checked.
        path: path of the file.

    Raises:
        InputError: if the boxes are shares.
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
    """Return a box with its edges moved into the image.

    Args:
        box: (4,).
        size: width and height of the image.
        where: FILE:ROW, for errors.

    Returns:
        (4,).

    Raises:
        BadRow: if an edge lies outside by more than a pixel.
    """
    width, height = size
    clipped = box.minimum(torch.tensor([width, height, width, height])).clamp(min=0)
    if bool((box - clipped).abs().max() > TOLERANCE) or not bool((clipped[:2] < clipped[2:]).all()):
        edges = ",".join(f"{edge:g}" for edge in box.tolist())
        raise BadRow(f"{where}: the box {edges} lies outside the image of {width} x {height} pixels; fix the box")
    return clipped


def to_bins(boxes: Tensor, *, side: int, num_bins: int) -> Tensor:
    """Return the bin of each coordinate.

    Args:
        boxes: coordinates of any shape, from 0 to `side` pixels.
        side: side that the bins cover, in pixels.
        num_bins: number of bins.

    Returns:
        int64 of the same shape.
    """
    return (boxes / side * (num_bins - 1)).round().long()


def from_bins(bins: Tensor, *, side: int, num_bins: int) -> Tensor:
    """Return the coordinate of each bin, the inverse of `to_bins`.

    Args:
        bins: bins of any shape.
        side: side that the bins cover, in pixels.
        num_bins: number of bins.

    Returns:
        float32 of the same shape.
    """
    return bins / (num_bins - 1) * side


def bins_in(text: str) -> list[int] | None:
    """Return the four bins of a text that is exactly `<bin_a><bin_b><bin_c><bin_d>`, else None."""
    boxes = boxes_in(text)
    return boxes[0] if boxes is not None and len(boxes) == 1 else None


def boxes_in(text: str) -> list[list[int]] | None:
    """Return the four bins of each box of a text that is a sequence of boxes, else None. An empty text has no box."""
    bins = [int(number) for number in _BIN.findall(text)]
    if not _BINS.fullmatch(text) or len(bins) % 4:
        return None
    return [bins[place : place + 4] for place in range(0, len(bins), 4)]


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the area of the intersection divided by that of the union.

    The result does not depend on the scale of either axis. A box with exchanged edges covers nothing.

    Args:
        boxes: (…, 4).
        others: (…, 4), broadcastable to `boxes`.

    Returns:
        (…), from 0 to 1.
    """
    corner, opposite = boxes[..., :2].maximum(others[..., :2]), boxes[..., 2:].minimum(others[..., 2:])
    common = _area(corner, opposite)
    union = _area(boxes[..., :2], boxes[..., 2:]) + _area(others[..., :2], others[..., 2:]) - common
    return torch.where(union > 0, common / union, 0.0)


def _area(corner: Tensor, opposite: Tensor) -> Tensor:
    return (opposite - corner).clamp(min=0).prod(-1)


def overlaps(boxes: Sequence[Sequence[float] | None], references: Sequence[Sequence[float]]) -> list[float]:
    """Return the IoU of each of B boxes with its reference; it is 0 for None, an invalid box."""
    found = torch.tensor([box or NO_BOX for box in boxes], dtype=torch.float32)
    return iou(found, torch.tensor(references, dtype=torch.float32)).tolist()
