"""Boxes: bins and back, text to bins, intersection over union by hand, shares that are taken for pixels."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narvl_plugin.data.boxes import bins_in, boxes_in, check_units, from_bins, iou, to_bins
from narvl_plugin.errors import InputError


@given(st.lists(st.floats(0, 512, width=32), min_size=4, max_size=4), st.integers(2, 1000))
def test_bins_are_at_most_half_a_bin_away(box: list[float], num_bins: int) -> None:
    bins = to_bins(torch.tensor(box), side=512, num_bins=num_bins)
    assert bins.min() >= 0
    assert bins.max() < num_bins
    back = from_bins(bins, side=512, num_bins=num_bins)
    assert torch.equal(to_bins(back, side=512, num_bins=num_bins), bins)
    assert (back - torch.tensor(box)).abs().max() <= 512 / (num_bins - 1) / 2 + 1e-3


@pytest.mark.parametrize(
    ("text", "bins"),
    [
        ("<bin_1><bin_20><bin_300><bin_0>", [1, 20, 300, 0]),
        (" <bin_1> <bin_2> <bin_3> <bin_4> ", [1, 2, 3, 4]),
        ("<bin_1><bin_2><bin_3>", None),
        ("<bin_1><bin_2><bin_3><bin_4><bin_5>", None),
        ("<bin_1><bin_2><bin_3><bin_4>dog", None),
        ("<bin_1><bin_2><bin_3><bin_\uff14>", None),  # another script's 4
        (f"<bin_1><bin_2><bin_3><bin_{10**20}>", None),
        ("", None),
    ],
)
def test_only_four_bins_are_a_box(text: str, bins: list[int] | None) -> None:
    assert bins_in(text) == bins


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("", []),
        ("  ", []),
        ("<bin_1><bin_2><bin_3><bin_4>", [[1, 2, 3, 4]]),
        ("<bin_1><bin_2><bin_3><bin_4> <bin_5><bin_6> <bin_7><bin_8> ", [[1, 2, 3, 4], [5, 6, 7, 8]]),
        ("<bin_1><bin_2><bin_3><bin_4><bin_5>", None),
        ("<bin_1><bin_2><bin_3><bin_4> and <bin_5><bin_6><bin_7><bin_8>", None),
        ("a", None),
    ],
)
def test_four_bins_each_are_boxes(text: str, boxes: list[list[int]] | None) -> None:
    assert boxes_in(text) == boxes


@pytest.mark.parametrize(
    ("box", "other", "expected"),
    [
        ([0, 0, 2, 2], [0, 0, 2, 2], 1),
        ([0, 0, 2, 2], [1, 1, 3, 3], 1 / 7),
        ([0, 0, 4, 2], [0, 0, 2, 2], 1 / 2),
        ([0, 0, 2, 2], [2, 0, 4, 2], 0),
        ([0, 0, 2, 2], [5, 5, 6, 6], 0),
        ([2, 2, 0, 0], [0, 0, 2, 2], 0),  # the wrong way round
        ([1, 1, 1, 1], [1, 1, 1, 1], 0),  # nothing over nothing
    ],
)
def test_iou(box: list[int], other: list[int], expected: float) -> None:
    boxes, others = (torch.tensor([edges], dtype=torch.float32) for edges in (box, other))
    assert iou(boxes, others).item() == pytest.approx(expected)
    stretch = torch.tensor([3, 0.5, 3, 0.5])
    assert iou(boxes * stretch, others * stretch).item() == pytest.approx(expected)


LARGE, SMALL, DOT = (640, 480), (150, 90), (2, 2)


@pytest.mark.parametrize(
    ("boxes", "sizes", "unit"),
    [
        ([[0.1, 0.2, 0.5, 0.9], [0, 0, 1, 1]], [LARGE], "shares"),
        ([[0.1, 0.2, 0.5, 0.9]], [(8, 6)], "shares"),
        ([[0, 0, 1, 1], [0, 0, 1, 1]], [(8, 6)], "shares"),
        ([[-0.002, 0, 1.0005, 0.5], [0.5, 0.5, 0.2, 0.2]], [LARGE], "shares"),  # rounded; x, y, width, height
        ([[0.1, 0.2, 0.5, 0.9], [0, 0, 1, 1]], [DOT, LARGE], "shares"),
        ([[0.1, 0.2, 0.5, 0.9], [10, 20, 60, 30]], [LARGE], "percent"),
        ([[12.5, 20, 60, 100.3]], [LARGE, (400, 300)], "percent"),
        ([[0, 0, 1, 1]], [LARGE], "one"),  # a lone box of one pixel
        ([[0, 0, 1, 1], [0, 0.5, 1, 1]], [DOT, (1, 1)], None),  # tiny images
        ([[0, 0, 1, 1], [10, 20, 60, 30], [5, 5, 300, 200]], [LARGE], None),
        ([[0, 0, 1, 1], [10, 20, 60, 80]], [SMALL, LARGE], None),  # right on images of this size
        ([[0.1, 0.2, 0.5, 0.9]], [], None),
        ([], [LARGE], None),
    ],
)
def test_boxes_that_are_shares_or_percent_are_told_from_pixels(
    boxes: list[list[float]], sizes: list[tuple[int, int]], unit: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    edges = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    with caplog.at_level(logging.WARNING):
        if unit == "shares":
            with pytest.raises(
                InputError, match=r"^a\.tsv: all of its first \d boxes lie within 1 pixels .*; if they are shares"
            ):
                check_units(edges, sizes, "a.tsv")
        else:
            check_units(edges, sizes, "a.tsv")
    said = {"percent": "within 100 pixels", "one": "within 1 pixels"}.get(unit or "")
    assert (said in caplog.text) if said else not caplog.text
