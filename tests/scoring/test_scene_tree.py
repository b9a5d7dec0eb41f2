"""The scores of trees: the edit distance against brute force, and the scorer on texts as models predict them."""

import itertools
import random

import pytest

from narvl_plugin.data.trees import Node, read_tree, write_tree
from narvl_plugin.scoring.scene_tree import SceneTreeConfig, SceneTreeScorer
from narvl_plugin.scoring.trees import edit_distance, score_trees, size_of

TREE = "( red ( left ( dog ) ( cat ) ) ( right ( dog ) ) )"
OTHER_ORDER = "( red ( right ( dog ) ) ( left ( cat ) ( dog ) ) )"


def by_brute_force(one: Node, other: Node) -> int:
    """Return the distance as the best over all ways to pair children."""
    short, long = sorted((one.children, other.children), key=len)
    best = None
    for chosen in itertools.permutations(range(len(long)), len(short)):
        for paired in itertools.product((True, False), repeat=len(short)):
            cost = sum(size_of(child) for number, child in enumerate(long) if number not in chosen)
            for child, number, pair in zip(short, chosen, paired, strict=True):
                cost += by_brute_force(child, long[number]) if pair else size_of(child) + size_of(long[number])
            best = cost if best is None else min(best, cost)
    return int(one.label != other.label) + (best or 0)


def drawn(draw: random.Random, levels: int = 3) -> Node:
    children = tuple(drawn(draw, levels - 1) for _ in range(draw.randint(0, 3))) if levels > 1 else ()
    return Node(draw.choice("abc"), children)


def test_the_distance_is_the_least_over_all_matchings() -> None:
    draw = random.Random(1)
    seen = set()
    for _ in range(60):
        one, other = drawn(draw), drawn(draw)
        distance = edit_distance(one, other)
        assert distance == by_brute_force(one, other) == edit_distance(other, one)
        assert (distance == 0) == (one.canonical() == other.canonical())
        seen.add(distance)
    assert len(seen) > 5


@pytest.mark.parametrize(
    ("predicted", "edits"),
    [
        (TREE, 0),
        (OTHER_ORDER, 0),
        (TREE.replace("red", "blue"), 1),
        (TREE.replace("( cat ) ", ""), 1),
        ("( red ( left ( dog ) ) ( right ( cat ) ( dog ) ) )", 2),  # the cat is on the other side
        ("( red ( left ( dog ) ( cat ) ) )", 2),
        ("( red )", 5),
    ],
)
def test_edits_are_counted_by_node(predicted: str, edits: int) -> None:
    assert edit_distance(read_tree(predicted, "one"), read_tree(TREE, "true")) == edits


def test_no_tree_lacks_all_nodes() -> None:
    true = read_tree(TREE, "true")
    assert edit_distance(None, true) == size_of(true) == 6
    assert score_trees([None, true], [true, true]) == (0.5, 3.0, 0.5)
    with pytest.raises(ValueError, match="no trees to score against"):
        score_trees([], [])


def test_the_scorer_reads_texts() -> None:
    scorer = SceneTreeScorer(SceneTreeConfig())
    for hypothesis in (TREE, OTHER_ORDER, "( red ( left", write_tree(Node("blue"))):
        scorer.add_string(TREE, hypothesis)
    assert scorer.score() == 0.5
    assert scorer.result_string() == "exact trees 0.5000, edit distance 3.0000, outputs that parse 0.7500, 4 rows"


def test_a_reference_must_be_a_tree() -> None:
    scorer = SceneTreeScorer(SceneTreeConfig())
    scorer.add_string("dog", TREE)
    with pytest.raises(ValueError, match="reference 1 is 'dog', and no tree; score with --task scene_tree"):
        scorer.scores()
