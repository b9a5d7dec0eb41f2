"""Rows that move from one TSV file to another."""

from __future__ import annotations

from pathlib import Path

import pytest

from narvl_plugin.data.rewrite import moved_image, whole_rows
from narvl_plugin.errors import InputError, MissingInput


def test_whole_rows_have_all_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("a\tb\t\tdé\ne\tf\tg\th\n", encoding="utf-8")
    rows = whole_rows(path)
    assert [rows[row] for row in range(len(rows))] == [["a", "b", "", "dé"], ["e", "f", "g", "h"]]


def test_rows_keep_their_own_number_of_columns_and_all_bytes(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    lines = [b"a", b"b\tc\td\t\t", b"\t", b"caf\xe9\tx\ry\xe2\x80\xa8z", b" e \t\x00"]
    path.write_bytes(b"\r\n".join(lines))
    rows = whole_rows(path)
    kept = ["\t".join(rows[row]).encode("utf-8", "surrogateescape") for row in range(len(rows))]
    assert kept == lines


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="gone.tsv"):
        whole_rows(tmp_path / "gone.tsv")
    (tmp_path / "empty.tsv").touch()
    with pytest.raises(InputError, match="empty.tsv"):
        whole_rows(tmp_path / "empty.tsv")


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("pictures/1.jpg", "../coco/pictures/1.jpg"),
        ("/media/1.PNG", "/media/1.PNG"),
        ("aGVsbG8jpg=", "aGVsbG8jpg="),
    ],
)
def test_only_relative_paths_move(column: str, expected: str) -> None:
    assert moved_image(column, Path("data/coco/train.tsv"), Path("data/out/train.tsv")) == expected
