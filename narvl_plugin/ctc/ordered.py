"""Outputs of one or several elements with ordered tokens, such as boxes, and the most probable path to one of them.

Legend: B batch, N queries, V labels, T tokens of an output, K elements of the longest output, M tokens of an element.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, count, groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from narvl_plugin.ctc.collapse import Paths
from narvl_plugin.ctc.constraints import NEVER, Automaton, Emissions, no_path
from narvl_plugin.ctc.narrowing import Narrowed, search_narrowly

FIRST_TRIED = 8
"""Least number of labels that a search tries."""
LABELS_TRIED = 128
"""Largest number of labels that a search tries; it bounds time and memory, which are quadratic in it."""


@dataclass(frozen=True, eq=False)
class OrderedTokens:
    """The outputs of one or several elements, in which certain tokens are in order. No two elements are equal.

    Attributes:
        automaton: the automaton of one element, from `sequence_of`.
        pairs: pairs of places in an element, from 0; the first token must not exceed the second. ((0, 2), (1, 3))
            orders a box. A place is in one pair at most.
        numbers: the numbers of elements that an output may have.
        end: a label that may come last, and is no token of an element; None for no such label.
    """

    automaton: Automaton
    pairs: tuple[tuple[int, int], ...]
    numbers: tuple[int, ...] = (1,)
    end: int | None = None

    def to(self, device: torch.device) -> OrderedTokens:
        """Return the same constraint on another device."""
        if self.automaton.labels.device == device:
            return self
        there = replace(self, automaton=self.automaton.to(device))
        vars(there)["_allowed"] = self._allowed.to(device, non_blocking=True)
        return there

    def ending_in(self, label: int) -> OrderedTokens:
        """Return the constraint that also accepts each valid output followed by `label`, which is no token of it."""
        return replace(self, end=label)

    def alphabet(self) -> Tensor:
        """Return the distinct labels of the valid outputs."""
        return self.of_any_order().alphabet()

    @property
    def size(self) -> int:
        """The number of tokens of an element."""
        return len(self.automaton.accepting) - 1

    def of_any_order(self) -> Automaton:
        """Return the automaton of the outputs whose tokens may be out of order, and whose elements may be equal."""
        sources, labels, targets, _ = self.automaton
        shifts = torch.arange(max(self.numbers))[:, None] * self.size
        accepting = torch.zeros(max(self.numbers) * self.size + 1, dtype=torch.bool)
        accepting[torch.tensor(self.numbers) * self.size] = True
        whole = Automaton(
            (sources + shifts).flatten(), labels.repeat(len(shifts)), (targets + shifts).flatten(), accepting
        )
        return whole if self.end is None else whole.ending_in(self.end)

    @cached_property
    def _allowed(self) -> Tensor:
        """(M, labels) bool, the labels of each place of an element; the last label is none of them."""
        sources, labels, _, _ = self.automaton
        allowed = torch.zeros(self.size, int(labels.max()) + 2, dtype=torch.bool)
        allowed[sources, labels] = True
        return allowed

    def accepts(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Tell which outputs are valid: (B, T), (B,) -> (B,) bool."""
        size, most = self.size, max(self.numbers)
        if self.end is not None and tokens.size(1):
            last = tokens.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
            lengths = lengths - ((lengths > 0) & (last == self.end)).long()
        numbers = torch.zeros_like(lengths, dtype=torch.bool)
        for number in self.numbers:
            numbers = numbers | (lengths == number * size)
        elements = F.pad(tokens, (0, most * size - tokens.size(1))).unflatten(1, (most, size))  # (B, K, M)
        is_there = torch.arange(1, most + 1, device=tokens.device) * size <= lengths[:, None]  # (B, K)
        places = torch.arange(size, device=tokens.device)
        good = self._allowed[places, elements.clamp(max=self._allowed.size(1) - 1)].all(2)
        for first, second in self.pairs:
            good = good & (elements[..., first] <= elements[..., second])
        equal = (elements[:, :, None] == elements[:, None]).all(3) & is_there[:, None]
        twice = equal.tril(-1).any(2)  # equal to an earlier element
        return numbers & (good & ~twice | ~is_there).all(1)

    def best_paths(self, log_probs: Tensor, *, blank: int) -> Paths:
        """Return each sample's most probable path to a valid output; see `OutputConstraint.best_paths`.

        Dynamic programming knows the tokens that later ones are compared with. With the two pairs of a box, it takes
        O(N K V^2) operations. So it reads only what can be on the best path, see `narvl_plugin.ctc.narrowing`. It is
        exact unless that is more than `LABELS_TRIED` labels.

        If two elements are equal, a token of one is another token in every valid output. The outputs with the best path
        are searched next, so the first valid path is best.

        Args:
            log_probs: (B, N, V), on any device.
            blank: the label of the blank.

        Returns:
            The paths, on the CPU.

        Raises:
            ValueError: if a sample has no such path.
        """
        # Numbers keep the order of the labels. The end follows them, and the blank is last.
        vocabulary, numbers = self.automaton.labels.unique(return_inverse=True)
        ends = vocabulary.new_tensor([] if self.end is None else [self.end])
        read = Emissions.of(log_probs, torch.cat([vocabulary, ends]).expand(len(log_probs), -1), blank=blank)
        allowed = np.zeros((max(self.numbers), self.size, len(vocabulary)), dtype=bool)
        allowed[:, self.automaton.sources.numpy(), numbers.numpy()] = True
        paths = [self._best_path(row, allowed) for row in read.log_probs.numpy()]
        return read.paths(torch.tensor(paths).reshape(len(paths), -1))

    def _best_path(self, log_probs: np.ndarray, allowed: np.ndarray) -> list[int]:
        """Find one sample's best path: (N, V + 1 or 2), (K, M, V) -> N labels."""
        num_labels = allowed.shape[2]
        form = _Form(self.pairs, self.numbers, self.size)
        parts: list[tuple[float, int, list[int], np.ndarray]] = []
        number = count()

        def add(allowed: np.ndarray) -> None:
            path, score = form.best_path(log_probs, allowed)
            if score > NEVER:
                heapq.heappush(parts, (-score, next(number), path, allowed))

        add(allowed)
        while parts:
            *_, path, allowed = heapq.heappop(parts)
            tokens = [label for label, _ in groupby(path) if label < num_labels]
            elements = [tokens[place : place + self.size] for place in range(0, len(tokens), self.size)]
            pairs = combinations(range(len(elements)), 2)
            equal = next((pair for pair in pairs if elements[pair[0]] == elements[pair[1]]), None)
            if equal is None:
                return path
            for element in equal:
                for place, token in enumerate(elements[element]):
                    fewer = allowed.copy()
                    fewer[element, place, token] = False
                    add(fewer)
        raise no_path(torch.from_numpy(log_probs)[None])


class _Form:
    """The places of an element, and the tokens that a search remembers at each.

    Attributes:
        numbers: the numbers of elements that an output may have.
        size: the number of tokens of an element.
        first_of: by the second place of a pair, the first.
        open: for each place, the earlier places whose tokens are compared with later ones than this place's.
        known: for each place, the places whose tokens are known after it, until the next token is read.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], numbers: Sequence[int], size: int) -> None:
        self.numbers = np.array(numbers)
        self.size = size
        self.first_of = {second: first for first, second in pairs}
        second_of = dict(pairs)
        self.open = [[one for one in range(place) if second_of.get(one, 0) > place] for place in range(size)]
        self.known = [
            [*self.open[place], place] if second_of.get(place, 0) > place else self.open[place] for place in range(size)
        ]

    def best_path(self, log_probs: np.ndarray, allowed: np.ndarray) -> tuple[list[int], float]:
        """Return the most probable path to an output whose elements may be equal: (N, V + 1 or 2), (K, M, V).

        Returns:
            N labels, and the log-probability; -inf, and any labels, if there is no path.
        """
        num_labels = allowed.shape[2]

        def search(read: Narrowed) -> tuple[list[int], float]:
            labels = read.cheapest(slice(num_labels), FIRST_TRIED, LABELS_TRIED)
            names = np.concatenate([labels, np.arange(num_labels, log_probs.shape[1])])
            path, score = _Search(self, read.log_probs[:, names], allowed[:, :, labels]).best_path()
            return names[path].tolist(), score

        return search_narrowly(log_probs, search)


class _Scores(NamedTuple):
    """The scores of the best paths before a query.

    Attributes:
        labels: for each place, (K, V, ..., V), of the paths that end in a label: its axes are the element, the tokens
            of the places that are open, and the label.
        blanks: for each place but the first, (K, V, ..., V), of the paths that end in a blank after the place before:
            its axes are the element, and the tokens that are known.
        between: (K + 1,), of the paths that end in a blank after whole elements, or are empty.
    """

    labels: list[np.ndarray]
    blanks: list[np.ndarray]
    between: np.ndarray


class _Search:
    """A search for the best path among all labels.

    Args:
        form: the places of an element.
        log_probs: (N, V + 1 or 2), of the labels, of the end if there is one, and of the blank.
        allowed: (K, M, V) bool.
    """

    def __init__(self, form: _Form, log_probs: np.ndarray, allowed: np.ndarray) -> None:
        self.form = form
        self.log_probs = log_probs
        self.num_elements, _, self.num_labels = allowed.shape
        self.blank = log_probs.shape[1] - 1
        closed = np.where(allowed, 0.0, NEVER).astype(log_probs.dtype)
        shape = self.num_elements, self.num_labels
        self.closed = [
            closed[:, place].reshape(shape[0], *[1] * len(form.open[place]), shape[1]) for place in range(form.size)
        ]

    def best_path(self) -> tuple[list[int], float]:
        """Return the labels of the N queries, and the log-probability; -inf, and any labels, if there is no path."""
        scores = [self._nothing_said()]
        for row in self.log_probs:
            scores.append(self._read(scores[-1], row))
        queries = len(self.log_probs)
        (score, number), stop, tail = self._whole(scores[-1]), queries, list[int]()
        if self.blank > self.num_labels:
            rest, blanks, ended = list[int](), 0.0, NEVER
            for query in reversed(range(queries)):
                if ended < blanks:
                    rest = [self.blank] * len(rest)
                rest.append(self.num_labels)
                ended = max(ended, blanks) + self.log_probs[query, self.num_labels]
                blanks += self.log_probs[query, self.blank]
                before, whole = self._whole(scores[query])
                if before + ended > score:
                    score, number, stop, tail = before + ended, whole, query, rest[::-1]
        return self._trace(scores[: stop + 1], number) + tail, float(score)

    def _nothing_said(self) -> _Scores:
        """Return the scores before the first query: only the empty path is possible."""
        dtype = self.log_probs.dtype

        def never(axes: int) -> np.ndarray:
            return np.full((self.num_elements, *[self.num_labels] * axes), NEVER, dtype)

        between = np.full(self.num_elements + 1, NEVER, dtype)
        between[0] = 0.0
        places = range(self.form.size)
        return _Scores(
            [never(len(self.form.open[place]) + 1) for place in places],
            [never(len(self.form.known[place])) for place in places[:-1]],
            between,
        )

    def _read(self, before: _Scores, row: np.ndarray) -> _Scores:
        """Return the scores after a query, (V + 1 or 2,)."""
        last = before.labels[-1]  # (K, V): the last token of an element is compared with none
        begin = np.repeat(before.between[:-1, None], self.num_labels, axis=1)
        begin[1:] = np.maximum(begin[1:], best_of_others(last[:-1]))
        ways = [begin, *(self._arrive(before, place) for place in range(1, self.form.size))]
        labels = [
            np.maximum(stay, way) + closed + row[: self.num_labels]
            for stay, way, closed in zip(before.labels, ways, self.closed, strict=True)
        ]
        blanks = [
            np.maximum(stay, said if place in self.form.known[place] else said.max(-1)) + row[self.blank]
            for place, (stay, said) in enumerate(zip(before.blanks, before.labels, strict=False))
        ]
        between = before.between + row[self.blank]
        between[1:] = np.maximum(before.between[1:], last.max(1)) + row[self.blank]
        return _Scores(labels, blanks, between)

    def _arrive(self, before: _Scores, place: int) -> np.ndarray:
        """Return the best scores of paths that may read a label at a place next, (K, V, ..., V)."""
        said, blank = before.labels[place - 1], before.blanks[place - 1]
        known, opened = self.form.known[place - 1], self.form.open[place - 1]
        same = np.arange(self.num_labels)
        if place not in self.form.first_of:
            after_blank = blank[..., None]
            if place - 1 not in known:
                return np.maximum(after_blank, best_of_others(said))
            ways = np.repeat(said[..., None], self.num_labels, axis=-1)
            ways[..., same, same] = NEVER  # equal labels at neighbouring queries would merge
            return np.maximum(after_blank, ways)
        first = self.form.first_of[place]
        after_blank = np.maximum.accumulate(np.moveaxis(blank, 1 + known.index(first), -1), axis=-1)
        if first == place - 1:
            ways = np.full(said.shape, NEVER, said.dtype)
            ways[..., 1:] = np.maximum.accumulate(said, axis=-1)[..., :-1]
            return np.maximum(after_blank, ways)
        # The axes of the first token and of the label before, whose place may be open or not.
        ways = np.maximum.accumulate(np.moveaxis(said, 1 + opened.index(first), -1), axis=-1)
        ways[..., same, same] = NEVER
        return np.maximum(after_blank, ways if place - 1 in known else ways.max(-2))

    def _whole(self, scores: _Scores) -> tuple[float, int]:
        """Return the score of the best path to a whole output, and its number of elements."""
        ends = scores.between.copy()
        ends[1:] = np.maximum(ends[1:], scores.labels[-1].max(1))
        numbers = self.form.numbers
        best = int(numbers[ends[numbers].argmax()])
        return float(ends[best]), best

    def _trace(self, scores: list[_Scores], number: int) -> list[int]:
        """Return the best path to an output of some elements, given the scores before each query and after the last."""
        cell = _best_of(self._ends_of_elements(scores[-1], number))
        path = []
        for before in reversed(scores[:-1]):
            path.append(cell.label)
            cell = _best_of(self._origins(before, cell))
        return path[::-1]

    def _ends_of_elements(self, scores: _Scores, number: int, other_than: int = -1) -> list[tuple[float, _Cell]]:
        """Return the best paths to some whole elements, with and without a blank after them.

        Args:
            scores: the scores.
            number: the number of elements.
            other_than: a label that is not their last.
        """
        found = [(float(scores.between[number]), _Cell(self.blank, number, -1, {}))]
        if number:
            found.append(self._best_label(scores, number - 1, self.form.size - 1, {}, other_than=other_than))
        return found

    def _origins(self, before: _Scores, cell: _Cell) -> list[tuple[float, _Cell]]:
        """Return the best paths before a query that may lead to a cell, with their scores."""
        label, element, place, tokens = cell
        if label == self.blank and place < 0:
            return self._ends_of_elements(before, element)
        if label == self.blank:
            said = {known: tokens[known] for known in self.form.known[place]}
            index = (element, *said.values())
            return [(float(before.blanks[place][index]), cell), self._best_label(before, element, place, said)]
        index = (element, *(tokens[known] for known in self.form.open[place]), label)
        stay = float(before.labels[place][index]), cell
        if place == 0:
            return [stay, *self._ends_of_elements(before, element, other_than=label)]
        first = self.form.first_of.get(place, -1)
        said = {known: tokens[known] for known in self.form.known[place - 1] if known != first}
        most = {first: label}
        blank = self._best(before.blanks[place - 1], element, self.form.known[place - 1], said, most)
        after = self._best_label(before, element, place - 1, said, most, other_than=label)
        return [stay, (blank[0], _Cell(self.blank, element, place - 1, blank[1])), after]

    def _best_label(
        self,
        scores: _Scores,
        element: int,
        place: int,
        tokens: Mapping[int, int],
        most: Mapping[int, int] | None = None,
        other_than: int = -1,
    ) -> tuple[float, _Cell]:
        """Return the best path to a label at a place, given the tokens of some places; see `_best`."""
        places = [*self.form.open[place], place]
        score, found = self._best(scores.labels[place], element, places, tokens, most or {}, other_than)
        return score, _Cell(found[place], element, place, found)

    @staticmethod
    def _best(
        scores: np.ndarray,
        element: int,
        places: Sequence[int],
        tokens: Mapping[int, int],
        most: Mapping[int, int],
        other_than: int = -1,
    ) -> tuple[float, dict[int, int]]:
        """Return the best score of an element, and the tokens of its axes.

        Args:
            scores: (K, V, ..., V).
            element: the element.
            places: the places of the other axes.
            tokens: tokens that are given, by place.
            most: the largest token of other places.
            other_than: a label that is not that of the last axis.
        """
        index = [tokens.get(place, slice(most[place] + 1 if place in most else None)) for place in places]
        chosen = scores[(element, *index)]
        free = [place for place in places if place not in tokens]
        if other_than >= 0 and places[-1] in free:
            chosen = chosen.copy()
            if other_than < chosen.shape[-1]:
                chosen[..., other_than] = NEVER
        elif other_than >= 0 and tokens[places[-1]] == other_than:
            chosen = np.full_like(chosen, NEVER)
        where = np.unravel_index(chosen.argmax(), chosen.shape)
        found = {**tokens, **dict(zip(free, map(int, where), strict=True))}
        return float(chosen[where]), {place: found[place] for place in places}


class _Cell(NamedTuple):
    """The end of a path: a label or a blank.

    Attributes:
        label: the label.
        element: the element of the label, or of the last token before the blank; the number of elements before a blank
            between two.
        place: the place in the element; -1 for a blank between elements.
        tokens: the tokens that are known, by place.
    """

    label: int
    element: int
    place: int
    tokens: dict[int, int]


def _best_of(cells: Sequence[tuple[float, _Cell]]) -> _Cell:
    """Return the cell of the highest score."""
    return max(cells, key=lambda pair: pair[0])[1]


def best_of_others(scores: np.ndarray) -> np.ndarray:
    """Return the highest score of the other entries along the last axis, for each entry: (..., V) -> (..., V)."""
    best = scores.argmax(-1)[..., None]
    others = scores.copy()
    np.put_along_axis(others, best, NEVER, axis=-1)
    found = np.repeat(scores.max(-1, keepdims=True), scores.shape[-1], axis=-1)
    np.put_along_axis(found, best, others.max(-1, keepdims=True), axis=-1)
    return found
