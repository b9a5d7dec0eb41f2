"""Files that are whole wherever they exist, and that one program at a time writes."""

from __future__ import annotations

import errno
import logging
import os
import platform
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from narvl_plugin.errors import InputError

logger = logging.getLogger(__name__)

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk, a quota or a limit of a file's size answers when it is full."""
_NO_SPACE_OF_LIBRARIES = re.compile("|".join(map(os.strerror, NO_SPACE)))
"""How libraries in other languages say it."""
_SHARED_MEMORY = re.compile("shared memory|/torch_|/dev/shm")
"""What torch says of the memory that data workers share, which is no disk's."""
_UNSAID = re.compile("iostream error|unexpected pos|file write failed")
"""What torch says when it writes to a path, and does not tell why it could not."""

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""What a file system without locks answers."""


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Name a file in the error of a disk that is full, however a library words that.

    An interrupt that came while torch wrote, and that it hides behind an error of its own, is raised again.

    Raises:
        InputError: what runs in the block finds no space to write to.
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
    """Yield an error, and those that it came from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _no_space(chain: Sequence[BaseException]) -> str:
    """Return what a disk that is full answered, as far as an error and what it came from say it; empty for others."""
    for error in chain:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return os.strerror(error.errno)
        found = _NO_SPACE_OF_LIBRARIES.search(str(error))
        if found and not _SHARED_MEMORY.search(str(error)):
            return found[0]
    return "is not whole, as where no space is left" if all(_UNSAID.search(str(error)) for error in chain) else ""


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a small file in one step, and the folders above it where they are missing.

    When two programs write it at a time, the file is that of one of them, whole.

    Raises:
        InputError: the disk is full.
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
    """Raise InputError where a file (or folder) cannot be written, before the work that it is to hold; writes nothing.

    What stands at `path` already may be replaced. Folders above that are missing will be made.
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
    """Give `PATH.part` to write a large file to; it becomes `path` at the end of the block, and goes with an error.

    Raises:
        InputError: another program writes `path`, or the disk is full.
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
def sole_writer(path: str | Path) -> Iterator[None]:
    """Keep other programs from writing a file (or into a folder) as long as the block runs.

    The lock lies in `PATH.lock`, which goes at the end of the block. A killed process loses its lock at once, also
    when workers that it has forked live on. Look only inside the block whether there is anything left to write.

    Raises:
        InputError: another program, which the message names, writes it.
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
        file.unlink(missing_ok=True)  # still locked: whoever has opened it sees that it is gone, and makes another
        lock.release()


def _holder(file: Path) -> str:
    """Return the name of the process that holds a lock, as far as the lock's file tells."""
    try:
        return file.read_text(encoding="utf-8").strip() or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"
