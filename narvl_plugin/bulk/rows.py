"""The rows of a shard: images with their names and texts, from files, TSV files, Parquet and tar archives.

All of these may be a stranger's. Nothing in them is evaluated, written to a disk, or followed to another place, but for
the paths of images in a TSV file, as elsewhere.
"""

from __future__ import annotations

import codecs
import io
import tarfile
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, Protocol

from narvl_plugin.bulk.places import is_url, opened
from narvl_plugin.data.images import IMAGE_SUFFIXES, MAX_BYTES, PATH_SUFFIXES, ImageReader
from narvl_plugin.data.tsv import MAX_ROW
from narvl_plugin.errors import BadRow, InputError

MAX_TEXT = 1 << 20
"""Largest text beside an image, in bytes."""
MAX_FOOTER = 1 << 26
"""Largest footer of a Parquet file, in bytes."""
BLOCK = 512
"""Size of a block of a tar archive, in bytes."""


class Columns(NamedTuple):
    """What to read of a row.

    Attributes:
        text: the name of the text beside the image, such as `question`; None if there is none, or one for all rows.
        numbers: the columns of a TSV file by the task's names.
    """

    text: str | None
    numbers: dict[str, int]


class Row(NamedTuple):
    """A row.

    Attributes:
        name: its name in the output.
        where: file and row, for errors.
        image: the image, as a path or the bytes of its file.
        text: the text beside the image, if it is the row's own.
    """

    name: str
    where: str
    image: Path | bytes
    text: str | None = None


class Source(Protocol):
    """Some rows of an input. It is sent to other processes, so it holds places and not what lies there."""

    def rows(self, columns: Columns) -> Iterator[Row | BadRow]:
        """Yield the rows in order, and in place of one that cannot be used the error.

        Raises:
            InputError: if the whole file cannot be used.
        """


@dataclass(frozen=True)
class Images:
    """Image files: names and places, in order."""

    files: tuple[tuple[str, str], ...]

    def rows(self, columns: Columns) -> Iterator[Row | BadRow]:
        """Yield a row for each file; see `Source`."""
        for name, place in self.files:
            if not is_url(place):
                yield Row(name, place, Path(place))
                continue
            try:
                with opened(place) as file:
                    yield Row(name, place, file.read(MAX_BYTES + 1))
            except (InputError, OSError) as error:
                yield BadRow(f"{place}: the image cannot be read ({' '.join(str(error).split())})")


@dataclass(frozen=True)
class TsvRows:
    """Some rows of a TSV file.

    Attributes:
        place: the file.
        first: the number of the first row, from 0.
        last: the number behind the last row.
        start: the position of the first row, in bytes.
        end: the position behind the last row.
    """

    place: str
    first: int
    last: int
    start: int
    end: int

    def rows(self, columns: Columns) -> Iterator[Row | BadRow]:
        """Yield the rows; see `Source`."""
        reader = ImageReader(1, folder=Path(self.place).parent)
        with opened(self.place) as file:
            file.seek(self.start)
            number, position = self.first, self.start
            while position < self.end:
                line = file.readline(min(MAX_ROW, self.end - position) + 1)
                if not line:
                    raise InputError(f"{self.place}: the file changed while it was read; start again")
                position += len(line)
                where = f"{self.place}:{number + 1}"
                if len(line) > MAX_ROW:
                    yield BadRow(f"{where}: has more than {MAX_ROW:,} bytes; more are refused")
                    position += _skip_line(file, line)
                else:
                    try:
                        yield self._row(line if number else line.removeprefix(codecs.BOM_UTF8), where, columns, reader)
                    except BadRow as error:
                        yield error
                number += 1

    def _row(self, line: bytes, where: str, columns: Columns, reader: ImageReader) -> Row:
        """Return the row of a line.

        Raises:
            BadRow: if it lacks a column, is not UTF-8, or has no image.
        """
        fields = line.rstrip(b"\r\n").split(b"\t")
        wanted = ["id", "image", *([] if columns.text is None else [columns.text])]
        for name in wanted:
            if columns.numbers[name] >= len(fields):
                raise BadRow(
                    f"{where}: has {len(fields)} columns, and column {columns.numbers[name]} with the {name} is "
                    "missing (columns count from 0)"
                )
        try:
            key, image, *text = (fields[columns.numbers[name]].decode("utf-8") for name in wanted)
        except UnicodeDecodeError as error:
            raise BadRow(f"{where}: is not UTF-8 text ({error}); save the file in UTF-8") from error
        if is_url(self.place) and image[-5:].lower().endswith(PATH_SUFFIXES):
            raise BadRow(f"{where}: names a file, and rows of a file at an address must hold base64")
        return Row(key, where, reader.read_bytes(image, where), *text)


def _skip_line(file: IO[bytes], line: bytes) -> int:
    """Read on to the end of a line, and return the number of bytes."""
    skipped = 0
    while line and not line.endswith(b"\n"):
        line = file.readline(1 << 20)
        skipped += len(line)
    return skipped


@dataclass(frozen=True)
class ParquetRows:
    """A row group of a Parquet file.

    Its column `image` holds the bytes of image files, or structs with a field `bytes`, as Hugging Face's `datasets`
    write them. The text is in the column of the task's name for it, and names are in `id`, if there is one.

    Attributes:
        place: the file.
        group: the number of the group, from 0.
        first: the number of its first row, from 0.
    """

    place: str
    group: int
    first: int

    def rows(self, columns: Columns) -> Iterator[Row | BadRow]:
        """Yield the rows; see `Source`."""
        with parquet_file(self.place) as parquet:
            schema = parquet.schema_arrow
            _check_columns(self.place, schema, columns.text)
            read = [name for name in ("id", "image", columns.text) if name in schema.names]
            # One row at a time: a few bytes may stand for many equal images.
            batches = parquet.iter_batches(batch_size=1, row_groups=[self.group], columns=read, use_threads=False)
            try:
                for number, batch in enumerate(batches, self.first):
                    (columns_of_row,) = batch.to_pylist()
                    yield _parquet_row(self.place, number, columns_of_row, columns.text)
            except (OSError, ValueError) as error:  # Arrow's errors are of these kinds
                raise InputError(f"{self.place}: is damaged ({' '.join(str(error).split()):.200})") from error


def parquet_file(place: str) -> Any:
    """Open a Parquet file whose columns are of Arrow's own types. Use it as a with-block.

    A library may register types of its own, which Arrow then builds from the file. Ray's are built by pickle. So a file
    that names any is refused, before Arrow sees it.

    Raises:
        MissingInput, InputError: if it cannot be opened, or holds such types.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{place}: needs the package pyarrow; pip install 'narvl[parquet]'") from None
    file = opened(place)
    try:
        _refuse_extension_types(place, file)
        return ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
    except (OSError, ValueError) as error:
        file.close()
        if isinstance(error, InputError):
            raise
        raise InputError(f"{place}: is not a Parquet file ({' '.join(str(error).split()):.200})") from error


def _refuse_extension_types(place: str, file: IO[bytes]) -> None:
    """Raise InputError for a footer that names extension types. It holds Arrow's schema as base64."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 8))
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or length + 8 > size:
        raise InputError(f"{place}: is not a Parquet file, or is cut off")
    if length > MAX_FOOTER:
        raise InputError(f"{place}: its footer has {length:,} bytes; more than {MAX_FOOTER:,} are refused")
    file.seek(size - 8 - length)
    footer = file.read(length)
    file.seek(0)
    # Base64 has three forms of a word, by its place. Characters at both ends also depend on what is beside the word.
    word = b"ARROW:extension:name"
    if any(b64encode(bytes(shift) + word)[4 if shift else 0 : -4] in footer for shift in range(3)):
        raise InputError(
            f"{place}: has columns of types that other programs define, which are not built; save images as bytes"
        )


def _check_columns(place: str, schema: Any, text: str | None) -> None:
    """Raise InputError if a Parquet file lacks a column, or has another type there."""
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    def is_image(kind: Any) -> bool:
        return is_bytes(kind) or (
            types.is_struct(kind) and any(one.name == "bytes" and is_bytes(one.type) for one in kind)
        )

    def is_text(kind: Any) -> bool:
        return types.is_string(kind) or types.is_large_string(kind)

    def is_name(kind: Any) -> bool:
        return is_text(kind) or types.is_integer(kind)

    wanted = {"image": (is_image, "the bytes of image files"), "id": (is_name, "names or numbers")}
    wanted |= {} if text is None else {text: (is_text, "texts")}
    for name, (fits, what) in wanted.items():
        if name not in schema.names:
            if name == "id":
                continue
            raise InputError(f"{place}: has no column {name!r} with {what}; it has {', '.join(schema.names):.200}")
        if schema.names.count(name) > 1 or not fits(schema.field(name).type):
            found = f"{schema.names.count(name)} columns" if schema.names.count(name) > 1 else schema.field(name).type
            raise InputError(f"{place}: the column {name!r} is {found!s:.100}; it must hold {what}")


def _parquet_row(place: str, number: int, row: dict[str, Any], text_column: str | None) -> Row | BadRow:
    where = f"{place}:{number + 1}"
    image = row["image"]
    data = image.get("bytes") if isinstance(image, dict) else image
    if not data:
        return BadRow(f"{where}: the image is missing")
    text = None if text_column is None else row[text_column] or ""
    name = row.get("id")
    return Row(str(number if name is None else name), where, data, text)


@dataclass(frozen=True)
class TarMembers:
    """A tar archive in the layout of WebDataset: KEY.jpg, and KEY.txt with its text. Only plain files are read."""

    place: str

    def rows(self, columns: Columns) -> Iterator[Row | BadRow]:
        """Yield a row for each key; see `Source`."""
        key, parts = "", dict[str, Any]()
        with opened(self.place) as file:
            for name, member in _members(self.place, file):
                here, _, suffix = _key(name)
                if here != key and parts:
                    yield self._row(key, parts, columns.text)
                    parts = {}
                key = here
                parts[f".{suffix.lower()}"] = member
        if parts:
            yield self._row(key, parts, columns.text)

    def _row(self, key: str, parts: dict[str, bytes | str], text_column: str | None) -> Row | BadRow:
        where = f"{self.place}:{key}"
        images = [part for suffix, part in parts.items() if suffix in IMAGE_SUFFIXES]
        if len(images) != 1:
            return BadRow(f"{where}: has {len(images)} images beside {', '.join(parts):.100}; expected one")
        text = parts.get(".txt", b"")
        for part in (images[0], text):
            if isinstance(part, str):
                return BadRow(f"{where}: {part}")
        if text_column is None:
            return Row(key, where, images[0])  # type: ignore[arg-type]
        try:
            return Row(key, where, images[0], text.decode("utf-8"))  # type: ignore[arg-type, union-attr]
        except UnicodeDecodeError:
            return BadRow(f"{where}: its text is not UTF-8; save it in UTF-8")


def _key(name: str) -> tuple[str, str, str]:
    """Return key, dot and suffix of a member: the key ends at the first dot of the file's name, as in WebDataset."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", dot, suffix


def _members(place: str, file: IO[bytes]) -> Iterator[tuple[str, bytes | str]]:
    """Yield name and contents of the images and texts in an archive; of a member that is refused, the reason.

    Raises:
        InputError: if it is not a tar archive, or is damaged.
    """
    try:
        with tarfile.open(fileobj=_Bounded(file), mode="r:") as archive:  # type: ignore[call-overload]
            while (member := archive.next()) is not None:
                archive.members.clear()  # or all would stay in memory
                path = PurePosixPath(member.name)
                if member.isdir() or path.name.startswith((".", "__")):
                    continue
                suffix = path.suffix.lower()
                most = MAX_BYTES if suffix in IMAGE_SUFFIXES else MAX_TEXT
                if suffix not in (*IMAGE_SUFFIXES, ".txt"):
                    continue
                if not member.isfile() or member.issparse():
                    yield member.name, f"{path.name!r:.100} is a link or a special file, which is not followed"
                elif member.size > most:
                    yield member.name, f"{path.name!r:.100} has {member.size:,} bytes; more than {most:,} are refused"
                else:
                    contents = archive.extractfile(member)
                    assert contents is not None
                    yield member.name, contents.read()
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{place}: is not a tar archive, or is damaged ({' '.join(str(error).split())})") from error


class _Bounded:
    """A file that refuses to read more at once than an image has: a header of tar may ask for any number of bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_BYTES + BLOCK:
            raise ValueError(f"a header asks for {size:,} bytes")
        return self._file.read(size)
