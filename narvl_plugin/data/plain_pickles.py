"""Pickles of plain values, such as OFA's answer lists and RefCOCO's expressions, read without running them."""

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
"""Bytes of a pickle of plain values; that of RefCOCO's expressions has 4% of so many."""


def read_pickle(file: str | Path) -> Any:
    """Return what a pickle of plain types holds: numbers, strings, lists, dicts, such as OFA's answer lists.

    The byte strings that Python 2 wrote for text, as in RefCOCO's files, are read as UTF-8.

    Raises:
        MissingInput: the file does not exist.
        InputError: it is damaged, it names any other type or function, or its values are out of all proportion to
            its size.
    """
    file = Path(file)
    if not file.is_file():
        raise MissingInput(f"{file}: no such file")
    if file.stat().st_size > LARGEST_LIST:  # some files of the system claim any size
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
    except Exception as error:  # a damaged pickle raises nearly anything
        raise InputError(f"{file}: is damaged or no pickle ({reason_of(error, data[:HEAD])})") from error
    return value


def reason_of(error: Exception, head: bytes = b"") -> str:
    """Return what an error says in one short line; its type, too, where the message alone says little.

    Of a file that is text by its first bytes, it says how the text begins: a server may say there what failed.
    """
    message = brief(error)
    says_all = message and isinstance(error, ValueError | pickle.UnpicklingError | zipfile.BadZipFile | EOFError)
    reason = message if says_all else f"{type(error).__name__} {message}".strip()
    text = as_text(head)
    return reason if text is None else f"{reason}; it is text that begins {text!r}"
