"""What may be wrong with a user's files, said in one line, and how many bad rows are forgiven."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import re
from collections.abc import Iterable, Sequence

logger = logging.getLogger(__name__)


_CONTROL = re.compile(r"[^\n\t -~\xa0-\u2027\u202f-\u2065\u206a-\ud7ff\ue000-\U0010ffff]")
"""Control characters, those that turn the direction of writing, and halves of surrogate pairs."""


def harmless(text: str, replacement: str = "?") -> str:
    """Return a text in which a terminal finds no commands, whatever file it comes from."""
    return _CONTROL.sub(replacement, text)


class InputError(Exception):
    """An error in what the user gave (files, flags) whose message says all there is to know.

    The message may hold names and texts of a file, made `harmless`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(harmless(message))


class MissingInput(InputError, FileNotFoundError):
    """A file or folder that does not exist; the message names it and says what to do."""


class BadRow(InputError, ValueError):
    """A row that cannot be used; the message starts with `FILE:ROW: ` (rows count from 1)."""

    @property
    def where(self) -> str:
        """Return the `FILE:ROW` that the message starts with, or all of a message that names no row."""
        found = re.match(r".*?:\d+(?=: )", str(self), re.DOTALL)
        return found[0] if found else str(self)


def check_arguments(words: Iterable[str]) -> None:
    """Raise InputError for an argument of a command line that is not UTF-8: no checkpoint could hold or read it."""
    for word in words:
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(f"the argument {word!r:.200} cannot be read as UTF-8; {encoding_advice(word)}") from None


def encoding_advice(name: str) -> str:
    """Return what to do about a name that Python reads as surrogates, as it also does in a locale without UTF-8."""
    try:
        os.fsencode(name).decode("utf-8")
    except UnicodeError:
        return "rename it"
    return "the locale has no UTF-8: set LC_ALL=C.UTF-8 or PYTHONUTF8=1"


class SkipBudget:
    """Forgives up to `limit` bad rows, counted once each however many epochs or workers meet them.

    The count lives in shared memory, so that forked data workers and the main process draw on one budget. Each of the
    processes of a distributed training has a budget of its own.

    A row is known by its number and its file's: `number_files` gives files their numbers, so that a training that goes
    on knows the rows of a file that has moved since. Other files are known by their paths.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise InputError(f"--skip-bad-rows {limit}: the number of rows to skip cannot be negative")
        self.limit = limit
        self._count = multiprocessing.Value("q", 0)
        # One place more than the limit tells a budget that is overdrawn from one that is spent.
        self._seen = multiprocessing.Array("q", limit + 1, lock=False)
        self._numbers: dict[str, int] = {}

    @property
    def count(self) -> int:
        """Return how many different rows have been skipped so far."""
        return self._count.value

    @property
    def skipped(self) -> list[int]:
        """Return what tells the rows that have been skipped from others, a hash of 64 bits of each."""
        return self._seen[: self.count]

    def number_files(self, paths: Sequence[str]) -> None:
        """Number files in the order in which they are first named."""
        for path in paths:
            self._numbers.setdefault(path, len(self._numbers))

    def restore(self, skipped: Sequence[int]) -> None:
        """Count the rows that an earlier part of a run skipped, see `skipped`, each once.

        With a limit below their number the next bad row is an error, as the rows may have been mended since.
        """
        with self._count.get_lock():
            known = list(dict.fromkeys([*self.skipped, *skipped]))[: self.limit + 1]
            self._seen[: len(known)] = known
            self._count.value = len(known)

    def charge(self, count: int) -> None:
        """Count rows that were skipped before this run, and that it does not meet again.

        Raises InputError if there are more than the limit.
        """
        if count > self.limit:
            raise InputError(f"--skip-bad-rows {self.limit}: {count} rows were skipped before the run was stopped")
        self._count.value += count

    def not_yet_skipped(self, errors: Iterable[BadRow]) -> list[BadRow]:
        """Return the bad rows that have not been skipped so far, each once."""
        known = set(self.skipped)
        return list({key: error for error in errors if (key := self._key(error)) not in known}.values())

    def skip(self, error: BadRow) -> None:
        """Forgive `error`, or raise it again (a BadRow) once more than `limit` rows are bad."""
        key = self._key(error)
        with self._count.get_lock():
            count = self._count.value
            if key in self._seen[:count] and count <= self.limit:
                return
            if count >= self.limit:
                raise BadRow(f"{error}; mend the row, or skip such rows with --skip-bad-rows (now {self.limit})")
            self._seen[count] = key
            self._count.value = count + 1
        logger.warning("skipped bad row %d of at most %d: %s", count + 1, self.limit, error)

    def _key(self, error: BadRow) -> int:
        """Return what tells a row from others."""
        file, _, row = error.where.rpartition(":")
        name = f"{self._numbers.get(file, file)}:{row}"
        digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)
