"""What may be wrong with a user's files, said in one line, and how many bad rows are forgiven."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing

logger = logging.getLogger(__name__)


class InputError(Exception):
    """An error in what the user gave (files, flags) whose message says all there is to know."""


class MissingInput(InputError, FileNotFoundError):
    """A file or folder that does not exist; the message names it and says what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


class BadRow(InputError, ValueError):
    """A row that cannot be used; the message starts with `FILE:ROW: ` (rows count from 1)."""

    @property
    def where(self) -> str:
        """Return the `FILE:ROW` that the message starts with."""
        return str(self).split(": ", 1)[0]


class SkipBudget:
    """Forgives up to `limit` bad rows, counted once each however many epochs or workers meet them.

    The count lives in shared memory, so that forked data workers and the main process draw on one budget.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise InputError(f"--skip-bad-rows {limit}: the number of rows to skip cannot be negative")
        self.limit = limit
        self._count = multiprocessing.Value("q", 0)
        self._seen = multiprocessing.Array("q", max(limit, 1), lock=False)

    @property
    def count(self) -> int:
        """Return how many different rows have been skipped so far."""
        return self._count.value

    def skip(self, error: BadRow) -> None:
        """Forgive `error`, or raise it again (a BadRow) once more than `limit` rows are bad."""
        digest = hashlib.blake2b(error.where.encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little", signed=True)
        with self._count.get_lock():
            count = self._count.value
            if key in self._seen[:count]:
                return
            if count >= self.limit:
                raise BadRow(f"{error}; mend the row, or skip such rows with --skip-bad-rows (now {self.limit})")
            self._seen[count] = key
            self._count.value = count + 1
        logger.warning("skipped bad row %d of at most %d: %s", count + 1, self.limit, error)
