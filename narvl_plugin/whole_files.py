"""Writing of files that are always complete, by one program at a time."""

from __future__ import annotations

import errno
import logging
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from narvl_plugin.errors import InputError

logger = logging.getLogger(__name__)

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, an exceeded quota and an exceeded limit of the file's size."""
_NO_SPACE_OF_LIBRARIES = re.compile("|".join(map(os.strerror, NO_SPACE)))
"""These errors in the messages of libraries in other languages."""
_SHARED_MEMORY = re.compile("shared memory|/torch_|/dev/shm")
"""Messages of torch about the shared memory of data workers, which is not a disk."""
_UNSAID = re.compile("iostream error|unexpected pos|file write failed")
"""Messages of torch about a failed write to a path, which do not name the reason."""

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of a file system without locks."""


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name a file in the error of a full disk, in whatever words a library reports it.

    If an interrupt stopped torch while it wrote, torch raises an error of its own. The interrupt is then raised again.

    Args:
        path: the file that the block writes.

    Raises:
        InputError: if the disk is full.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        chain = list(_chain(error))
        if interrupt := next((cause for cause in chain if not isinstance(cause, Exception)), None):
            raise interrupt from None
        if reason := _no_space(chain):
            raise InputError(f"{path}: {reason}; make room, and start the same command again") from error
        raise


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _no_space(chain: Sequence[BaseException]) -> str:
    """Return the message of a full disk, found in an error and its causes, or an empty text for other errors."""
    for error in chain:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return os.strerror(error.errno)
        found = _NO_SPACE_OF_LIBRARIES.search(str(error))
        if found and not _SHARED_MEMORY.search(str(error)):
            return found[0]
    return "is not whole, as where no space is left" if all(_UNSAID.search(str(error)) for error in chain) else ""


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a small file in one step, and create missing folders above it.

    If two programs write the file at the same time, it is the complete file of one of them.

    Args:
        path: the file.
        content: its contents.

    Raises:
        InputError: if the disk is full.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        try:
            with open(part, "xb") as file:
                file.write(content.encode("utf-8") if isinstance(content, str) else content)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def require_writable(path: Path, *, folder: bool = False) -> None:
    """Check, before long work, that a file or folder can be written later. Nothing is written.

    An existing file may be replaced, and missing folders above it may be created.

    Args:
        path: the file or folder.
        folder: whether it is a folder.

    Raises:
        InputError: if it cannot be written.
    """
    if not folder and path.is_dir():
        raise InputError(f"{path}: is a folder; give the name of a file")
    if folder and path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file; give the name of a folder")
    above = path.absolute() if folder else path.absolute().parent
    while not above.exists() and not above.is_symlink():
        above = above.parent
    if not above.is_dir():
        raise InputError(f"{path}: cannot be written, because {above} is no folder; give another path")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{path}: cannot be written, because {above} may not be written to; give another path")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a large file in the block. The file is renamed at the end of the block, or deleted after an error.

    Args:
        path: the final path.

    Yields:
        The path to write to, `PATH.part`.

    Raises:
        InputError: if another program writes the file, or the disk is full.
    """
    with naming(path), sole_writer(path):
        part = path.with_name(path.name + ".part")
        try:
            yield part
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Write a folder in the block. It is renamed at the end of the block, or deleted after an error.

    Args:
        path: the final path. It must not exist, or be an empty folder.

    Yields:
        The folder to write into, `PATH.part`.

    Raises:
        InputError: if another program writes the folder, or the disk is full.
    """
    with naming(path), sole_writer(path):
        part = path.with_name(path.name + ".part")
        shutil.rmtree(part, ignore_errors=True)  # of a killed program
        try:
            part.mkdir()
            yield part
            part.replace(path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


@contextmanager
def sole_writer(path: str | Path) -> Iterator[None]:
    """Lock a file or folder against other programs for the duration of the block.

    The lock is the file `PATH.lock`, which is deleted at the end of the block. A killed process loses its lock at once,
    even if its forked workers survive. Check only inside the block whether anything is left to write.

    Args:
        path: the file or folder.

    Raises:
        InputError: if another program writes it. The message names the program.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(path.name + ".lock")
    lock = FileLock(file, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"{path}: {_holder(file)} is writing it; wait until it ends, or write to another file"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        logger.warning("%s: this file system has no locks; start no second program that writes it", path)
    try:
        with naming(path):
            file.write_text(f"process {os.getpid()} on {platform.node()}\n", encoding="utf-8")
        yield
    finally:
        file.unlink(missing_ok=True)  # before the release: a waiting program then sees that it must make another
        lock.release()


def _holder(file: Path) -> str:
    """Return the name of the process that holds a lock, as far as the lock's file names it."""
    try:
        return file.read_text(encoding="utf-8").strip() or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"
