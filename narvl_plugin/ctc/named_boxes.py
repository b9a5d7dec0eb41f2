"""Outputs of elements that alternate names of closed lists and boxes, and the most probable path to one of them.

A triplet of a scene graph is such an element: a noun, its box, a relation and a noun, the box of that noun.

Legend: B batch, N queries, V labels, T tokens of an output, K elements of the longest output, P parts of an element,
each a name and a box, H = K P parts of the longest output, A arcs of a trie, U labels of coordinates, L + 1 labels that
a search reads, the blank last.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import combinations, count, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from narvl_plugin.ctc.collapse import Paths
from narvl_plugin.ctc.constraints import NEVER, Automaton, Emissions, no_path, one_of

FIRST_TRIED = 12
"""Number of the most probable coordinates that a search tries first."""
LABELS_TRIED = 32
"""Largest number of coordinates that a search tries; it bounds time and memory, which are quadratic in it."""
CELLS = 1 << 22
"""Number of scores of a search that are kept at once."""
ROUNDING = 1e-3
"""Largest error of a path's log-probability, in nats."""
EDGES = 4
"""Number of tokens of a box: its left, upper, right and lower edge."""

Part = tuple[tuple[int, ...], tuple[int, ...]]
"""The tokens of a name, and those of a box."""


class Parts(NamedTuple):
    """The parts of outputs.

    Attributes:
        names: (B, H, T), the tokens of the name of each part; -1 on padding.
        boxes: (B, H, 4), the coordinates of each box, from 0; 0 on padding.
        numbers: (B,), the number of parts.
        whole: (B,), whether the output is whole parts, at most H.
    """

    names: Tensor
    boxes: Tensor
    numbers: Tensor
    whole: Tensor


def split(tokens: Tensor, lengths: Tensor, *, bins: tuple[int, int], most: int) -> Parts:
    """Split outputs into parts, each a name of any tokens and a box of four coordinates.

    Args:
        tokens: (B, T).
        lengths: (B,).
        bins: the label of the first coordinate, and the number of coordinates.
        most: the greatest number of parts H.
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

    names = gathered(is_name, place_in_name, tokens, length, -1)
    boxes = gathered(is_bin, edge, tokens - bins[0], EDGES, 0)
    # A run of coordinates follows each name, and none comes first, so equal numbers of all are four of each.
    last = is_bin & torch.cat([~is_bin, is_bin.new_ones(batch, 1)], 1)[:, 1:]
    whole = (last & (edge == EDGES - 1)).sum(1) == numbers
    whole = whole & (last.sum(1) == numbers) & (part >= 0).logical_or(~is_said).all(1) & (numbers <= most)
    return Parts(names, boxes, numbers, whole)


class NamedBoxes(NamedTuple):
    """The outputs of 0 to `most` elements, all different. An element is P times a name and a box with ordered edges.

    Attributes:
        names: for each part of an element, the trie of its names.
        element: the automaton of any number of elements whose boxes may have any edges, which it reads as `first_bin`.
        first_bin: the label of the first coordinate; those of the others follow.
        num_bins: the number of coordinates.
        most: the greatest number of elements K.
        end: a label that may come last, and is no token of an element; None for no such label.
    """

    names: tuple[Automaton, ...]
    element: Automaton
    first_bin: int
    num_bins: int
    most: int
    end: int | None = None

    @classmethod
    def of(cls, names: Sequence[Sequence[Sequence[int]]], *, first_bin: int, num_bins: int, most: int) -> NamedBoxes:
        """Return the constraint of lists of names.

        Args:
            names: for each part of an element, the tokens of its names, which are no coordinates.
            first_bin: see the class.
            num_bins: see the class.
            most: see the class.
        """
        tries = tuple(one_of(listed) for listed in names)
        return cls(tries, _cycle(tries, first_bin), first_bin, num_bins, most)

    def to(self, device: torch.device) -> NamedBoxes:
        """Return the same constraint on another device."""
        return self._replace(names=tuple(trie.to(device) for trie in self.names), element=self.element.to(device))

    def ending_in(self, label: int) -> NamedBoxes:
        """Return the constraint that also accepts each valid output followed by `label`, which is no token of it."""
        return self._replace(element=self.element.ending_in(label), end=label)

    def alphabet(self) -> Tensor:
        """Return the distinct labels of the valid outputs."""
        bins = torch.arange(self.first_bin, self.first_bin + self.num_bins, device=self.element.labels.device)
        return torch.cat([self.element.labels, bins]).unique()

    def accepts(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Tell which outputs are valid: (B, T), (B,) -> (B,) bool."""
        if self.end is not None:
            place = torch.arange(tokens.size(1), device=tokens.device)
            is_last = place == lengths[:, None] - 1
            lengths = lengths - (is_last & (tokens == self.end)).sum(1)
        is_bin = (tokens >= self.first_bin) & (tokens < self.first_bin + self.num_bins)
        accepted = self.element.accepts(torch.where(is_bin, self.first_bin, tokens), lengths)
        parts = self.parts(tokens, lengths)
        left, upper, right, lower = parts.boxes.unbind(2)
        accepted = accepted & parts.whole & ((left <= right) & (upper <= lower)).all(1)
        size = len(self.names)
        for one, other in combinations(range(0, parts.boxes.size(1), size), 2):
            differs = [
                (part[:, one : one + size] != part[:, other : other + size]).flatten(1).any(1) for part in parts[:2]
            ]
            accepted = accepted & ((parts.numbers <= other) | differs[0] | differs[1])
        return accepted

    def parts(self, tokens: Tensor, lengths: Tensor) -> Parts:
        """Split outputs into names and boxes: (B, T), (B,)."""
        return split(tokens, lengths, bins=(self.first_bin, self.num_bins), most=self.most * len(self.names))

    def best_paths(self, log_probs: Tensor, *, blank: int) -> Paths:
        """Return each sample's most probable path to a valid output; see `OutputConstraint.best_paths`.

        Dynamic programming knows the edges that later ones are compared with. It takes O(N H U^2) operations. So it
        reads only the coordinates that can be on the best path: not those that cost more, at any query, than a valid
        path that is known. It is exact unless there are more than `LABELS_TRIED` of them.

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
        with torch.inference_mode(False), torch.enable_grad():  # gradients are paths
            search = _Search(here, labels)
            scores = read.log_probs.clone()
            found = search.paths(scores, [_Forbidden()] * len(scores))
            paths = [search.without_repeats(row, path) for row, path in zip(scores, found, strict=True)]
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


class _Found(NamedTuple):
    """The best path under some prohibitions.

    Attributes:
        labels: N labels.
        score: its log-probability; -inf if there is no path.
        forbidden: the prohibitions.
    """

    labels: list[int]
    score: float
    forbidden: _Forbidden


class _Trie(NamedTuple):
    """A trie of names, ready for a search. The arc a enters the node a + 1; 0 is the root.

    Attributes:
        sources: (A,), the node that each arc leaves.
        labels: (A,), the label that each arc reads, as a number of the search.
        repeats: (A,), whether it reads the same label as the arc before.
        ends: the last arcs of names.
        number: the place in `ends` by name.
    """

    sources: Tensor
    labels: Tensor
    repeats: Tensor
    ends: Tensor
    number: dict[tuple[int, ...], int]

    @classmethod
    def of(cls, automaton: Automaton) -> _Trie:
        """Return the trie of an automaton whose labels are numbers of the search."""
        sources, labels, _, accepting = automaton
        before = torch.cat([labels.new_tensor([-1]), labels])[sources]
        ends = accepting[1:].nonzero()[:, 0]
        spelled: list[tuple[int, ...]] = [()]
        for source, label in zip(sources.tolist(), labels.tolist(), strict=True):
            spelled.append((*spelled[source], label))
        number = {spelled[arc + 1]: place for place, arc in enumerate(ends.tolist())}
        return cls(sources.clone(), labels, before == labels, ends, number)


class _Search:
    """A search for best paths.

    Args:
        constraint: the constraint, on the CPU.
        labels: (L,), the labels that are read, in order; a number of the search is a place in it.
    """

    def __init__(self, constraint: NamedBoxes, labels: Tensor) -> None:
        self.first_bin = int(torch.searchsorted(labels, constraint.first_bin))
        self.num_bins = constraint.num_bins
        self.most = constraint.most
        self.blank = len(labels)
        self.end = None if constraint.end is None else int(torch.searchsorted(labels, constraint.end))
        self.tries = [
            _Trie.of(trie._replace(labels=torch.searchsorted(labels, trie.labels))) for trie in constraint.names
        ]
        self.num_parts = self.most * len(self.tries)

    def without_repeats(self, log_probs: Tensor, best: _Found) -> list[int]:
        """Return the best path whose elements all differ: (N, L + 1) and the best path of all.

        Raises:
            ValueError: if there is none.
        """
        number = count()
        waiting: list[tuple[float, int, _Found]] = []

        def add(found: _Found) -> None:
            if found.score > NEVER:
                heapq.heappush(waiting, (-found.score, next(number), found))

        add(best)
        while waiting:
            found = heapq.heappop(waiting)[2]
            elements = self.elements(found.labels)
            pairs = combinations(range(len(elements)), 2)
            equal = next((pair for pair in pairs if elements[pair[0]] == elements[pair[1]]), None)
            if equal is None:
                return found.labels
            others = [
                other for element in equal for other in self._without(found.forbidden, element, elements[element])
            ]
            for other in self.paths(log_probs.expand(len(others), -1, -1), others):
                add(other)
        raise no_path(log_probs[None])

    def elements(self, path: Sequence[int]) -> list[tuple[Part, ...]]:
        """Return the elements of a path."""
        tokens = [label for label, _ in groupby(path) if label not in (self.blank, self.end)]
        bins = range(self.first_bin, self.first_bin + self.num_bins)
        runs = [tuple(run) for _, run in groupby(tokens, key=lambda token: token in bins)]
        parts = list(zip(runs[::2], runs[1::2], strict=True))
        size = len(self.tries)
        return [tuple(parts[place : place + size]) for place in range(0, len(parts), size)]

    def _without(self, forbidden: _Forbidden, element: int, parts: Sequence[Part]) -> Iterator[_Forbidden]:
        """Yield prohibitions that each exclude a name or an edge of an element. Other elements are allowed by one."""
        for part, (name, box) in enumerate(parts, element * len(self.tries)):
            yield forbidden._replace(names=(*forbidden.names, (part, name)))
            for place, edge in enumerate(box):
                yield forbidden._replace(edges=(*forbidden.edges, (part, place, edge - self.first_bin)))

    def paths(self, log_probs: Tensor, forbidden: Sequence[_Forbidden]) -> list[_Found]:
        """Return the best path of each sample, whose elements may be equal.

        Args:
            log_probs: (B, N, L + 1).
            forbidden: the prohibitions of each sample.
        """
        most = log_probs.max(2).values
        bins = log_probs[:, :, self.first_bin : self.first_bin + self.num_bins]
        costs = (most[..., None] - bins).amin(1)  # at least, of a path with the coordinate
        order = costs.argsort(dim=1, stable=True)
        found = self._among(order[:, :FIRST_TRIED], log_probs, forbidden)
        scores = torch.tensor([one.score for one in found])
        needed = (costs <= (most.sum(1) - scores)[:, None] + ROUNDING).sum(1).tolist()
        again = [row for row, number in enumerate(needed) if number > FIRST_TRIED]
        if again and self.num_bins > FIRST_TRIED:
            number = min(LABELS_TRIED, max(needed))
            more = self._among(order[again, :number], log_probs[again], [forbidden[row] for row in again])
            for row, one in zip(again, more, strict=True):
                found[row] = one
        return found

    def _among(self, tried: Tensor, log_probs: Tensor, forbidden: Sequence[_Forbidden]) -> list[_Found]:
        """Return the best path of each sample with some coordinates: (B, U), (B, N, L + 1)."""
        tried = tried.sort(1).values
        rows = max(1, CELLS // (log_probs.size(1) * self.num_parts * tried.size(1) ** 2))
        found = []
        for start in range(0, len(log_probs), rows):
            piece = slice(start, start + rows)
            read = log_probs[piece].clone().requires_grad_()
            scores = self._scores(tried[piece], read, forbidden[piece])
            # The gradient of a maximum is the path that reaches it.
            (shares,) = torch.autograd.grad(scores[scores > NEVER].sum(), read)
            labels = shares.argmax(2).tolist()
            found += [_Found(*one) for one in zip(labels, scores.tolist(), forbidden[piece], strict=True)]
        return found

    def _scores(self, tried: Tensor, log_probs: Tensor, forbidden: Sequence[_Forbidden]) -> Tensor:
        """Return the log-probability of each sample's best path: (B, U), (B, N, L + 1) -> (B,)."""
        batch, num_queries, _ = log_probs.shape
        size, parts = tried.size(1), self.num_parts

        def never(*shape: int) -> Tensor:
            return log_probs.new_full((batch, *shape), NEVER)

        bins = log_probs.gather(2, (self.first_bin + tried)[:, None].expand(-1, num_queries, -1))
        closed = self._closed_edges(tried, forbidden).to(log_probs)
        closed_names = [self._closed_names(number, forbidden).to(log_probs) for number in range(len(self.tries))]
        same = torch.eye(size, dtype=torch.bool)
        # Scores of the paths so far, by what they have read last: a label, or blanks after it.
        names = [never(self.most, len(trie.labels)) for trie in self.tries]
        after_names = [score.clone() for score in names]
        left, after_left = never(parts, size), never(parts, size)
        upper, after_upper = never(parts, size, size), never(parts, size, size)  # by the left and the upper edge
        right, after_right = never(parts, size, size), never(parts, size)  # by the upper edge, and the right one
        lower = never(parts, size)
        between = torch.cat([log_probs.new_zeros(batch, 1), never(parts)], 1)  # whole parts, then blanks
        end, after_end = never(), never()
        for query in range(num_queries):
            blank, edge = log_probs[:, query, self.blank], bins[:, query, None]
            ways = torch.cat([between[:, :1], better(between[:, 1:], lower.max(2).values)], 1)
            if self.end is not None:
                whole = ways[:, :: len(self.tries)].max(1).values
                end, after_end = (
                    better(end, whole) + log_probs[:, query, self.end],
                    better(after_end, end) + blank,
                )
            # The last edge.
            in_order = right.cummax(2).values.masked_fill(same, NEVER).max(3).values
            lower = better(better(lower, after_right.cummax(2).values), in_order) + edge + closed[:, :, 3]
            after_right = better(after_right, right.max(3).values) + blank[:, None, None]
            in_order = better(after_upper.cummax(2).values, upper.cummax(2).values.masked_fill(same, NEVER))
            right = better(right, in_order.mT) + edge[..., None, :] + closed[:, :, 2, None]
            after_upper = better(after_upper, upper) + blank[:, None, None, None]
            differs = left[..., None].expand(-1, -1, -1, size).masked_fill(same, NEVER)
            upper = better(upper, better(after_left[..., None], differs)) + edge[..., None, :] + closed[:, :, 1, None]
            after_left = better(after_left, left) + blank[:, None, None]
            named = [
                (better(said, after)[:, :, trie.ends] + shut).max(2).values
                for said, after, trie, shut in zip(names, after_names, self.tries, closed_names, strict=True)
            ]
            left = better(left, torch.stack(named, 2).flatten(1)[..., None]) + edge + closed[:, :, 0]
            for number, trie in enumerate(self.tries):
                said, after = names[number], after_names[number]
                begin = ways[:, number : parts : len(self.tries), None]
                nothing = torch.full_like(begin, NEVER)
                follows = torch.cat([nothing, said], 2)[:, :, trie.sources].masked_fill(trie.repeats, NEVER)
                come = better(torch.cat([begin, after], 2)[:, :, trie.sources], follows)
                names[number] = better(said, come) + log_probs[:, query, None, trie.labels]
                after_names[number] = better(after, said) + blank[:, None, None]
            between = ways + blank[:, None]
        ways = torch.cat([between[:, :1], better(between[:, 1:], lower.max(2).values)], 1)
        return torch.stack([*ways[:, :: len(self.tries)].unbind(1), end, after_end], 1).max(1).values

    def _closed_edges(self, tried: Tensor, forbidden: Sequence[_Forbidden]) -> Tensor:
        """Return -inf for forbidden edges, and 0 for others: (B, U) -> (B, H, 4, U)."""
        closed = torch.zeros(len(tried), self.num_parts, EDGES, tried.size(1))
        for row, one in enumerate(forbidden):
            for part, place, edge in one.edges:
                closed[row, part, place, tried[row] == edge] = NEVER
        return closed

    def _closed_names(self, number: int, forbidden: Sequence[_Forbidden]) -> Tensor:
        """Return -inf for forbidden names of a part of elements, and 0 for others: (B, K, names)."""
        trie = self.tries[number]
        closed = torch.zeros(len(forbidden), self.most, len(trie.ends))
        for row, one in enumerate(forbidden):
            for part, name in one.names:
                if part % len(self.tries) == number:
                    closed[row, part // len(self.tries), trie.number[name]] = NEVER
        return closed


def better(one: Tensor, other: Tensor) -> Tensor:
    """Return the larger of two scores. The gradient is that of one alone, even if both are equal."""
    return torch.where(one >= other, one, other)
