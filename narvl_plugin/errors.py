"""Errors in a user's input, with messages of one line, and the budget of bad rows that may be skipped."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Sequence

logger = logging.getLogger(__name__)


_CONTROL = re.compile(r"[^\n\t -~\xa0-\u2027\u202f-\u2065\u206a-\ud7ff\ue000-\U0010ffff]")
"""Control characters, characters that change the direction of writing, and halves of surrogate pairs."""


def harmless(text: str, replacement: str = "?") -> str:
    """Return a text without characters that a terminal could read as commands."""
    return _CONTROL.sub(replacement, text)


class InputError(Exception):
    """An error in the user's files or flags. The message names the cause and what to do.

    It may quote names and texts of a file, made `harmless`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(harmless(message))


class MissingInput(InputError, FileNotFoundError):
    """A file or folder does not exist. The message names it and what to do."""


class BadRow(InputError, ValueError):
    """A row cannot be used. The message starts with `FILE:ROW: ` (rows count from 1)."""

    @property
    def where(self) -> str:
        """The `FILE:ROW` at the start of the message, or the whole message if it names no row."""
        found = re.match(r".*?:\d+(?=: )", str(self), re.DOTALL)
        return found[0] if found else str(self)


def check_arguments(words: Iterable[str]) -> None:
    """Check that the arguments of a command line are UTF-8, which checkpoints require.

    Raises:
        InputError: if an argument is not.
    """
    for word in words:
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"the argument {word!r:.200} cannot be read as UTF-8; {encoding_advice(word)}") from None


def encoding_advice(name: str) -> str:
    """Return the advice for a name that Python read as surrogates: the name or the locale may not be UTF-8."""
    try:
        os.fsencode(name).decode("utf-8")
    except UnicodeError:
        return "rename it"
    return "the locale has no UTF-8: set LC_ALL=C.UTF-8 or PYTHONUTF8=1"


class SkipBudget:
    """Number of bad rows that may be skipped. Each row counts once, whatever the number of epochs and workers.

    The count is in shared memory: forked data workers and the main process share one budget. Each process of a
    distributed training has a budget of its own.

    A row is identified by its number and by the number of its file (see `number_files`). A resumed training therefore
    recognises the rows of a file that was moved. Files without numbers are identified by their paths.

    Attributes:
        limit: largest number of rows that may be skipped.
        report: called with the error of each row that is skipped; by default it is logged.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise InputError(f"--skip-bad-rows {limit}: the number of rows to skip cannot be negative")
        self.limit = limit
        self._count = multiprocessing.Value("q", 0)
        # One more place than the limit: an exceeded budget then differs from one that is used up.
        self._seen = multiprocessing.Array("q", limit + 1, lock=False)
        self._numbers: dict[str, int] = {}
        self.report: Callable[[BadRow], None] = self._log

    @property
    def count(self) -> int:
        """The number of different rows that have been skipped so far."""
        return self._count.value

    @property
    def skipped(self) -> list[int]:
        """The identities of the rows that have been skipped, as hashes of 64 bits."""
        return self._seen[: self.count]

    def number_files(self, paths: Sequence[str]) -> None:
        """Number files in the order of their first mention."""
        for path in paths:
            self._numbers.setdefault(path, len(self._numbers))

    def restore(self, skipped: Sequence[int]) -> None:
        """Count the rows that an earlier part of a run skipped, each once.

        If they exceed the limit, the next bad row is an error. They may have been fixed since.

        Args:
            skipped: identities of the rows, see `skipped`.
        """
        with self._count.get_lock():
            known = list(dict.fromkeys([*self.skipped, *skipped]))[: self.limit + 1]
            self._seen[: len(known)] = known
            self._count.value = len(known)

    def charge(self, count: int) -> None:
        """Count rows that an earlier part of a run skipped, and that this part does not read again.

        Raises:
            InputError: if there are more than the limit.
        """
        if count > self.limit:
            raise InputError(f"--skip-bad-rows {self.limit}: {count} rows were skipped before the run was stopped")
        self._count.value += count

    def not_yet_skipped(self, errors: Iterable[BadRow]) -> list[BadRow]:
        """Return the bad rows that have not been skipped so far, each once."""
        known = set(self.skipped)
        return list({key: error for error in errors if (key := self._key(error)) not in known}.values())

    def skip(self, error: BadRow) -> None:
        """Skip a bad row.

        Args:
            error: the error of the row.

        Raises:
            BadRow: if more than `limit` rows are bad.
        """
        key = self._key(error)
        with self._count.get_lock():
            count = self._count.value
            if key in self._seen[:count] and count <= self.limit:
                return
            if count >= self.limit:
                raise BadRow(f"{error}; fix the row, or allow more bad rows by --skip-bad-rows (now {self.limit})")
            self._seen[count] = key
            self._count.value = count + 1
        self.report(error)

    def _log(self, error: BadRow) -> None:
        logger.warning("skipped bad row %d of at most %d: %s", self.count, self.limit, error)

    def _key(self, error: BadRow) -> int:
        """Return the identity of a row."""
        file, _, row = error.where.rpartition(":")
        name = f"{self._numbers.get(file, file)}:{row}"
        digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)
