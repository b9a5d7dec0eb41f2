"""Recognition of files of a wrong kind by their first bytes.

Such files are often left by a failed download. An error message can then name the cause.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from pathlib import Path

from narvl_plugin.errors import InputError

HEAD = 512
"""Number of first bytes that are checked."""

_AGAIN = "download it again"
_UNPACK = "unpack it, and give the file in it"
_CONVERT = "convert it to UTF-8 (iconv -f UTF-{bits} -t UTF-8 FILE > NEW)"

KINDS: dict[bytes, str] = {
    b"version https://git-lfs.github.com/spec/": "is a Git LFS pointer, not the file itself; fetch it with `git lfs "
    "pull`",
    b"\xff\xfe\0\0": f"is text in UTF-32; {_CONVERT.format(bits=32)}",
    b"\0\0\xfe\xff": f"is text in UTF-32; {_CONVERT.format(bits=32)}",
    codecs.BOM_UTF16_LE: f"is text in UTF-16; {_CONVERT.format(bits=16)}",
    codecs.BOM_UTF16_BE: f"is text in UTF-16; {_CONVERT.format(bits=16)}",
    b"\x1f\x8b": f"is compressed by gzip; {_UNPACK} (gunzip)",
    b"BZh": f"is compressed by bzip2; {_UNPACK} (bunzip2)",
    b"\xfd7zXZ\0": f"is compressed by xz; {_UNPACK} (unxz)",
    b"\x28\xb5\x2f\xfd": f"is compressed by Zstandard; {_UNPACK} (unzstd)",
    b"7z\xbc\xaf\x27\x1c": f"is a 7z archive; {_UNPACK}",
    b"Rar!\x1a\x07": f"is a RAR archive; {_UNPACK}",
    b"PK\x03\x04": f"is a zip archive; {_UNPACK}",
    b"PK\x05\x06": "is an empty zip archive",
    b"%PDF-": "is a PDF",
    b"\x89PNG": "is an image (PNG)",
    b"\xff\xd8\xff": "is an image (JPEG)",
    b"\x93NUMPY": "is an array of numpy (.npy)",
    b"\x89HDF\r\n": "is an HDF5 file",
    b"PAR1": "is a Parquet file",
    b"GGUF": "is a model in GGUF",
    b"SQLite format 3\0": "is an SQLite database",
    **{bytes([0x80, protocol]): "is a pickle of Python" for protocol in range(2, 6)},
}
"""First bytes of files of a kind -> the message about such a file."""

ZIP, PICKLE = b"PK", b"\x80"
"""First bytes of files that some readers accept."""

_HTML = re.compile(rb"\s*(<!doctype html|<html|<head)", re.IGNORECASE)
_SVG = re.compile(rb"\s*(<\?xml.*)?(<!.*)?<svg\b", re.DOTALL)
_XML = re.compile(rb"\s*<\?xml")


def read_head(file: str | Path) -> bytes:
    """Return the first `HEAD` bytes of a file.

    Raises:
        InputError: if the file cannot be read.
    """
    try:
        with open(file, "rb") as stream:
            return stream.read(HEAD)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from error


def mistaken(head: bytes, wanted: Iterable[bytes] = ()) -> str | None:
    """Return the kind of a file and what to do, such as "is a PDF".

    Args:
        head: the first `HEAD` bytes, or all of a shorter file.
        wanted: first bytes of files that the caller can read.

    Returns:
        A message, or None if the kind is wanted or unknown.
    """
    if head.startswith(tuple(wanted)):
        return None
    unmarked = head.removeprefix(codecs.BOM_UTF8)
    if _HTML.match(unmarked):
        return f"is an HTML page, as a failed download leaves it; {_AGAIN}, from the address of the file itself"
    if _SVG.match(unmarked):
        return "is a drawing (SVG), not an image of pixels; save it as PNG"
    if _XML.match(unmarked):
        return f"is XML, perhaps an error message of a server; {_AGAIN}"
    if head[257:262] == b"ustar":
        return f"is a tar archive; {_UNPACK} (tar -x)"
    if _is_utf_16(head[:16]):
        return f"is text in UTF-16; {_CONVERT.format(bits=16)}"
    return next((what for beginning, what in KINDS.items() if head.startswith(beginning)), None)


def _is_utf_16(head: bytes) -> bool:
    """Return whether exactly every other byte is zero, as in ASCII letters in UTF-16 without a byte order mark."""
    return len(head) > 1 and any(all(head[1 - zeros :: 2]) and not any(head[zeros::2]) for zeros in (0, 1))


def as_text(head: bytes) -> str | None:
    """Return the first characters of a text file; None for other files and for empty ones."""
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(head).strip()
    readable = "\ufffd" not in text and all(character.isprintable() or character.isspace() for character in text)
    return " ".join(text.split())[:40] if text and readable else None
