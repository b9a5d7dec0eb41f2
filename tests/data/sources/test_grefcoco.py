"""gRefCOCO: whole rows with no, one or several boxes, too many of them, and hostile files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from narvl_plugin.data.dataset import DatasetOptions
from narvl_plugin.data.regions import RegionsDataset
from narvl_plugin.data.resumable import ResumableWriter, StalePart, fingerprint
from narvl_plugin.data.sources.grefcoco import convert_grefcoco
from narvl_plugin.data.sources.writing import ImageFolder
from narvl_plugin.data.text import TextCodec
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow, InputError, MissingInput, SkipBudget

NAME = "COCO_train2014_000000000909.jpg"
BOXES = {
    101: [103.93, 299.99, 134.22, 177.42],
    102: [-1.5, 3, 20.5, 4],
    103: [640, 10, 5, 5],
    **{110 + number: [10 * number, 0, 5, 5] for number in range(7)},
}


def reference(ref_id: int, split: str, ann_id: Any, *texts: str, image_id: int = 909) -> dict[str, Any]:
    """Return an entry of grefs(unc).json, with all that it says."""
    sent_ids = [3 * ref_id + number for number in range(len(texts))]
    return {
        "ann_id": ann_id,
        "category_id": [-1] if ann_id == [-1] else [1],
        "file_name": "COCO_train2014_000000000909_16.jpg",
        "image_id": image_id,
        "no_target": ann_id == [-1],
        "ref_id": ref_id,
        "sent_ids": sent_ids,
        "sentences": [
            {"raw": text.upper(), "sent": text, "sent_id": sent_id, "tokens": text.split()}
            for text, sent_id in zip(texts, sent_ids, strict=True)
        ],
        "split": split,
    }


REFERENCES = [
    reference(0, "train", [101], "lady in blue", "blue woman"),
    reference(1, "train", [101, 102], "everyone\tin blue"),
    reference(2, "train", [-1], "the kid in blue"),
    reference(3, "train", 102, "left man"),
    reference(4, "train", [101]),  # some have no sentence
    reference(5, "val", [101, 103], "one is outside of the image"),
    reference(6, "val", [-1], ""),
    reference(7, "val", [*range(110, 117)], "all seven"),
    reference(8, "val", [*range(110, 115)], "five of them"),
    reference(9, "testA", [-1], "nobody"),
    reference(0, "testB", [101], "lady"),
]


def instances(file_name: str = NAME, boxes: Any = BOXES) -> dict[str, Any]:
    """Return COCO's part of the data set."""
    return {
        "images": [{"file_name": file_name, "height": 480, "width": 640, "id": 909, "license": 1}],
        "annotations": [
            {"id": key, "bbox": box, "image_id": 909, "iscrowd": 0, "category_id": 1} for key, box in boxes.items()
        ],
        "categories": [{"supercategory": "person", "id": 1, "name": "person"}],
    }


@pytest.fixture
def image(photo: Callable[..., str], write_json: Callable[[str, Any], Path]) -> str:
    """Write gRefCOCO, and return its photograph."""
    write_json("grefcoco/instances.json", instances())
    write_json("grefcoco/grefs(unc).json", REFERENCES)
    return photo(f"train2014/{NAME}")


def test_rows(raw: Path, tmp_path: Path, image: str, read_rows: Callable[..., Any]) -> None:
    train, val, test_a, test_b = convert_grefcoco(raw, tmp_path, ImageFolder(raw))
    lady, left = "103.93,299.99,238.15,477.41", "0,3,19,7"
    assert read_rows(train.path) == [
        ["0-0", "909", "lady in blue", lady, image],
        ["0-1", "909", "blue woman", lady, image],
        ["1-3", "909", "everyone in blue", f"{lady}&&{left}", image],
        ["2-6", "909", "the kid in blue", "", image],
        ["3-9", "909", "left man", left, image],
    ]
    assert train.counts == {
        "rows written": 5,
        "boxes clipped": 2,
        "texts cleaned of tabs, line ends or separators": 1,
    }
    five = "0,0,5,5&&10,0,15,5&&20,0,25,5&&30,0,35,5&&40,0,45,5"
    assert read_rows(val.path) == [["8-24", "909", "five of them", five, image]]
    assert val.counts == {
        "rows written": 1,
        "dropped (box empty or outside the image)": 1,
        "dropped (empty text)": 1,
        "dropped (more than 5 boxes)": 1,
    }
    assert read_rows(test_a.path) == [["9-27", "909", "nobody", "", image]]
    assert read_rows(test_b.path) == [["0-0", "909", "lady", lady, image]]
    assert [outcome.path.name for outcome in (test_a, test_b)] == ["testA.tsv", "testB.tsv"]


def test_rows_of_many_boxes_can_be_cut_and_are_counted(
    raw: Path, tmp_path: Path, image: str, read_rows: Callable[..., Any]
) -> None:
    (val,) = convert_grefcoco(raw, tmp_path, ImageFolder(raw), splits=["val"], cut_boxes=True)
    seven, five = read_rows(val.path)
    assert seven[:3] == ["7-21", "909", "all seven"] and seven[3] == five[3]
    assert val.counts is not None
    assert "2 boxes cut" in str(val) and "1 rows cut to their first 5 boxes" in str(val)


def test_rows_are_those_that_the_data_set_of_regions_reads(
    raw: Path, tmp_path: Path, image: str, photo: Callable[..., str], codec: TextCodec
) -> None:
    photo(f"train2014/{NAME}", (640, 480))
    train, val, *_ = convert_grefcoco(raw, tmp_path, ImageFolder(raw), cut_boxes=True)
    options = DatasetOptions(codec, 64, 20, 20, False, SkipBudget(0))
    numbers = []
    for outcome in (train, val):
        dataset = RegionsDataset(TsvFile(outcome.path, "0,4,2,3"), options, "valid", max_image_size=512)
        numbers.append([len(dataset.sample(row)["region_coord"]) for row in range(len(dataset))])
    assert numbers == [[1, 1, 2, 0, 1], [5, 5]]


def test_an_unfinished_file_of_the_other_choice_is_refused(raw: Path, tmp_path: Path, image: str) -> None:
    files = [raw / "grefcoco/grefs(unc).json", raw / "grefcoco/instances.json"]
    inputs = {file.name: fingerprint(file) for file in files}
    settings = {"inputs": inputs, "image_paths": None, "check_images": False, "cut_boxes": True}
    with ResumableWriter(tmp_path / "val.tsv", settings) as writer:
        writer.append(["x"], rows=1)
    with pytest.raises(StalePart, match="was begun with cut_boxes=True, now cut_boxes=False"):
        list(convert_grefcoco(raw, tmp_path, ImageFolder(raw), splits=["val"]))


@pytest.mark.parametrize("gone", ["grefcoco/grefs(unc).json", "grefcoco/instances.json", "train2014"])
def test_missing_input_is_named_before_anything_is_written(raw: Path, tmp_path: Path, image: str, gone: str) -> None:
    (raw / gone).rename(raw / "elsewhere")
    with pytest.raises(MissingInput, match=r"no such .*; unpack grefs\(unc\).json and instances.json") as caught:
        list(convert_grefcoco(raw, tmp_path / "out", ImageFolder(raw)))
    assert str(raw / gone) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ({}, r"grefs\(unc\).json: is a dict, not a list"),
        ([[]], r"grefs\(unc\).json\[0\]: is a list, not an object with ref_id"),
        ([{"ref_id": 1, "image_id": 909}], r"\[0\]: has no field 'ann_id'"),
        ([reference(True, "train", [101], "x")], r"\[0\]: ref_id is True, not of type int"),
        ([reference(1, "test", [101], "x")], r"\[0\]: split is 'test', not one of train, val, testA, testB"),
        ([reference(1, "train", [101], "x", image_id=8)], r"\[0\]: image_id 8 is not among the images of .*instances"),
        ([reference(1, "train", [101, 8], "x")], r"\[0\]: ann_id 8 is not among the annotations of .*instances"),
        ([reference(1, "train", [-1, 101], "x")], r"\[0\]: ann_id -1 is not among the annotations"),
        ([reference(1, "train", [], "x")], r"\[0\]: ann_id is \[\], not a list of whole numbers"),
        ([reference(1, "train", ["101"], "x")], r"\[0\]: ann_id is \['101'\], not a list of whole numbers"),
        ([reference(1, "train", [101.0], "x")], r"not a list of whole numbers"),
        ([reference(1, "train", [True], "x")], r"not a list of whole numbers"),
        ([reference(1, "train", {}, "x")], r"\[0\]: ann_id is \{\}, not a list of whole numbers"),
        ([reference(1, "train", None, "x")], r"not a list of whole numbers"),
        (
            [{**reference(1, "val", [101]), "sentences": [{"sent": "x"}]}],
            r"\[0\].sentences\[0\]: has no field 'sent_id'",
        ),
        ([{**reference(1, "val", [101]), "sentences": [{"sent_id": 1, "sent": 7}]}], "sent is 7, not of type str"),
    ],
)
def test_a_record_that_is_not_as_published_is_named(
    raw: Path, tmp_path: Path, image: str, write_json: Callable[[str, Any], Path], references: Any, message: str
) -> None:
    write_json("grefcoco/grefs(unc).json", references)
    with pytest.raises(BadRow, match=message):
        list(convert_grefcoco(raw, tmp_path, ImageFolder(raw)))


@pytest.mark.parametrize(
    "box", [[1, 2, 3], [1, 2, 3, "4"], [1, 2, 3, float("nan")], [1, 2, 3, 10**400], [1, 2, 3, 1e10]]
)
def test_boxes_that_are_no_numbers_of_pixels_are_named(
    raw: Path, tmp_path: Path, image: str, write_json: Callable[[str, Any], Path], box: Any
) -> None:
    write_json("grefcoco/instances.json", instances(boxes={**BOXES, 101: box}))
    with pytest.raises(BadRow, match="instances.json:annotations: id 101 has bbox .*, not 4 numbers of pixels"):
        list(convert_grefcoco(raw, tmp_path, ImageFolder(raw)))


@pytest.mark.parametrize(
    "content", ["", "{", "[" * 100_000, '[{"ref_id": 1' + "0" * 5000 + "}]", "\ufeffnull", "<html>"]
)
def test_broken_json_is_named(raw: Path, tmp_path: Path, image: str, content: str) -> None:
    (raw / "grefcoco/grefs(unc).json").write_text(content)
    with pytest.raises(BadRow, match=r"grefs\(unc\).json: is not JSON \(.*; the published file is otherwise"):
        list(convert_grefcoco(raw, tmp_path, ImageFolder(raw)))


def test_a_file_of_any_size_is_not_read(raw: Path, tmp_path: Path, image: str) -> None:
    with open(raw / "grefcoco/instances.json", "wb") as file:
        file.truncate(2**33)  # takes no room on the disk
    with pytest.raises(InputError, match=r"instances.json: has 8,589,934,592 bytes; of JSON at most 4,294,967,296 are"):
        list(convert_grefcoco(raw, tmp_path, ImageFolder(raw)))


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "../secret.jpg", "a\tb.jpg"])
def test_names_that_climb_out_of_the_images_are_refused(
    raw: Path, tmp_path: Path, image: str, write_json: Callable[[str, Any], Path], name: str
) -> None:
    (raw / "secret.jpg").write_text("secret")
    write_json("grefcoco/instances.json", instances(name))
    with pytest.raises(InputError, match="refused, because it is no plain path of an image in"):
        list(convert_grefcoco(raw, tmp_path, ImageFolder(raw)))
    assert not any("secret" in file.read_text() for file in tmp_path.glob("*.tsv*"))
