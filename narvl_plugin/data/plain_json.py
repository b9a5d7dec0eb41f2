"""Safe reading of JSON: bounded in size and depth, each name once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from narvl_plugin.data.foreign_files import read_text
from narvl_plugin.data.plain_pickles import reason_of
from narvl_plugin.errors import InputError
from narvl_plugin.safe_pickle import Refused, allowance, brief, check_extent


def read_json(file: Path, largest: int) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Args:
        file: the file.
        largest: largest size, in bytes.

    Raises:
        InputError: if the file is larger, is not JSON, holds something else than an object, or names a value twice.
    """
    text = read_text(file, largest)
    try:
        value = json.loads(text, object_pairs_hook=_each_once)
        check_extent(value, allowance(len(text)))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is not JSON ({reason_of(error)})") from error
    except Refused as error:
        raise InputError(f"{file}: refused, because it {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: holds a value of type {type(value).__name__}; expected an object in braces")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON. Readers differ in which of two values of a name they take."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise Refused(f"names {brief(repr(name))} twice")
        found[name] = value
    return found
