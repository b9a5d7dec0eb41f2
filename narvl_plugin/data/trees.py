"""Scene trees as a TSV column: a scene, its regions, and the objects in each, as bracketed text.

A node is `( label child child … )`. The label of a node is its words: an object with its attributes, a region, or what
is said of the scene as a whole. The order of children has no meaning, and equal objects may occur several times::

    ( red striped ( left ( small dog ) ( small dog ) ) ( right ( cat ) ) )
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from narvl_plugin.errors import BadRow

LEVELS = ("scene", "region", "object")
"""What the nodes of each level are, from the root."""
LONGEST_TREE = 10_000
"""Largest number of characters of a column."""
OPENING, CLOSING = "(", ")"
_PART = re.compile(r"[()]|[^()\s]+")


class Node(NamedTuple):
    """A node of a tree.

    Attributes:
        label: its words, with single spaces.
        children: the nodes below it.
    """

    label: str
    children: tuple[Node, ...] = ()

    def canonical(self) -> Node:
        """Return the tree with its children sorted; equal trees become equal."""
        return Node(self.label, tuple(sorted(child.canonical() for child in self.children)))

    def below(self) -> Iterator[Node]:
        """Yield all nodes below this one, each before those that are below it."""
        for child in self.children:
            yield child
            yield from child.below()


def read_tree(column: str, where: str) -> Node:
    """Return the tree of a column.

    Args:
        column: the column.
        where: FILE:ROW, for errors.

    Raises:
        BadRow: if the column is no tree of at most three levels.
    """
    if len(column) > LONGEST_TREE:
        raise BadRow(f"{where}: the tree has {len(column):,} characters, and at most {LONGEST_TREE:,} are read")
    words: list[list[str]] = [[]]
    children: list[list[Node]] = [[]]

    def wrong(what: str) -> BadRow:
        return BadRow(f"{where}: {column!r:.200} is no tree: {what}; expected `( scene ( region ( object ) ) )`")

    for part in _PART.findall(column):
        if len(words) == 1 and (part != OPENING or children[0]):
            raise wrong(f"{part!r:.50} is outside its brackets")
        if part == OPENING:
            if len(words) > 1 and not words[-1]:
                raise wrong("a node has no label")
            if len(words) > len(LEVELS):
                raise wrong(f"it has more than {len(LEVELS)} levels")
            words.append([])
            children.append([])
        elif part == CLOSING:
            label, below = " ".join(words.pop()), tuple(children.pop())
            if not label:
                raise wrong("a node has no label")
            children[-1].append(Node(label, below))
        elif children[-1]:
            raise wrong(f"the word {part!r:.50} follows a child; labels come first")
        else:
            words[-1].append(part)
    if len(words) > 1:
        raise wrong("a bracket is not closed")
    if not children[0]:
        raise wrong("it is empty")
    return children[0][0]


def tree_in(text: str) -> Node | None:
    """Return the tree of a text that a model predicts, None for a text of another form."""
    try:
        return read_tree(text, "text")
    except BadRow:
        return None


def write_tree(tree: Node) -> str:
    """Return the column of a tree, with single spaces. `read_tree` reads it back."""
    return " ".join((OPENING, tree.label, *map(write_tree, tree.children), CLOSING))
