"""Languages: what they accept and their best paths, against all paths of tiny lattices."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from narvl_plugin.ctc import BoxSets, LengthRange, OutputConstraint, constrained_search, sequence_of

BLANK = 0
END = 4


def a_box(tokens: tuple[int, ...]) -> bool:
    are_bins = all(token in (1, 2, 3) for token in tokens)
    return len(tokens) == 4 and are_bins and tokens[0] <= tokens[2] and tokens[1] <= tokens[3]


def one_or_two(tokens: tuple[int, ...]) -> bool:
    return 1 <= len(tokens) <= 2


def two_or_three_then_end(tokens: tuple[int, ...]) -> bool:
    said = tokens[:-1] if tokens and tokens[-1] == END else tokens
    return 2 <= len(said) <= 3 and END not in said


A_BOX = BoxSets.of(first_bin=1, num_bins=3, least=1, most=1)
CASES: list[tuple[OutputConstraint, Callable[[tuple[int, ...]], bool]]] = [
    (A_BOX, a_box),
    (A_BOX.ending_in(END), lambda tokens: a_box(tokens[:4]) and tokens[4:] in ((), (END,))),
    (BoxSets.of(first_bin=1, num_bins=3, most=1), lambda tokens: not tokens or a_box(tokens)),
    (LengthRange(1, 2), one_or_two),
    (LengthRange(5, 9), lambda tokens: len(tokens) >= 5),
    (LengthRange(2, 3).ending_in(END), two_or_three_then_end),
]


def random_log_probs(seed: int, queries: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(2, queries, 5, generator=generator, dtype=torch.float64)).log_softmax(2)


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("queries", [5, 6])
def test_the_best_path_is_the_best_of_all_and_the_score_a_sum(
    case: int, queries: int, collapse_path: Callable[..., tuple[int, ...]]
) -> None:
    constraint, contains = CASES[case]
    outputs = {
        path: tokens
        for path in itertools.product(range(5), repeat=queries)
        if contains(tokens := collapse_path(path, BLANK))
    }
    paths = torch.tensor(list(outputs))
    for seed in range(8):
        log_probs = random_log_probs(seed, queries)
        for sample, found in enumerate(constrained_search(log_probs, constraint, blank=BLANK)):
            scores = log_probs[sample, torch.arange(queries), paths].sum(1)
            best = outputs[tuple(paths[scores.argmax()].tolist())]
            assert tuple(found.tokens.tolist()) == best
            same = torch.tensor([tokens == best for tokens in outputs.values()])
            assert float(found.score) == pytest.approx(float(scores[same].logsumexp(0)), abs=1e-9)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_it_accepts_what_it_contains(case: int) -> None:
    constraint, contains = CASES[case]
    every = [tokens for length in range(6) for tokens in itertools.product(range(1, 5), repeat=length)]
    padded = torch.tensor([[*tokens, *[END] * (6 - len(tokens))] for tokens in every])
    accepted = constraint.accepts(padded, torch.tensor([len(tokens) for tokens in every]))
    assert accepted.tolist() == [contains(tokens) for tokens in every]


def test_edges_of_a_thousand_bins_come_in_order() -> None:
    log_probs = torch.randn(6, 7, 1001, generator=torch.Generator().manual_seed(1)).log_softmax(2)
    boxes = BoxSets.of(first_bin=0, num_bins=1000, least=1, most=1)
    outputs = [found.tokens.tolist() for found in constrained_search(log_probs, boxes, blank=1000)]
    assert all(x0 <= x1 and y0 <= y1 for x0, y0, x1, y1 in outputs)


def test_a_length_of_a_large_vocabulary_is_searched_exactly() -> None:
    """The labels of the best runs are enough: against the automaton of all labels."""
    log_probs = (2 * torch.randn(3, 6, 40, generator=torch.Generator().manual_seed(2))).log_softmax(2)
    for length in (1, 2, 3):
        whole = sequence_of([torch.arange(1, 40)] * length)
        for found, expected in zip(
            constrained_search(log_probs, LengthRange(length, length), blank=BLANK),
            constrained_search(log_probs, whole, blank=BLANK),
            strict=True,
        ):
            assert found.tokens.tolist() == expected.tokens.tolist()


def test_a_label_may_have_to_differ_from_both_neighbours() -> None:
    """Of the second query's labels the third best is on the best path, since the others are said beside it."""
    probabilities = torch.tensor(
        [[0.02, 0.9, 0.05, 0.02, 0.01], [0.01, 0.4, 0.38, 0.2, 0.01], [0.02, 0.05, 0.9, 0.02, 0.01]]
    )
    (found,) = constrained_search(probabilities.log()[None], LengthRange(3, 3), blank=BLANK)
    assert found.tokens.tolist() == [1, 3, 2]


@pytest.mark.parametrize("constraint", [LengthRange(7, 9), A_BOX])
def test_too_few_queries_for_any_output(constraint: OutputConstraint) -> None:
    log_probs = torch.zeros(1, 3, 5).log_softmax(2)
    with pytest.raises(ValueError, match="3 queries have no path"):
        constrained_search(log_probs, constraint, blank=BLANK)


def test_all_paths_equally_probable_are_no_endless_search() -> None:
    boxes = BoxSets.of(first_bin=0, num_bins=1000, least=1, most=1)
    log_probs = torch.zeros(1, 7, 1001).log_softmax(2)
    x0, y0, x1, y1 = constrained_search(log_probs, boxes, blank=1000)[0].tokens.tolist()
    assert x0 <= x1
    assert y0 <= y1
