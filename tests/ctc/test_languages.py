"""The loss over languages: against all paths of tiny lattices, and against the losses that it contains."""

import itertools
import random
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from narvl_plugin.ctc import (
    Automaton,
    PathGraph,
    best_path_of,
    elements_of,
    label_posteriors,
    language_loss,
    one_of,
    path_entropy,
    query_ctc_any_loss,
    query_ctc_loss,
    sequence_of,
    set_of,
)

Collapse = Callable[[tuple[int, ...], int], tuple[int, ...]]
Outputs = set[tuple[int, ...]]
QUERIES, LABELS, BLANK = 5, 4, 3


def random_logits(seed: int, *shape: int) -> Tensor:
    """Return logits in float64."""
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orders(elements: Sequence[Sequence[int]]) -> Outputs:
    """Return what a set of elements may be written as."""
    return {tuple(itertools.chain(*order)) for order in itertools.permutations(elements)}


def paths_into(outputs: Iterable[tuple[int, ...]], collapse_path: Collapse) -> Tensor:
    """Return all paths (P, QUERIES) to some outputs, by enumeration."""
    outputs = set(outputs)
    paths = itertools.product(range(LABELS), repeat=QUERIES)
    return torch.tensor([path for path in paths if collapse_path(path, BLANK) in outputs])


def scores_of(logits: Tensor, paths: Tensor) -> Tensor:
    """Return the log-probabilities of paths, (QUERIES, LABELS), (P, QUERIES) -> (P,)."""
    return logits.log_softmax(1)[torch.arange(len(logits)), paths].sum(1)


LANGUAGES: dict[str, tuple[Automaton, Outputs]] = {
    "a chain": (sequence_of([torch.tensor([one]) for one in (1, 1, 0)]), {(1, 1, 0)}),
    "a trie": (one_of([[0], [0, 0], [1, 0], [1, 2, 0]]), {(0,), (0, 0), (1, 0), (1, 2, 0)}),
    "nothing": (set_of([]), {()}),
    "a set": (set_of([(0, 1), (1,), (2,)]), orders([(0, 1), (1,), (2,)])),
    "a set with a common beginning": (set_of([(0, 1), (0, 2)]), orders([(0, 1), (0, 2)])),
    "equal elements": (set_of([(0,), (0,), (1,)]), orders([(0,), (0,), (1,)])),
    "a window": (set_of([(0,), (1,), (2,)], window=2), orders([(0,), (1,), (2,)]) - {(2, 0, 1), (2, 1, 0), (1, 2, 0)}),
    "any two of three": (elements_of([(0,), (1, 2), (2,)], 2), set()),
    "a loop": (
        Automaton(*map(torch.tensor, ([0, 1], [0, 1], [1, 0])), torch.tensor([True, False])),
        {(), (0, 1), (0, 1, 0, 1)},
    ),
}
LANGUAGES["any two of three"][1].update(
    first + second for first, second in itertools.product([(0,), (1, 2), (2,)], repeat=2)
)


@pytest.mark.parametrize("name", LANGUAGES)
def test_loss_gradient_best_path_posteriors_and_entropy_by_enumeration(name: str, collapse_path: Collapse) -> None:
    automaton, outputs = LANGUAGES[name]
    paths = paths_into(outputs, collapse_path)
    logits = random_logits(len(name), 1, QUERIES, LABELS).requires_grad_()
    loss = language_loss(logits, [automaton], blank=BLANK)
    scores = scores_of(logits[0], paths)
    torch.testing.assert_close(loss, -scores.logsumexp(0), rtol=0, atol=1e-9)
    found, expected = (torch.autograd.grad(each, logits)[0] for each in (loss, -scores.logsumexp(0)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)

    shares = scores.detach().softmax(0)
    labels, best = best_path_of(logits, [automaton], blank=BLANK)
    assert labels[0].tolist() == paths[scores.argmax()].tolist()
    torch.testing.assert_close(best[0], scores.max().detach(), rtol=0, atol=1e-9)
    read, posteriors = label_posteriors(logits, [automaton], blank=BLANK)
    for place, label in enumerate(read[0].tolist()):
        torch.testing.assert_close(posteriors[0, :, place], (shares[:, None] * (paths == label)).sum(0))
    torch.testing.assert_close(path_entropy(logits, [automaton], blank=BLANK)[0], -(shares * shares.log()).sum())


def test_the_gradient_is_that_of_finite_differences() -> None:
    automata = [LANGUAGES[name][0] for name in ("a trie", "a set", "nothing")]
    logits = random_logits(1, 3, QUERIES, LABELS).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: language_loss(x, automata, blank=BLANK, reduction="none"), logits)


ELEMENTS = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple), max_size=4)


def is_code(elements: Sequence[tuple[int, ...]]) -> bool:
    return not any(a != b and b[: len(a)] == a for a, b in itertools.permutations(set(elements), 2))


@given(ELEMENTS.filter(is_code), st.randoms(), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_a_set_is_the_sum_over_its_orders_and_bounds_close_to_it(
    elements: list[tuple[int, ...]], shuffler: random.Random, seed: int
) -> None:
    logits = random_logits(seed, 1, 24, 6)
    whole = language_loss(logits, [set_of(elements)], blank=5)
    spelled = sorted(orders(elements))
    targets = torch.nn.utils.rnn.pad_sequence([torch.tensor(one, dtype=torch.int64) for one in spelled], True)[None]
    lengths = torch.tensor([[len(one) for one in spelled]])
    torch.testing.assert_close(whole, query_ctc_any_loss(logits, targets, lengths, blank=5)[0], rtol=0, atol=1e-9)

    permuted = shuffler.sample(elements, len(elements))
    torch.testing.assert_close(language_loss(logits, [set_of(permuted)], blank=5), whole, rtol=0, atol=1e-9)
    bounds = [language_loss(logits, [set_of(elements, window=w)], blank=5) for w in range(1, len(elements) + 1)]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(bounds)), "a wider window leaves less out"
    if elements:
        torch.testing.assert_close(bounds[-1], whole, rtol=0, atol=1e-9)
        given_order = torch.tensor([list(itertools.chain(*elements))])
        one = query_ctc_loss(logits, given_order, torch.tensor([given_order.size(1)]), blank=5)
        torch.testing.assert_close(bounds[0], one, rtol=0, atol=1e-9)
        assert language_loss(logits, [elements_of(elements, len(elements))], blank=5) <= whole + 1e-9


def test_all_sets_of_a_universe_are_the_well_formed_language() -> None:
    universe = [(0, 3), (1, 3), (2, 3)]
    logits = random_logits(3, 1, 9, 6)
    multisets = itertools.chain.from_iterable(
        itertools.combinations_with_replacement(universe, number) for number in range(4)
    )
    losses = [language_loss(logits, [set_of(chosen)], blank=5) for chosen in multisets]
    language = [language_loss(logits, [elements_of(universe, number)], blank=5) for number in range(4)]
    torch.testing.assert_close((-torch.stack(losses)).logsumexp(0), (-torch.stack(language)).logsumexp(0))


@pytest.mark.parametrize("number", [1, 2, 5, 7])
def test_the_best_order_of_single_tokens_is_the_best_assignment(number: int) -> None:
    logits = random_logits(number, 1, number, number + 1)
    labels, score = best_path_of(logits, [set_of([(token,) for token in range(number)])], blank=number)
    log_probs = logits[0].log_softmax(1).numpy()
    rows, columns = linear_sum_assignment(-log_probs[:, :number])
    assert labels[0].tolist() == columns.tolist()
    assert score.item() == pytest.approx(log_probs[rows, columns].sum(), abs=1e-9)


def test_chains_of_differing_length_equal_query_ctc_in_every_float_type() -> None:
    targets, lengths = torch.tensor([[1, 1, 0], [2, 0, 0], [0, 0, 0]]), torch.tensor([3, 1, 0])
    chains = [
        sequence_of([torch.tensor([one]) for one in row[:length]]) if length else set_of([])
        for row, length in zip(targets.tolist(), lengths.tolist(), strict=True)
    ]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits = random_logits(5, 3, 6, LABELS).to(dtype).requires_grad_()
        losses = language_loss(logits, chains, blank=BLANK, reduction="none")
        expected = query_ctc_loss(logits, targets, lengths, blank=BLANK, reduction="none")
        torch.testing.assert_close(losses, expected)
        assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        found, right = (torch.autograd.grad(each.sum(), logits)[0] for each in (losses, expected))
        assert found.dtype == dtype
        torch.testing.assert_close(found, right)
    assert language_loss(logits, chains, blank=BLANK, reduction="sum") == losses.sum()
    torch.testing.assert_close(language_loss(logits, chains, blank=BLANK), losses.mean())
    assert language_loss(logits[:0], [], blank=BLANK) == 0


def test_what_does_not_fit_has_an_infinite_loss_and_no_gradient() -> None:
    automata = [set_of([(0, 0), (1,)]), set_of([(0,), (1,)]), set_of([])]
    graph = PathGraph.of(automata, blank=BLANK)
    assert graph.least_queries(9).tolist() == [4, 2, 0]
    assert graph.least_queries(1).tolist() == [2, 2, 0]
    logits = random_logits(2, 3, 3, LABELS).requires_grad_()
    losses = language_loss(logits, graph, blank=BLANK, reduction="none")
    assert losses.isinf().tolist() == [True, False, False]
    gradient = torch.autograd.grad(losses.sum(), logits)[0]
    assert gradient[0].eq(0).all() and gradient.isfinite().all() and gradient[1:].ne(0).any()
    _, scores = best_path_of(logits, graph, blank=BLANK)
    assert scores.isinf().tolist() == [True, False, False]
    without_queries = language_loss(logits[:, :0], graph, blank=BLANK, reduction="none")
    assert without_queries.tolist() == [torch.inf, torch.inf, 0.0]


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: set_of([(0, 1), (0,)]), r"the element \[0\] is the beginning of \[0, 1\]"),
        (lambda: set_of([(0,), ()]), "an element is empty"),
        (lambda: set_of([(0,)], window=0), "a window of 0 elements"),
        (lambda: PathGraph.of([set_of([(BLANK,)])], blank=BLANK), "the automaton reads the blank, which is 3"),
        (lambda: language_loss(torch.zeros(2, 3, 4), [set_of([])], blank=BLANK), "1 automata for 2 samples"),
        (lambda: language_loss(torch.zeros(1, 3, 4), [set_of([(9,)])], blank=BLANK), "labels must be in"),
        (lambda: language_loss(torch.zeros(1, 3, 4), [set_of([])], blank=BLANK, reduction="max"), "reduction is 'max'"),
    ],
)
def test_errors(make: Callable[[], object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make()


def test_arcs_double_with_each_element_and_a_window_makes_them_linear() -> None:
    arcs = [len(set_of([(one, one + 20) for one in range(number)]).labels) for number in range(1, 7)]
    assert arcs == [2 * number * 2 ** (number - 1) for number in range(1, 7)]
    windowed = [len(set_of([(one,) for one in range(number)], window=3).labels) for number in (10, 11, 12, 13)]
    steps = {b - a for a, b in itertools.pairwise(windowed)}
    assert len(steps) == 1 and max(windowed) < 13 * 3 * 2**2, windowed
