"""Files by path or by address (URL), as Ray Data opens them: object stores, HDFS, HTTP."""

from __future__ import annotations

import io
import stat
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from narvl_plugin.data.images import URL
from narvl_plugin.errors import InputError, MissingInput


def is_url(place: str) -> bool:
    """Tell whether a place is an address such as s3://bucket/file, and not a path."""
    return URL.match(place) is not None


def opened(place: str) -> IO[bytes]:
    """Open a file for reading at any position.

    Args:
        place: a path or an address. An address comes from the command line, never from a file.

    Raises:
        MissingInput, InputError: if it cannot be opened, or is not a regular file.
    """
    try:
        if is_url(place):
            system, path = _file_system(place)
            return io.BufferedReader(system.open_input_file(path))
        if not stat.S_ISREG(Path(place).stat().st_mode):
            raise InputError(f"{place}: is not a regular file")
        return open(place, "rb")
    except FileNotFoundError:
        raise MissingInput(f"{place}: no such file") from None
    except OSError as error:
        raise InputError(f"{place}: cannot be read ({_reason(error)})") from error


def size_of(place: str) -> int:
    """Return the size of a file in bytes.

    Raises:
        MissingInput, InputError: as `opened`.
    """
    with opened(place) as file:
        return file.seek(0, io.SEEK_END)


def files_at(url: str) -> list[str]:
    """Return the addresses of the files that an address stands for, sorted.

    Args:
        url: a file, a folder, which is searched recursively, or a pattern such as s3://bucket/images/*.tar. Hidden
            files are left out of folders.

    Raises:
        MissingInput: if there is no such file.
        InputError: if the address cannot be read.
    """
    from pyarrow.fs import FileSelector, FileType

    fixed = _before_pattern(url)
    try:
        system, path = _file_system(fixed)
        (about,) = system.get_file_info([path])
        if about.type is FileType.File:
            return [url]
        found = system.get_file_info(FileSelector(path, recursive=True, allow_not_found=True))
    except OSError as error:
        raise InputError(f"{url}: cannot be read ({_reason(error)})") from error
    inside = [one.path for one in found if one.type is FileType.File]
    visible = [one for one in inside if "/." not in one[len(path) :]]
    urls = sorted(fixed.rstrip("/") + one[len(path.rstrip("/")) :] for one in visible)
    matching = urls if fixed == url else [one for one in urls if fnmatchcase(one, url)]
    if not matching:
        raise MissingInput(f"{url}: no such file, and no folder with files")
    return matching


def _before_pattern(url: str) -> str:
    """Return the folder of a pattern, or the whole address if it is none."""
    folders: list[str] = []
    for part in url.split("/"):
        if any(sign in part for sign in "*?["):
            return "/".join(folders) + "/"
        folders.append(part)
    return url


def _file_system(url: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path in it.

    Raises:
        InputError: if a package for it is missing.
    """
    try:
        import pyarrow
        from pyarrow import fs

        try:
            return fs.FileSystem.from_uri(url)
        except pyarrow.ArrowInvalid:  # one that Arrow does not know
            import fsspec

            system, path = fsspec.core.url_to_fs(url)
            return fs.PyFileSystem(fs.FSSpecHandler(system)), path
    except ImportError as error:
        raise InputError(f"{url}: needs the package {error.name or error}; pip install 'narvl[ray]'") from error
    except ValueError as error:
        raise InputError(f"{url}: is not an address that can be read ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())
