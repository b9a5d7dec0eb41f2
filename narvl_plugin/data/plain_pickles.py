"""Safe reading of pickles of plain values, such as OFA's answer lists and RefCOCO's expressions."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

from narvl_plugin.data.mistaken_files import HEAD, PICKLE, as_text, mistaken
from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.safe_pickle import PlainUnpickler, Refused, allowance, brief, check_extent

LARGEST_LIST = 2**30
"""Largest size of a pickle of plain values, in bytes. RefCOCO's expressions take 4% of it."""


def read_pickle(file: str | Path) -> Any:
    """Return the contents of a pickle of plain types: numbers, strings, lists and dicts.

    Byte strings that Python 2 wrote for text, as in RefCOCO's files, are read as UTF-8.

    Args:
        file: the pickle.

    Raises:
        MissingInput: if the file does not exist.
        InputError: if it is damaged, names any other type or function, or unpacks to far more than its size.
    """
    file = Path(file)
    if not file.is_file():
        raise MissingInput(f"{file}: no such file")
    if file.stat().st_size > LARGEST_LIST:  # special files of the system may report any size
        raise InputError(f"{file}: has {file.stat().st_size:,} bytes; at most {LARGEST_LIST:,} are read")
    with file.open("rb") as stream:
        data = stream.read(file.stat().st_size)
    what = mistaken(data[:HEAD], wanted=[PICKLE])
    if what is not None or not data:
        raise InputError(f"{file}: {what or 'is damaged or no pickle: it is empty; copy or download it again'}")
    unpickler = PlainUnpickler(io.BytesIO(data), len(data), {}, "and only numbers, strings, lists and dicts are read")
    try:
        value = unpickler.load()
        check_extent(value, allowance(len(data)))
    except Refused as error:
        raise InputError(f"{file}: refused, because it {error}") from error
    except Exception as error:  # a damaged pickle may raise almost any exception
        raise InputError(f"{file}: is damaged or no pickle ({reason_of(error, data[:HEAD])})") from error
    return value


def reason_of(error: Exception, head: bytes = b"") -> str:
    """Return the message of an error in one short line.

    The line includes the type of an error whose message alone is unclear. For a text file it includes the beginning of
    the text, which may be the error message of a server.

    Args:
        error: the error.
        head: the first bytes of the file.
    """
    message = brief(error)
    says_all = message and isinstance(error, ValueError | pickle.UnpicklingError | zipfile.BadZipFile | EOFError)
    reason = message if says_all else f"{type(error).__name__} {message}".strip()
    text = as_text(head)
    return reason if text is None else f"{reason}; it is text that begins {text!r}"
