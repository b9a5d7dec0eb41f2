"""The task `scene_tree`: it predicts the tree of a scene, its regions, and the objects in them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Optional

import torch

from narvl_plugin.ctc import Automaton, Tree, tree_automaton
from narvl_plugin.data.scene_tree import SceneTreeDataset, TreeNames, shuffled_tree, tokens_in
from narvl_plugin.data.trees import read_tree, tree_in
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import InputError
from narvl_plugin.scoring.trees import edit_distance
from narvl_plugin.tasks.base import BaseTaskConfig, Hypotheses, Search
from narvl_plugin.tasks.sets import ElementOrder, SetTask

OUTPUTS_KEPT = 4096
"""Number of parsed outputs that are kept. Most outputs that are drawn from a student are equal."""

Part = tuple[tuple[int, ...], Tree]
"""A region or an object: the tokens of the node that it is in, and its tree with sorted children."""


class Parsed(NamedTuple):
    """A tree that tokens spell.

    Attributes:
        tree: the tree with sorted children.
        parts: its regions, each followed by its objects, in the order of the tokens.
        numbers: how often each part occurs.
    """

    tree: Tree
    parts: list[Part]
    numbers: Counter[Part]


@dataclass
class SceneTreeConfig(BaseTaskConfig):
    """Options of the task `scene_tree`."""

    selected_cols: str = field(
        default="0,3,2", metadata={"help": "TSV columns (from 0) of id, image and tree, in this order"}
    )
    names_file: Optional[str] = field(
        default=None,
        metadata={
            "help": "JSON file with the words of labels: an object with scene, region and object. Each is a list of "
            'lists of words. A label has one word of each list, and "" stands for none'
        },
    )
    eval_acc: bool = field(
        default=False,
        metadata={
            "help": "generate in validation and log the share of exact trees as `score` (for "
            "--best-checkpoint-metric), and the mean tree edit distance as `edits`"
        },
    )
    eval_args: str = field(
        default='{"beam": 5, "unnormalized": true}',
        metadata={"help": "options of the generator in validation, as JSON; a student's is beam"},
    )
    element_order: ElementOrder = field(
        default=ElementOrder.reading,
        metadata={
            "help": "order of regions and objects in the targets of training: that of the column, or a new random one "
            "in each epoch. It matters to teachers, and to --criterion qset with --order given"
        },
    )


class SceneTreeTask(SetTask):
    """The tree of a scene; see SceneTreeDataset for the columns.

    Outputs are always trees of listed labels, with each region once, one object or more in each, and at most
    `MOST_OBJECTS` in all. Objects may be equal.
    """

    name = "scene_tree"
    verb = "tree"
    config_class = SceneTreeConfig
    validation_metrics = ("score", "edits")
    dataset_class = SceneTreeDataset
    target_place = 2
    cfg: SceneTreeConfig

    def __init__(self, cfg: SceneTreeConfig, **kwargs: Any) -> None:
        super().__init__(cfg, **kwargs)
        if not cfg.names_file:
            raise InputError("--names-file: is not given; give the words of each level")
        self.names = TreeNames.of_file(cfg.names_file, self.codec)
        self.language = self.names.language()
        self._arcs: list[dict[int, set[int]]] = [{} for _ in self.language.accepting]
        for source, label, target in zip(*(part.tolist() for part in self.language[:3]), strict=True):
            self._arcs[source].setdefault(label, set()).add(target)
        self._parsed = lru_cache(OUTPUTS_KEPT)(self._parse)

    @property
    def generates_in_validation(self) -> bool:
        """Return whether validation generates trees (--eval-acc)."""
        return self.cfg.eval_acc

    def build_dataset(self, tsv: TsvFile, split: str) -> SceneTreeDataset:
        """Return the data set of a split's file."""
        return SceneTreeDataset(
            tsv,
            self.options,
            split,
            names=self.names,
            random_order=self.cfg.element_order == ElementOrder.random,
        )

    # --- Targets in any order ----------------------------------------------------------------------------------------

    def acceptor(self, tokens: list[int], window: int | None) -> Automaton:
        """Return the automaton of a target with the children of each node in any order, see `CommonTask.acceptor`."""
        if window is not None:
            raise InputError(f"--window {window}: is for sets, and the targets of scene_tree are trees; leave it out")
        return tree_automaton(self._target(tokens))

    def in_random_order(self, tokens: list[int], draw: Random) -> list[int]:
        """Return a target with the children of each node in a random order, see `CommonTask.in_random_order`."""
        return tokens_in(shuffled_tree(self._target(tokens), draw))

    def _target(self, tokens: list[int]) -> Tree:
        tree = self.names.parse(tokens)
        assert tree is not None, "the data set spells trees"
        return tree

    def elements(self, tokens: list[int]) -> list[tuple[int, ...]]:
        """Return the regions of a tree, each followed by its objects; none for tokens that are no tree."""
        tree = self.names.parse(tokens)
        return [] if tree is None else [tuple(tokens_in(node)) for _, node in _below(tree)]

    # --- Search ------------------------------------------------------------------------------------------------------

    def path_options(self, args: Any) -> dict[str, Any]:
        """Return how a student finds the most probable trees."""
        return {"beam_size": getattr(args, "beam", 1), "constraint": self.language}

    def beam_searches(self, frequencies: Path | None) -> dict[str, Search]:
        """Return the decoding methods of students beside greedy search; see `ways_to_decode`."""
        return {"probably exact": Search({"beam": 5}, {})}

    @property
    def longest_output(self) -> int:
        """The number of tokens of the longest tree."""
        return self.names.longest

    def allowed_tokens(self, tokens: list[int]) -> list[int]:
        """Return the tokens that may follow the tokens of a teacher's output; none if no tree begins so."""
        reached = {0}
        for token in tokens:
            reached = {target for source in reached for target in self._arcs[source].get(token, ())}
        following = {token for source in reached for token in self._arcs[source]}
        if any(self.language.accepting[state] for state in reached):
            following.add(self.target_dictionary.eos())
        return sorted(following)

    # --- Scores of outputs -------------------------------------------------------------------------------------------

    def _parse(self, tokens: tuple[int, ...]) -> Parsed | None:
        """Return the tree that tokens spell; None for tokens that are no valid output."""
        if self._is_invalid(tokens):
            return None
        tree = self._target(list(tokens))
        parts = [(above, node.canonical()) for above, node in _below(tree)]
        return Parsed(tree.canonical(), parts, Counter(parts))

    def _is_invalid(self, tokens: Sequence[int]) -> bool:
        return self.target_dictionary.eos() not in self.allowed_tokens(list(tokens))

    def is_invalid(self, tokens: torch.Tensor) -> bool:
        """Return whether tokens (T,) are no tree of listed labels."""
        return self._is_invalid(self._without_end(tokens))

    def _without_end(self, tokens: torch.Tensor) -> list[int]:
        return [token for token in tokens.tolist() if token != self.target_dictionary.eos()]

    def _parsed_of(self, outputs: Sequence[torch.Tensor]) -> list[Parsed | None]:
        """Return the trees of H outputs, (T,) each, without `</s>`."""
        return [self._parsed(tuple(self._without_end(tokens))) for tokens in outputs]

    def _parsed_rows(self, tokens: torch.Tensor, lengths: torch.Tensor) -> list[Parsed | None]:
        """Return the trees of M outputs: (M, T), (M,)."""
        return [self._parsed(row) for row in _rows(tokens, lengths)]

    def agreement(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return whether each two of H outputs are the same tree: (H, H), 1 or 0."""
        parsed = self._parsed_of(outputs)
        return torch.tensor([[float(_are_equal(one, other)) for other in parsed] for one in parsed])

    def output_scores(
        self, outputs: torch.Tensor, lengths: torch.Tensor, targets: torch.Tensor, target_lengths: torch.Tensor
    ) -> torch.Tensor:
        """Return 1 for exact trees and 0 for others: (B, M, T), (B, M), (B, K, S), (B, K) -> (B, M)."""
        scores = torch.zeros(lengths.shape)
        for row, sample in enumerate(zip(outputs, lengths, targets[:, :1], target_lengths[:, :1], strict=True)):
            (true,) = self._parsed_rows(*sample[2:])
            scores[row] = torch.tensor([float(_are_equal(one, true)) for one in self._parsed_rows(*sample[:2])])
        return scores.to(outputs.device)

    def element_scores(self, outputs: torch.Tensor, lengths: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the probability of each region and object of an output: the share of drawn trees with an equal one.

        Objects are equal if they have equal labels, and are in regions of equal labels. Regions are equal if their
        objects are, too. Of several equal objects, the second has the share of the trees with two or more, and so on.

        Args:
            outputs: (M, T), drawn outputs. Those that are no trees are left out.
            lengths: (M,).
            tokens: (S,), the output, with K regions and objects, in the order of `elements`.

        Returns:
            (K,), from 0 to 1.
        """
        drawn = Counter(_rows(outputs, lengths))
        trees = [self._parsed(tokens) for tokens in drawn]
        weights = torch.tensor([float(number) for number in drawn.values()])
        number = sum(float(weight) for tree, weight in zip(trees, weights, strict=True) if tree is not None)
        return self._shares(trees, weights, tokens) / max(1.0, number)

    def _shares(self, trees: Sequence[Parsed | None], weights: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the weight of the trees with an equal region or object: weights (M,), tokens (S,) -> (K,)."""
        asked = self._parsed(tuple(self._without_end(tokens)))
        wanted: list[tuple[Part, int]] = []
        seen: Counter[Part] = Counter()
        for part in asked.parts if asked is not None else ():
            seen[part] += 1
            wanted.append((part, seen[part]))
        found = [[tree is not None and tree.numbers[part] >= number for part, number in wanted] for tree in trees]
        return weights @ torch.tensor(found, dtype=weights.dtype).reshape(len(trees), len(wanted))

    def element_shares(
        self, outputs: Sequence[torch.Tensor], weights: torch.Tensor, tokens: torch.Tensor
    ) -> list[float]:
        """Return the weight of the trees with an equal region or object, for each of an output's."""
        shares: list[float] = self._shares(self._parsed_of(outputs), weights, tokens).tolist()
        return shares

    def tree(self, beam: list[dict[str, Any]]) -> dict[str, Any] | None:
        """Return the best tree as plain values, see `BaseTask.tree`. The root's probability is that of the whole."""
        tree = self.names.parse(self._without_end(beam[0]["tokens"]))
        if tree is None:  # the student abstained
            return None
        shares = iter(self.element_confidences(beam))

        def plain(node: Tree, probability: float) -> dict[str, Any]:
            label = self.codec.decode(node.before[1:])
            children = [plain(child, next(shares)) for child in node.children]
            return {"label": label, "probability": probability, "children": children}

        return plain(tree, self.confidence(beam))

    def validation_scores(self, sample: dict[str, Any], hypotheses: Hypotheses) -> dict[str, list[float]]:
        """Return for each hypothesis whether it is exact, and its edit distance."""
        found: dict[str, list[float]] = {name: [] for name in self.validation_metrics}
        for beam, column, where in zip(hypotheses, sample["trees"], sample["where"], strict=True):
            edits = edit_distance(tree_in(self.codec.decode(beam[0]["tokens"])), read_tree(column, where))
            found["score"].append(float(edits == 0))
            found["edits"].append(float(edits))
        return found

    def written_targets(self, sample: dict[str, Any], hypotheses: Hypotheses) -> list[str | None]:
        """Return the best trees as columns; None for an output that is no tree."""
        best = [beam[0]["tokens"] for beam in hypotheses]
        return [None if self.is_invalid(tokens) else self.codec.decode(tokens) for tokens in best]


def _below(tree: Tree) -> Iterator[Part]:
    """Yield the regions of a tree, each followed by its objects; see `Part`."""
    for region in tree.children:
        yield (), region
        for thing in region.children:
            yield region.before, thing


def _rows(tokens: torch.Tensor, lengths: torch.Tensor) -> list[tuple[int, ...]]:
    """Return M outputs without their padding: (M, T), (M,)."""
    return [tuple(row[:length]) for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]


def _are_equal(one: Parsed | None, other: Parsed | None) -> bool:
    """Return whether two outputs are the same tree."""
    return one is not None and other is not None and one.tree == other.tree
