"""Image files as rows of a task, instead of a TSV file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from narvl_plugin.data.dataset import TsvDataset


class Table:
    """Image files with the other columns that a task reads.

    Attributes:
        path: the folder that relative paths refer to.
        columns: numbers of the columns, in the order of the task.
        rows: name and file of each row.
    """

    path = "images"

    def __init__(
        self, images: Mapping[str, Path], texts: Mapping[str, Mapping[str, str]], kind: type[TsvDataset]
    ) -> None:
        """Make the rows of some image files.

        Args:
            images: the files by name.
            texts: the texts by column and name.
            kind: the data set that reads the rows.
        """
        self.columns = tuple(range(len(kind.column_names)))
        self.rows = list(images.items())
        self._texts = texts
        self._kind = kind

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> list[str]:
        """Return the columns of a row. Unknown ones hold the task's placeholders."""
        name, file = self.rows[row]
        known = {**self._kind.placeholders, "id": name, "image": str(file)}
        known |= {column: by_name[name] for column, by_name in self._texts.items() if name in by_name}
        return [known[column] for column in self._kind.column_names]

    def where(self, row: int) -> str:
        """Return the file of a row, for errors."""
        return str(self.rows[row][1])
