"""Trees with children in any order: both losses against the sum over all texts."""

import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from narvl_plugin.ctc import (
    Tree,
    best_path_of,
    language_loss,
    one_of,
    query_ctc_any_loss,
    set_of,
    tree_automaton,
    tree_language,
    tree_loss,
)

LABELS, BLANK = 7, 6

TREES = {
    "nothing": Tree(()),
    "a leaf": Tree((1, 1), after=(2,)),
    "a set with equal elements": Tree((), (Tree((1,)), Tree((2,)), Tree((1,)))),
    "a tree that ends in its children": Tree((4,), (Tree((1,)), Tree((2, 2)))),
    "brackets and commas": Tree(
        (0,), (Tree((1,), (Tree((2,)), Tree((3,))), (4,), (0,)), Tree((2,), (Tree((2,)),), (), (2,))), (), (5,)
    ),
    "equal labels where texts adjoin": Tree((), (Tree((1,), (Tree((1,)), Tree((2,))), (), (1,)), Tree((1, 3))), (3,)),
    "equal subtrees": Tree((5,), (Tree((1,), (Tree((2,)), Tree((3,))), (), (4,)),) * 2, (0,), (5,)),
}


def texts(tree: Tree) -> set[tuple[int, ...]]:
    """Return all texts of a tree, by enumeration."""
    if not tree.children:
        return {tree.before + tree.after}
    found = set()
    for order in itertools.permutations(tree.children):
        for parts in itertools.product(*map(texts, order)):
            said = tree.before + parts[0]
            for part in parts[1:]:
                said += tree.between + part
            found.add(said + tree.after)
    return found


def random_logits(seed: int, batch: int = 1) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(batch, 17, LABELS, dtype=torch.float64, generator=random)).requires_grad_()


@pytest.mark.parametrize("name", TREES)
def test_both_losses_and_their_gradients_are_those_of_all_texts(name: str) -> None:
    tree = TREES[name]
    said = sorted(texts(tree))
    logits = random_logits(len(name))
    targets = torch.nn.utils.rnn.pad_sequence([torch.tensor(text, dtype=torch.int64) for text in said], True)[None]
    lengths = torch.tensor([[len(text) for text in said]])
    expected = query_ctc_any_loss(logits, targets, lengths, blank=BLANK)[0]
    gradient = torch.autograd.grad(expected, logits)[0]
    for loss in (
        language_loss(logits, [tree_automaton(tree)], blank=BLANK),
        tree_loss(logits, [tree], blank=BLANK),
    ):
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], gradient, rtol=0, atol=1e-9)


def test_the_order_of_children_changes_nothing() -> None:
    first, second = Tree((1,), (Tree((2,)), Tree((3,))), (), (4,)), Tree((5,))
    logits = random_logits(0)
    losses = []
    for one, other in ((first, second), (second, first._replace(children=first.children[::-1]))):
        tree = Tree((0,), (one, other), (5,))
        losses += [tree_loss(logits, [tree], blank=BLANK), language_loss(logits, [tree_automaton(tree)], blank=BLANK)]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=0, atol=1e-9)


def test_the_automaton_grows_with_the_depth_and_a_set_is_a_tree_without_brackets() -> None:
    def tower(depth: int) -> Tree:
        children = (tower(depth - 1), Tree((3,))) if depth else ()
        return Tree((1,), children, (), (2,))

    sizes = [len(tree_automaton(tower(depth)).labels) for depth in range(1, 7)]
    assert all(b > 1.9 * a for a, b in itertools.pairwise(sizes))
    elements = [(0, 1), (2,), (3, 3)]
    assert len(tree_automaton(Tree((), tuple(map(Tree, elements)))).labels) == len(set_of(elements).labels)


def test_a_batch_of_trees_and_what_does_not_fit() -> None:
    trees = [TREES["brackets and commas"], TREES["nothing"], Tree((1,) * 10)]
    logits = random_logits(3, 3)
    losses = tree_loss(logits, trees, blank=BLANK, reduction="none")
    alone = [tree_loss(logits[sample : sample + 1], [tree], blank=BLANK) for sample, tree in enumerate(trees)]
    torch.testing.assert_close(losses, torch.stack(alone))
    assert losses.isinf().tolist() == [False, False, True]
    gradient = torch.autograd.grad(losses.sum(), logits)[0]
    assert gradient.isfinite().all() and gradient[2].eq(0).all() and gradient[:2].ne(0).any()
    assert tree_loss(logits[:0], [], blank=BLANK) == 0


@pytest.mark.parametrize(
    ("tree", "complaint"),
    [
        (Tree((), (Tree(()),)), "a node needs tokens before its children"),
        (Tree((), (Tree((1,), (Tree((2,)),)),)), "and after them if it has any"),
        (Tree((BLANK,)), "differ from the blank 6"),
        (Tree((LABELS,)), r"must be in \[0, 7\)"),
    ],
)
def test_errors(tree: Tree, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        tree_loss(random_logits(0), [tree], blank=BLANK)
    with pytest.raises(ValueError, match="1 trees for 2 samples"):
        tree_loss(random_logits(0, 2), [tree], blank=BLANK)


# --- All trees -------------------------------------------------------------------------------------------------------

ROOTS, NODES, LEAVES = [(5,), (6, 7)], [(8,), (9,)], [(10,), (10, 11), (12,)]
OPENING, CLOSING = 3, 4


def all_trees(most: int) -> Iterator[tuple[int, ...]]:
    """Yield all bracketed trees with up to some leaves, by enumeration."""

    def bracketed(label: Sequence[int], *children: tuple[int, ...]) -> tuple[int, ...]:
        return (OPENING, *label, *itertools.chain(*children), CLOSING)

    for root, number in itertools.product(ROOTS, range(len(NODES) + 1)):
        for nodes in itertools.permutations(NODES, number):
            for sizes in itertools.product(range(1, most + 1), repeat=number):
                if sum(sizes) <= most:
                    for leaves in itertools.product(map(bracketed, LEAVES), repeat=sum(sizes)):
                        rest = iter(leaves)
                        below = [
                            bracketed(node, *itertools.islice(rest, size))
                            for node, size in zip(nodes, sizes, strict=True)
                        ]
                        yield bracketed(root, *below)


def test_the_language_of_trees_has_each_tree_and_nothing_else() -> None:
    language = tree_language(ROOTS, NODES, LEAVES, opening=OPENING, closing=CLOSING, most=3)
    expected = set(all_trees(3))
    found: set[tuple[int, ...]] = set()
    waiting = [((), frozenset({0}))]
    arcs = list(zip(*(part.tolist() for part in language[:3]), strict=True))
    for text, states in waiting:  # grows while it is read
        if any(language.accepting[state] for state in states):
            found.add(text)
        following = {label for source, label, _ in arcs if source in states}
        for label in following:
            reached = frozenset(target for source, read, target in arcs if source in states and read == label)
            waiting.append(((*text, label), reached))  # type: ignore[arg-type]
    assert found == expected and len(expected) > 300


def test_the_best_path_to_a_tree_is_one() -> None:
    language = tree_language(ROOTS, NODES, LEAVES, opening=OPENING, closing=CLOSING, most=2)
    log_probs = (2 * torch.randn(6, 16, 13, generator=torch.Generator().manual_seed(1))).log_softmax(2)
    labels = language.best_paths(log_probs, blank=0).labels
    for row, path in zip(log_probs, labels.tolist(), strict=True):
        said = tuple(label for label, _ in itertools.groupby(path) if label)
        assert said in set(all_trees(2))
        targets = [torch.tensor([text]) for text in all_trees(2)]
        best = max(float(best_path_of(row[None], [one_of(target.tolist())], blank=0)[1]) for target in targets)
        assert float(row.gather(1, torch.tensor(path)[:, None]).sum()) == pytest.approx(best, abs=1e-4)
