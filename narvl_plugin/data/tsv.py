"""Random access to the rows of a TSV file of any size. The file is indexed once and then read row by row."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from narvl_plugin.data.mistaken_files import mistaken, read_head
from narvl_plugin.errors import BadRow, InputError, MissingInput

logger = logging.getLogger(__name__)

CHUNK = 1 << 24
"""Number of bytes that are read at once in the search for line ends."""
MAX_ROW = 1 << 30
"""Longest row, in bytes. A file without line ends would be read into memory as one row."""
LONGEST_BLANK = 256
"""Longest line that can count as blank, in bytes."""
HEADER = 2
"""Length of an index's header: the size and the modification time of its file."""


def parse_columns(selected_cols: str | Sequence[int]) -> list[int]:
    """Return the column numbers (from 0) of a text such as "0,4,2".

    Raises:
        InputError: if the text has another form.
    """
    if not isinstance(selected_cols, str):
        return list(selected_cols)
    if not re.fullmatch(r" *[0-9]{1,9} *(, *[0-9]{1,9} *)*", selected_cols):
        raise InputError(f"--selected-cols {selected_cols}: expected column numbers from 0, such as 0,4,2")
    return [int(column) for column in selected_cols.split(",")]


class TsvFile:
    """The selected columns of the rows of a TSV file, by row number from 0.

    The index of row ends is computed once and stored beside the file (FILE.idx.npy), or in the user's cache folder if
    that is not possible. It is computed again when the file's size or time changes. The index is memory-mapped (8 bytes
    per row), and rows are read one by one. Opening is therefore quick and takes little memory. Worker processes receive
    only the path.

    Blank lines at the end of the file are not rows. A byte order mark of UTF-8 is not part of the first column.

    Attributes:
        path: the path, as it was given.
        columns: the numbers of the selected columns.
        advice: the end of an error about a text in a column.

    Raises:
        MissingInput: if the file does not exist.
        InputError: if it is empty, or not UTF-8 text with line ends.
    """

    advice = "; check --selected-cols"

    def __init__(self, path: str | os.PathLike[str], selected_cols: str | Sequence[int]) -> None:
        self.path = str(path)
        self.columns = parse_columns(selected_cols)
        self._open()
        if blank := len(self._offsets) - 1 - self._rows:
            logger.warning("%s: the file ends in %d blank lines, which are no rows", self.path, blank)

    def _open(self) -> None:
        if not os.path.isfile(self.path):
            raise no_file(self.path, "; check the data argument (TRAIN.tsv,…,VALID.tsv)")
        if os.path.getsize(self.path) == 0:
            raise InputError(f"{self.path}: the file is empty")
        refuse_other_files(self.path)
        self._offsets = load_index(self.path)
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - stays open as long as the instance
        self._rows = self._rows_before_blank_lines()
        if not self._rows:
            raise InputError(f"{self.path}: the file holds blank lines only")
        if len(self) == 1:
            self._refuse_other_line_ends()

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "columns": self.columns}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self._rows

    @property
    def offsets(self) -> np.ndarray:
        """The positions of all rows and of the end of the last one, int64 (rows + 1), in bytes."""
        return self._offsets[: self._rows + 1]

    def where(self, row: int) -> str:
        """Return `FILE:ROW`, with the path as it was given and rows counted from 1."""
        return f"{self.path}:{row + 1}"

    def __getitem__(self, row: int) -> list[str]:
        """Return the selected columns of a row.

        Raises:
            BadRow: if the row is blank, or a column is missing or not UTF-8.
        """
        fields = self.fields(row)
        if not b"".join(fields).strip():
            raise BadRow(f"{self.where(row)}: is a blank line; delete it")
        missing = [column for column in self.columns if column >= len(fields)]
        if missing:
            raise BadRow(
                f"{self.where(row)}: has {len(fields)} columns, column {missing[0]} of --selected-cols "
                f"{','.join(map(str, self.columns))} is missing (columns count from 0)"
            )
        try:
            return [fields[column].decode("utf-8") for column in self.columns]
        except UnicodeDecodeError as error:
            raise BadRow(f"{self.where(row)}: is not UTF-8 text ({error}); save the file in UTF-8") from error

    def fields(self, row: int) -> list[bytes]:
        """Return all columns of a row, without the line end.

        Raises:
            BadRow: if the row is too long.
            InputError: if the index is damaged there.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"{self.path} has {len(self)} rows; row {row} does not exist")
        start, end = self._offsets[row : row + 2].tolist()
        if not 0 <= start < end <= self._offsets[-1]:  # the index may be of another file
            raise self._damaged_index(row)
        if end - start > MAX_ROW:
            raise BadRow(f"{self.where(row)}: has {end - start:,} bytes; more than {MAX_ROW:,} are refused")
        # pread takes a position of its own, since forked processes share that of the file.
        line = os.pread(self._file.fileno(), end - start, start)
        first_end = line.find(b"\n") + 1 or self._offsets[-1] - start  # only the last row may lack a line end
        if first_end != len(line):
            raise self._damaged_index(row)
        if row == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        return line.rstrip(b"\r\n").split(b"\t")

    def _damaged_index(self, row: int) -> InputError:
        if os.fstat(self._file.fileno()).st_size != self._offsets[-1]:
            return InputError(f"{self.path}: the file changed while it was read; start again when it is complete")
        index = getattr(self._offsets, "filename", f"{self.path}.idx.npy")
        return InputError(
            f"{self.path}: its index is damaged at row {row + 1}; delete {index}, which may be of an earlier file"
        )

    def _rows_before_blank_lines(self) -> int:
        """Count the rows without the blank lines at the end, which editors often leave."""
        rows = len(self._offsets) - 1
        while rows:
            start, end = self._offsets[rows - 1 : rows + 1].tolist()
            if not 0 < end - start <= LONGEST_BLANK or os.pread(self._file.fileno(), end - start, start).strip():
                break
            rows -= 1
        return rows

    def _refuse_other_line_ends(self) -> None:
        """Raise InputError if carriage returns divide the file into rows and it has no line ends."""
        end = int(self._offsets[-1])
        rows = os.pread(self._file.fileno(), CHUNK, 0).strip(b"\r").split(b"\r")
        if end > CHUNK:
            rows.pop()  # the last row is cut off
        has_line_end = os.pread(self._file.fileno(), 1, end - 1) == b"\n"
        columns = {row.count(b"\t") + 1 for row in rows}
        if not has_line_end and len(rows) > 1 and len(columns) == 1 and min(columns) > max(self.columns, default=0):
            raise InputError(
                f"{self.path}: its rows end in carriage returns, as on old Macs, and would be read as one; convert it "
                "(tr '\\r' '\\n' < FILE > NEW)"
            )


def no_file(path: str, hint: str) -> MissingInput:
    """Return the error of a path that is a folder or does not exist; `hint` is appended in the second case."""
    if os.path.isdir(path):
        return MissingInput(f"{path}: is a folder; name the TSV files in it, joined by commas")
    return MissingInput(f"{path or 'a name without a letter'}: no such TSV file{hint}")


def refuse_other_files(path: str) -> None:
    """Raise InputError if the first bytes of a file show that it is not UTF-8 text, or was not downloaded."""
    head = read_head(path)
    if head == codecs.BOM_UTF8:
        raise InputError(f"{path}: the file is empty")
    if (what := mistaken(head)) is not None:
        raise InputError(f"{path}: {what}; a table of text in columns (TSV) is expected")


def load_index(path: str) -> np.ndarray:
    """Return the offsets of all rows of a file and of its end, int64 (rows + 1), in bytes.

    The offsets are memory-mapped if the index can be stored.

    Raises:
        InputError: if the file changes while it is read.
    """
    candidates = [candidate for candidate in (Path(path + ".idx.npy"), cached_index_path(path)) if candidate]
    stamp = file_stamp(path)
    for candidate in candidates:
        index = read_index(candidate, stamp)
        if index is not None:
            return index
    index = build_index(path)
    if file_stamp(path) != stamp:
        raise InputError(f"{path}: the file changed while it was read; start again when it is complete")
    contents = np.concatenate([np.array(stamp, dtype=np.int64), index])
    for candidate in candidates:
        # If no folder can be written (read-only media, a full disk), the file is indexed again the next time.
        with contextlib.suppress(OSError):
            write_index(candidate, contents)
            written = read_index(candidate, stamp)
            if written is not None:
                return written
    logger.warning("%s: the row index could not be stored; it stays in memory", path)
    return index


def file_stamp(path: str) -> tuple[int, int]:
    """Return the size of a file in bytes and its modification time in nanoseconds."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def cached_index_path(path: str) -> Path | None:
    """Return the path of the index in the user's cache folder; None for a user without a home."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a container's user may have neither HOME nor an entry in passwd
        return None
    name = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:24]
    return cache / "narvl" / "index" / f"{name}.idx.npy"


def read_index(path: Path, stamp: tuple[int, int]) -> np.ndarray | None:
    """Return the stored offsets if they are of a file of this size and time, else None."""
    try:
        if not path.is_file():  # a pipe would never end
            return None
        contents = np.lib.format.open_memmap(path, mode="r")
    except Exception:  # a foreign file, whose header may raise almost any exception
        return None
    if contents.ndim != 1 or contents.dtype != np.int64 or len(contents) < HEADER + 2:
        return None
    if tuple(contents[:HEADER]) != stamp or contents[HEADER] != 0 or contents[-1] != stamp[0]:
        return None
    return contents[HEADER:]


def write_index(path: Path, contents: np.ndarray) -> None:
    """Write an index in one step: another process sees either none or all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.save(file, contents, allow_pickle=False)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def build_index(path: str) -> np.ndarray:
    """Return the offsets of all rows of a file and of its end, see `row_offsets`."""
    with open(path, "rb") as file:
        return row_offsets(file)


def row_offsets(file: IO[bytes]) -> np.ndarray:
    """Return the offsets of all rows of an open file and of its end, int64 (rows + 1), in bytes."""
    starts = [np.zeros(1, dtype=np.int64)]
    position = 0
    while chunk := file.read(CHUNK):
        newlines = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n"))
        starts.append(newlines + (position + 1))
        position += len(chunk)
    offsets = np.concatenate(starts)
    # The last line end closes the last row. Without it, the last row ends at the end of the file.
    if offsets[-1] != position:
        offsets = np.append(offsets, position)
    return offsets
