"""Files of a folder from elsewhere: which of them may be opened, and how much of them is read."""

from __future__ import annotations

from pathlib import Path

from narvl_plugin.data.mistaken_files import HEAD, mistaken, read_head
from narvl_plugin.errors import InputError

HUB_SNAPSHOTS, HUB_BLOBS = "snapshots", "blobs"
"""Folders of a model in the cache of the Hugging Face hub. The files of a snapshot are links to blobs."""
LONGEST_NAME = 100
"""Largest length of a file's name, in characters. File systems allow 255 bytes and more."""


def file_in(folder: Path, name: str) -> Path | None:
    """Return a file of a folder; None if there is no such file.

    Args:
        folder: the folder.
        name: the file's name.

    Raises:
        InputError: if the name is a path, or a link that leads out of the folder. The hub's cache may link to its own
            blobs.
    """
    if name != Path(name).name or name in ("", "..") or not name.isprintable() or len(name) > LONGEST_NAME:
        raise InputError(f"{folder}: names the file {name!r:.200}; expected a file in this folder, without a path")
    file = folder / name
    if not file.is_file():
        return None
    own, real = folder.resolve(), file.resolve()
    allowed = [own]
    if own.parent.name == HUB_SNAPSHOTS:
        allowed.append(own.parents[1] / HUB_BLOBS)
    if not any(real.is_relative_to(place) for place in allowed):
        raise InputError(f"{file}: is a link that leads out of its folder; put a copy of the file there")
    return file


def plausible(file: Path) -> Path:
    """Return a file of a vocabulary, after a check of its first bytes. A Git LFS pointer could pass for GPT-2's merges.

    Raises:
        InputError: if the file is empty or of another kind.
    """
    head = read_head(file)
    what = mistaken(head) if head else "is empty; copy or download it again"
    if what is not None:
        raise InputError(f"{file}: {what}")
    return file


def read_text(file: Path, largest: int) -> str:
    """Return the text of a file in UTF-8.

    Args:
        file: the file.
        largest: largest size, in bytes.

    Raises:
        InputError: if the file is larger, of another kind, or no text in UTF-8.
    """
    with file.open("rb") as stream:
        data = stream.read(largest + 1)
    if len(data) > largest:
        raise InputError(f"{file}: is larger than {largest:,} bytes, which no such file needs")
    if what := mistaken(data[:HEAD]):
        raise InputError(f"{file}: {what}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: is not text in UTF-8 ({error.reason} at byte {error.start:,})") from error
