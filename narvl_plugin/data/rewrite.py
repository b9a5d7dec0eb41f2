"""What commands that write a TSV file anew share: whole rows, and image paths seen from another folder."""

from __future__ import annotations

import os
from pathlib import Path

from narvl_plugin.data.images import PATH_SUFFIXES
from narvl_plugin.data.tsv import TsvFile


def whole_rows(path: str | Path) -> TsvFile:
    """Open a TSV file with all columns that its first row has.

    Raises:
        MissingInput, InputError: there is no such file, or it is empty.
    """
    TsvFile(path, [0])  # complains in its own words of a file that cannot be opened
    with open(path, "rb") as file:
        return TsvFile(path, range(file.readline().count(b"\t") + 1))


def moved_image(column: str, source: Path, target: Path) -> str:
    """Return an image column for a row that moves from one TSV file to another.

    A relative path counts from its TSV's own folder, so it changes with the folder; base64 stays as it is.
    """
    if not column[-5:].lower().endswith(PATH_SUFFIXES) or os.path.isabs(column):
        return column
    return os.path.relpath(source.parent / column, target.parent)
