"""Outputs that are sets of boxes, with or without names, and the most probable path to one of them.

An element of a set is a box, or alternates names of closed lists and boxes. A triplet of a scene graph is such an
element: a noun, its box, a relation and a noun, the box of that noun.

Legend: B batch, N queries, V labels, T tokens of an output, W tokens of a name, K elements of the longest output, P
parts of an element, each a box that may have a name, H = K P parts of the longest output, A arcs of a trie, U labels of
coordinates, L + 1 labels that a search reads, the blank last.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from itertools import combinations, count, groupby
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from narvl_plugin.ctc.collapse import Paths
from narvl_plugin.ctc.constraints import NEVER, Automaton, Emissions, no_path, one_of, sequence_of
from narvl_plugin.ctc.narrowing import Narrowed, search_narrowly

FIRST_TRIED = 8
"""Least number of coordinates that a search tries."""
PAIRS_TRIED = 32_768
"""Largest number of pairs of coordinates, in all parts together, that a search tries; it bounds time and memory."""
EDGES = 4
"""Number of tokens of a box: its left, upper, right and lower edge."""
IN_ORDER = ((0, 2), (1, 3))
"""Pairs of edges of which the first must not exceed the second."""

Part = tuple[tuple[int, ...], tuple[int, ...]]
"""The tokens of a name, of which there may be none, and those of a box."""


class Parts(NamedTuple):
    """The parts of outputs.

    Attributes:
        names: (B, H, W), the first tokens of the name of each part; -1 on padding.
        boxes: (B, H, 4), the coordinates of each box, from 0; 0 on padding.
        numbers: (B,), the number of parts.
        whole: (B,), whether the output is whole parts, at most H.
    """

    names: Tensor
    boxes: Tensor
    numbers: Tensor
    whole: Tensor


def split(tokens: Tensor, lengths: Tensor, *, bins: tuple[int, int], most: int, width: int) -> Parts:
    """Split outputs into parts, each a name of any tokens and a box of four coordinates.

    Args:
        tokens: (B, T).
        lengths: (B,).
        bins: the label of the first coordinate, and the number of coordinates.
        most: the greatest number of parts H.
        width: the number of tokens W of a name to return.
    """
    batch, length = tokens.shape
    places = torch.arange(length, device=tokens.device).expand(batch, -1)
    is_said = places < lengths[:, None]
    is_bin = (tokens >= bins[0]) & (tokens < sum(bins)) & is_said
    is_name = is_said & ~is_bin
    begins = is_name & torch.cat([is_name.new_ones(batch, 1), is_bin], 1)[:, :-1]
    part = begins.cumsum(1) - 1
    numbers = begins.sum(1)
    place_in_name = places - torch.where(begins, places, 0).cummax(1).values if length else places
    edge = places - 1 - torch.where(is_bin, -1, places).cummax(1).values if length else places
    fits = (part >= 0) & (part < most)

    def gathered(where: Tensor, place: Tensor, values: Tensor, width: int, padding: int) -> Tensor:
        """Return the values by part and place, (B, H, width)."""
        index = torch.where(where & fits & (place < width), part * width + place, most * width)
        found = tokens.new_full((batch, most * width + 1), padding)
        return found.scatter(1, index, values)[:, :-1].unflatten(1, (most, width))

    names = gathered(is_name, place_in_name, tokens, width, -1)
    boxes = gathered(is_bin, edge, tokens - bins[0], EDGES, 0)
    # A run of coordinates follows each name, and none comes first, so equal numbers of all are four of each.
    last = is_bin & torch.cat([~is_bin, is_bin.new_ones(batch, 1)], 1)[:, 1:]
    whole = (last & (edge == EDGES - 1)).sum(1) == numbers
    whole = whole & (last.sum(1) == numbers) & (part >= 0).logical_or(~is_said).all(1) & (numbers <= most)
    return Parts(names, boxes, numbers, whole)


class BoxSets(NamedTuple):
    """The outputs of some elements, all different. An element is a box, or P times a name and a box.

    The left edge of a box is at most the right one, and the upper edge at most the lower one.

    Attributes:
        names: for each part of an element, the trie of its names; none for boxes without names.
        elements: the automaton of any number of elements whose boxes may have any edges, which it reads as `first_bin`.
        first_bin: the label of the first coordinate; those of the others follow.
        num_bins: the number of coordinates.
        least: the least number of elements.
        most: the greatest number of elements K.
        longest_name: the number of tokens of the longest name.
        end: a label that may come last, and is no token of an element; None for no such label.
    """

    names: tuple[Automaton, ...]
    elements: Automaton
    first_bin: int
    num_bins: int
    least: int
    most: int
    longest_name: int
    end: int | None = None

    @classmethod
    def of(
        cls, names: Sequence[Sequence[Sequence[int]]] = (), *, first_bin: int, num_bins: int, least: int = 0, most: int
    ) -> BoxSets:
        """Return the constraint of lists of names.

        Args:
            names: for each part of an element, the tokens of its names, which are no coordinates. By default, an
                element is a box without a name.
            first_bin: see the class.
            num_bins: see the class.
            least: see the class.
            most: see the class.
        """
        tries = tuple(one_of(listed) for listed in names)
        elements = _cycle(tries or [one_of([()])], first_bin)
        longest = max((len(name) for listed in names for name in listed), default=0)
        return cls(tries, elements, first_bin, num_bins, least, most, longest)

    @property
    def size(self) -> int:
        """The number of parts P of an element."""
        return max(1, len(self.names))

    def to(self, device: torch.device) -> BoxSets:
        """Return the same constraint on another device; one without names holds no tensors that are read there."""
        if not self.names:
            return self
        return self._replace(names=tuple(trie.to(device) for trie in self.names), elements=self.elements.to(device))

    def ending_in(self, label: int) -> BoxSets:
        """Return the constraint that also accepts each valid output followed by `label`, which is no token of it."""
        return self._replace(elements=self.elements.ending_in(label), end=label)

    def alphabet(self) -> Tensor:
        """Return the distinct labels of the valid outputs."""
        bins = torch.arange(self.first_bin, self.first_bin + self.num_bins, device=self.elements.labels.device)
        return torch.cat([self.elements.labels, bins]).unique()

    def boxes_of_any_edges(self) -> Automaton:
        """Return the automaton of boxes without names, whose edges may be out of order, and which may be equal."""
        bins = torch.arange(self.first_bin, self.first_bin + self.num_bins)
        automaton = sequence_of([bins] * (EDGES * self.most))
        automaton.accepting[self.least * EDGES :: EDGES] = True
        return automaton if self.end is None else automaton.ending_in(self.end)

    def accepts(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Tell which outputs are valid: (B, T), (B,) -> (B,) bool."""
        if self.end is not None:
            place = torch.arange(tokens.size(1), device=tokens.device)
            is_last = place == lengths[:, None] - 1
            lengths = lengths - (is_last & (tokens == self.end)).sum(1)
        names, boxes, numbers, accepted = self.parts(tokens, lengths)
        if self.names:
            is_bin = (tokens >= self.first_bin) & (tokens < self.first_bin + self.num_bins)
            accepted = accepted & self.elements.accepts(torch.where(is_bin, self.first_bin, tokens), lengths)
        for one, other in IN_ORDER:
            accepted = accepted & (boxes[..., one] <= boxes[..., other]).all(1)
        elements = torch.cat([names, boxes], 2).unflatten(1, (self.most, self.size)).flatten(2)
        equal = (elements[:, :, None] == elements[:, None]).all(3).tril(-1)  # to an earlier element
        is_there = torch.arange(self.most, device=tokens.device) * self.size < numbers[:, None]
        return accepted & (numbers >= self.least * self.size) & ~(equal.any(2) & is_there).any(1)

    def parts(self, tokens: Tensor, lengths: Tensor) -> Parts:
        """Split outputs into names and boxes: (B, T), (B,)."""
        most = self.most * self.size
        if self.names:
            width = self.longest_name + 1  # by which a longer one differs
            return split(tokens, lengths, bins=(self.first_bin, self.num_bins), most=most, width=width)
        length = most * EDGES
        bins = F.pad(tokens - self.first_bin, (0, length - tokens.size(1)))
        is_said = torch.arange(length, device=tokens.device) < lengths[:, None]
        whole = ((bins >= 0) & (bins < self.num_bins) | ~is_said).all(1) & (lengths % EDGES == 0) & (lengths <= length)
        boxes = torch.where(is_said, bins, 0).unflatten(1, (most, EDGES))
        return Parts(boxes[..., :0], boxes, lengths // EDGES, whole)

    def best_paths(self, log_probs: Tensor, *, blank: int) -> Paths:
        """Return each sample's most probable path to a valid output; see `OutputConstraint.best_paths`.

        Dynamic programming knows the edges that later ones are compared with. It takes O(N H U^2) operations. So it
        reads only what can be on the best path, see `narvl_plugin.ctc.narrowing`. It is exact unless that is more pairs
        of coordinates than `PAIRS_TRIED`.

        If two elements are equal, a name or an edge of one is another one in every valid output. The outputs with the
        best path are searched next, so the first valid path is best.

        Args:
            log_probs: (B, N, V), on any device.
            blank: the label of the blank.

        Returns:
            The paths, on the CPU.

        Raises:
            ValueError: if a sample has no such path.
        """
        here = self.to(torch.device("cpu"))
        labels = here.alphabet()
        read = Emissions.of(log_probs, labels.expand(len(log_probs), -1), blank=blank)
        search = _Search(here, labels)
        paths = [search.best_path(row) for row in read.log_probs.numpy()]
        return read.paths(torch.tensor(paths, dtype=torch.int64).reshape(len(paths), -1))


def _cycle(tries: Sequence[Automaton], first_bin: int) -> Automaton:
    """Return the automaton of any number of elements, whose edges are all read as `first_bin`."""
    sizes = [len(trie.accepting) + EDGES - 1 for trie in tries]
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    parts = []
    for start, trie, following in zip(starts, tries, [*starts[1:-1], 0], strict=False):
        parts.append((trie.sources + start, trie.labels, trie.targets + start))
        edges = start + len(trie.accepting) + torch.arange(EDGES - 1)
        ends = trie.accepting.nonzero()[:, 0] + start
        sources = torch.cat([ends, edges])
        targets = torch.cat([edges[:1].expand(len(ends)), edges[1:], edges.new_tensor([following])])
        parts.append((sources, torch.full_like(sources, first_bin), targets))
    sources, labels, targets = (torch.cat(part) for part in zip(*parts, strict=True))
    return Automaton(sources, labels, targets, torch.arange(starts[-1]) == 0)


class _Forbidden(NamedTuple):
    """Names and edges that an output may not have, by the number of the part.

    Attributes:
        names: pairs of a part and the tokens of a name.
        edges: triples of a part, a place in the box, and a coordinate.
    """

    names: tuple[tuple[int, tuple[int, ...]], ...] = ()
    edges: tuple[tuple[int, int, int], ...] = ()


class _Trie(NamedTuple):
    """A trie of names, ready for a search.

    Attributes:
        previous: (A,), the arc before each arc; -1 for the first of a name.
        labels: (A,), the label that each arc reads, as a number of the search.
        repeats: (A,), whether it reads the same label as the arc before.
        ends: the last arcs of names.
        number: the place in `ends` by name.
    """

    previous: np.ndarray
    labels: np.ndarray
    repeats: np.ndarray
    ends: np.ndarray
    number: dict[tuple[int, ...], int]

    @classmethod
    def of(cls, automaton: Automaton) -> _Trie:
        """Return the trie of an automaton whose labels are numbers of the search. Its arc a enters the node a + 1."""
        sources, labels, _, accepting = (part.numpy() for part in automaton)
        before = np.append(-1, labels)[sources]
        ends = accepting[1:].nonzero()[0]
        spelled: list[tuple[int, ...]] = [()]
        for source, label in zip(sources.tolist(), labels.tolist(), strict=True):
            spelled.append((*spelled[source], label))
        number = {spelled[arc + 1]: place for place, arc in enumerate(ends.tolist())}
        return cls(sources - 1, labels, before == labels, ends, number)


class _Search:
    """A search for best paths.

    Args:
        constraint: the constraint, on the CPU.
        labels: (L,), the labels that are read, in order; a number of the search is a place in it.
    """

    def __init__(self, constraint: BoxSets, labels: Tensor) -> None:
        self.first_bin = int(torch.searchsorted(labels, constraint.first_bin))
        self.num_bins = constraint.num_bins
        self.size, self.least, self.most = constraint.size, constraint.least, constraint.most
        self.blank = len(labels)
        self.end = None if constraint.end is None else int(torch.searchsorted(labels, constraint.end))
        self.tries = [
            _Trie.of(trie._replace(labels=torch.searchsorted(labels, trie.labels))) for trie in constraint.names
        ]
        self.num_parts = self.most * self.size

    def best_path(self, log_probs: np.ndarray) -> list[int]:
        """Return the best path whose elements all differ: (N, L + 1) -> N labels.

        Raises:
            ValueError: if there is none.
        """
        number = count()
        waiting: list[tuple[float, int, list[int], _Forbidden]] = []

        def add(forbidden: _Forbidden) -> None:
            path, score = self._best_allowed(log_probs, forbidden)
            if score > NEVER:
                heapq.heappush(waiting, (-score, next(number), path, forbidden))

        add(_Forbidden())
        while waiting:
            *_, path, forbidden = heapq.heappop(waiting)
            elements = self.elements(path)
            pairs = combinations(range(len(elements)), 2)
            equal = next((pair for pair in pairs if elements[pair[0]] == elements[pair[1]]), None)
            if equal is None:
                return path
            for element in equal:
                for other in self._without(forbidden, element, elements[element]):
                    add(other)
        raise no_path(torch.from_numpy(log_probs)[None])

    def elements(self, path: Sequence[int]) -> list[tuple[Part, ...]]:
        """Return the elements of a path."""
        tokens = [label for label, _ in groupby(path) if label not in (self.blank, self.end)]
        if not self.tries:
            return [(((), tuple(tokens[place : place + EDGES])),) for place in range(0, len(tokens), EDGES)]
        bins = range(self.first_bin, self.first_bin + self.num_bins)
        runs = [tuple(run) for _, run in groupby(tokens, key=lambda token: token in bins)]
        parts = list(zip(runs[::2], runs[1::2], strict=True))
        return [tuple(parts[place : place + self.size]) for place in range(0, len(parts), self.size)]

    def _without(self, forbidden: _Forbidden, element: int, parts: Sequence[Part]) -> Iterator[_Forbidden]:
        """Yield prohibitions that each exclude a name or an edge of an element. Other elements are allowed by one."""
        for part, (name, box) in enumerate(parts, element * self.size):
            if name:
                yield forbidden._replace(names=(*forbidden.names, (part, name)))
            for place, edge in enumerate(box):
                yield forbidden._replace(edges=(*forbidden.edges, (part, place, edge - self.first_bin)))

    def _best_allowed(self, log_probs: np.ndarray, forbidden: _Forbidden) -> tuple[list[int], float]:
        """Return the best path, whose elements may be equal, and its log-probability, or any path and -inf."""
        bins = slice(self.first_bin, self.first_bin + self.num_bins)
        most = math.isqrt(PAIRS_TRIED // self.num_parts)

        def search(read: Narrowed) -> tuple[list[int], float]:
            tried = read.cheapest(bins, FIRST_TRIED, most)
            return _Lattice(self, tried, read.log_probs, forbidden).best_path()

        return search_narrowly(log_probs, search)

    def closed_edges(self, tried: np.ndarray, forbidden: _Forbidden) -> np.ndarray:
        """Return -inf for forbidden edges, and 0 for others: (U,) -> (H, 4, U)."""
        closed = np.zeros((self.num_parts, EDGES, len(tried)), np.float32)
        for part, place, edge in forbidden.edges:
            closed[part, place, tried == edge] = NEVER
        return closed

    def closed_names(self, forbidden: _Forbidden) -> list[np.ndarray]:
        """Return -inf for forbidden names, and 0 for others, for each part of an element: (K, names)."""
        closed = [np.zeros((self.most, len(trie.ends)), np.float32) for trie in self.tries]
        for part, name in forbidden.names:
            element, number = divmod(part, self.size)
            closed[number][element, self.tries[number].number[name]] = NEVER
        return closed


class _Scores(NamedTuple):
    """The scores of the best paths before a query, by what they have read last.

    Attributes:
        names: for each part of an element (K, A), an arc of a name.
        after_names: for each part of an element (K, A), a blank after that arc.
        left: (H, U), the left edge.
        after_left: (H, U), a blank after that edge.
        upper: (H, U, U), the upper edge; its axes are the left and the upper edge.
        after_upper: (H, U, U), a blank after that edge.
        right: (H, U, U), the right edge; its axes are the upper and the right edge.
        after_right: (H, U), a blank after that edge; its axis is the upper edge.
        lower: (H, U), the lower edge.
        between: (H + 1,), nothing, or a blank after whole parts.
        end: the end.
        after_end: a blank after the end.
    """

    names: list[np.ndarray]
    after_names: list[np.ndarray]
    left: np.ndarray
    after_left: np.ndarray
    upper: np.ndarray
    after_upper: np.ndarray
    right: np.ndarray
    after_right: np.ndarray
    lower: np.ndarray
    between: np.ndarray
    end: float
    after_end: float


_Cell = tuple[str, tuple[int, ...]]
"""The end of a path: the name of a field of `_Scores`, and a place in it, which begins with the number of a part."""


class _Lattice:
    """The paths of one sample among some coordinates.

    Args:
        search: the search.
        tried: (U,), the coordinates, in order.
        log_probs: (N, L + 1).
        forbidden: what no path may have.
    """

    def __init__(self, search: _Search, tried: np.ndarray, log_probs: np.ndarray, forbidden: _Forbidden) -> None:
        self.search = search
        self.log_probs = log_probs
        self.bins = search.first_bin + tried
        self.closed = search.closed_edges(tried, forbidden)
        self.closed_names = search.closed_names(forbidden)

    def best_path(self) -> tuple[list[int], float]:
        """Return the labels of the N queries, and the log-probability; -inf, and any labels, if there is no path."""
        scores = [self._nothing_said()]
        for row in self.log_probs:
            scores.append(self._read(scores[-1], row))
        last = scores[-1]
        ends = [*self._whole_elements(last), (last.end, ("end", ())), (last.after_end, ("after_end", ()))]
        score, cell = max(ends)
        path = []
        for before in reversed(scores[:-1]):
            path.append(self._label(cell))
            cell = max(self._origins(before, cell))[1]
        return path[::-1], score

    def _nothing_said(self) -> _Scores:
        """Return the scores before the first query: only the empty path is possible."""
        parts, size = self.search.num_parts, len(self.bins)

        def never(*shape: int) -> np.ndarray:
            return np.full(shape, NEVER, np.float32)

        names = [never(self.search.most, len(trie.labels)) for trie in self.search.tries]
        flat, deep = never(parts, size), never(parts, size, size)
        between = never(parts + 1)
        between[0] = 0.0
        return _Scores(names, names, flat, flat, deep, deep, deep, flat, flat, between, NEVER, NEVER)

    def _read(self, before: _Scores, row: np.ndarray) -> _Scores:
        """Return the scores after a query, (L + 1,)."""
        search, closed, same = self.search, self.closed, np.arange(len(self.bins))
        blank, edge = row[search.blank], row[self.bins]
        whole = before.between.copy()
        whole[1:] = np.maximum(whole[1:], before.lower.max(1))
        end, after_end = NEVER, NEVER
        if search.end is not None:
            end = float(max(before.end, whole[search.least * search.size :: search.size].max()) + row[search.end])
            after_end = float(max(before.after_end, before.end) + blank)

        names, after_names, named = [], [], []
        places = zip(before.names, before.after_names, search.tries, self.closed_names, strict=True)
        for place, (said, after, trie, shut) in enumerate(places):
            follows = np.where(trie.repeats, NEVER, said[:, trie.previous])
            begin = whole[place : search.num_parts : search.size, None]
            come = np.where(trie.previous < 0, begin, np.maximum(after[:, trie.previous], follows))
            names.append(np.maximum(said, come) + row[trie.labels])
            after_names.append(np.maximum(said, after) + blank)
            named.append((np.maximum(said, after)[:, trie.ends] + shut).max(1))

        # Equal labels at neighbouring queries would merge.
        if named:
            come = np.stack(named, 1).reshape(-1, 1)
        else:
            come = np.repeat(before.between[:-1, None], len(same), 1)
            come[1:] = np.maximum(come[1:], best_of_others(before.lower[:-1]))
        left = np.maximum(before.left, come) + edge + closed[:, 0]
        differs = np.repeat(before.left[:, :, None], len(same), 2)
        differs[:, same, same] = NEVER
        upper = np.maximum(before.upper, np.maximum(before.after_left[:, :, None], differs)) + edge + closed[:, 1, None]
        # The right edge is at least the left one, and the lower edge at least the upper one.
        in_order = np.maximum.accumulate(before.upper, 1)
        in_order[:, same, same] = NEVER
        in_order = np.maximum(in_order, np.maximum.accumulate(before.after_upper, 1)).swapaxes(1, 2)
        right = np.maximum(before.right, in_order) + edge + closed[:, 2, None]
        in_order = np.maximum.accumulate(before.right, 1)
        in_order[:, same, same] = NEVER
        come = np.maximum(in_order.max(2), np.maximum.accumulate(before.after_right, 1))
        lower = np.maximum(before.lower, come) + edge + closed[:, 3]
        return _Scores(
            names,
            after_names,
            left,
            np.maximum(before.after_left, before.left) + blank,
            upper,
            np.maximum(before.after_upper, before.upper) + blank,
            right,
            np.maximum(before.after_right, before.right.max(2)) + blank,
            lower,
            whole + blank,
            end,
            after_end,
        )

    def _label(self, cell: _Cell) -> int:
        """Return the label that a path read last."""
        last, place = cell
        if last == "names":
            return int(self.search.tries[place[0] % self.search.size].labels[place[1]])
        if last in ("left", "upper", "right", "lower"):
            return int(self.bins[place[-1]])
        if last == "end":
            assert self.search.end is not None
            return self.search.end
        return self.search.blank

    def _whole_elements(self, scores: _Scores) -> Iterator[tuple[float, _Cell]]:
        """Yield the best paths to any valid number of whole elements."""
        search = self.search
        for part in range(search.least * search.size, search.num_parts + 1, search.size):
            yield from self._whole_parts(scores, part)

    def _whole_parts(self, scores: _Scores, number: int, other_than: int = -1) -> Iterator[tuple[float, _Cell]]:
        """Yield the best paths to a number of whole parts, of which the last does not end in a certain edge."""
        yield float(scores.between[number]), ("between", (number,))
        if number:
            ends = scores.lower[number - 1].copy()
            if other_than >= 0:
                ends[other_than] = NEVER
            score, (lower,) = _best(ends)
            yield score, ("lower", (number - 1, lower))

    def _origins(self, before: _Scores, cell: _Cell) -> Iterator[tuple[float, _Cell]]:
        """Yield the best paths before a query that may lead to a cell, with their scores."""
        match cell:
            case "between", (number,):
                yield from self._whole_parts(before, number)
            case "end", _:
                yield before.end, cell
                yield from self._whole_elements(before)
            case "after_end", _:
                yield before.after_end, cell
                yield before.end, ("end", ())
            case "names", (part, arc):
                trie, said, after, _ = self._names(before, part)
                yield float(said[arc]), cell
                previous = int(trie.previous[arc])
                if previous < 0:
                    yield from self._whole_parts(before, part)
                else:
                    yield float(after[previous]), ("after_names", (part, previous))
                    if not trie.repeats[arc]:
                        yield float(said[previous]), ("names", (part, previous))
            case "after_names", (part, arc):
                _, said, after, _ = self._names(before, part)
                yield float(after[arc]), cell
                yield float(said[arc]), ("names", (part, arc))
            case "left", (part, left):
                yield float(before.left[part, left]), cell
                if not self.search.tries:
                    yield from self._whole_parts(before, part, other_than=left)
                    return
                trie, said, after, shut = self._names(before, part)
                for last, scores in (("names", said), ("after_names", after)):
                    score, (end,) = _best(scores[trie.ends] + shut)
                    yield score, (last, (part, int(trie.ends[end])))
            case "upper", (part, left, upper):
                yield float(before.upper[part, left, upper]), cell
                yield float(before.after_left[part, left]), ("after_left", (part, left))
                if left != upper:
                    yield float(before.left[part, left]), ("left", (part, left))
            case "right", (part, upper, right):
                yield float(before.right[part, upper, right]), cell
                score, (left,) = _best(before.after_upper[part, : right + 1, upper])
                yield score, ("after_upper", (part, left, upper))
                if upper != right:
                    score, (left,) = _best(before.upper[part, : right + 1, upper])
                    yield score, ("upper", (part, left, upper))
            case "lower", (part, lower):
                yield float(before.lower[part, lower]), cell
                score, (upper,) = _best(before.after_right[part, : lower + 1])
                yield score, ("after_right", (part, upper))
                others = before.right[part, : lower + 1].copy()
                others[:, lower] = NEVER
                score, (upper, right) = _best(others)
                yield score, ("right", (part, upper, right))
            case "after_right", (part, upper):
                yield float(before.after_right[part, upper]), cell
                score, (right,) = _best(before.right[part, upper])
                yield score, ("right", (part, upper, right))
            case "after_upper", place:
                yield float(before.after_upper[place]), cell
                yield float(before.upper[place]), ("upper", place)
            case "after_left", place:
                yield float(before.after_left[place]), cell
                yield float(before.left[place]), ("left", place)

    def _names(self, scores: _Scores, part: int) -> tuple[_Trie, np.ndarray, np.ndarray, np.ndarray]:
        """Return the trie of a part, the scores (A,) of its arcs, those of blanks after them, and its closed names."""
        element, number = divmod(part, self.search.size)
        said, after = scores.names[number][element], scores.after_names[number][element]
        return self.search.tries[number], said, after, self.closed_names[number][element]


def _best(scores: np.ndarray) -> tuple[float, tuple[int, ...]]:
    """Return the best score, and its place."""
    place = tuple(map(int, np.unravel_index(scores.argmax(), scores.shape)))
    return float(scores[place]), place


def best_of_others(scores: np.ndarray) -> np.ndarray:
    """Return the highest score of the other entries along the last axis, for each entry: (..., U) -> (..., U)."""
    best = scores.argmax(-1)[..., None]
    others = scores.copy()
    np.put_along_axis(others, best, NEVER, axis=-1)
    found = np.repeat(scores.max(-1, keepdims=True), scores.shape[-1], axis=-1)
    np.put_along_axis(found, best, others.max(-1, keepdims=True), axis=-1)
    return found
