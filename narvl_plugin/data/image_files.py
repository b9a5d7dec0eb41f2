"""Image files: found by their names in folders and by patterns, and numbered as COCO numbers them."""

from __future__ import annotations

import glob
import logging
import re
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from narvl_plugin.data.images import IMAGE_SUFFIXES
from narvl_plugin.errors import InputError, MissingInput, encoding_advice

logger = logging.getLogger(__name__)

OTHER_SUFFIXES = {
    *(
        ".avif",
        ".heic",
        ".heif",
        ".jp2",
        ".j2k",
        ".jxl",
        ".svg",
        ".psd",
        ".eps",
        ".ico",
        ".tga",
        ".ppm",
        ".pgm",
        ".pbm",
    ),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf"),
} - {*IMAGE_SUFFIXES}
"""Suffixes of image formats that cannot be read here."""
COCO_NAME = re.compile(r"(?:COCO_[A-Za-z0-9]+_)?([0-9]{1,12})")
SURROGATES = re.compile(r"[\ud800-\udfff]")
UNWRITABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that a line of text cannot hold: line ends, tabs, other control characters, and bytes that are not
UTF-8."""


def coco_ids(names: Iterable[str]) -> dict[str, int] | dict[str, str]:
    """Return the image id of each image's name: 42 for COCO_val2014_000000000042.jpg, 000000000042.jpg and 42.jpg.

    COCO's programs accept only whole numbers. If no name has a number, the images are not COCO's, and the names are the
    ids.

    Raises:
        InputError: if only some names have a number, or if two images have the same id.
    """
    matches = {name: COCO_NAME.fullmatch(Path(name).stem) for name in names}
    if not any(matches.values()):
        logger.warning("no image has a number as its name, as in COCO; each image_id will be the image's name")
        return {name: name for name in matches}
    ids: dict[str, int] = {}
    name_of: dict[int, str] = {}
    advice = "COCO's results identify images by numbers: rename it, leave it out, or give --out NAME.tsv"
    for name, match in matches.items():
        if match is None:
            raise InputError(
                f"{name}: has no number for an image_id, unlike {next(filter(matches.get, matches))}; {advice}"
            )
        ids[name] = int(match[1])
        if (other := name_of.setdefault(ids[name], name)) != name:
            raise InputError(f"{name}: has the same image_id, {ids[name]}, as {other}; {advice}")
    return ids


def find_images(given: Sequence[Path]) -> dict[str, Path]:
    """Return image files by name, see `search_images`."""
    return search_images(given)[0]


def search_images(given: Sequence[Path]) -> tuple[dict[str, Path], list[Path]]:
    """Return image files by name: the given files, and all in and below the given folders, sorted.

    If only one folder is given, a name is the path below it; else it is the path as given. Links below a folder are
    followed. Hidden entries (their names begin with a dot) are left out.

    Returns:
        The images, and the files in folders whose names have the suffix of another image format.

    Raises:
        MissingInput: if a file or folder does not exist.
        InputError: if a given file has none of `IMAGE_SUFFIXES`, a folder has no such file or cannot be read, or a name
            cannot be written.
    """
    kinds = ", ".join(IMAGE_SUFFIXES)
    found: dict[str, Path] = {}
    others: list[Path] = []
    for path in matching(given):
        files = [path]
        if path.is_dir():
            inside = files_below(path)
            files = [file for file in inside if file.suffix.lower() in IMAGE_SUFFIXES]
            others += (file for file in inside if file.suffix.lower() in OTHER_SUFFIXES)
        elif not path.exists():
            raise MissingInput(f"{path}: no such image or folder")
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            raise InputError(f"{path}: its name is not that of an image; give folders, or files ending in {kinds}")
        if not files:
            raise InputError(f"{path}: there is no image in this folder (no file ending in {kinds})")
        from_there = path.is_dir() and len(given) == 1
        found.update({str(file.relative_to(path) if from_there else file): file for file in files})
    unwritable = [name for name in found if UNWRITABLE.search(name)]
    if unwritable:
        advice = encoding_advice(unwritable[0]) if SURROGATES.search(unwritable[0]) else "rename it"
        raise InputError(f"{unwritable[0]!r}: this name does not fit into a line of text; {advice}")
    return found, others


def matching(given: Sequence[Path]) -> list[Path]:
    """Return the paths that are given, and in place of each pattern such as `photos/*.jpg` the sorted paths it matches.

    Raises:
        MissingInput: if nothing matches a pattern.
    """
    found: list[Path] = []
    for path in given:
        if path.exists() or not glob.has_magic(str(path)):
            found.append(path)
            continue
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            raise MissingInput(f"{path}: no file matches this pattern")
        found += map(Path, matches)
    return list(dict.fromkeys(found))


def files_below(folder: Path) -> list[Path]:
    """Return all files in and below a folder, sorted, without hidden ones.

    Linked folders are searched, too. Each folder is searched once, so circles of links end. If a folder is also here
    under its own name, that name is used.

    Raises:
        InputError: if a folder cannot be read.
    """
    files: list[Path] = []
    folders, links = [folder], deque[Path]()
    seen = set()
    while folders or links:
        here = folders.pop() if folders else links.popleft()
        try:
            status = here.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = [(entry, entry.is_dir()) for entry in sorted(here.iterdir()) if not entry.name.startswith(".")]
        except OSError as error:
            raise InputError(f"{here}: this folder cannot be read ({error.strerror})") from error
        for entry, is_folder in entries:
            if not is_folder:
                files.append(entry)
            elif entry.is_symlink():
                links.append(entry)
            else:
                folders.append(entry)
    return sorted(files)
