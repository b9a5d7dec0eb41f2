"""A writer of text files that a program resumes where it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from tqdm import tqdm

from narvl_plugin.errors import InputError
from narvl_plugin.whole_files import naming, require_writable, sole_writer

EDGE_BYTES = 1 << 16
"""Number of bytes at both ends of a file that its fingerprint covers."""
SKIPPED = "bad rows skipped"
"""Name of the count of skipped bad rows."""


class StalePart(InputError):
    """An unfinished file was begun with other inputs, or has lost bytes since."""


def fingerprint(path: str | Path) -> str:
    """Return a short hash that distinguishes versions of a large file without reading all of it.

    The hash covers the size and both ends of the file. A checkpoint's end holds the checksums of all its tensors, and a
    TSV file's ends change with its rows. The modification time is not covered: copies of a folder can be resumed.

    Raises:
        FileNotFoundError: if the file does not exist.
    """
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        digest.update(file.read(EDGE_BYTES))
        file.seek(max(0, size - EDGE_BYTES))
        digest.update(file.read(EDGE_BYTES))
    return digest.hexdigest()[:16]


class ResumableWriter:
    """Writes `PATH.part` in whole batches and renames it to `PATH` at the end.

    The file `PATH.part.json` records the settings, the numbers of rows and bytes so far, and the caller's counts. It is
    replaced after every batch. The next run removes all that a killed run wrote after its last whole batch. A resumed
    run therefore gives the same bytes and counts as an uninterrupted one.

    Inside the with-block the file is locked against other processes, unless it is finished. Another process may have
    finished it just before. The caller must check this inside the block:

        with ResumableWriter(path, settings) as writer:
            if not writer.finished:
                for batch in writer.batches(...): writer.append(...)
                writer.finish()

    Args:
        path: the file to write. Its folder is created.
        settings: all values that the contents depend on, as JSON. An unfinished file with other settings is refused.
        replace: whether a file that exists under its final name is written anew.

    Attributes:
        path: the file.
        part: the unfinished file.
        record: the record of the unfinished file.
        settings: the settings.
        rows_done: number of input rows that are done.
        counts: the caller's counts among these rows, by name.

    Raises:
        InputError: if the file cannot be written; on entering, if another process writes it; in `append` and `finish`,
            if the disk is full.
        StalePart: on entering, if the part belongs to other settings or is shorter than recorded.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], *, replace: bool = False) -> None:
        self.path = Path(path)
        self.replace = replace
        require_writable(self.path)
        self.part = self.path.with_name(self.path.name + ".part")
        self.record = self.path.with_name(self.path.name + ".part.json")
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.rows_done = 0
        self.counts: Counter[str] = Counter()
        self._bytes_done = 0
        self._file: IO[bytes] | None = None
        self._lock = ExitStack()

    @property
    def finished(self) -> bool:
        """Whether the file exists under its final name, and is not to be written anew."""
        return self.path.exists() and not self.replace

    def __enter__(self) -> ResumableWriter:
        if self.finished:
            return self
        with self._lock:  # released if anything fails before pop_all
            self._lock.enter_context(sole_writer(self.path))
            if self.record.exists() and self.part.exists():
                self._take_up()
            self._file = open(self.part, "ab")
            self._file.truncate(self._bytes_done)
            self._save_record()
            self._lock = self._lock.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError:  # on a full disk, closing tries to write again
                if kind is None:
                    raise
            self._file = None
            if not self.rows_done:
                self.discard()
        self._lock.close()

    def batches(self, num_rows: int, batch_size: int, title: str) -> Iterator[range]:
        """Yield the remaining input rows (from 0) batch by batch, and show progress.

        The caller must append each batch before it takes the next. Only whole batches are recorded. A resumed run
        therefore has the same batches as an uninterrupted one.

        Args:
            num_rows: number of all input rows.
            batch_size: number of rows per batch.
            title: title of the progress bar.
        """
        with tqdm(total=num_rows, initial=self.rows_done, desc=title, unit="row") as progress:
            while self.rows_done < num_rows:
                yield range(self.rows_done, min(self.rows_done + batch_size, num_rows))
                progress.update(self.rows_done - progress.n)

    def append(self, lines: list[str], rows: int, counts: Mapping[str, int] | None = None) -> None:
        """Write the lines for the next input rows.

        Args:
            lines: the lines, without line ends. Bytes that are not UTF-8 are surrogates of `surrogateescape`.
            rows: number of the input rows.
            counts: numbers to add to the counts.
        """
        assert self._file is not None, "append() needs the writer's with-block"
        content = "".join(line + "\n" for line in lines).encode("utf-8", "surrogateescape")
        with naming(self.path):
            self._file.write(content)
            self._file.flush()
        self.rows_done += rows
        self.counts.update(counts or {})
        self._bytes_done += len(content)
        self._save_record()

    def finish(self, convert: Callable[[Path], None] | None = None) -> None:
        """Rename the complete file and delete the record.

        Args:
            convert: writes the file under its final name from the unfinished one, if it has another format.

        Raises:
            InputError: if the file is empty. It is then deleted.
        """
        assert self._file is not None, "finish() needs the writer's with-block"
        if not self._bytes_done:
            self.discard()
            raise InputError(f"{self.path}: no row is left to write; all {self.rows_done} rows were skipped")
        with naming(self.path):
            os.fsync(self._file.fileno())
            self._file.close()
        self._file = None
        if convert is None:
            os.replace(self.part, self.path)
        else:
            convert(self.part)
            self.part.unlink()
        self.record.unlink()

    def discard(self) -> None:
        """Delete the unfinished file. The next run then starts from the beginning."""
        self.part.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)

    def _take_up(self) -> None:
        """Read the record of an earlier run, and check that it had the same settings."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            before: dict[str, Any] = dict(record["settings"])
            counts = Counter({str(name): int(count) for name, count in record.get("counts", {}).items()})
            if min(int(record["rows"]), int(record["bytes"]), *counts.values()) < 0:
                raise ValueError("a number below 0")
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
            raise StalePart(
                f"{self.record}: is damaged ({error}); delete it and {self.part} to start from the beginning"
            ) from error
        if not record["rows"]:
            return
        for key in sorted(before.keys() | self.settings.keys()):
            if before.get(key) != self.settings.get(key):
                raise StalePart(
                    f"{self.part}: was begun with {key}={before.get(key)!r},"
                    f" now {key}={self.settings.get(key)!r};"
                    f" run it with the former settings, or delete it to start from the beginning"
                )
        if self.part.stat().st_size < record["bytes"]:
            raise StalePart(
                f"{self.part}: holds {self.part.stat().st_size} bytes where {self.record.name} counts"
                f" {record['bytes']}; delete it to start from the beginning"
            )
        self.rows_done, self._bytes_done = record["rows"], record["bytes"]
        self.counts = counts

    def _save_record(self) -> None:
        """Replace the record in one step. A killed program leaves either the old or the new one."""
        state = {"settings": self.settings, "rows": self.rows_done, "bytes": self._bytes_done, "counts": self.counts}
        content = json.dumps(state, indent=1)
        fresh = self.record.with_name(self.record.name + ".new")
        with naming(self.path):
            fresh.write_text(content + "\n", encoding="utf-8")
            os.replace(fresh, self.record)
