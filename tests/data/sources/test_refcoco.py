"""RefCOCO and its relatives: whole rows from pickles of Python 2, boxes at the border, hostile pickles."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from narvl_plugin.data.sources.refcoco import convert_refcoco
from narvl_plugin.data.sources.writing import ImageFolder
from narvl_plugin.errors import BadRow, InputError, MissingInput

PHOTO = "train2014/COCO_train2014_000000581857.jpg"


def python2_pickle(value: Any) -> bytes:
    """Return what Python 2's pickle.dumps (protocol 0) writes for lists, dicts, byte strings and whole numbers."""

    def opcodes(value: Any) -> bytes:
        if isinstance(value, str):
            return b"S" + repr(value.encode())[1:].encode() + b"\n"
        if isinstance(value, int):
            return b"I%d\n" % value
        if isinstance(value, list):
            return b"(l" + b"".join(opcodes(item) + b"a" for item in value)
        return b"(d" + b"".join(opcodes(key) + opcodes(item) + b"s" for key, item in value.items())

    return opcodes(value) + b"."


def reference(ref_id: int, split: str, *texts: str, image_id: int = 581857) -> dict[str, Any]:
    """Return an entry of a refs file; its annotation has the number ref_id + 100."""
    sent_ids = [10 * ref_id + number for number in range(len(texts))]
    sentences = [
        {"tokens": text.split(), "raw": text.upper(), "sent_id": sent_id, "sent": text}
        for sent_id, text in zip(sent_ids, texts, strict=True)
    ]
    return {
        "sent_ids": sent_ids,
        "file_name": f"COCO_train2014_000000581857_{ref_id}.jpg",
        "ann_id": ref_id + 100,
        "ref_id": ref_id,
        "image_id": image_id,
        "split": split,
        "sentences": sentences,
        "category_id": 1,
    }


REFERENCES = [
    reference(1, "train", "the lady with the blue shirt", "café woman"),
    reference(2, "train", "left   man", ""),
    reference(3, "val", "outside"),
    reference(4, "val", "flat"),
    reference(5, "val", "at the\tcorner"),
    reference(6, "testA", "whole"),
    reference(7, "testB", "dog"),
]
BOXES = {
    101: [103.93, 299.99, 134.22, 177.42],
    102: [-1.5, 3, 20.5, 4],
    103: [640, 10, 5, 5],
    104: [10, 10, 5, 0],
    105: [600.125, 400.1, 40, 80],
    106: [0, 0, 640, 480],
    107: [1, 2, 3, 4],
}


def instances(boxes: dict[int, list[float]]) -> dict[str, Any]:
    """Return COCO's part of the data set."""
    return {
        "info": {"description": "This is stable 1.0 version of the 2014 MS COCO dataset."},
        "images": [
            {
                "license": 1,
                "file_name": "COCO_train2014_000000581857.jpg",
                "coco_url": "",
                "height": 480,
                "width": 640,
                "date_captured": "2013-11-16 20:32:17",
                "flickr_url": "",
                "id": 581857,
            }
        ],
        "licenses": [],
        "annotations": [
            {
                "segmentation": [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]],
                "area": 12.5,
                "iscrowd": 0,
                "image_id": 581857,
                "bbox": box,
                "category_id": 1,
                "id": key,
            }
            for key, box in boxes.items()
        ],
        "categories": [{"supercategory": "person", "id": 1, "name": "person"}],
    }


@pytest.fixture
def image(raw: Path, photo: Callable[..., str], write_json: Callable[[str, Any], Path]) -> str:
    """Write RefCOCO, and return its photograph."""
    write_json("refcoco/instances.json", instances(BOXES))
    (raw / "refcoco/refs(unc).p").write_bytes(python2_pickle(REFERENCES))
    return photo(PHOTO)


def test_the_stand_in_for_python_2_writes_pickles() -> None:
    assert pickle.loads(python2_pickle(REFERENCES), encoding="utf-8") == REFERENCES


def test_rows(raw: Path, tmp_path: Path, image: str, read_rows: Callable[..., Any]) -> None:
    train, val, test_a, test_b = convert_refcoco(raw, tmp_path, ImageFolder(raw))
    assert read_rows(train.path) == [
        ["10", "581857", "the lady with the blue shirt", "103.93,299.99,238.15,477.41", image],
        ["11", "581857", "café woman", "103.93,299.99,238.15,477.41", image],
        ["20", "581857", "left   man", "0,3,19,7", image],
    ]
    assert train.counts == {"rows written": 3, "boxes clipped": 1, "dropped (empty text)": 1}
    assert read_rows(val.path) == [["50", "581857", "at the corner", "600.12,400.1,640,480", image]]
    assert val.counts == {
        "dropped (box empty or outside the image)": 2,
        "rows written": 1,
        "boxes clipped": 1,
        "texts cleaned of tabs, line ends or separators": 1,
    }
    assert read_rows(test_a.path) == [["60", "581857", "whole", "0,0,640,480", image]]
    assert read_rows(test_b.path) == [["70", "581857", "dog", "1,2,4,6", image]]
    assert [out.path.name for out in (test_a, test_b)] == ["testA.tsv", "testB.tsv"]


@pytest.mark.parametrize(
    ("name", "split_by", "file", "splits"),
    [
        ("refcoco", "google", "refcoco/refs(google).p", ["train", "val", "test"]),
        ("refcoco+", None, "refcoco+/refs(unc).p", ["train", "val", "testA", "testB"]),
        ("refcocog", None, "refcocog/refs(umd).p", ["train", "val", "test"]),
        ("refcocog", "google", "refcocog/refs(google).p", ["train", "val"]),
    ],
)
def test_each_data_set_has_its_splits(
    raw: Path,
    tmp_path: Path,
    photo: Callable[..., str],
    write_json: Callable[[str, Any], Path],
    name: str,
    split_by: str | None,
    file: str,
    splits: list[str],
) -> None:
    photo(PHOTO)
    write_json(f"{name}/instances.json", instances(BOXES))
    (raw / file).write_bytes(python2_pickle([reference(7, split, "it") for split in splits]))
    outcomes = list(convert_refcoco(raw, tmp_path, ImageFolder(raw), name=name, split_by=split_by))
    assert [outcome.path.name for outcome in outcomes] == [f"{split}.tsv" for split in splits]
    assert all(outcome.counts == {"rows written": 1} for outcome in outcomes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "refclef"}, r"--name refclef: choose one of refcoco, refcoco\+, refcocog"),
        ({"split_by": "umd"}, "--split-by umd: refcoco was split by unc and google"),
        ({"splits": ["test"]}, "--splits test: this data set has train, val, testA, testB"),
    ],
)
def test_what_does_not_exist_is_refused(raw: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(convert_refcoco(raw, tmp_path, ImageFolder(raw), **options))


@pytest.mark.parametrize("gone", ["refcoco/refs(unc).p", "refcoco/instances.json", "train2014"])
def test_missing_input_is_named_before_anything_is_written(raw: Path, tmp_path: Path, image: str, gone: str) -> None:
    (raw / gone).rename(raw / "elsewhere")
    with pytest.raises(MissingInput, match=r"no such .*; unpack refcoco.zip") as caught:
        list(convert_refcoco(raw, tmp_path / "out", ImageFolder(raw)))
    assert str(raw / gone) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_pickle_that_would_run_a_command_is_refused(raw: Path, tmp_path: Path, image: str) -> None:
    ran = tmp_path / "ran"
    (raw / "refcoco/refs(unc).p").write_bytes(f"(lp0\ncposix\nsystem\n(S'touch {ran}'\ntRa.".encode())
    with pytest.raises(InputError, match=r"refs\(unc\).p: refused, because it asks for posix.system"):
        list(convert_refcoco(raw, tmp_path, ImageFolder(raw)))
    assert os.name == "posix" and not ran.exists()


@pytest.mark.parametrize(
    ("references", "boxes", "message"),
    [
        ({}, BOXES, r"refs\(unc\).p: is a dict, not a list"),
        ([{"ann_id": 101}], BOXES, r"refs\(unc\).p\[0\]: has no field 'image_id'"),
        ([reference(1, "train", "x", image_id=8)], BOXES, r"\[0\]: image_id 8 is not among the images of .*instances"),
        ([reference(1, "train", "x")], {}, r"\[0\]: ann_id 101 is not among the annotations of .*instances"),
        ([reference(1, "train", "x")], {101: [1, 2, 3]}, r"id 101 has bbox \[1, 2, 3\], not 4 numbers"),
        ([reference(1, "train", "x")], {101: [1, 2, 3, "4"]}, "id 101 has bbox .*, not 4 numbers"),
    ],
)
def test_a_record_that_is_not_as_published_is_named(
    raw: Path,
    tmp_path: Path,
    image: str,
    write_json: Callable[[str, Any], Path],
    references: Any,
    boxes: dict[int, list[float]],
    message: str,
) -> None:
    write_json("refcoco/instances.json", instances(boxes))
    (raw / "refcoco/refs(unc).p").write_bytes(python2_pickle(references))
    with pytest.raises(BadRow, match=message):
        list(convert_refcoco(raw, tmp_path, ImageFolder(raw)))
