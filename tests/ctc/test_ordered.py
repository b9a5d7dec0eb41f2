"""The search for ordered elements: among many labels, with few of them tried, and where elements would be equal."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from narvl_plugin.ctc import OrderedTokens, collapse, constrained_search, ordered, sequence_of

BIN_COUNT = 24
BLANK = BIN_COUNT
BOX = sequence_of([torch.arange(BIN_COUNT)] * 4)
EDGES = ((0, 2), (1, 3))


def draw(seed: int, batch: int, queries: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(batch, queries, BIN_COUNT + 1, generator=generator, dtype=torch.float64)).log_softmax(2)


def elements_of(tokens: list[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[place : place + size]) for place in range(0, len(tokens), size)]


def test_the_box_of_four_queries_is_the_best_of_all() -> None:
    """Each query says one edge, so the best path is the best of all boxes whose neighbouring edges differ."""
    boxes = torch.cartesian_prod(*[torch.arange(BIN_COUNT)] * 4)
    x0, y0, x1, y1 = boxes.T
    boxes = boxes[(x0 <= x1) & (y0 <= y1) & (x0 != y0) & (y0 != x1) & (x1 != y1)]
    log_probs = draw(1, 12, 4)
    for row, found in zip(
        log_probs, constrained_search(log_probs, OrderedTokens(BOX, EDGES), blank=BLANK), strict=True
    ):
        scores = row[torch.arange(4), boxes].sum(1)
        assert found.tokens.tolist() == boxes[scores.argmax()].tolist()


def test_labels_that_cost_too_much_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search is the same, however many labels are tried first."""
    constraint = OrderedTokens(BOX, EDGES, (0, 1, 2, 3))
    log_probs = draw(2, 6, 15)
    expected = [found.labels.tolist() for found in constrained_search(log_probs, constraint, blank=BLANK)]
    for tried in (1, 4, BIN_COUNT):
        monkeypatch.setattr(ordered, "FIRST_TRIED", tried)
        found = [path.labels.tolist() for path in constrained_search(log_probs, constraint, blank=BLANK)]
        assert found == expected


def test_a_search_of_a_few_labels_finds_a_valid_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordered, "LABELS_TRIED", 5)
    constraint = OrderedTokens(BOX, EDGES, tuple(range(6)))
    log_probs = draw(3, 6, 25)
    paths = constraint.best_paths(log_probs, blank=BLANK).labels
    tokens, _, lengths = collapse(paths, blank=BLANK)
    assert constraint.accepts(tokens, lengths).all()


@pytest.mark.parametrize("numbers", [(2,), (0, 1, 2, 3), (0, 3)])
def test_no_two_elements_are_equal(numbers: tuple[int, ...]) -> None:
    """All queries prefer the same element, said again and again; the best path has the next best ones instead."""
    pair = sequence_of([torch.arange(3)] * 2)
    constraint = OrderedTokens(pair, ((0, 1),), numbers)
    logits = torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(4))
    logits[:, 0::2, 0] += 5.0
    logits[:, 1::2, 1] += 5.0
    log_probs = logits.log_softmax(2)
    outputs = {}
    for path in itertools.product(range(4), repeat=8):
        tokens = [label for label, _ in itertools.groupby(path) if label != 3]
        said = elements_of(tokens, 2)
        are_different = len(tokens) % 2 == 0 and len(said) in numbers and len(set(said)) == len(said)
        if are_different and all(low <= high for low, high in said):
            outputs[path] = said
    paths = torch.tensor(list(outputs))
    found = constraint.best_paths(log_probs, blank=3).labels
    for row, path in zip(log_probs, found, strict=True):
        best = row[torch.arange(8), paths].sum(1).max()
        assert float(row[torch.arange(8), path].sum()) == pytest.approx(float(best), abs=1e-5)
        assert tuple(path.tolist()) in outputs


def test_numbers_of_elements_and_the_end() -> None:
    constraint = OrderedTokens(BOX, EDGES, (0, 2))
    box, other, crossed = [0, 1, 2, 3], [0, 1, 2, 4], [2, 1, 0, 3]
    cases: list[tuple[list[int], bool]] = [
        ([], True),
        (box, False),
        ([*box, *other], True),
        ([*other, *box], True),
        ([*box, *box], False),
        ([*box, *crossed], False),
        ([*crossed, *box], False),
        ([*box, *other, 5], False),
        ([*box, *other[:3]], False),
        ([*box, *other, *[3, 3, 3, 3]], False),
    ]
    padded = torch.tensor([[*tokens, *[BLANK] * (13 - len(tokens))] for tokens, _ in cases])
    lengths = torch.tensor([len(tokens) for tokens, _ in cases])
    assert constraint.accepts(padded, lengths).tolist() == [valid for _, valid in cases]
    end = BIN_COUNT + 5
    closed = torch.tensor([[*tokens, end, *[BLANK] * (12 - len(tokens))] for tokens, _ in cases])
    assert constraint.ending_in(end).accepts(closed, lengths + 1).tolist() == [valid for _, valid in cases]
    assert not constraint.accepts(closed, lengths + 1).any()
    assert constraint.ending_in(end).alphabet().tolist() == [*range(BIN_COUNT), end]


def test_outputs_of_any_order_are_those_of_an_automaton(collapse_path: Callable[..., tuple[int, ...]]) -> None:
    pair = sequence_of([torch.tensor([1]), torch.tensor([1, 2])])
    automaton = OrderedTokens(pair, ((0, 1),), (0, 2)).ending_in(3).of_any_order()
    every = [tokens for length in range(6) for tokens in itertools.product((1, 2, 3), repeat=length)]
    padded = torch.tensor([[*tokens, *[0] * (5 - len(tokens))] for tokens in every])
    accepted = automaton.accepts(padded, torch.tensor([len(tokens) for tokens in every]))
    pairs = ((1, 1), (1, 2))
    valid = {(), (3,), *((*one, *other, *end) for one in pairs for other in pairs for end in ((), (3,)))}
    assert {tokens for tokens, is_valid in zip(every, accepted.tolist(), strict=True) if is_valid} == valid
