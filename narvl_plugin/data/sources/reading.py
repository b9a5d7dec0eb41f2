"""The shared input of all data sets: required files, and records checked field by field."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from narvl_plugin.errors import BadRow, InputError, MissingInput

LARGEST_JSON = 2**32
"""Largest size of a JSON file, in bytes. Published ones take less than a quarter of it."""

Record = dict[str, Any]


def need(files: Iterable[Path], folders: Iterable[Path], download: str) -> None:
    """Check that all files and folders exist, before any work.

    Args:
        files: the required files.
        folders: the required folders of images.
        download: where to get them, for errors.

    Raises:
        MissingInput: for the first that does not exist.
    """
    for file in files:
        if not file.is_file():
            raise MissingInput(f"{file}: no such file; {download}")
    for folder in folders:
        if not folder.is_dir():
            raise MissingInput(f"{folder}: no such folder of images; {download}, or name its parent with --images")


def chosen_splits(chosen: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """Return the splits to write, all of them for None.

    Raises:
        InputError: for an unknown split.
    """
    known = list(known)
    for split in chosen or ():
        if split not in known:
            raise InputError(f"--splits {split}: this data set has {', '.join(known)}")
    return list(chosen or known)


def read_json(file: Path, object_hook: Callable[[Record], Any] | None = None) -> Any:
    """Return the content of a JSON file.

    Args:
        file: the file.
        object_hook: converts each object, the innermost first; see `json.load`.

    Returns:
        The content.

    Raises:
        InputError: if the file is larger than `LARGEST_JSON`.
        BadRow: if the file is not JSON.
    """
    check_size(file)
    with file.open(encoding="utf-8") as stream:
        try:
            return json.load(stream, object_hook=object_hook)
        except (ValueError, RecursionError) as error:
            not_as_published(str(file), f"is not JSON ({error})")


def check_size(file: Path) -> None:
    """Check that a JSON file is not larger than `LARGEST_JSON`.

    Raises:
        InputError: if it is.
        FileNotFoundError: if it does not exist.
    """
    size = file.stat().st_size
    if size > LARGEST_JSON:
        raise InputError(f"{file}: has {size:,} bytes; of JSON at most {LARGEST_JSON:,} are read")


def pick(record: Any, fields: Mapping[str, type], where: str) -> Record:
    """Return the named fields of a record, after a check of their types.

    Args:
        record: the record.
        fields: the type of each field.
        where: FILE:KEY, for errors.

    Returns:
        The fields.

    Raises:
        BadRow: if a field is missing or of another type.
    """
    if not isinstance(record, dict):
        not_as_published(where, f"is a {type(record).__name__}, not an object with {', '.join(fields)}")
    for name, kind in fields.items():
        if name not in record:
            not_as_published(where, f"has no field {name!r}")
        if not isinstance(record[name], kind) or (kind is int and isinstance(record[name], bool)):  # true is 1
            not_as_published(where, f"{name} is {record[name]!r:.40}, not of type {kind.__name__}")
    return {name: record[name] for name in fields}


def pick_all(records: Any, fields: Mapping[str, type], where: str) -> list[Record]:
    """Return the named fields of each record of a list.

    Raises:
        BadRow: as `pick`, with `where[INDEX]`.
    """
    if not isinstance(records, list):
        not_as_published(where, f"is a {type(records).__name__}, not a list")
    return [pick(record, fields, f"{where}[{index}]") for index, record in enumerate(records)]


def not_as_published(where: str, what: str) -> NoReturn:
    """Raise BadRow for a place in a file (FILE:KEY) that differs from the published data set."""
    raise BadRow(f"{where}: {what}; the published file is otherwise: download it again")
