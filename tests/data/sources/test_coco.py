"""COCO captions in Karpathy's splits: whole rows, and what is left out of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from narvl_plugin.data.sources import coco, writing
from narvl_plugin.data.sources.coco import convert_coco
from narvl_plugin.data.sources.writing import ImageFolder
from narvl_plugin.errors import BadRow, InputError, MissingInput

NAMES = {
    9: "train2014/COCO_train2014_000000000009.jpg",
    42: "val2014/COCO_val2014_000000000042.jpg",
    73: "val2014/COCO_val2014_000000000073.jpg",
    74: "val2014/COCO_val2014_000000000074.jpg",
}


def image(cocoid: int, split: str, *captions: str) -> dict[str, Any]:
    """Return an entry of dataset_coco.json."""
    sentids = [10 * cocoid + number for number in range(len(captions))]
    folder, filename = NAMES[cocoid].split("/")
    return {
        "filepath": folder,
        "sentids": sentids,
        "filename": filename,
        "imgid": cocoid - 1,
        "split": split,
        "sentences": [
            {"tokens": caption.lower().split(), "raw": caption, "imgid": cocoid - 1, "sentid": sentid}
            for sentid, caption in zip(sentids, captions, strict=True)
        ],
        "cocoid": cocoid,
    }


IMAGES = [
    image(9, "train", "A café, with\ttables. ", "Two R&&B singers\n"),
    image(42, "restval", "a dog", " \n"),
    image(73, "val", "One cat", "", "the |!+ cat &"),
    image(74, "test", "a boat", "Boats"),
]


@pytest.fixture
def photos(photo: Callable[..., str], write_json: Callable[[str, Any], Path]) -> dict[int, str]:
    """Write the data set and return its photographs."""
    write_json("dataset_coco.json", {"images": IMAGES, "dataset": "coco"})
    return {cocoid: photo(name) for cocoid, name in NAMES.items()}


def test_rows(raw: Path, tmp_path: Path, photos: dict[int, str], read_rows: Callable[..., Any]) -> None:
    out = tmp_path / "out"
    reports = [str(outcome) for outcome in convert_coco(raw, out, ImageFolder(raw))]
    assert read_rows(out / "train.tsv") == [
        ["90", "9", "A café, with tables.", "", photos[9]],
        ["91", "9", "Two R B singers", "", photos[9]],
        ["420", "42", "a dog", "", photos[42]],
    ]
    assert read_rows(out / "val.tsv") == [["73", "73", "One cat&&the   cat", "", photos[73]]]
    assert read_rows(out / "test.tsv") == [["74", "74", "a boat&&Boats", "", photos[74]]]
    assert reports == [
        f"{out / 'train.tsv'}: 3 rows written, 2 texts cleaned of tabs, line ends or separators, "
        "1 dropped (empty text)",
        f"{out / 'val.tsv'}: 1 rows written, 1 texts cleaned of tabs, line ends or separators, "
        "1 empty texts left out of a row",
        f"{out / 'test.tsv'}: 1 rows written",
    ]


def test_all_captions_of_an_image_in_one_row(
    raw: Path, tmp_path: Path, photos: dict[int, str], read_rows: Callable[..., Any]
) -> None:
    list(convert_coco(raw, tmp_path, ImageFolder(raw), splits=["train"], join_captions=True))
    assert read_rows(tmp_path / "train.tsv") == [
        ["9", "9", "A café, with tables.&&Two R B singers", "", photos[9]],
        ["42", "42", "a dog", "", photos[42]],
    ]
    assert not (tmp_path / "val.tsv").exists()


@pytest.mark.parametrize("kill_at", [0, 1, 2, 3])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes_and_counts(
    raw: Path, tmp_path: Path, photos: dict[int, str], monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    monkeypatch.setattr(writing, "BATCH_ROWS", 2)
    whole = [outcome.counts for outcome in convert_coco(raw, tmp_path / "whole", ImageFolder(raw))]
    seen = 0

    def row(entry: Any, notes: Any, real: Any = coco.caption_row) -> list[str | Path]:
        nonlocal seen
        if seen == kill_at:
            raise KeyboardInterrupt
        seen += 1
        return real(entry, notes)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(coco, "caption_row", row)
        list(convert_coco(raw, tmp_path / "killed", ImageFolder(raw)))
    again = [outcome.counts for outcome in convert_coco(raw, tmp_path / "killed", ImageFolder(raw))]
    assert again[-2:] == whole[-2:]
    assert again[0] in (whole[0], None)
    for split in ("train", "val", "test"):
        name = f"{split}.tsv"
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(list((tmp_path / "killed").iterdir())) == 3


def test_what_is_there_already_is_left_alone(raw: Path, tmp_path: Path, photos: dict[int, str]) -> None:
    list(convert_coco(raw, tmp_path, ImageFolder(raw)))
    before = (tmp_path / "train.tsv").stat().st_mtime_ns
    reports = [str(outcome) for outcome in convert_coco(raw, tmp_path, ImageFolder(raw))]
    assert reports[0] == f"{tmp_path / 'train.tsv'} is there already; delete it to make it anew"
    assert (tmp_path / "train.tsv").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("dataset_coco.json", "dataset_coco.json: no such file; unpack dataset_coco.json from caption_datasets.zip"),
        ("val2014", "val2014: no such folder of images; .* or name its parent with --images"),
    ],
)
def test_missing_input_is_named_before_anything_is_written(
    raw: Path, tmp_path: Path, photos: dict[int, str], gone: str, message: str
) -> None:
    (raw / gone).rename(raw / "elsewhere")
    with pytest.raises(MissingInput, match=message):
        list(convert_coco(raw, tmp_path / "out", ImageFolder(raw)))
    assert not (tmp_path / "out").exists()


def test_unknown_split_is_refused(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--splits restval: this data set has train, val, test"):
        list(convert_coco(raw, tmp_path, ImageFolder(raw), splits=["restval"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "dataset_coco.json: is a list, not an object with images; the published file is otherwise"),
        ({"images": {}}, "dataset_coco.json: images is {}, not of type list"),
        ({"images": [IMAGES[0], "x"]}, r"dataset_coco.json:images\[1\]: is a str, not an object with cocoid"),
        ({"images": [{**IMAGES[0], "cocoid": "9"}]}, r"images\[0\]: cocoid is '9', not of type int"),
        ({"images": [{"cocoid": 9}]}, r"images\[0\]: has no field 'filepath'"),
        ({"images": [{**IMAGES[0], "sentences": [{"sentid": 3}]}]}, r"images\[0\].sentences\[0\]: has no field 'raw'"),
    ],
)
def test_a_record_that_is_not_as_published_is_named(
    raw: Path,
    tmp_path: Path,
    photos: dict[int, str],
    write_json: Callable[[str, Any], Path],
    content: Any,
    message: str,
) -> None:
    write_json("dataset_coco.json", content)
    with pytest.raises(BadRow, match=message):
        list(convert_coco(raw, tmp_path, ImageFolder(raw)))


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_json_is_named(raw: Path, tmp_path: Path, photos: dict[int, str], content: bytes) -> None:
    (raw / "dataset_coco.json").write_bytes(content)
    with pytest.raises(BadRow, match="dataset_coco.json: is not JSON"):
        list(convert_coco(raw, tmp_path, ImageFolder(raw)))
