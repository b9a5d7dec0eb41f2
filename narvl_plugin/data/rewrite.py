"""What commands that write a TSV file anew share: whole rows, and image paths seen from another folder."""

from __future__ import annotations

import os
from pathlib import Path

from narvl_plugin.data.images import PATH_SUFFIXES
from narvl_plugin.data.tsv import TsvFile


class WholeRows(TsvFile):
    """All columns of a TSV file's rows, by row number from 0, however many each row has.

    Every byte of a column stays, also in columns that are no UTF-8: such bytes become the surrogates of Python's
    `surrogateescape`, which `ResumableWriter` turns back. The line end is no part of a column.
    """

    def __getitem__(self, row: int) -> list[str]:
        """Return all columns of `row`."""
        return [field.decode("utf-8", "surrogateescape") for field in self.fields(row)]


def whole_rows(path: str | Path) -> WholeRows:
    """Open a TSV file with all columns of each row.

    Raises:
        MissingInput, InputError: there is no such file, or it is empty.
    """
    return WholeRows(path, [])


def moved_image(column: str, source: Path, target: Path) -> str:
    """Return an image column for a row that moves from one TSV file to another.

    A relative path counts from its TSV's own folder, so it changes with the folder; base64 stays as it is.
    """
    if not column[-5:].lower().endswith(PATH_SUFFIXES) or os.path.isabs(column):
        return column
    return os.path.relpath(source.parent / column, target.parent)
