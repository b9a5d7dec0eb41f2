"""Scene trees: from an image to the tree of the scene, its regions and the objects in them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import torch

from narvl_plugin.ctc import Automaton, Tree, tree_language
from narvl_plugin.data.collate import Batch, Sample
from narvl_plugin.data.dataset import DatasetOptions, TsvDataset
from narvl_plugin.data.plain_json import read_json
from narvl_plugin.data.scene_graph import spelled
from narvl_plugin.data.table import Table
from narvl_plugin.data.text import PROMPTS, TextCodec
from narvl_plugin.data.trees import CLOSING, LEVELS, OPENING, Node, read_tree
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import BadRow, InputError

MOST_OBJECTS = 4
"""Largest number of objects of a row."""
MOST_REGIONS = 4
"""Largest number of different regions. Each set of them is a state of the automaton of all trees."""
MOST_LABELS = 10_000
"""Largest number of labels of the nodes of a level."""
LARGEST_NAMES = 1_000_000
"""Largest size of a file of names, in bytes."""
QUESTION = "what is where in the image"
"""The question of all rows. It is no prompt of its own, so that vocabularies stay as they are."""

Tokens = tuple[int, ...]
Words = Sequence[Sequence[str]]
"""The label of a node is a word of each of these lists, in their order. The empty word is left out."""


class TreeNames:
    """The labels that nodes may have, and their tokens.

    Args:
        words: for each of `LEVELS`, the words of its labels.
        codec: spells the labels.

    Attributes:
        labels: for each level, the tokens of each label.

    Raises:
        InputError: if a level has no label that the vocabulary can spell, or too many, or if the vocabulary splits a
            bracket into several tokens.
    """

    def __init__(self, words: Sequence[Words], codec: TextCodec) -> None:
        self.labels: list[dict[str, Tokens]] = []
        for level, (kind, lists) in enumerate(zip(LEVELS, words, strict=True)):
            most = MOST_REGIONS if kind == "region" else MOST_LABELS
            number = _number_of_labels(lists)
            if not 0 < number <= most:
                raise InputError(f"--names-file: the {kind} has {number:,} labels; give 1 to {most:,}")
            texts = [" ".join(filter(None, chosen)) for chosen in product(*lists)]
            self.labels.append(spelled({text: text for text in dict.fromkeys(texts) if text}, codec))
            if not self.labels[level]:
                raise InputError(
                    f"--bpe-dir: the vocabulary spells no label of the {kind} in --names-file; train it on the column "
                    "of trees (narvl vocab --column)"
                )
        self._brackets = [codec.encode(f" {bracket}").tolist() for bracket in (OPENING, CLOSING)]
        if any(len(one) != 1 or one[0] == codec.dictionary.unk() for one in self._brackets):
            raise InputError(
                "--bpe-dir: the vocabulary does not write a bracket as one token; train it on the column of trees "
                "(narvl vocab --column)"
            )

    @classmethod
    def of_file(cls, file: str | Path, codec: TextCodec) -> TreeNames:
        """Return the labels of a JSON file: an object with a list of lists of words for each of `LEVELS`.

        Raises:
            InputError: if the file cannot be used.
        """
        if not Path(file).is_file():
            raise InputError(f"--names-file {file}: no such file; give a file with the words of each level")
        found = read_json(Path(file), LARGEST_NAMES)
        for level in LEVELS:
            lists = found.get(level)
            if not isinstance(lists, list) or not all(
                isinstance(words, list) and all(isinstance(word, str) and _is_word(word) for word in words)
                for words in lists
            ):
                raise InputError(
                    f"--names-file {file}: {level!r} is {lists!r:.80}; expected a list of lists of words without "
                    'brackets, such as [["", "small"], ["dog", "cat"]]'
                )
        return cls([found[level] for level in LEVELS], codec)

    @property
    def opening(self) -> int:
        """The token of the opening bracket."""
        return self._brackets[0][0]

    @property
    def closing(self) -> int:
        """The token of the closing bracket."""
        return self._brackets[1][0]

    @property
    def longest(self) -> int:
        """The number of tokens of the longest tree."""
        scene, region, thing = (sorted(map(len, level.values()), reverse=True) for level in self.labels)
        nodes = [scene[0], *region[:MOST_OBJECTS], *[thing[0]] * MOST_OBJECTS]
        return sum(nodes) + 2 * len(nodes)

    def language(self) -> Automaton:
        """Return the automaton of all trees with up to `MOST_OBJECTS` objects."""
        labels = [list(level.values()) for level in self.labels]
        return tree_language(*labels, opening=self.opening, closing=self.closing, most=MOST_OBJECTS)

    def parse(self, tokens: Sequence[int]) -> Tree | None:
        """Return the tree that tokens spell, None for tokens of another form; see `tokens_of` for the converse.

        Labels are not compared with the listed ones.
        """
        root: list[Tree] = []
        open_nodes: list[tuple[list[int], list[Tree]]] = []
        for token in tokens:
            if root:
                return None
            if token == self.opening:
                open_nodes.append(([token], []))
                continue
            if not open_nodes:
                return None
            before, children = open_nodes[-1]
            if token == self.closing:
                open_nodes.pop()
                siblings = open_nodes[-1][1] if open_nodes else root
                siblings.append(Tree(tuple(before), tuple(children), after=(token,)))
            elif children:
                return None
            else:
                before.append(token)
        return None if open_nodes or not root else root[0]

    def tokens_of(self, tree: Node, where: str) -> Tree:
        """Return the tokens of a tree.

        Args:
            tree: the tree.
            where: FILE:ROW, for errors.

        Raises:
            BadRow: if a label is not listed, a region occurs twice or has no object, or there are too many objects.
        """
        for number, region in enumerate(tree.children):
            if not region.children:
                raise BadRow(f"{where}: the region {region.label!r:.100} has no object; delete it")
            if any(region.label == other.label for other in tree.children[:number]):
                raise BadRow(f"{where}: the region {region.label!r:.100} occurs twice; put all its objects into one")
        number = sum(len(region.children) for region in tree.children)
        if number > MOST_OBJECTS:
            raise BadRow(f"{where}: has {number} objects, and this task reads at most {MOST_OBJECTS}; delete some")
        return self._tokens_of(tree, 0, where)

    def _tokens_of(self, node: Node, level: int, where: str) -> Tree:
        label = self.labels[level].get(node.label)
        if label is None:
            raise BadRow(
                f"{where}: the {LEVELS[level]} {node.label!r:.100} is not in --names-file, or cannot be spelled; "
                "correct it, or list its words"
            )
        children = tuple(self._tokens_of(child, level + 1, where) for child in node.children)
        return Tree((self.opening, *label), children, after=(self.closing,))


def _number_of_labels(lists: Words) -> int:
    """Return the number of labels of some lists of words, with repetitions."""
    number = 1
    for words in lists:
        number *= len(words)
    return number if lists else 0


def _is_word(text: str) -> bool:
    """Return whether a text can be part of a label: words with single spaces and no bracket, or nothing."""
    return text == " ".join(text.split()) and not set(text) & {OPENING, CLOSING}


def tokens_in(tree: Tree) -> list[int]:
    """Return the tokens of a tree in its own order."""
    return [*tree.before, *(token for child in tree.children for token in tokens_in(child)), *tree.after]


def shuffled_tree(tree: Tree, draw: Random) -> Tree:
    """Return a tree with the children of each node in a random order."""
    children = [shuffled_tree(child, draw) for child in tree.children]
    return tree._replace(children=tuple(draw.sample(children, len(children))))


class SceneTreeDataset(TsvDataset):
    """Rows of (id, image, tree), selected in this order.

    The column of trees is that of `narvl_plugin.data.trees`, with at most `MOST_OBJECTS` objects, and each region once.
    The target is the same text, one token for a bracket. With `random_order`, each epoch of a training learns another
    order of the children of each node.

    A batch also holds `trees`, the columns of its B rows.

    Attributes:
        names: the labels that may occur.
        random_order: whether a training learns random orders.
    """

    column_names = ("id", "image", "tree")
    placeholders = {"tree": ""}

    def __init__(
        self, tsv: TsvFile, options: DatasetOptions, split: str, *, names: TreeNames, random_order: bool = False
    ) -> None:
        super().__init__(tsv, options, split)
        self.names = names
        self.random_order = random_order
        self._source = self.with_specials(options.codec.encode(PROMPTS["vqa_gen"].format(question=QUESTION)))

    def source_tokens(self, row: int, columns: list[str]) -> torch.Tensor:
        """Return the question that the encoder reads, int64 (S,); it is the same for all rows."""
        return self._source

    def target_tokens(self, row: int, columns: list[str]) -> torch.Tensor:
        """Return the tokens of a row's tree in the order of this epoch, int64 (T,).

        Raises:
            BadRow: if the tree cannot be used.
        """
        if isinstance(self.tsv, Table):  # there are images alone
            return torch.empty(0, dtype=torch.int64)
        where = self.tsv.where(row)
        tree = self.names.tokens_of(read_tree(columns[-1], where), where)
        if self.random_order and self.training:
            tree = shuffled_tree(tree, Random(f"{self.epoch}/{row}"))
        return torch.tensor(tokens_in(tree), dtype=torch.int64)

    def make_sample(self, row: int, columns: list[str]) -> Sample:
        """Return the sample of one row.

        Raises:
            BadRow: if the tree or the image cannot be used.
        """
        unique_id, image, column = columns
        target = self.as_target(self.target_tokens(row, columns))
        pixels = self.read_image(image, self.tsv.where(row))
        return self.as_input(row, unique_id, self._source, pixels) | target | {"tree": column}

    def make_batch(self, samples: Sequence[Sample]) -> Batch:
        """Return the batch of some samples, with the trees."""
        trees: dict[str, Any] = {"trees": [sample["tree"] for sample in samples]}
        return super().make_batch(samples) | trees
