"""Inputs divided into shards. The shards follow from the inputs alone, and so do the names of the output's files."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from narvl_plugin.bulk.places import files_at, is_url, opened, size_of
from narvl_plugin.bulk.rows import Images, ParquetRows, Source, TarMembers, TsvRows, parquet_file
from narvl_plugin.data.image_files import matching, search_images
from narvl_plugin.data.images import IMAGE_SUFFIXES
from narvl_plugin.data.tsv import TsvFile, row_offsets
from narvl_plugin.errors import InputError

SHARD_ROWS = 1000
"""Rows of a shard. Parquet files are divided by their row groups, and a tar archive is one shard."""
TABLES = (".tsv", ".parquet", ".tar")
"""Endings of the files that hold rows."""


class Shard(NamedTuple):
    """Rows of the input that become one file of the output, which has this name and the ending of its format."""

    name: str
    source: Source


class Plan(NamedTuple):
    """All shards.

    Attributes:
        shards: the shards, in the order of the inputs, which is that of their names.
        record: a hash of the names and sizes of all inputs.
        left_out: files in folders that are of other image formats.
    """

    shards: list[Shard]
    record: str
    left_out: list[Path]


def plan(given: Sequence[str], rows_of_shard: int = SHARD_ROWS) -> Plan:
    """Divide inputs into shards.

    Args:
        given: images, folders of images, TSV files, Parquet files and tar archives, in any mixture; patterns of these;
            and addresses of these.
        rows_of_shard: rows of a shard of images, or of a TSV file.

    Raises:
        MissingInput, InputError: if an input does not exist, is of another kind, or has no rows.
    """
    tables: list[str] = []
    images: dict[str, str] = {}
    local: list[Path] = []
    for place in given:
        if is_url(place):
            for url in files_at(place):
                kind = _ending(url)
                if kind in TABLES:
                    tables.append(url)
                elif kind in IMAGE_SUFFIXES:
                    images[url] = url
        else:
            for path in matching([Path(place)]):
                if path.suffix.lower() in TABLES and not path.is_dir():
                    tables.append(str(path.absolute()))
                else:
                    local.append(path)
    left_out: list[Path] = []
    if local:
        found, left_out = search_images(local)
        images |= {name: str(path.absolute()) for name, path in found.items()}
    digest = hashlib.sha256(str(rows_of_shard).encode())
    for name, place in images.items():
        # Sizes at addresses would take a request each.
        digest.update(f"{name}\t{'' if is_url(place) else _size(place)}\n".encode("utf-8", "surrogateescape"))
    files = tuple(images.items())
    parts: list[tuple[str, Source]] = [
        ("images", Images(files[first : first + rows_of_shard])) for first in range(0, len(files), rows_of_shard)
    ]
    for place in dict.fromkeys(tables):
        digest.update(f"{place}\t{size_of(place)}\n".encode("utf-8", "surrogateescape"))
        parts += ((_stem(place), source) for source in _sources(place, rows_of_shard))
    if not parts:
        raise InputError(f"{', '.join(given):.200}: holds no images, TSV files, Parquet files or tar archives")
    shards = [Shard(f"{number:06}-{stem}", source) for number, (stem, source) in enumerate(parts)]
    return Plan(shards, digest.hexdigest()[:16], left_out)


def _sources(place: str, rows_of_shard: int) -> Iterator[Source]:
    """Yield the parts of a file of rows."""
    kind = _ending(place)
    if kind == ".tar":
        yield TarMembers(place)
    elif kind == ".parquet":
        with parquet_file(place) as parquet:
            counts = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        for group, count in enumerate(counts):
            if count:
                yield ParquetRows(place, group, sum(counts[:group]))
    else:
        yield from tsv_parts(place, rows_of_shard)


def tsv_parts(place: str, rows_of_shard: int) -> Iterator[TsvRows]:
    """Yield the parts of a TSV file, each of `rows_of_shard` rows.

    Raises:
        MissingInput, InputError: if the file cannot be used.
    """
    if is_url(place):
        with opened(place) as file:
            offsets = row_offsets(file)
    else:
        offsets = TsvFile(place, []).offsets
    for first in range(0, len(offsets) - 1, rows_of_shard):
        last = min(first + rows_of_shard, len(offsets) - 1)
        yield TsvRows(place, first, last, int(offsets[first]), int(offsets[last]))


def _size(place: str) -> int:
    try:
        return os.path.getsize(place)
    except OSError:  # reported when the image is read
        return -1


def _ending(place: str) -> str:
    """Return the ending of a file's name, without what follows a question mark in an address."""
    return os.path.splitext(place.partition("?")[0] if is_url(place) else place)[1].lower()


def _stem(place: str) -> str:
    """Return a file's name without its ending, made of letters, digits, points and hyphens."""
    name = unquote(place.partition("?")[0]) if is_url(place) else place
    return re.sub(r"[^A-Za-z0-9.-]", "_", os.path.splitext(os.path.basename(name))[0])[:60]


def is_input(word: str) -> bool:
    """Tell whether a word of a command line is an input, and not a text."""
    return is_url(word) or word.lower().endswith(TABLES) or os.path.exists(word)
