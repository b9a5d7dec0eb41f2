"""Images as rows of a task, instead of a TSV file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from narvl_plugin.data.dataset import TsvDataset


class Table:
    """Images with the other columns that a task reads.

    Attributes:
        path: the folder that relative paths refer to.
        columns: numbers of the columns, in the order of the task.
        advice: the end of an error about a text, empty because no one selected its column.
        rows: name and image of each row. An image is whatever the reader of the data set reads.
    """

    path = "images"
    advice = ""

    def __init__(
        self, images: Mapping[str, Any], texts: Mapping[str, Mapping[str, str]], kind: type[TsvDataset]
    ) -> None:
        """Make the rows of some images.

        Args:
            images: the images by name.
            texts: the texts by column and name.
            kind: the data set that reads the rows.
        """
        self.columns = tuple(range(len(kind.column_names)))
        self.rows = list(images.items())
        self._texts = texts
        self._kind = kind

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> list[Any]:
        """Return the columns of a row. Unknown ones hold the task's placeholders."""
        name, image = self.rows[row]
        known = {**self._kind.placeholders, "id": name, "image": str(image) if isinstance(image, Path) else image}
        known |= {column: by_name[name] for column, by_name in self._texts.items() if name in by_name}
        return [known[column] for column in self._kind.column_names]

    def where(self, row: int) -> str:
        """Return the file of a row, or the name of an image that is not a file, for errors."""
        name, image = self.rows[row]
        return str(image) if isinstance(image, Path) else name
