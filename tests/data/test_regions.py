"""The data set of all regions that a phrase describes: several boxes or none, batches, bad rows, tables, features."""

import base64
import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

from narvl_plugin.data.columns import check_columns
from narvl_plugin.data.dataset import DatasetOptions
from narvl_plugin.data.images import encode_features
from narvl_plugin.data.refcoco import RefcocoDataset
from narvl_plugin.data.regions import RegionsDataset
from narvl_plugin.data.scenes import write_scenes
from narvl_plugin.data.table import Table
from narvl_plugin.data.text import TextCodec
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow, InputError, SkipBudget

Rows = list[list[str]]
Make = Callable[..., RegionsDataset]


@pytest.fixture
def rows(regions_rows: Rows) -> Rows:
    """Rows with two boxes, one and none, on images of 8 x 6 pixels."""
    return regions_rows


@pytest.fixture
def options(codec: TextCodec) -> DatasetOptions:
    return DatasetOptions(codec, 90, 20, 4, False, SkipBudget(0))


@pytest.fixture
def make(options: DatasetOptions, write_tsv: Callable[..., Path]) -> Make:
    """Make a data set of rows; images are resized to 90 pixels, and ten bins cover them."""

    def make_dataset(rows: Sequence[Sequence[str]], split: str = "train", **orders: bool) -> RegionsDataset:
        tsv = TsvFile(write_tsv("train.tsv", rows), "0,4,2,3")
        return RegionsDataset(tsv, options, split, max_image_size=90, **orders)

    return make_dataset


def test_all_boxes_become_bins_in_the_order_of_reading(make: Make, codec: TextCodec, rows: Rows) -> None:
    two, one, none = (make(rows).sample(row) for row in range(3))
    # x is stretched by 11.25, y by 15, and nine bins' distances cover 90 pixels.
    assert codec.decode(two["target"]) == "<bin_0><bin_0><bin_4><bin_4><bin_1><bin_3><bin_8><bin_9>"
    assert codec.decode(one["target"]) == "<bin_2><bin_2><bin_9><bin_9>"
    assert two["region_coord"].tolist() == [[1, 2, 7.5, 6], [0, 0, 4, 3]]
    eos = codec.dictionary.eos()
    assert [len(sample["target"]) for sample in (two, one, none)] == [9, 5, 1]
    assert all(sample["target"][-1] == eos for sample in (two, one, none))
    assert none["prev_output_tokens"].tolist() == [codec.dictionary.bos()]


def test_one_box_is_read_as_in_refcoco(make: Make, rows: Rows, options: DatasetOptions) -> None:
    dataset = make(rows[1:2])
    other = RefcocoDataset(dataset.tsv, options, "train", max_image_size=90).sample(0)
    sample = dataset.sample(0)
    assert torch.equal(sample["target"], other["target"])
    assert torch.equal(sample["region_coord"], other["region_coord"][None])
    for key in ("w_resize_ratio", "h_resize_ratio", "patch_image"):
        assert torch.equal(sample[key], other[key])


def test_the_prompt_asks_for_regions(make: Make, codec: TextCodec, rows: Rows) -> None:
    rows[0][2] = "Every striped Cup"
    expected = codec.encode(' which region does the text " every striped cup " describe?')
    assert torch.equal(make(rows).sample(0)["source"][1:-1], expected)


def test_a_batch_holds_the_boxes_of_each_row(make: Make, codec: TextCodec, rows: Rows) -> None:
    dataset = make(rows)
    batch = dataset.collater([dataset[row] for row in range(3)])
    assert [tuple(boxes.shape) for boxes in batch["region_coords"]] == [(2, 4), (1, 4), (0, 4)]
    assert all(boxes.dtype == torch.float64 for boxes in batch["region_coords"])  # fairseq halves what is float32
    assert batch["w_resize_ratios"].tolist() == [11.25] * 3 and batch["h_resize_ratios"].tolist() == [15] * 3
    assert batch["h_resize_ratios"].dtype == torch.float64
    assert batch["target_lengths"] == [8, 4, 0]
    assert batch["target_needs"] == [8 + 2, 4 + 2, 0]  # equal neighbours: 00 and 44, 22 and 99
    assert batch["ntokens"] == 9 + 5 + 1
    pad, eos = codec.dictionary.pad(), codec.dictionary.eos()
    assert batch["target"][2].tolist() == [eos] + [pad] * 8
    alone = dataset.collater([dataset[2]])
    assert alone["target"].tolist() == [[eos]]


def test_targets_are_known_without_the_pixels(make: Make, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = make(rows)
    targets = [dataset.sample(row)["target"][:-1] for row in range(3)]
    monkeypatch.setattr("PIL.Image.Image.convert", None)
    for row, target in enumerate(targets):
        assert torch.equal(dataset.target_tokens(row, dataset.tsv[row]), target)
    assert [dataset.min_queries(row) for row in range(3)] == [10, 6, 0]


def test_rows_of_boxes_are_read_from_left_to_right(make: Make, codec: TextCodec, rows: Rows) -> None:
    rows[0][3] = "4,0,6,3&&0,0,2,3&&1,3,4,6&&0,0,4,3"
    bins = (make(rows).sample(0)["target"][:-1] - codec.dictionary.index("<bin_0>")).view(-1, 4).tolist()
    assert bins == sorted(bins, key=lambda box: (box[1], box[0], box[2]))
    assert bins[-1][1] > 0 and len(bins) == 4


def test_boxes_of_equal_bins_are_one(make: Make, rows: Rows) -> None:
    rows[0][3] = "1,2,7,6&&1.02,2,7,6&&0,0,4,3"
    sample = make(rows).sample(0)
    assert len(sample["target"]) == 9
    assert sample["region_coord"].shape == (3, 4)


def test_random_orders_need_as_many_queries_as_any_of_them(make: Make, rows: Rows) -> None:
    rows[0][3] = "0,0,4,3&&1,2,7.5,3&&4,3,8,6"  # bins 0 0 4 4, 1 3 8 4 and 4 4 9 9
    dataset = make(rows, random_order=True)
    needs = []
    for epoch in range(1, 60):
        dataset.set_epoch(epoch)
        needs.append(dataset.collater([dataset.sample(0)])["target_needs"][0])
    assert dataset.min_queries(0) == max(needs) > min(needs)
    assert dataset.min_queries(2) == 0
    assert make(rows).min_queries(0) == make(rows, split="valid", random_order=True).min_queries(0)


def test_five_boxes_are_the_most(make: Make, rows: Rows) -> None:
    rows[0][3] = "&&".join(f"0,0,{edge},3" for edge in range(4, 9))
    assert make(rows).sample(0)["region_coord"].shape == (5, 4)
    assert len(make(rows).sample(0)["target"]) == 21
    rows[0][3] += "&&1,1,2,2"
    with pytest.raises(BadRow, match=r"train\.tsv:1: has 6 boxes, and this task reads at most 5"):
        make(rows).sample(0)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ("0,0,4,3&&1,2,3", "'1,2,3' is no box; expected x0,y0,x1,y1"),
        ("0,0,4,3&&", "'' is no box"),
        ("&&", "'' is no box"),
        ("0,0,4,3,1,1,2,2", "is no box"),
        ("none", "'none' is no box"),
        ("0,0,4,3&&5,2,3,4", "the box 5,2,3,4 is empty"),
        ("1,1,9.5,4&&0,0,4,3", "the box 1,1,9.5,4 lies outside the image of 8 x 6 pixels"),
    ],
)
def test_bad_boxes_are_named_and_can_be_skipped(
    make: Make, rows: Rows, options: DatasetOptions, boxes: str, message: str
) -> None:
    rows[1][3] = boxes
    dataset = make(rows)
    for read in (dataset.sample, dataset.min_queries):
        with pytest.raises(BadRow, match=rf"train\.tsv:2: .*{message}"):
            read(1)
    options.skip_budget.limit = 1
    assert dataset[1] is None


@pytest.mark.parametrize("column", ["  ", ""])
def test_a_blank_column_is_no_box(make: Make, rows: Rows, column: str) -> None:
    rows[0][3] = column
    assert make(rows).sample(0)["region_coord"].shape == (0, 4)


def test_boxes_of_0_to_1_are_refused_also_behind_rows_without_boxes(make: Make, rows: Rows) -> None:
    for row, boxes in zip(rows, ("", "0.1,0.2,0.5,0.9&&0,0,0.5,0.5", "0.1,0.1,1,1"), strict=True):
        row[3] = boxes
    with pytest.raises(InputError, match=r"train\.tsv: all of its first 3 boxes lie within 1 pixels .* 8 x 6 pixels"):
        make(rows)
    rows[1][3] = "0.1,0.2,0.5,0.9&&0,0,4,3"
    rows[2][3] = "0,0,101,102"  # no share and no percentage
    make(rows)


def test_images_without_boxes_tell_nothing_of_the_unit(make: Make, rows: Rows) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (2, 2)).save(stream, "PNG")
    tiny = base64.b64encode(stream.getvalue()).decode()
    rows[0][3:] = ["", rows[0][4]]  # of 8 x 6 pixels, where the others' boxes would be shares
    rows[1][3:] = ["0,0,1,1&&0,0,0.5,1", tiny]
    rows[2][3:] = ["0,0,1,0.5", tiny]
    assert make(rows).sample(1)["region_coord"].shape == (2, 4)


def test_a_file_of_phrases_that_fit_nothing_can_be_read(make: Make, rows: Rows) -> None:
    for row in rows:
        row[3] = ""
    dataset = make(rows, split="valid")
    batch = dataset.collater([dataset[row] for row in range(3)])
    assert batch["target"].shape == (3, 1)


def test_features_do_if_they_tell_the_size(make: Make, rows: Rows, tmp_path: Path) -> None:
    image = make(rows).sample(0)
    (tmp_path / "features.npy").write_bytes(encode_features(torch.zeros(5, 2, 2), (8, 6)))
    for row in rows:
        row[4] = "features.npy"
    dataset = make(rows)
    features = dataset.sample(0)
    assert features["patch_image"].shape == (5, 2, 2)
    assert torch.equal(features["target"], image["target"])
    assert torch.equal(features["region_coord"], image["region_coord"])
    assert dataset.sample(2)["region_coord"].shape == (0, 4)


def test_images_without_boxes_are_rows_of_a_table(options: DatasetOptions, rows: Rows) -> None:
    table = Table({"one": rows[0][4]}, {"text": {"one": "every cup"}}, RegionsDataset)
    dataset = RegionsDataset(table, options, "test", max_image_size=90)  # type: ignore[arg-type]
    batch = dataset.collater([dataset.sample(0)])
    assert batch["id"].tolist() == ["one"]
    assert batch["region_coords"][0].shape == (0, 4)
    assert batch["w_resize_ratios"].tolist() == [11.25]


def test_embedded_scenes_are_read_in_silence(
    options: DatasetOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_scenes(tmp_path, train=60, valid=1, test=1, size=32, nouns=20, tasks=("regions",))
    caplog.set_level(logging.WARNING)
    tsv = TsvFile(tmp_path / "regions" / "train.tsv", "0,4,2,3")
    check_columns(tsv, RegionsDataset.column_names)
    dataset = RegionsDataset(tsv, options, "train", max_image_size=90)
    numbers = {len(dataset.sample(row)["region_coord"]) for row in range(60)}
    assert numbers == {0, 1, 2, 3, 4}
    assert not caplog.text
