"""What a search may leave out: no path that costs little, and no log-probability."""

import itertools

import numpy as np
import pytest

from narvl_plugin.ctc.narrowing import ROUNDING, Narrowed, cost_of

QUERIES, LABELS = 7, 3


def draw(seed: int) -> np.ndarray:
    """Return log-probabilities of which half are sure."""
    log_probs = np.random.default_rng(seed).normal(size=(QUERIES, LABELS))
    log_probs[1:5, 2] += 6  # neighbours that agree
    return log_probs


@pytest.mark.parametrize("cost", [0.1, 1.0, 4.0, np.inf])
@pytest.mark.parametrize("seed", range(4))
def test_every_path_of_a_cost_is_a_path_of_groups(seed: int, cost: float) -> None:
    log_probs = draw(seed)
    read = Narrowed.of(log_probs, cost)
    labels = read.cheapest(slice(LABELS), 0, LABELS)
    found = {}
    for path in itertools.product(labels, repeat=len(read.sizes)):
        widened = read.widened(np.array(path))
        found[tuple(widened)] = read.log_probs[np.arange(len(path)), path].sum()
        assert found[tuple(widened)] == pytest.approx(log_probs[np.arange(QUERIES), widened].sum())
    cheap = [
        path
        for path in itertools.product(range(LABELS), repeat=QUERIES)
        if cost_of(log_probs, log_probs[np.arange(QUERIES), path].sum()) <= cost
    ]
    assert cheap and found.keys() >= set(cheap)


def test_neighbours_that_agree_are_read_as_one_query() -> None:
    read = Narrowed.of(draw(1), 0.1)
    assert max(read.sizes) >= 4 and read.sizes.sum() == QUERIES
    assert Narrowed.of(draw(1), np.inf).sizes.tolist() == [1] * QUERIES


def test_the_cheapest_labels_come_in_order_and_within_bounds() -> None:
    read = Narrowed(np.zeros((1, 5)), np.array([1]), np.array([9.0, 3.0, 0.0, 1.0, 2.0]), cost=1.5)
    assert read.cheapest(slice(1, 5), 0, 4).tolist() == [1, 2]
    assert read.cheapest(slice(1, 5), 3, 4).tolist() == [1, 2, 3]
    assert read.cheapest(slice(1, 5), 0, 1).tolist() == [1]


def test_a_path_that_is_impossible_costs_more_than_any_other() -> None:
    log_probs = draw(2)
    assert cost_of(log_probs, -np.inf) == np.inf
    assert cost_of(log_probs, log_probs.max(1).sum()) == pytest.approx(ROUNDING)
