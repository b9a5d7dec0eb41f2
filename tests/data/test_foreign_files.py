"""Files of a stranger's folder: which are opened, how much is read, and JSON in them."""

import os
from pathlib import Path

import pytest

from narvl_plugin.data.foreign_files import file_in, read_text
from narvl_plugin.data.plain_json import read_json
from narvl_plugin.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.txt").write_text("a")
    (tmp_path / "outside.txt").write_text("b")
    return tmp_path / "model"


def test_a_file_is_found_or_not(folder: Path) -> None:
    assert file_in(folder, "a.txt") == folder / "a.txt"
    assert file_in(folder, "b.txt") is None
    os.mkfifo(folder / "pipe")
    assert file_in(folder, "pipe") is None


@pytest.mark.parametrize(
    "name", ["../outside.txt", "/etc/passwd", "sub/a.txt", "", ".", "..", "a\n.txt", "a.txt/", "x" * 1000]
)
def test_a_name_is_no_path(name: str, folder: Path) -> None:
    with pytest.raises(InputError, match=r"model: names the file .*; expected a file in this folder"):
        file_in(folder, name)


def test_links_stay_in_the_folder(folder: Path) -> None:
    (folder / "inside").symlink_to("a.txt")
    assert file_in(folder, "inside") == folder / "inside"
    (folder / "outside").symlink_to("../outside.txt")
    (folder / "chain").symlink_to("outside")
    for name in ("outside", "chain"):
        with pytest.raises(InputError, match=rf"{name}: is a link that leads out of its folder"):
            file_in(folder, name)
    (folder / "circle").symlink_to("circle")
    assert file_in(folder, "circle") is None
    folder.with_name("linked").symlink_to(folder)  # the folder itself may be a link
    assert file_in(folder.with_name("linked"), "a.txt")


def test_the_cache_of_the_hub_links_to_its_own_blobs(tmp_path: Path) -> None:
    model = tmp_path / "models--owner--name"
    (model / "blobs").mkdir(parents=True)
    (model / "blobs" / "0123").write_text("a")
    (model / "snapshots" / "45").mkdir(parents=True)
    (model / "snapshots" / "45" / "config.json").symlink_to("../../blobs/0123")
    assert file_in(model / "snapshots" / "45", "config.json")
    (model / "blobs" / "67").symlink_to("/etc/passwd")
    (model / "snapshots" / "45" / "merges.txt").symlink_to("../../blobs/67")
    (model / "snapshots" / "45" / "vocab.json").symlink_to("../../../outside.txt")
    (tmp_path / "outside.txt").write_text("b")
    for name in ("merges.txt", "vocab.json"):
        with pytest.raises(InputError, match="leads out of its folder"):
            file_in(model / "snapshots" / "45", name)


def test_texts_are_bounded(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9")
    assert read_text(file, 8) == "café"
    with pytest.raises(InputError, match=r"a\.txt: is larger than 7 bytes"):
        read_text(file, 7)
    file.write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"a\.txt: is not text in UTF-8 \(unexpected end of data at byte 3\)"):
        read_text(file, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("3", "holds a value of type int; expected an object"),
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "refused, because it names 'c' twice"),
        ('{"a\\nb": 1, "a\\nb": 2}', r"refused, because it names 'a\\nb' twice"),
        ('{"a": "\\ud800"}', "is not JSON"),
        ('{"a": ' + "9" * 100 + "}", "holds a whole number of 333 bits"),
    ],
)
def test_json_is_checked(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=rf"a\.json: .*{message}"):
        read_json(tmp_path / "a.json", 1000)


def test_json_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, 2.5, null, true], "b": {"a": "é"}}', encoding="utf-8")
    assert read_json(tmp_path / "a.json", 1000) == {"a": [1, 2.5, None, True], "b": {"a": "é"}}
