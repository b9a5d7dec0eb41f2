"""The grounding data set: the published items and batches, boxes to bins, bad rows."""

import base64
import io
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

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
        (3, "1_0,2,30,4", "'1_0,2,30,4' is no box"),
        (3, "\uff11,2,30,4", "'\uff11,2,30,4' is no box"),
        (3, "1,2,3,nan", "'1,2,3,nan' is no box"),
        (3, "5,2,5,4", "the box 5,2,5,4 is empty"),
        (3, "5,2,3,4", "the box 5,2,3,4 is empty; .*not x,y,width,height"),
        (3, "1,1,9.5,4", "the box 1,1,9.5,4 lies outside the image of 8 x 6 pixels"),
        (3, "8,1,8.5,4", "the box 8,1,8.5,4 lies outside the image of 8 x 6 pixels"),
        (3, "-2,1,5,4", "the box -2,1,5,4 lies outside"),
        (4, "bm8gaW1hZ2U=", "the image is not readable"),
        (4, base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%EOF\n").decode(), "the image is not readable"),
        (4, base64.b64encode(b"DDS |\0\0\0" + bytes(120)).decode(), "the image is not readable"),
        (4, "/dev/zero.jpg", "the image file /dev/zero.jpg cannot be read"),
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
    image = make(refcoco_rows)[0]
    (tmp_path / "features.npy").write_bytes(encode_features(torch.zeros(5, 2, 2), (8, 6)))
    refcoco_rows[0][4] = "features.npy"
    dataset = make(refcoco_rows)
    features = dataset[0]
    assert image is not None and features is not None
    assert features["patch_image"].shape == (5, 2, 2)
    assert torch.equal(features["target"], image["target"])
    assert torch.equal(features["h_resize_ratio"], image["h_resize_ratio"])
    assert torch.equal(dataset.target_tokens(0, dataset.tsv[0]), image["target"][:-1])


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


def image(width: int, height: int, file_format: str = "PNG", orientation: int = 1) -> str:
    """Give an image as an image column."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, file_format, exif=exif)
    return base64.b64encode(stream.getvalue()).decode()


@pytest.mark.parametrize("boxes", [("0.1,0.2,0.5,0.9", "0,0,1,1", "0.25,0,0.5,0.3"), ("0,0,1,1",) * 3])
@pytest.mark.parametrize("broken", [False, True])
def test_boxes_of_0_to_1_are_refused_before_training(
    make: Callable[..., RefcocoDataset], refcoco_rows: Rows, boxes: Sequence[str], broken: bool
) -> None:
    for row, box in zip(refcoco_rows, boxes, strict=True):
        row[3] = box
    if broken:  # what cannot be read tells nothing
        refcoco_rows[0][3:] = ["box", "bm8gaW1hZ2U="]
    with pytest.raises(InputError, match=r"train\.tsv: all of its first \d boxes lie within 1 pixels .* 8 x 6 pixels"):
        make(refcoco_rows, skip=3)


def test_boxes_in_percent_are_warned_of(
    make: Callable[..., RefcocoDataset], refcoco_rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for row in refcoco_rows:
        row[3:] = ["10,20,60.5,100", image(640, 480)]
    make(refcoco_rows)
    assert caplog.text.count("train.tsv: all of its first 3 boxes lie within 100 pixels") == 1
    assert "640 x 480 pixels; if they are percent" in caplog.text
    caplog.clear()
    refcoco_rows[2][3] = "10,20,300,100"
    make(refcoco_rows)
    assert not caplog.text


def test_one_small_box_among_others_is_right(
    make: Callable[..., RefcocoDataset], refcoco_rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    refcoco_rows[0][3] = "0,0,1,1"
    assert make(refcoco_rows)[0] is not None
    assert not caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_boxes_on_images_that_exif_turns_are_warned_of_once(
    make: Callable[..., RefcocoDataset], refcoco_rows: Rows, tmp_path: Path, workers: int
) -> None:
    refcoco_rows[1][4] = image(8, 6, "JPEG", 6)
    refcoco_rows[2][4] = image(8, 6, "PNG", 3)
    dataset = make(refcoco_rows)
    handler = logging.FileHandler(tmp_path / "log")  # which workers write to, too
    logging.getLogger("narvl_plugin").addHandler(handler)
    try:
        for _ in range(2):  # epochs
            samples = list(DataLoader(dataset, None, num_workers=workers))
    finally:
        logging.getLogger("narvl_plugin").removeHandler(handler)
    assert samples[1]["h_resize_ratio"] == 15, "it is read as it lies, 6 pixels high"
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert re.search(r"train\.tsv:[23]: EXIF turns the image, which is read as it lies", line)


def test_upright_images_are_not_warned_of(
    make: Callable[..., RefcocoDataset], refcoco_rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    refcoco_rows[1][4] = image(8, 6, "JPEG", 1)
    refcoco_rows[2][4] = image(8, 6, "TIFF", 3)  # which Pillow turns
    dataset = make(refcoco_rows)
    assert all(dataset[row] for row in range(3))
    assert not caplog.text
