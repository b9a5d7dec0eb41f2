"""The grounding data set: the published items and batches, boxes to bins, bad rows."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from narvl_plugin.data.dataset import DatasetOptions
from narvl_plugin.data.images import encode_features
from narvl_plugin.data.refcoco import RefcocoDataset
from narvl_plugin.data.text import TextCodec
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow, InputError, SkipBudget

Rows = list[list[str]]


@pytest.fixture
def make(codec: TextCodec, write_tsv: Callable[..., Path]) -> Callable[..., RefcocoDataset]:
    """Make a data set of rows of regions; images are resized to 90 pixels, and ten bins cover them."""

    def make_dataset(rows: Sequence[Sequence[str]], skip: int = 0, columns: str = "0,4,2,3") -> RefcocoDataset:
        options = DatasetOptions(codec, 90, 20, 4, False, SkipBudget(skip))
        return RefcocoDataset(TsvFile(write_tsv("train.tsv", rows), columns), options, "train", max_image_size=90)

    return make_dataset


@pytest.mark.parametrize(("case", "size"), [("refcoco", 64), ("refcoco_512", 512)])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_items_and_batches_are_the_published_ones(
    goldens: Path, gpt2_codec: TextCodec, check_golden: Callable[..., None], case: str, size: int, split: str
) -> None:
    options = DatasetOptions(gpt2_codec, size, 80, 30, False, SkipBudget(0))
    tsv = TsvFile(goldens / "data" / "refcoco_train.tsv", "0,4,2,3")
    check_golden(RefcocoDataset(tsv, options, split, max_image_size=512), case, split)


def test_a_box_becomes_the_bins_of_the_resized_image(
    make: Callable[..., RefcocoDataset], codec: TextCodec, refcoco_rows: Rows
) -> None:
    # The image is 8 wide and 6 high, and becomes 90 by 90: x is stretched by 11.25, y by 15.
    refcoco_rows[0][3] = "1,2,7.5,6"
    sample = make(refcoco_rows)[0]
    assert sample is not None
    # 11.25, 30, 84.375, 90 in tenths of 90 of which nine make the whole: 1.125, 3, 8.4375, 9
    assert codec.decode(sample["target"]) == "<bin_1><bin_3><bin_8><bin_9>"
    assert sample["region_coord"].tolist() == [1, 2, 7.5, 6]
    assert (sample["w_resize_ratio"].item(), sample["h_resize_ratio"].item()) == (11.25, 15)


def test_a_batch_keeps_boxes_from_being_halved(make: Callable[..., RefcocoDataset], refcoco_rows: Rows) -> None:
    dataset = make(refcoco_rows)
    batch = dataset.collater([dataset[row] for row in range(3)])
    assert batch["region_coords"].shape == (3, 4)
    for key in ("region_coords", "w_resize_ratios", "h_resize_ratios"):
        assert batch[key].dtype == torch.float64  # fairseq halves what is float32


def test_targets_are_known_without_the_pixels(
    make: Callable[..., RefcocoDataset], refcoco_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make(refcoco_rows)
    targets = [dataset[row]["target"][:-1] for row in range(len(dataset))]
    monkeypatch.setattr("PIL.Image.Image.convert", None)
    for row, target in enumerate(targets):
        assert torch.equal(dataset.target_tokens(row, dataset.tsv[row]), target)


def test_an_edge_is_moved_in_by_a_pixel_at_most(
    make: Callable[..., RefcocoDataset], codec: TextCodec, refcoco_rows: Rows
) -> None:
    refcoco_rows[0][3] = "-0.5,0,8.9,7"
    sample = make(refcoco_rows)[0]
    assert sample is not None
    assert sample["region_coord"].tolist() == [0, 0, 8, 6]
    assert codec.decode(sample["target"]) == "<bin_0><bin_0><bin_9><bin_9>"


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (2, "", "the text '' has no words"),
        (2, "?! ", r"the text '\?! ' has no words"),
        (3, "1,2,3", "'1,2,3' is no box; expected x0,y0,x1,y1"),
        (3, "left", "'left' is no box"),
        (3, "1,2,3,nan", "'1,2,3,nan' is no box"),
        (3, "5,2,5,4", "the box 5,2,5,4 is empty"),
        (3, "5,2,3,4", "the box 5,2,3,4 is empty; .*not x,y,width,height"),
        (3, "1,1,9.5,4", "the box 1,1,9.5,4 lies outside the image of 8 x 6 pixels"),
        (3, "8,1,8.5,4", "the box 8,1,8.5,4 lies outside the image of 8 x 6 pixels"),
        (3, "-2,1,5,4", "the box -2,1,5,4 lies outside"),
        (4, "bm8gaW1hZ2U=", "the image is not readable"),
    ],
)
def test_bad_rows_are_named_and_can_be_skipped(
    make: Callable[..., RefcocoDataset], refcoco_rows: Rows, column: int, value: str, message: str
) -> None:
    refcoco_rows[1][column] = value
    with pytest.raises(BadRow, match=rf"train\.tsv:2: {message}.*--skip-bad-rows"):
        make(refcoco_rows)[1]
    dataset = make(refcoco_rows, skip=1)
    assert dataset[1] is None
    assert dataset.options.skip_budget.count == 1


def test_features_do_if_they_tell_the_size(
    make: Callable[..., RefcocoDataset], refcoco_rows: Rows, tmp_path: Path
) -> None:
    picture = make(refcoco_rows)[0]
    (tmp_path / "features.npy").write_bytes(encode_features(torch.zeros(5, 2, 2), (8, 6)))
    refcoco_rows[0][4] = "features.npy"
    dataset = make(refcoco_rows)
    features = dataset[0]
    assert picture is not None and features is not None
    assert features["patch_image"].shape == (5, 2, 2)
    assert torch.equal(features["target"], picture["target"])
    assert torch.equal(features["h_resize_ratio"], picture["h_resize_ratio"])
    assert torch.equal(dataset.target_tokens(0, dataset.tsv[0]), picture["target"][:-1])


def test_features_of_unknown_size_do_not_do(
    make: Callable[..., RefcocoDataset], refcoco_rows: Rows, tmp_path: Path
) -> None:
    np.save(tmp_path / "features.npy", np.zeros((3, 2, 2), dtype=np.float32))
    refcoco_rows[0][4] = "features.npy"
    with pytest.raises(BadRow, match=r"train\.tsv:1: the image column holds features that do not tell the size"):
        make(refcoco_rows)[0]


def test_too_few_columns_are_named(make: Callable[..., RefcocoDataset], refcoco_rows: Rows) -> None:
    refcoco_rows[1] = refcoco_rows[1][:4]
    with pytest.raises(BadRow, match=r"train\.tsv:2: has 4 columns, column 4 of --selected-cols 0,4,2,3 is missing"):
        make(refcoco_rows)[1]
    with pytest.raises(InputError, match="--selected-cols 0,4,2: names 3 columns, .* reads 4: id, image, text, box"):
        make(refcoco_rows, columns="0,4,2")
