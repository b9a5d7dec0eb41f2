"""Helpers of commands that rewrite a TSV file: whole rows, and image paths relative to another folder."""

from __future__ import annotations

import os
from pathlib import Path

from narvl_plugin.data.images import PATH_SUFFIXES
from narvl_plugin.data.tsv import TsvFile


class WholeRows(TsvFile):
    """All columns of the rows of a TSV file, by row number from 0. Rows may have different numbers of columns.

    Bytes that are not UTF-8 become surrogates of Python's `surrogateescape`, which `ResumableWriter` converts back. The
    line end is not part of a column.
    """

    def __getitem__(self, row: int) -> list[str]:
        """Return all columns of `row`."""
        return [field.decode("utf-8", "surrogateescape") for field in self.fields(row)]


def whole_rows(path: str | Path) -> WholeRows:
    """Open a TSV file with all columns of each row.

    Raises:
        MissingInput: if the file does not exist.
        InputError: if it is empty or not text, see `TsvFile`.
    """
    return WholeRows(path, [])


def moved_image(column: str, source: Path, target: Path) -> str:
    """Return an image column for a row that moves from one TSV file to another.

    A relative path refers to the folder of its TSV file and changes with the folder. Base64 stays unchanged.

    Args:
        column: the column.
        source: the TSV file that the row comes from.
        target: the TSV file that the row goes to.
    """
    if not column[-5:].lower().endswith(PATH_SUFFIXES) or os.path.isabs(column):
        return column
    return os.path.relpath(source.parent / column, target.parent)
