"""Exact searches among few labels and queries.

A path that costs at most C nats more than the path of the most probable labels has, at each query, a label that costs
at most C. So the best path among those labels is the best of all, if it costs at most C. If it costs more, a second
search among the labels of that cost is exact.

Most queries of a trained student have one such label, and mostly the blank. Neighbours with the same one are read as
one query: nothing follows from how often a label is repeated.

Legend: N queries, M groups of neighbouring queries, L labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

FIRST_COST = 1.0
"""Cost of a path, in nats, up to which a search looks first."""
ROUNDING = 1e-3
"""Largest error of a path's log-probability, in nats."""


class Narrowed(NamedTuple):
    """What a search reads of a sample.

    Attributes:
        log_probs: (M, L), the log-probability that all queries of a group have a label.
        sizes: (M,), the number of queries of each group.
        costs: (L,), the least that a path with the label costs; at most `cost` for labels that may be on a path.
        cost: the greatest cost of a path that the search is exact for.
    """

    log_probs: np.ndarray
    sizes: np.ndarray
    costs: np.ndarray
    cost: float

    @classmethod
    def of(cls, log_probs: np.ndarray, cost: float) -> Narrowed:
        """Leave out what no path of some cost has: (N, L)."""
        costs = log_probs.max(1, keepdims=True) - log_probs
        near = costs <= cost
        label = np.where(near.sum(1) == 1, near.argmax(1), -1)  # the only one, or -1
        begins = np.append(True, (label[1:] != label[:-1]) | (label[1:] < 0))
        starts = begins.nonzero()[0]
        sizes = np.diff(np.append(starts, len(log_probs)))
        return cls(np.add.reduceat(log_probs, starts), sizes, costs.min(0), cost)

    def cheapest(self, labels: slice, least: int, most: int) -> np.ndarray:
        """Return the labels of a range that may be on a path, in order: from `least` to `most` of the cheapest."""
        costs = self.costs[labels]
        number = min(max(int((costs <= self.cost).sum()), least), most)
        return np.sort(costs.argsort(kind="stable")[:number])

    def widened(self, path: np.ndarray) -> np.ndarray:
        """Return the path (N,) of a path of groups (M,)."""
        return np.repeat(path, self.sizes)


Search = Callable[[Narrowed], tuple[list[int], float]]
"""Maps what is read to the best path of groups and its log-probability, or to any path and -inf."""


def search_narrowly(log_probs: np.ndarray, search: Search) -> tuple[list[int], float]:
    """Return the best path of a search (N labels) and its log-probability, or any path and -inf: (N, L)."""
    read = Narrowed.of(log_probs, FIRST_COST)
    path, score = search(read)
    cost = cost_of(log_probs, score)
    if cost > FIRST_COST:
        read = Narrowed.of(log_probs, cost)
        path, score = search(read)
    return read.widened(np.array(path)).tolist(), score


def cost_of(log_probs: np.ndarray, score: float) -> float:
    """Return what a path of some log-probability costs, and a little more: (N, L)."""
    return float(log_probs.max(1).sum()) - score + ROUNDING
