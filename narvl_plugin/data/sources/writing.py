"""The shared output of all data sets: clean columns, images, and a resumable TSV file."""

from __future__ import annotations

import base64
import os
import pickle
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

from narvl_plugin.data.images import open_image, opened, read_file
from narvl_plugin.data.resumable import ResumableWriter, fingerprint
from narvl_plugin.data.text import REFERENCE_SEPARATOR
from narvl_plugin.errors import BadRow, InputError
from narvl_plugin.whole_files import write_whole

BATCH_ROWS = 64
"""Number of rows written at a time; with images, they take about 10 MiB of memory."""

WRITTEN = "rows written"
CLEANED = "texts cleaned of tabs, line ends or separators"
ANSWER_LIST = "trainval_ans2label.pkl"
_UNSAFE = re.compile(r"[\t\r\n\ud800-\udfff]+|&{2,}|\|!\+")

Entry = TypeVar("Entry")
Notes = Counter[str]
Columns = list[str | Path]
"""One row; a Path is the row's image, relative to the folder of images."""


class Dropped(Exception):
    """A row that is left out; the message is the reason, and rows are counted by reason."""


@dataclass(frozen=True)
class ImageFolder:
    """The images of a data set and their form in the rows.

    Attributes:
        folder: the folder of the paths in rows.
        as_paths: write the path relative to the TSV file instead of base64 of the file's bytes.
        check: open every image and drop rows with an unreadable image.
    """

    folder: Path
    as_paths: bool = False
    check: bool = False

    def column(self, image: Path, tsv: Path) -> str:
        """Return the image column of a row.

        Args:
            image: the path of the image in the folder.
            tsv: the TSV file of the row.

        Returns:
            The column.

        Raises:
            Dropped: if the image is missing or unreadable. The image is only read if `check` is set or a link leads out
                of the folder.
            InputError: if the path leads out of the folder, to files outside the data set.
        """
        if image.is_absolute() or ".." in image.parts or _UNSAFE.search(str(image)):
            raise InputError(f"{str(image)!r}: refused, because it is no plain path of an image in {self.folder}")
        file = self.folder / image
        if not file.is_file():
            raise Dropped("missing image")
        try:
            data = b"" if self.as_paths and not self.check else read_file(file, str(file))
            if self.check:
                open_image(data, str(file))
            elif data and not file.resolve().is_relative_to(self.folder.resolve()):
                with opened(data, str(file)):  # a link leads out of the folder, and the file may not be an image
                    pass
        except BadRow as error:
            raise Dropped("unreadable image") from error
        if self.as_paths:
            return os.path.join(self.seen_from(tsv), image)
        return base64.b64encode(data).decode("ascii")

    def seen_from(self, tsv: Path) -> str:
        """Return the relative path from a TSV file's folder to that of the images."""
        return os.path.relpath(self.folder.resolve(), tsv.parent.resolve())


@dataclass(frozen=True)
class Outcome:
    """The result of writing one file.

    Attributes:
        path: the file.
        counts: the counts by name; None if the file existed already.
    """

    path: Path
    counts: Mapping[str, int] | None

    def __str__(self) -> str:
        if self.counts is None:
            return f"{self.path} is there already; delete it to make it anew"
        ordered = sorted(self.counts.items(), key=lambda count: count[0] != WRITTEN)
        return f"{self.path}: " + ", ".join(f"{count} {name}" for name, count in ordered)


def tidy(text: str, notes: Notes) -> str:
    """Return a text that fits into a column: without tabs, line ends, `&&`, `|!+` and surrounding spaces.

    Each unsafe piece becomes a space. A single `&` is removed at either end, because joining could double it. Changed
    texts are counted in `notes`.
    """
    tidied = _UNSAFE.sub(" ", text).strip(" &")
    if tidied != text.strip(" "):
        notes[CLEANED] += 1
    return tidied


def clean(text: str, notes: Notes) -> str:
    """Return a tidy text.

    Raises:
        Dropped: if the tidy text is empty.
    """
    tidied = tidy(text, notes)
    if not tidied:
        raise Dropped("empty text")
    return tidied


def join_texts(texts: Sequence[str], notes: Notes) -> str:
    """Return tidy texts joined by `&&`, without empty ones.

    Raises:
        Dropped: if all texts are empty.
    """
    kept = [tidied for text in texts if (tidied := tidy(text, notes))]
    if not kept:
        raise Dropped("empty text")
    notes["empty texts left out of a row"] += len(texts) - len(kept)
    return REFERENCE_SEPARATOR.join(kept)


def join_answers(confidences: Mapping[str, float], notes: Notes) -> str:
    """Return `conf|!+answer&&…`, the highest confidence first.

    Raises:
        Dropped: if no answer remains.
    """
    ranked = sorted(confidences.items(), key=lambda item: -item[1])
    kept = [(confidence, tidied) for answer, confidence in ranked if (tidied := tidy(answer, notes))]
    if not kept:
        raise Dropped("no answer")
    return REFERENCE_SEPARATOR.join(f"{round(confidence, 4)}|!+{answer}" for confidence, answer in kept)


def write_split(
    path: Path,
    load: Callable[[], Sequence[Entry]],
    columns: Callable[[Entry, Notes], Columns],
    *,
    inputs: Sequence[Path],
    images: ImageFolder,
    settings: Mapping[str, Any] | None = None,
) -> Outcome:
    """Write one TSV file, a row for each entry that is not dropped; an interrupted run can be resumed.

    Args:
        path: the TSV file.
        load: returns the entries; called only if rows remain to be written.
        columns: makes a row of an entry, or raises Dropped; it counts notable events in its second argument.
        inputs: the files of the entries; an unfinished `path` of other inputs is refused.
        images: the images and their form in the rows.
        settings: further settings that the rows depend on, as JSON values.

    Returns:
        The counts: rows written, notes, and rows dropped by reason.

    Raises:
        InputError: if no row remains, or another process is writing `path`.
        StalePart: if an unfinished `path` was begun with other inputs or settings.
    """
    writer = ResumableWriter(
        path,
        {
            "inputs": {file.name: fingerprint(file) for file in inputs},
            "image_paths": images.seen_from(path) if images.as_paths else None,
            "check_images": images.check,
            **(settings or {}),
        },
    )
    with writer:
        if writer.finished:
            return Outcome(path, None)
        entries = load()
        column = lru_cache(maxsize=1)(partial(images.column, tsv=path))  # questions of one image follow each other
        for batch in writer.batches(len(entries), BATCH_ROWS, path.stem):
            lines, counts = [], Counter[str]()
            for index in batch:
                notes = Counter({WRITTEN: 1})
                try:
                    row = columns(entries[index], notes)
                    lines.append("\t".join(column(c) if isinstance(c, Path) else c for c in row))
                    counts += notes
                except Dropped as reason:
                    counts[f"dropped ({reason})"] += 1
            writer.append(lines, rows=len(batch), counts=counts)
        if not writer.counts[WRITTEN]:
            writer.discard()
            found = ", ".join(f"{count} {name}" for name, count in writer.counts.items()) or "no entry of this split"
            raise InputError(f"{path}: no row to write ({found}); check {inputs[0]} and the images in {images.folder}")
        writer.finish()
    return Outcome(path, writer.counts)


def write_answers(out: Path, load: Callable[[], Sequence[str]]) -> Outcome:
    """Write OUT/trainval_ans2label.pkl, OFA's list of answers: a pickle of a dict from answer to number.

    Args:
        out: the folder.
        load: returns the answers; called only if the file does not exist.

    Returns:
        The number of answers.
    """
    path = out / ANSWER_LIST
    if path.exists():
        return Outcome(path, None)
    answers = load()
    write_whole(path, pickle.dumps({answer: number for number, answer in enumerate(answers)}))
    return Outcome(path, {"answers": len(answers)})
