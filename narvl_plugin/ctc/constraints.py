"""Languages: the outputs that a search may give, and the most probable path to one of them.

Legend: B batch, N queries, V labels, A arcs and S states of an automaton, T tokens of an output.
"""

import heapq
from collections.abc import Iterable, Sequence
from itertools import count
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from narvl_plugin.ctc.answer_trie import build_trie
from narvl_plugin.ctc.collapse import Paths, collapse
from narvl_plugin.ctc.host import to_host

NEVER = -torch.inf


class Language(Protocol):
    """A set of outputs."""

    def to(self, device: torch.device) -> "Language":
        """Return the same language on another device."""

    def ending_in(self, label: int) -> "Language":
        """Return the language of the same outputs, and of each of them with `label` after it."""

    def alphabet(self) -> Tensor | None:
        """Return the labels of its outputs, each once, or None where that may be any."""

    def accepts(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Tell which outputs are in the language: (B, T), (B,) -> (B,) bool."""

    def best_paths(self, log_probs: Tensor, *, blank: int) -> Paths:
        """Return each sample's most probable path into the language, on the CPU: (B, N, V), on any device.

        The search itself runs on the CPU, so that a device is waited for once. Raises ValueError if there is no path.
        """


class Automaton(NamedTuple):
    """The regular language of a finite automaton that reads tokens; it starts in state 0.

    sources, labels, targets: (A,) int64, of each arc the state it leaves, the token it reads, the state it enters;
    accepting: (S,) bool, the states in which an output may end.
    """

    sources: Tensor
    labels: Tensor
    targets: Tensor
    accepting: Tensor

    def to(self, device: torch.device) -> "Automaton":
        """Return the same automaton on another device, which is not waited for."""
        return Automaton(*(part.to(device, non_blocking=True) for part in self))

    def ending_in(self, label: int) -> "Automaton":
        """Return the automaton of the same outputs, and of each of them with `label` after it."""
        ends = self.accepting.nonzero()[:, 0]
        sources = torch.cat([self.sources, ends])
        labels = torch.cat([self.labels, torch.full_like(ends, label)])
        targets = torch.cat([self.targets, torch.full_like(ends, len(self.accepting))])
        return Automaton(sources, labels, targets, torch.cat([self.accepting, self.accepting.new_ones(1)]))

    def keep(self, arcs: Tensor) -> "Automaton":
        """Return the automaton with some of its arcs, (A,) bool."""
        return Automaton(self.sources[arcs], self.labels[arcs], self.targets[arcs], self.accepting)

    def alphabet(self) -> Tensor:
        """Return the labels that it reads, each once."""
        return self.labels.unique()

    def accepts(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Tell which outputs are in the language: (B, T), (B,) -> (B,) bool."""
        reached = torch.zeros(len(tokens), len(self.accepting), dtype=torch.bool, device=tokens.device)
        reached[:, 0] = True
        for place in range(tokens.size(1)):
            arcs = reached[:, self.sources] & (tokens[:, place, None] == self.labels)
            after = torch.zeros_like(reached).index_add(1, self.targets, arcs)
            reached = torch.where((place < lengths)[:, None], after, reached)
        return (reached & self.accepting).any(1)

    def best_paths(self, log_probs: Tensor, *, blank: int) -> Paths:
        """Return each sample's most probable path into the language, on the CPU: (B, N, V), on any device.

        Raises ValueError if there is none.
        """
        vocabulary, automaton = self.numbered()
        read = Emissions.of(log_probs, vocabulary.expand(len(log_probs), -1), blank=blank)
        paths, scores = automaton.search(read.log_probs, blank=len(vocabulary))
        if bool((scores == NEVER).any()):
            raise no_path(log_probs)
        return read.paths(paths)

    def numbered(self) -> tuple[Tensor, "Automaton"]:
        """Return the labels that it reads, (K,), in order, and the automaton that reads their numbers instead."""
        vocabulary, numbers = self.labels.unique(return_inverse=True)
        return vocabulary, self._replace(labels=numbers)

    def search(self, log_probs: Tensor, *, blank: int) -> tuple[Tensor, Tensor]:
        """Return each sample's most probable path, and its log-probability, -inf if there is none: (B, N), (B,).

        By dynamic programming over (query, last arc, whether blanks followed it): O(N A) for each sample.
        """
        batch, num_queries, _ = log_probs.shape
        sources, labels, targets, accepting = self
        num_arcs, num_states = len(labels), len(accepting)
        emissions = log_probs[:, :, labels]
        # What has been said so far ends in an arc's label (B, A), or in a blank, or is nothing (B, S).
        in_label = log_probs.new_full((batch, num_arcs), NEVER)
        in_blank = log_probs.new_full((batch, num_states), NEVER)
        in_blank[:, 0] = 0.0
        here = torch.arange(num_arcs, device=labels.device).expand(batch, -1)
        there = num_arcs + torch.arange(num_states, device=labels.device).expand(batch, -1)
        moves = []  # (B, A + S) each: where the best path to each of both came from; states count from A
        for query in range(num_queries):
            arrived = Arrivals.of(in_label, labels, targets, num_states)
            after_label, label_arc = arrived.other_than(labels, sources)
            best, way = torch.stack([in_label, in_blank[:, sources], after_label]).max(0)
            came_from = torch.stack([here, there[:, sources], label_arc]).gather(0, way[None])[0]
            blank_came_from = torch.where(arrived.scores > in_blank, arrived.arcs, there)
            moves.append(torch.cat([came_from, blank_came_from], 1))
            in_blank = in_blank.maximum(arrived.scores) + log_probs[:, query, blank, None]
            in_label = best + emissions[:, query]

        ends = torch.cat([accepting[targets], accepting])
        scores, place = torch.cat([in_label, in_blank], 1).masked_fill(~ends, NEVER).max(1)
        said = torch.cat([labels, labels.new_full((num_states,), blank)])
        path = []
        for move in reversed(moves):
            path.append(said[place])
            place = move.gather(1, place[:, None])[:, 0]
        return torch.stack(path[::-1], 1), scores


def sequence_of(allowed: Sequence[Tensor]) -> Automaton:
    """Return the automaton of outputs whose i-th token is one of `allowed[i]`, each int64 (K,): T = len(allowed)."""
    places = [torch.full_like(labels, place) for place, labels in enumerate(allowed)]
    sources = torch.cat(places)
    accepting = torch.zeros(len(allowed) + 1, dtype=torch.bool, device=sources.device)
    accepting[-1] = True
    return Automaton(sources, torch.cat(list(allowed)), sources + 1, accepting)


def one_of(sequences: Iterable[Sequence[int]]) -> Automaton:
    """Return the automaton, a trie, of the outputs that are one of `sequences`."""
    rows = [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences]
    trie = build_trie(pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows]))
    accepting = torch.zeros(len(trie.parents), dtype=torch.bool)
    accepting[trie.ends] = True
    places = torch.arange(1, len(trie.parents))
    return Automaton(trie.parents[1:], trie.labels[1:], places, accepting)


class Ordered(NamedTuple):
    """The outputs of `sequence_of` in which of each pair of places the first's token is not above the second's.

    automaton: of the sequences; pairs: places, from 0. A box's four edges are in order with ((0, 2), (1, 3)).
    """

    automaton: Automaton
    pairs: tuple[tuple[int, int], ...]

    def to(self, device: torch.device) -> "Ordered":
        """Return the same language on another device."""
        return Ordered(self.automaton.to(device), self.pairs)

    def ending_in(self, label: int) -> "Ordered":
        """Return the language of the same outputs, and of each of them with `label` after it."""
        return Ordered(self.automaton.ending_in(label), self.pairs)

    def alphabet(self) -> Tensor:
        """Return the labels of its outputs, each once."""
        return self.automaton.alphabet()

    def accepts(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Tell which outputs are in the language: (B, T), (B,) -> (B,) bool."""
        accepted = self.automaton.accepts(tokens, lengths)
        places = range(tokens.size(1))
        for first, second in self.pairs:
            if first in places and second in places:  # otherwise all outputs are too short
                accepted = accepted & (tokens[:, first] <= tokens[:, second])
        return accepted

    def best_paths(self, log_probs: Tensor, *, blank: int) -> Paths:
        """Return each sample's most probable path into the language, on the CPU: (B, N, V), on any device.

        An automaton would need a state for every token that a later one is compared with. Instead the best path out
        of order is excluded by halves: with m between the two tokens, either the first is at most m, or both are
        above. Of all parts the one with the best path is searched next, so that the first path in order is the best.
        Raises ValueError if there is none.
        """
        vocabulary, automaton = self.automaton.numbered()  # whose order is that of the labels
        read = Emissions.of(log_probs, vocabulary.expand(len(log_probs), -1), blank=blank)
        numbered = Ordered(automaton, self.pairs)
        paths = [numbered._best_path(row[None], len(vocabulary)) for row in read.log_probs]
        return read.paths(torch.cat(paths))

    def _best_path(self, log_probs: Tensor, blank: int) -> Tensor:
        """Find the labels of one sample's path, on the CPU: (1, N, V) -> (1, N)."""
        parts: list[tuple[float, int, Tensor, Automaton]] = []
        number = count()

        def add(automaton: Automaton) -> None:
            path, score = automaton.search(log_probs, blank=blank)
            if float(score) > NEVER:
                heapq.heappush(parts, (-float(score), next(number), path, automaton))

        add(self.automaton)
        while parts:
            *_, path, automaton = heapq.heappop(parts)
            tokens = collapse(path, blank=blank).tokens[0].tolist()
            wrong = [(first, second) for first, second in self.pairs if tokens[first] > tokens[second]]
            if not wrong:
                return path
            first, second = wrong[0]
            middle = (tokens[first] + tokens[second]) // 2
            at_first, low = automaton.sources == first, automaton.labels <= middle
            add(automaton.keep(low | ~at_first))
            add(automaton.keep(~low | ~(at_first | (automaton.sources == second))))
        raise no_path(log_probs)


class Lengths(NamedTuple):
    """All outputs of `minimum` to `maximum` tokens; `end`, if there is one, may come last, and does not count."""

    minimum: int
    maximum: int
    end: int | None = None

    def to(self, device: torch.device) -> "Lengths":
        """Return the language itself, which is on no device."""
        return self

    def ending_in(self, label: int) -> "Lengths":
        """Return the language of the same outputs without `label` in them, and of each of them with it at its end."""
        return Lengths(self.minimum, self.maximum, label)

    def alphabet(self) -> None:
        """Return that all labels may be said."""
        return

    def accepts(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Tell which outputs are in the language: (B, T), (B,) -> (B,) bool."""
        within = torch.ones_like(lengths, dtype=torch.bool)
        if self.end is not None:
            place = torch.arange(tokens.size(1), device=tokens.device)
            is_end = (tokens == self.end) & (place < lengths[:, None])
            is_last = place == lengths[:, None] - 1
            within = ~(is_end & ~is_last).any(1)
            lengths = lengths - (is_end & is_last).sum(1)
        return within & (lengths >= self.minimum) & (lengths <= self.maximum)

    def best_paths(self, log_probs: Tensor, *, blank: int) -> Paths:
        """Return each sample's most probable path into the language, on the CPU: (B, N, V), on any device.

        Raises ValueError if there is none.
        """
        num_queries = log_probs.size(1)
        excluded = [blank] if self.end is None else [blank, self.end]
        found = torch.stack([labels_of_best_runs(row, excluded) for row in log_probs])  # some of them many times
        if self.end is not None:
            found = torch.cat([found, found.new_full((len(found), 1), self.end)], 1)
        read = Emissions.of(log_probs, found, blank=blank)
        paths = []
        end, number_of_blank = found.size(1) - 1, found.size(1)
        for read_labels, row in zip(read.labels[:, :-1], read.log_probs, strict=True):
            labels, which = read_labels.unique(return_inverse=True)
            # The number of each label; any will do of a label that was read more than once.
            numbers = torch.empty_like(labels).scatter_(0, which, torch.arange(len(which)))
            allowed = numbers[~torch.isin(labels, torch.tensor(excluded))]
            automaton = sequence_of([allowed] * min(self.maximum, num_queries))
            automaton.accepting[:] = torch.arange(len(automaton.accepting)) >= self.minimum
            if self.end is not None:
                automaton = automaton.ending_in(end)
            path, score = automaton.search(row[None], blank=number_of_blank)
            if float(score) == NEVER:
                raise no_path(log_probs)
            paths.append(path)
        return read.paths(torch.cat(paths))


def labels_of_best_runs(log_probs: Tensor, excluded: Sequence[int]) -> Tensor:
    """Return the labels that are one of the three most probable of some run of neighbouring queries: (N, V) -> (K,).

    Where only the number of tokens counts, there is a best path of these alone: the label of any run can be
    exchanged for one of that run's best three, of which at least one is none of its two neighbours. There are as many
    for any numbers: labels come as often as they are found, and `excluded` ones where there are no others.
    """
    sums = log_probs.clone()
    for label in excluded:
        sums[:, label] = NEVER
    single = sums
    best = []
    for longer in range(len(log_probs)):
        if longer:
            sums = sums[:-1] + single[longer:]
        best.append(sums.topk(min(3, sums.size(1)), dim=1).indices.flatten())
    return torch.cat(best)


class Emissions(NamedTuple):
    """What a search reads, on the CPU, instead of all labels.

    labels: (B, K + 1), of which the blank is the last; log_probs: (B, N, K + 1), of each at each query.
    """

    labels: Tensor
    log_probs: Tensor

    @classmethod
    def of(cls, log_probs: Tensor, labels: Tensor, *, blank: int) -> "Emissions":
        """Take the log-probabilities of some labels (B, K) and of the blank out of (B, N, V), waiting for them once."""
        index = torch.cat([labels, labels.new_full((len(labels), 1), blank)], 1)
        there = index.to(log_probs.device, non_blocking=True)
        return to_host(cls(there, log_probs.gather(2, there[:, None].expand(-1, log_probs.size(1), -1))))

    def paths(self, numbers: Tensor) -> Paths:
        """Return paths through them, (B, N), whose labels are numbers in `labels`."""
        return Paths.of(self.log_probs, numbers, blank=self.labels.size(1) - 1)._replace(
            labels=self.labels.gather(1, numbers)
        )


def no_path(log_probs: Tensor) -> ValueError:
    """Return the error that says that no path leads into the language."""
    return ValueError(f"{log_probs.size(1)} queries have no path with a probability to any output of the language")


class Arrivals(NamedTuple):
    """The best arc into each state, and the best one that reads another label than that.

    scores, arcs: (B, S); other_scores, other_arcs: (B, S); first_labels: (B, S).
    """

    scores: Tensor
    arcs: Tensor
    other_scores: Tensor
    other_arcs: Tensor
    first_labels: Tensor

    @classmethod
    def of(cls, in_label: Tensor, labels: Tensor, targets: Tensor, num_states: int) -> "Arrivals":
        """Sort out the arcs by the state they enter: (B, A), (A,), (A,)."""
        scores, arcs = best_by_state(in_label, targets, num_states)
        first_labels = labels[arcs]
        same = first_labels[:, targets] == labels
        others = best_by_state(in_label.masked_fill(same, NEVER), targets, num_states)
        return cls(scores, arcs, *others, first_labels)

    def other_than(self, labels: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
        """Return for each arc the best score at its source after another label than its own, and from which arc.

        A label right after itself would merge with it. labels, sources: (A,). Returns (B, A) each.
        """
        same = self.first_labels[:, sources] == labels
        scores = torch.where(same, self.other_scores[:, sources], self.scores[:, sources])
        return scores, torch.where(same, self.other_arcs[:, sources], self.arcs[:, sources])


def best_by_state(scores: Tensor, targets: Tensor, num_states: int) -> tuple[Tensor, Tensor]:
    """Return the largest score (B, S) of the arcs into each state, and such an arc (the last one where there is none).

    scores: (B, A); targets: (A,) the state that each arc enters.
    """
    batch, num_arcs = scores.shape
    index = targets.expand(batch, -1)
    best = scores.new_full((batch, num_states), NEVER).scatter_reduce(1, index, scores, "amax")
    arcs = torch.arange(num_arcs, device=scores.device).expand(batch, -1)
    candidates = torch.where(scores == best[:, targets], arcs, num_arcs - 1)
    last = arcs.new_full((batch, num_states), num_arcs - 1)
    return best, last.scatter_reduce(1, index, candidates, "amin")
