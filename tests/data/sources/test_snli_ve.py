"""SNLI-VE: whole rows and bad lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from narvl_plugin.data.sources.snli_ve import convert_snli_ve
from narvl_plugin.data.sources.writing import ImageFolder
from narvl_plugin.errors import BadRow, MissingInput

CAPTION = "Two women are embracing while holding to go packages ."


def pair(number: int, hypothesis: str, label: str, image: str = "4705552913") -> dict[str, Any]:
    """Return a record of SNLI with the image that SNLI-VE adds."""
    return {
        "Flickr30K_ID": image,
        "annotator_labels": [label],
        "captionID": f"{image}.jpg#2",
        "gold_label": label,
        "pairID": f"{image}.jpg#2r{number}{label[0]}",
        "sentence1": CAPTION,
        "sentence1_binary_parse": "( ( Two women ) ( are embracing ) )",
        "sentence1_parse": "(ROOT (S (NP (CD Two) (NNS women))))",
        "sentence2": hypothesis,
        "sentence2_binary_parse": "( women )",
        "sentence2_parse": "(ROOT (NP (NNS women)))",
    }


def write_lines(raw: Path, split: str, records: list[Any]) -> None:
    """Write a file of records."""
    (raw / f"snli_ve_{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def image(raw: Path, photo: Callable[..., str]) -> str:
    """Write the data set and return its photograph."""
    train = [
        pair(1, "The sisters are hugging goodbye.", "neutral"),
        pair(1, "Two woman\tare holding\npackages.", "entailment"),
        pair(1, "The men are fighting.", "contradiction"),
        pair(2, "Nobody agrees.", "-"),
        pair(3, "", "neutral"),
        pair(1, "No picture.", "neutral", image="1"),
    ]
    write_lines(raw, "train", train)
    write_lines(raw, "dev", [pair(4, "Zwei Frauen – café", "neutral")])
    write_lines(raw, "test", [pair(5, "A test.", "entailment")])
    return photo("flickr30k-images/4705552913.jpg")


def test_rows(raw: Path, tmp_path: Path, image: str, read_rows: Callable[..., Any]) -> None:
    train, dev, test = convert_snli_ve(raw, tmp_path, ImageFolder(raw))
    image_id = "4705552913"
    assert read_rows(train.path) == [
        [f"{image_id}.jpg#2r1n", image_id, image, "The sisters are hugging goodbye.", CAPTION, "neutral"],
        [f"{image_id}.jpg#2r1e", image_id, image, "Two woman are holding packages.", CAPTION, "entailment"],
        [f"{image_id}.jpg#2r1c", image_id, image, "The men are fighting.", CAPTION, "contradiction"],
    ]
    assert train.counts == {
        "rows written": 3,
        "texts cleaned of tabs, line ends or separators": 1,
        "dropped (no gold label)": 1,
        "dropped (empty text)": 1,
        "dropped (missing image)": 1,
    }
    assert read_rows(dev.path) == [[f"{image_id}.jpg#2r4n", image_id, image, "Zwei Frauen – café", CAPTION, "neutral"]]
    assert read_rows(test.path) == [[f"{image_id}.jpg#2r5e", image_id, image, "A test.", CAPTION, "entailment"]]


@pytest.mark.parametrize("gone", ["snli_ve_dev.jsonl", "flickr30k-images"])
def test_missing_input_is_named_before_anything_is_written(raw: Path, tmp_path: Path, image: str, gone: str) -> None:
    (raw / gone).rename(raw / "elsewhere")
    with pytest.raises(MissingInput, match=rf"{gone}: no such .*necla-ml/SNLI-VE"):
        list(convert_snli_ve(raw, tmp_path / "out", ImageFolder(raw)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"pairID": "1"}, "snli_ve_train.jsonl:2: has no field 'Flickr30K_ID'"),
        ([], "snli_ve_train.jsonl:2: is a list, not an object with Flickr30K_ID"),
        (pair(1, "x", "maybe"), "snli_ve_train.jsonl:2: gold_label is 'maybe', not one of entailment"),
    ],
)
def test_a_record_that_is_not_as_published_is_named(
    raw: Path, tmp_path: Path, image: str, record: Any, message: str
) -> None:
    write_lines(raw, "train", [pair(1, "x", "neutral"), record])
    with pytest.raises(BadRow, match=message):
        list(convert_snli_ve(raw, tmp_path, ImageFolder(raw)))


def test_a_line_that_is_cut_off_is_named(raw: Path, tmp_path: Path, image: str) -> None:
    file = raw / "snli_ve_train.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(BadRow, match=r"snli_ve_train.jsonl:6: is not JSON"):
        list(convert_snli_ve(raw, tmp_path, ImageFolder(raw)))
