"""What all data sets share on their way out: clean columns, pictures, and a TSV file that can be resumed."""

from __future__ import annotations

import base64
import os
import pickle
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from narvl_plugin.data.images import open_image, opened, read_file
from narvl_plugin.data.resumable import ResumableWriter, fingerprint
from narvl_plugin.data.text import REFERENCE_SEPARATOR
from narvl_plugin.errors import BadRow, InputError
from narvl_plugin.whole_files import write_whole

BATCH_ROWS = 64
"""Rows written at a time: with pictures some 10 MiB, all that is held in memory of them."""

WRITTEN = "rows written"
CLEANED = "texts cleaned of tabs, line ends or separators"
ANSWER_LIST = "trainval_ans2label.pkl"
_UNSAFE = re.compile(r"[\t\r\n\ud800-\udfff]+|&{2,}|\|!\+")

Entry = TypeVar("Entry")
Notes = Counter[str]
Columns = list[str | Path]
"""One row; a Path is the row's picture, from the folder of images."""


class Dropped(Exception):
    """A row that is left out; the message is the reason, and rows of one reason are counted together."""


@dataclass(frozen=True)
class Pictures:
    """Where the pictures are, and how rows hold them.

    Args:
        folder: what the paths in rows count from.
        as_paths: write the path, seen from the TSV file, in place of base64 of the file's bytes.
        check: open every picture and drop rows whose picture cannot be read.
    """

    folder: Path
    as_paths: bool = False
    check: bool = False

    def column(self, picture: Path, tsv: Path) -> str:
        """Return the image column of a row of `tsv`.

        Raises:
            Dropped: the picture is missing or, if that is checked or its link leads out of the folder, no picture.
            InputError: its path leads out of the folder, to files that are no part of the data set.
        """
        if picture.is_absolute() or ".." in picture.parts or _UNSAFE.search(str(picture)):
            raise InputError(f"{str(picture)!r}: refused, because it is no plain path of an image in {self.folder}")
        file = self.folder / picture
        if not file.is_file():
            raise Dropped("missing image")
        try:
            data = b"" if self.as_paths and not self.check else read_file(file, str(file))
            if self.check:
                open_image(data, str(file))
            elif data and not file.resolve().is_relative_to(self.folder.resolve()):
                with opened(data, str(file)):  # a link leads out of the folder, to what may be no picture
                    pass
        except BadRow as error:
            raise Dropped("unreadable image") from error
        if self.as_paths:
            return os.path.join(self.seen_from(tsv), picture)
        return base64.b64encode(data).decode("ascii")

    def seen_from(self, tsv: Path) -> str:
        """Return the relative path from a TSV file's folder to that of the pictures."""
        return os.path.relpath(self.folder.resolve(), tsv.parent.resolve())


@dataclass(frozen=True)
class Outcome:
    """What became of one TSV file: counts by name, or None if it was there already."""

    path: Path
    counts: Mapping[str, int] | None

    def __str__(self) -> str:
        if self.counts is None:
            return f"{self.path} is there already; delete it to make it anew"
        ordered = sorted(self.counts.items(), key=lambda count: count[0] != WRITTEN)
        return f"{self.path}: " + ", ".join(f"{count} {name}" for name, count in ordered)


def tidy(text: str, notes: Notes) -> str:
    """Return a text that stays in its column and part: no tabs, line ends, `&&` or `|!+`, no spaces around.

    Each unsafe piece becomes a space; a single `&` goes at either end, where joining could double it. Changed texts
    are counted in `notes`.
    """
    tidied = _UNSAFE.sub(" ", text).strip(" &")
    if tidied != text.strip(" "):
        notes[CLEANED] += 1
    return tidied


def clean(text: str, notes: Notes) -> str:
    """Return a tidy text; raises Dropped if nothing is left of it."""
    tidied = tidy(text, notes)
    if not tidied:
        raise Dropped("empty text")
    return tidied


def join_texts(texts: Sequence[str], notes: Notes) -> str:
    """Return tidy texts joined by `&&`, without empty ones; raises Dropped if all are empty."""
    kept = [tidied for text in texts if (tidied := tidy(text, notes))]
    if not kept:
        raise Dropped("empty text")
    notes["empty texts left out of a row"] += len(texts) - len(kept)
    return REFERENCE_SEPARATOR.join(kept)


def join_answers(confidences: Mapping[str, float], notes: Notes) -> str:
    """Return `conf|!+answer&&…`, the highest confidence first; raises Dropped if there is no answer."""
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
    pictures: Pictures,
    settings: Mapping[str, Any] | None = None,
) -> Outcome:
    """Write one TSV file, a row for each entry that is not dropped; stopped and started again, it goes on.

    Args:
        path: the TSV file.
        load: returns the entries; called only if there is something to do.
        columns: makes a row of an entry, or raises Dropped; counts in its second argument what is worth a report.
        inputs: files that the entries come from; an unfinished `path` begun with others is refused.
        settings: what else the rows depend on, as JSON values.

    Returns:
        the counts: rows written, notes, and rows dropped by reason.

    Raises:
        InputError: no row is left, or another process writes `path`.
        StalePart: an unfinished `path` was begun with other inputs or settings.
    """
    writer = ResumableWriter(
        path,
        {
            "inputs": {file.name: fingerprint(file) for file in inputs},
            "image_paths": pictures.seen_from(path) if pictures.as_paths else None,
            "check_images": pictures.check,
            **(settings or {}),
        },
    )
    with writer:
        if writer.finished:
            return Outcome(path, None)
        entries = load()
        for batch in writer.batches(len(entries), BATCH_ROWS, path.stem):
            lines, counts = [], Counter[str]()
            for index in batch:
                notes = Counter({WRITTEN: 1})
                try:
                    row = columns(entries[index], notes)
                    lines.append("\t".join(pictures.column(c, path) if isinstance(c, Path) else c for c in row))
                    counts += notes
                except Dropped as reason:
                    counts[f"dropped ({reason})"] += 1
            writer.append(lines, rows=len(batch), counts=counts)
        if not writer.counts[WRITTEN]:
            writer.discard()
            found = ", ".join(f"{count} {name}" for name, count in writer.counts.items()) or "no entry of this split"
            raise InputError(
                f"{path}: no row to write ({found}); check {inputs[0]} and the images in {pictures.folder}"
            )
        writer.finish()
    return Outcome(path, writer.counts)


def write_answers(out: Path, load: Callable[[], Sequence[str]]) -> Outcome:
    """Write OUT/trainval_ans2label.pkl, a pickle of a dict from answer to number, as OFA keeps a list of answers."""
    path = out / ANSWER_LIST
    if path.exists():
        return Outcome(path, None)
    answers = load()
    write_whole(path, pickle.dumps({answer: number for number, answer in enumerate(answers)}))
    return Outcome(path, {"answers": len(answers)})
