"""Prefix beam search: against all paths of tiny lattices, and against the loss."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from narvl_plugin.ctc import constrained_outputs, greedy, one_of, prefix_beam_search, query_ctc_loss, sequence_of

BLANK = 2
LABELS = 4


def random_log_probs(seed: int, batch: int = 3, queries: int = 5, labels: int = LABELS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(batch, queries, labels, generator=generator, dtype=torch.float64)).log_softmax(2)


def all_outputs(log_probs: Tensor, collapse_path: Callable[..., tuple[int, ...]]) -> dict[tuple[int, ...], float]:
    """Return the probability of every output of one sample, (N, V)."""
    outputs: dict[tuple[int, ...], float] = defaultdict(float)
    for path in itertools.product(range(log_probs.size(1)), repeat=log_probs.size(0)):
        score = float(log_probs[range(len(path)), path].sum())
        outputs[collapse_path(path, BLANK)] += math.exp(score)
    return outputs


@pytest.mark.parametrize("seed", range(6))
def test_unlimited_it_finds_every_output_with_its_probability(
    seed: int, collapse_path: Callable[..., tuple[int, ...]]
) -> None:
    log_probs = random_log_probs(seed)
    found = prefix_beam_search(log_probs, blank=BLANK, beam_size=400, nbest=400)
    for sample, hypotheses in enumerate(found):
        expected = all_outputs(log_probs[sample], collapse_path)
        assert {tuple(tokens.tolist()) for tokens, _ in hypotheses} == set(expected)
        assert len(hypotheses) == len(expected)
        for tokens, score in hypotheses:
            assert math.exp(score) == pytest.approx(expected[tuple(tokens.tolist())], rel=1e-9)
        scores = [float(score) for _, score in hypotheses]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("seed", range(6))
def test_scores_are_those_of_the_loss(seed: int) -> None:
    log_probs = random_log_probs(seed, queries=6).float()
    for sample, hypotheses in enumerate(prefix_beam_search(log_probs, blank=BLANK, beam_size=500, nbest=5)):
        for tokens, score in hypotheses:
            loss = query_ctc_loss(log_probs[sample, None], tokens[None], torch.tensor([len(tokens)]), blank=BLANK)
            assert float(score) == pytest.approx(-float(loss), abs=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_a_narrow_beam_gives_lower_bounds_of_different_outputs(
    seed: int, collapse_path: Callable[..., tuple[int, ...]]
) -> None:
    log_probs = random_log_probs(seed, queries=6)
    for sample, hypotheses in enumerate(prefix_beam_search(log_probs, blank=BLANK, beam_size=4, nbest=4, top_k=2)):
        expected = all_outputs(log_probs[sample], collapse_path)
        assert len({tuple(tokens.tolist()) for tokens, _ in hypotheses}) == len(hypotheses) == 4
        for tokens, score in hypotheses:
            assert math.exp(score) <= expected[tuple(tokens.tolist())] + 1e-9


def test_an_output_that_left_the_beam_and_comes_back_is_not_there_twice() -> None:
    for seed in range(60):
        log_probs = random_log_probs(seed, batch=8, queries=7)
        for hypotheses in prefix_beam_search(log_probs, blank=BLANK, beam_size=3, nbest=3):
            assert len({tuple(tokens.tolist()) for tokens, _ in hypotheses}) == len(hypotheses)


@pytest.mark.parametrize("seed", range(6))
def test_in_a_language_it_finds_every_output_with_its_probability(
    seed: int, collapse_path: Callable[..., tuple[int, ...]]
) -> None:
    log_probs = random_log_probs(seed)
    constraint = sequence_of([torch.tensor([0, 3]), torch.tensor([1, 3])])
    members = {(0, 1), (0, 3), (3, 1), (3, 3)}
    for sample, hypotheses in enumerate(constrained_outputs(log_probs, constraint, blank=BLANK, beam_size=400).lists()):
        expected = all_outputs(log_probs[sample], collapse_path)
        scores = {tuple(tokens.tolist()): math.exp(score) for tokens, score in hypotheses}
        assert scores == pytest.approx({output: expected[output] for output in members}, rel=1e-9)
        assert list(scores.values()) == sorted(scores.values(), reverse=True)


def test_in_a_language_that_the_beam_misses_the_best_path_decides(
    collapse_path: Callable[..., tuple[int, ...]],
) -> None:
    log_probs = random_log_probs(1, batch=8)
    best = (3, 0, 3)
    found = constrained_outputs(log_probs, one_of([best]), blank=BLANK, beam_size=1, top_k=1).lists()
    for sample, hypotheses in enumerate(found):
        ((tokens, score),) = hypotheses
        assert tuple(tokens.tolist()) == best
        assert math.exp(score) <= all_outputs(log_probs[sample], collapse_path)[best] * (1 + 1e-9)


def test_it_finds_what_greedy_search_misses() -> None:
    """Two queries: 'a' has the paths a-, -a, aa (0.64 in all), nothing has -- (0.36), the best single path."""
    log_probs = torch.tensor([[[0.4, 0.6]] * 2]).log()
    assert greedy(log_probs, blank=1)[0].tokens.tolist() == []
    ((first, second),) = prefix_beam_search(log_probs, blank=1, beam_size=2, nbest=2)
    assert (first.tokens.tolist(), second.tokens.tolist()) == ([0], [])
    assert math.exp(first.score) == pytest.approx(0.64)
    assert math.exp(second.score) == pytest.approx(0.36)


def test_outputs_without_any_probability_are_left_out() -> None:
    log_probs = torch.tensor([[[1.0, 0.0, 0.0]] * 2]).log()
    ((only,),) = prefix_beam_search(log_probs, blank=2, beam_size=5, nbest=5)
    assert (only.tokens.tolist(), float(only.score)) == ([0], 0.0)


def test_no_query_and_no_sample() -> None:
    ((only,),) = prefix_beam_search(torch.zeros(1, 0, 3), blank=0, beam_size=2, nbest=2)
    assert (only.tokens.tolist(), float(only.score)) == ([], 0.0)
    assert prefix_beam_search(torch.zeros(0, 4, 3), blank=0, beam_size=2) == []


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_without_repeated_ngrams_it_finds_all_other_outputs_with_their_probabilities(
    seed: int, size: int, collapse_path: Callable[..., tuple[int, ...]]
) -> None:
    def repeats(tokens: tuple[int, ...]) -> bool:
        ngrams = [tokens[place : place + size] for place in range(len(tokens) - size + 1)]
        return len(set(ngrams)) < len(ngrams)

    log_probs = random_log_probs(seed)
    found = prefix_beam_search(log_probs, blank=BLANK, beam_size=400, nbest=400, no_repeat_ngram=size)
    for sample, hypotheses in enumerate(found):
        outputs = all_outputs(log_probs[sample], collapse_path)
        assert any(repeats(output) for output in outputs)
        expected = {output: probability for output, probability in outputs.items() if not repeats(output)}
        assert {tuple(tokens.tolist()): math.exp(score) for tokens, score in hypotheses} == pytest.approx(expected)


@pytest.mark.parametrize("beam", [1, 3])
def test_no_output_of_a_narrow_beam_repeats_an_ngram(beam: int) -> None:
    log_probs = random_log_probs(1, batch=50, queries=12)
    log_probs[:, :, BLANK] -= 4  # long outputs of three tokens: greedy search repeats bigrams
    for size in (2, 3):
        for hypotheses in prefix_beam_search(log_probs, blank=BLANK, beam_size=beam, nbest=beam, no_repeat_ngram=size):
            for tokens, _ in hypotheses:
                ngrams = [tuple(ngram) for ngram in tokens.unfold(0, size, 1).tolist()] if len(tokens) >= size else []
                assert len(set(ngrams)) == len(ngrams)


@pytest.mark.parametrize("sizes", [{"beam_size": 0}, {"beam_size": 2, "nbest": 0}, {"beam_size": 2, "top_k": 0}])
def test_sizes_below_one_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        prefix_beam_search(torch.zeros(1, 2, 3), blank=0, **sizes)
