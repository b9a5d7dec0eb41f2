"""Scene graphs as a TSV column: the set of triplets of subject, relation and object, with the boxes of both.

`&&` joins triplets, and an image without any has an empty column. A column with two of them::

    dog 12,40,96.5,131 | on | mat 0,90,150,160&&cat 100,20,140,90 | left of | dog 12,40,96.5,131

Objects are told apart by their boxes: two dogs have two boxes, and one dog in two triplets has the same box in both.
A box is x0,y0,x1,y1 in pixels of the original image, with at most two decimals. A name is a noun or a relation. It is
one line of 1 to `LONGEST_NAME` characters without `|` and `&`, so it cannot hold a separator.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from narvl_plugin.data.boxes import GOOD_IOU, format_box, iou, parse_box
from narvl_plugin.data.text import REFERENCE_SEPARATOR
from narvl_plugin.errors import BadRow, harmless

MOST_TRIPLETS = 1000
"""Largest number of triplets of a column. Images of Visual Genome have up to 800, and 21 on average."""
LONGEST_NAME = 100
"""Largest number of characters of a name."""
LONGEST_TRIPLET = 500
"""Largest number of characters of a triplet."""
PART_SEPARATOR = "|"
_SEPARATORS = re.compile(r"[|&]")


class Instance(NamedTuple):
    """An object in an image.

    Attributes:
        noun: its name.
        box: x0, y0, x1, y1 in pixels.
    """

    noun: str
    box: tuple[float, float, float, float]


class Triplet(NamedTuple):
    """A relation between two objects, such as a dog on a mat."""

    subject: Instance
    relation: str
    object: Instance


def clean_name(text: str) -> str:
    """Return a text as a name: separators, control characters and runs of white space become single spaces.

    The name may be empty, or longer than `LONGEST_NAME`.
    """
    return " ".join(_SEPARATORS.sub(" ", harmless(text, " ")).split())


def read_triplets(column: str, where: str) -> list[Triplet]:
    """Return the triplets of a column in its order.

    Args:
        column: the column.
        where: FILE:ROW, for errors.

    Raises:
        BadRow: if the column is not a set of triplets, or holds more than `MOST_TRIPLETS`.
    """
    if not column.strip():
        return []
    number = column.count(REFERENCE_SEPARATOR) + 1
    if number > MOST_TRIPLETS:
        raise BadRow(f"{where}: has {number} triplets, and at most {MOST_TRIPLETS} are read; delete some")
    triplets = [_read_triplet(text, where) for text in column.split(REFERENCE_SEPARATOR)]
    seen: set[Triplet] = set()
    for triplet in triplets:
        if triplet in seen:
            raise BadRow(f"{where}: holds the triplet {format_triplet(triplet)!r} twice; delete one")
        seen.add(triplet)
    return triplets


def write_triplets(triplets: Sequence[Triplet]) -> str:
    """Return the column of some triplets, with edges rounded to two decimals. `read_triplets` reads them back.

    Raises:
        ValueError: if a column cannot hold them: for a name that `clean_name` would change, an empty box, or two
            triplets that are equal with rounded edges.
    """
    rounded = [Triplet(_rounded(subject), relation, _rounded(other)) for subject, relation, other in triplets]
    column = REFERENCE_SEPARATOR.join(map(format_triplet, rounded))
    if read_triplets(column, "triplets") != rounded:
        raise ValueError(f"{column!r:.200} is read as other triplets than are written")
    return column


def format_triplet(triplet: Triplet) -> str:
    """Return a triplet as a part of the column, with edges of at most two decimals; nothing is checked."""
    subject, relation, other = triplet
    parts = (f"{subject.noun} {format_box(subject.box)}", relation, f"{other.noun} {format_box(other.box)}")
    return f" {PART_SEPARATOR} ".join(parts)


def triplet_words(triplets: Iterable[Triplet]) -> str:
    """Return triplets as words without their boxes, such as `dog on mat; cat left of dog`; empty without triplets."""
    return "; ".join(f"{one.subject.noun} {one.relation} {one.object.noun}" for one in triplets)


def objects_of(triplets: Iterable[Triplet]) -> tuple[list[Instance], list[tuple[int, int]]]:
    """Return the objects of triplets. Those of one noun whose boxes overlap well are one.

    Args:
        triplets: the triplets.

    Returns:
        The objects, and the numbers (from 0) of the subject and the object of each triplet.
    """
    found: list[Instance] = []

    def number_of(instance: Instance) -> int:
        number = next((number for number, other in enumerate(found) if _is_same(instance, other)), len(found))
        if number == len(found):
            found.append(instance)
        return number

    return found, [(number_of(one.subject), number_of(one.object)) for one in triplets]


def distinct_names(objects: Sequence[Instance]) -> list[str]:
    """Return the nouns of objects; those of one noun are numbered, as `dog 1` and `dog 2`."""
    total, so_far = Counter(one.noun for one in objects), Counter[str]()
    names = []
    for noun, _ in objects:
        so_far[noun] += 1
        names.append(f"{noun} {so_far[noun]}" if total[noun] > 1 else noun)
    return names


def _is_same(one: Instance, other: Instance) -> bool:
    if one.noun != other.noun:
        return False
    boxes = torch.tensor([one.box, other.box], dtype=torch.float64)
    return one.box == other.box or bool(iou(boxes[0], boxes[1]) >= GOOD_IOU)


def _read_triplet(text: str, where: str) -> Triplet:
    parts = [part.strip() for part in text.split(PART_SEPARATOR)] if len(text) <= LONGEST_TRIPLET else []
    if len(parts) != 3:
        raise BadRow(
            f"{where}: {text!r:.100} is no triplet; expected `noun x0,y0,x1,y1 | relation | noun x0,y0,x1,y1` with at "
            f"most {LONGEST_TRIPLET} characters"
        )
    subject, relation, other = parts
    return Triplet(_read_instance(subject, where), _checked(relation, where), _read_instance(other, where))


def _read_instance(text: str, where: str) -> Instance:
    noun, _, box = text.rpartition(" ")
    x0, y0, x1, y1 = parse_box(box, where).tolist()
    instance = _rounded(Instance(_checked(noun, where), (x0, y0, x1, y1)))
    if not (instance.box[0] < instance.box[2] and instance.box[1] < instance.box[3]):
        raise BadRow(f"{where}: the box {box} is empty with edges rounded to two decimals")
    return instance


def _rounded(instance: Instance) -> Instance:
    x0, y0, x1, y1 = (round(edge, 2) for edge in instance.box)
    return Instance(instance.noun, (x0, y0, x1, y1))


def _checked(name: str, where: str) -> str:
    if not name or len(name) > LONGEST_NAME or clean_name(name) != name:
        raise BadRow(
            f"{where}: {name!r:.120} is no name; expected 1 to {LONGEST_NAME} characters, single spaces, and no `&`"
        )
    return name
