"""Captions of picture files: what they are called, in which order, and what becomes of those that are none."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from narvl_plugin.bench import Predictor
from narvl_plugin.captioning import PictureTable, caption_pictures, find_pictures
from narvl_plugin.errors import BadRow, InputError, MissingInput

NAMES = ("b.png", "a.webp", "sub/c.BMP", "d.jpg", "sub/deeper/e.jpeg", "z.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with noise in pictures of several names, and with a text."""
    draw = random.Random(0)
    for name in NAMES:
        file = tmp_path / "pictures" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (8, 6), draw.randbytes(8 * 6 * 3)).save(file)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


def pairs(file: Path) -> list[list[str]]:
    """Read names and captions."""
    return [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]


def test_pictures_are_found_below_a_folder_and_named_from_there(folder: Path) -> None:
    assert list(find_pictures([folder])) == sorted(NAMES)
    files = [folder / "z.png", folder / "sub"]
    assert list(find_pictures(files)) == [f"{folder}/z.png", f"{folder}/sub/c.BMP", f"{folder}/sub/deeper/e.jpeg"]


def test_what_is_no_picture_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: there is no picture in this folder"):
        find_pictures([tmp_path / "empty"])
    with pytest.raises(MissingInput, match=r"gone: no such picture or folder"):
        find_pictures([tmp_path / "gone"])
    with pytest.raises(InputError, match=r"notes.txt: is no picture by its name"):
        find_pictures([folder / "notes.txt"])
    (folder / "a\tb.png").touch()
    with pytest.raises(InputError, match=r"'a\\tb.png': .* rename it"):
        find_pictures([folder])


@pytest.mark.integration
def test_captions_are_those_of_one_picture_at_a_time(
    make_model: Callable[..., Path], folder: Path, write_tsv: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    student = make_model("narvl_tiny", "qctc")
    state = torch.load(student, weights_only=False)
    torch.manual_seed(0)
    for weight in state["model"].values():
        if weight.dim() == 2:  # at birth outputs hardly depend on the picture
            weight.copy_(torch.randn_like(weight))
    torch.save(state, student)
    names = sorted(NAMES)
    pictures = [base64.b64encode((folder / name).read_bytes()).decode() for name in names]
    data = write_tsv(
        "rows.tsv", [[name, name, "words", "", picture] for name, picture in zip(names, pictures, strict=True)]
    )
    one_by_one = Predictor.load(student, data).with_options({}, beam=2)
    expected = [[name, one_by_one(row)] for row, name in enumerate(names)]
    assert len({caption for _, caption in expected}) > 1, "different pictures should get different words here"

    options = {"checkpoint": student, "beam": 2, "device": "cpu"}
    for workers in (0, 2):
        out = tmp_path / f"captions{workers}.tsv"
        count = caption_pictures([folder], out=out, batch_size=4, workers=workers, **options)
        assert pairs(out) == expected
        assert count[:2] == (len(NAMES), 0)
    capsys.readouterr()
    caption_pictures([folder], workers=0, **options)
    assert [line.split("\t") for line in capsys.readouterr().out.splitlines()] == expected
    caption_pictures([folder], out=tmp_path / "captions.json", workers=0, **options)
    records = json.loads((tmp_path / "captions.json").read_text())
    assert records == [{"image_id": name, "caption": caption} for name, caption in expected]


@pytest.mark.integration
def test_broken_pictures_are_named_or_left_out(make_model: Callable[..., Path], folder: Path, tmp_path: Path) -> None:
    student = make_model("narvl_tiny", "qctc")
    for name in ("c.png", "d.jpg"):  # the second batch of two has nothing else
        (folder / name).write_bytes(b"no picture")
    options = {"checkpoint": student, "batch_size": 2, "device": "cpu"}
    with pytest.raises(BadRow, match=r"^\S*pictures/c.png: the image is not readable"):
        caption_pictures([folder], workers=1, **options)
    out = tmp_path / "captions.tsv"
    count = caption_pictures([folder], out=out, workers=1, skip_bad_rows=2, **options)
    assert count[:2] == (5, 2)
    assert [name for name, _ in pairs(out)] == sorted(set(NAMES) - {"d.jpg"})
    with pytest.raises(BadRow, match=r"d.jpg: .*now 1"):
        caption_pictures([folder], out=out, workers=1, skip_bad_rows=1, **options)
    assert [name for name, _ in pairs(out)] == ["a.webp", "b.png"], "what was said before stays"


def test_a_table_of_pictures_reads_like_a_tsv_file(folder: Path) -> None:
    table = PictureTable(find_pictures([folder]))
    assert len(table) == len(NAMES)
    assert table[1][:2] == ["b.png", str(folder / "b.png")]
    assert table.where(1) == str(folder / "b.png")


def test_a_missing_checkpoint_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="gone.pt: no such checkpoint"):
        caption_pictures([folder], checkpoint=tmp_path / "gone.pt")
