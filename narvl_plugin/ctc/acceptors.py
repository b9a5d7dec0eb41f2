"""Automata of sets: outputs that hold some elements, each of a few tokens, in any order.

A set of K elements is the lattice of its subsets: a state knows which elements have been said, and how much of the next
one. There are 2^K subsets. Nothing smaller is exact: with elements of one token and as many queries, the sum over all
orders is a permanent, which is #P-hard (Valiant, Theoretical Computer Science 8, 1979). A window makes large sets
affordable, and bounds their probability from below; `elements_of` bounds it from above.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from narvl_plugin.ctc.constraints import Automaton

Element = Sequence[int]


class _Shape(NamedTuple):
    """The arcs of an automaton whose tokens are not known yet.

    Attributes:
        sources: (A,), the state that each arc leaves.
        targets: (A,), the state that each arc enters.
        elements: (A,), the number of the element that each arc says.
        places: (A,), the place in it of the arc's token.
        num_states: the number of states.
        end: the state in which an output ends.
    """

    sources: np.ndarray
    targets: np.ndarray
    elements: np.ndarray
    places: np.ndarray
    num_states: int
    end: int

    def with_tokens(self, elements: Sequence[Element]) -> Automaton:
        """Return the automaton of some elements."""
        tokens = np.zeros((len(elements) or 1, max(map(len, elements), default=1)), dtype=np.int64)
        for number, element in enumerate(elements):
            tokens[number, : len(element)] = element
        accepting = np.arange(self.num_states) == self.end
        parts = (self.sources, tokens[self.elements, self.places], self.targets, accepting)
        return Automaton(*map(torch.from_numpy, parts))


def set_of(elements: Sequence[Element], *, window: int | None = None) -> Automaton:
    """Return the automaton of the outputs that say all elements, in any order, and nothing else.

    Equal elements are said as often as they are given. The number of arcs doubles with each element.

    Args:
        elements: K elements, each of one token or more. None is the beginning of another one, so that an output can be
            read in one way only.
        window: allows only orders in which each element is less than `window` places behind the first that is left, in
            the given order. Their probability grows with the window. With 1 it is that of the given order, and with K
            that of all orders. The number of arcs is linear in K, and doubles with each element of the window.

    Returns:
        The automaton; that of the empty output without elements.

    Raises:
        ValueError: for an empty element, one that begins another one, or a window below 1.
    """
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} elements; it must be 1 or more")
    counts = Counter(map(tuple, elements))  # in the order of their first occurrence
    distinct = list(counts)
    _require_code(distinct)
    numbers = {element: number for number, element in enumerate(distinct)}
    order = tuple(numbers[tuple(element)] for element in elements)
    limit = len(order) if window is None else min(window, len(order))
    return _any_order(order, tuple(map(len, distinct)), limit).with_tokens(distinct)


def elements_of(elements: Sequence[Element], number: int) -> Automaton:
    """Return the automaton of the outputs of `number` elements, each any of the given ones, repeated or not.

    Its probability is an upper bound of that of `set_of` as many elements.

    Args:
        elements: see `set_of`; equal elements count once.
        number: the number of elements in an output.

    Raises:
        ValueError: see `set_of`.
    """
    distinct = list(dict.fromkeys(map(tuple, elements)))
    _require_code(distinct)
    return _any_elements(number, tuple(map(len, distinct))).with_tokens(distinct)


def _require_code(distinct: Sequence[tuple[int, ...]]) -> None:
    """Check that no element begins another one."""
    if not all(distinct):
        raise ValueError("an element is empty")
    for first, second in pairwise(sorted(distinct)):
        if second[: len(first)] == first:
            raise ValueError(f"the element {list(first)} is the beginning of {list(second)}")


@lru_cache(maxsize=4096)
def _any_order(order: tuple[int, ...], lengths: tuple[int, ...], window: int) -> _Shape:
    """Return the arcs of all orders of elements within a window.

    Args:
        order: (K,), the number of the distinct element at each place of the given order.
        lengths: the number of tokens of each distinct element.
        window: see `set_of`.
    """
    arcs = _Arcs(lengths)
    # The places that are left are a state. Of equal elements, the first is said first.
    everything = tuple(range(len(order)))
    states = {everything: arcs.new_state()}
    waiting = [everything]
    for left in waiting:  # grows while it is read
        said = set()
        for place in left:
            element = order[place]
            if place >= left[0] + window:
                break
            if element in said:
                continue
            said.add(element)
            after = tuple(other for other in left if other != place)
            if after not in states:
                states[after] = arcs.new_state()
                waiting.append(after)
            arcs.say(element, states[left], states[after])
    return arcs.shape(states[()])


@lru_cache(maxsize=256)
def _any_elements(number: int, lengths: tuple[int, ...]) -> _Shape:
    """Return the arcs of all sequences of a number of elements."""
    arcs = _Arcs(lengths)
    states = [arcs.new_state() for _ in range(number + 1)]
    for source, target in pairwise(states):
        for element in range(len(lengths)):
            arcs.say(element, source, target)
    return arcs.shape(states[-1])


class _Arcs:
    """Collects the arcs of a `_Shape`.

    Args:
        lengths: the number of tokens of each element.
    """

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths
        self.num_states = 0
        self.arcs: list[tuple[int, int, int, int]] = []

    def new_state(self) -> int:
        """Add a state and return its number."""
        self.num_states += 1
        return self.num_states - 1

    def say(self, element: int, source: int, target: int) -> None:
        """Add the arcs that say an element between two states."""
        length = self.lengths[element]
        between = [source, *(self.new_state() for _ in range(length - 1)), target]
        self.arcs += [(*ends, element, place) for place, ends in enumerate(pairwise(between))]

    def shape(self, end: int) -> _Shape:
        """Return the arcs; an output ends in the state `end`."""
        sources, targets, elements, places = np.array(self.arcs, dtype=np.int64).reshape(-1, 4).T
        return _Shape(sources, targets, elements, places, self.num_states, end)
