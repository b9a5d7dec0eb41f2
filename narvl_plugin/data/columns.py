"""A check of --selected-cols by the first rows of a TSV file.

A column that is certainly of another kind than the task reads is refused. A doubtful one is warned of. Without the
check, a model could silently learn to predict labels of objects, or row numbers, instead of captions.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import mean
from typing import NamedTuple

from narvl_plugin.data.images import PATH_SUFFIXES
from narvl_plugin.data.text import CONFIDENCE_MARK, ENTAILMENT_ANSWERS, REFERENCE_SEPARATOR
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow, InputError

logger = logging.getLogger(__name__)

ROWS_LOOKED_AT = 32
"""Number of first rows that are checked."""
MOST = 0.9
"""Share of a column's values that must be of one kind for the column to be of that kind."""
FEWEST_ROWS = 4
"""Smallest number of rows for a comparison of the lengths of texts."""

_IMAGE = re.compile(r"(/9j/|_9j_|iVBOR|R0lG|UklG|Qk[0-9]|SUk[qr]|TU0A|AAAA|k05V)[\w+/=-]{36,}")
"""The beginning of an image or of features as base64, in either alphabet, cut to `_SHOWN` characters."""
_SHOWN = 64
_EDGE = r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*"
_BOX = re.compile(rf"{_EDGE}(,{_EDGE}){{3}}")
_ANSWERS = re.compile(rf"\s*[0-9.]+([eE]-?[0-9]+)?{re.escape(CONFIDENCE_MARK)}.+")
_ID = re.compile(r"(?=.*\d)[\w.:/#-]+", re.ASCII)
_WORD = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]|\w[\w']*")
"""A word, or a letter of a script without spaces between words: Thai, Lao, Burmese, Khmer, kana and Chinese."""
_FUNCTION_WORDS = frozenset(
    [
        *("a", "an", "the", "this", "that", "his", "her", "its", "their", "there", "and", "or", "is", "are", "do"),
        *("does", "how", "what", "which", "where", "who", "by", "for", "from", "in", "next", "near", "of", "on"),
        *("over", "to", "under", "at", "with"),
    ]
)
"""Words that occur in English sentences but not in names of objects."""


class Kind(Enum):
    """Kind of a column's values; the member's value is its name in messages."""

    EMPTY = "nothing"
    IMAGE = "images (base64)"
    PATH = "paths of image files"
    BOX = "boxes (x0,y0,x1,y1)"
    ANSWERS = f"answers with their confidence (CONFIDENCE{CONFIDENCE_MARK}ANSWER)"
    LABEL = f"labels of entailment ({', '.join(ENTAILMENT_ANSWERS)})"
    ID = "ids"
    TEXT = "text"
    MIXED = "no one kind of value"


TYPED = {
    "image": (Kind.IMAGE, Kind.PATH),
    "box": (Kind.BOX,),
    "boxes": (Kind.BOX,),
    "answers": (Kind.ANSWERS,),
    "label": (Kind.LABEL,),
}
"""Possible kinds of the columns whose kind is fixed, by the task's name of the column."""
ID_COLUMNS = (0, 1)
"""Numbers of the columns that hold the ids of a row and of its image in OFA's files."""


@dataclass(frozen=True)
class Column:
    """Description of a column by its first rows.

    Attributes:
        number: number of the column, from 0.
        kind: kind of its values.
        words: average number of words in a value.
        sentences: share of values that hold a word of sentences, which names of objects lack.
        longest_name: number of words in the longest of the parts that `&&` joins.
    """

    number: int
    kind: Kind
    words: float
    sentences: float
    longest_name: int

    @property
    def is_sentences(self) -> bool:
        """Whether the column holds whole sentences."""
        return self.kind is Kind.TEXT and self.words >= 4 and self.sentences >= 0.7

    @property
    def is_names(self) -> bool:
        """Whether the column holds names of objects, or other words without sentences."""
        return self.kind is Kind.TEXT and self.sentences == 0 and self.longest_name <= 3


def kind_of(value: str) -> Kind:
    """Return the kind of one value."""
    if not value.strip():
        return Kind.EMPTY
    if value[-5:].lower().endswith(PATH_SUFFIXES):
        return Kind.PATH
    if _IMAGE.fullmatch(value[:_SHOWN]):
        return Kind.IMAGE
    if value in ENTAILMENT_ANSWERS:
        return Kind.LABEL
    parts = value.split(REFERENCE_SEPARATOR)
    if all(_BOX.fullmatch(part[:200]) for part in parts):
        return Kind.BOX
    if all(_ANSWERS.fullmatch(part) for part in parts):
        return Kind.ANSWERS
    return Kind.ID if _ID.fullmatch(value) else Kind.TEXT


def look_at(number: int, values: Sequence[str]) -> Column:
    """Return the description of a column.

    Args:
        number: number of the column.
        values: its values in the first rows.
    """
    kinds = Counter(kind_of(value) for value in values)
    kinds.pop(Kind.EMPTY, None)
    kind, count = kinds.most_common(1)[0] if kinds else (Kind.EMPTY, 0)
    if count < MOST * kinds.total():
        kind = Kind.MIXED
    if kind is not Kind.TEXT:
        return Column(number, kind, 0.0, 0.0, 0)
    texts = [value for value in values if value.strip()]
    words = [[_WORD.findall(part.lower()) for part in value.split(REFERENCE_SEPARATOR)] for value in texts]
    return Column(
        number,
        kind,
        words=mean(sum(map(len, parts)) / len(parts) for parts in words),
        sentences=mean(any(not _FUNCTION_WORDS.isdisjoint(part) for part in parts) for parts in words),
        longest_name=max(len(part) for parts in words for part in parts),
    )


def first_columns(tsv: TsvFile) -> list[Column]:
    """Return the descriptions of all columns of a file. Rows that lack a selected column are ignored."""
    rows = []
    for row in range(min(len(tsv), ROWS_LOOKED_AT)):
        try:
            fields = tsv.fields(row)
        except BadRow:
            continue  # reported when the row is read
        if len(fields) > max(tsv.columns):
            rows.append([field.decode("utf-8", "replace") for field in fields])
    width = min(map(len, rows), default=0)
    return [look_at(number, [row[number] for row in rows]) for number in range(width)]


def check_columns(tsv: TsvFile, names: Sequence[str]) -> None:
    """Refuse selected columns that are certainly of another kind than a task reads, and warn of doubtful ones.

    Args:
        tsv: a file with a selected column for each name.
        names: the task's names of the selected columns, in order.

    Raises:
        InputError: if a text column holds images; if it holds boxes, answers, labels or ids, and another column holds
            text; or if another column holds the images, boxes, answers or labels that a selected one lacks.
    """
    columns = first_columns(tsv)
    if not columns:
        return
    for name, number in zip(names, tsv.columns, strict=True):
        column = columns[number]
        # Tasks read these columns only with an option. A file that lacks them may name any other column instead.
        maybe_unread = name == "objects" or (name == "caption" and "label" in names)
        is_image = number == tsv.columns[names.index("image")]
        doubt = _doubt(name, column, columns, maybe_unread, is_image)
        if doubt is None:
            continue
        found = "names of objects" if column.is_names else "sentences" if column.is_sentences else column.kind.value
        hint = f"; column {' or '.join(str(other.number) for other in doubt.right)} looks right" if doubt.right else ""
        message = (
            f"{tsv.path}: column {number} is read as the {name}, and looks like {found}{hint} (--selected-cols "
            f"{','.join(map(str, tsv.columns))} names the columns, from 0, of {', '.join(names)})"
        )
        if doubt.certain:
            raise InputError(message)
        logger.warning(message)
    _compare_texts(tsv, names, columns)


class Doubt(NamedTuple):
    """Doubt about a selected column.

    Attributes:
        right: columns that may be meant instead.
        certain: whether the selected column is certainly wrong.
    """

    right: list[Column]
    certain: bool


def _doubt(name: str, column: Column, columns: Sequence[Column], maybe_unread: bool, is_image: bool) -> Doubt | None:
    """Return the doubt about a column, or None if it may be correct.

    A column of mixed or missing values is not judged here; its rows raise errors when they are read.

    Args:
        name: the task's name of the column.
        column: the column.
        columns: all columns.
        maybe_unread: whether the task may ignore the column.
        is_image: whether the column is also read as the image.
    """
    if column.kind in (Kind.EMPTY, Kind.MIXED):
        return None
    if name in TYPED:
        right = [other for other in columns if other.kind in TYPED[name]]
        return Doubt(right, certain=True) if right and column.kind not in TYPED[name] else None
    if name == "id":
        right = [other for other in columns if other.kind is Kind.ID]
        if column.kind in (Kind.ID, Kind.PATH) or (column.kind is Kind.TEXT and not right):
            return None
        return Doubt(right, certain=column.kind is Kind.IMAGE and is_image)  # else it may be a hash in base64
    sentences = [other for other in columns if other.is_sentences]
    if name == "objects":
        right = [other for other in columns if other.is_names]
        return None if column.kind is Kind.TEXT and not column.is_sentences else Doubt(right, certain=False)
    if column.kind is Kind.TEXT:
        return Doubt(sentences, certain=False) if column.is_names and sentences and not maybe_unread else None
    right = sentences or [other for other in columns if other.kind is Kind.TEXT]
    # A value that looks like an id, a file, a box or a label may be a text to learn, for example a number plate. This
    # is ruled out if another column holds text. Ids and paths are then refused only in their usual columns, or if the
    # column is also the image.
    is_other = bool(right) and (column.kind not in (Kind.ID, Kind.PATH) or column.number in ID_COLUMNS or is_image)
    return Doubt(right, certain=not maybe_unread and (column.kind is Kind.IMAGE or is_other))


def _compare_texts(tsv: TsvFile, names: Sequence[str], columns: Sequence[Column]) -> None:
    """Warn if hypotheses are longer than their captions, which suggests that the two columns are exchanged."""
    if "hypothesis" not in names or len(tsv) < FEWEST_ROWS:
        return
    number = dict(zip(names, tsv.columns, strict=True))
    hypothesis, caption = columns[number["hypothesis"]], columns[number["caption"]]
    if caption.kind is Kind.TEXT and hypothesis.words > 1.2 * caption.words:
        logger.warning(
            "%s: the hypotheses (column %d) have %.1f words on average, the captions (column %d) %.1f; if these are "
            "exchanged, exchange their numbers in --selected-cols",
            *(tsv.path, hypothesis.number, hypothesis.words, caption.number, caption.words),
        )
