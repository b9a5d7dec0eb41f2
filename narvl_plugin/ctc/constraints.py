"""Constraints: sets of valid outputs, and the most probable path to a valid output.

Legend: B batch, N queries, V labels, A arcs and S states of an automaton, T tokens of an output.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from narvl_plugin.ctc.answer_trie import build_trie
from narvl_plugin.ctc.collapse import Paths
from narvl_plugin.ctc.host import to_host

NEVER = -torch.inf


class OutputConstraint(Protocol):
    """A set of valid outputs."""

    def to(self, device: torch.device) -> "OutputConstraint":
        """Return the same constraint on another device."""

    def ending_in(self, label: int) -> "OutputConstraint":
        """Return the constraint that also accepts each valid output followed by `label`."""

    def alphabet(self) -> Tensor | None:
        """Return the distinct labels of the valid outputs; None if any label may occur."""

    def accepts(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Tell which outputs are valid: (B, T), (B,) -> (B,) bool."""

    def best_paths(self, log_probs: Tensor, *, blank: int) -> Paths:
        """Return each sample's most probable path to a valid output.

        The search runs on the CPU and synchronises with the device once.

        Args:
            log_probs: (B, N, V), on any device.
            blank: the label of the blank.

        Returns:
            The paths, on the CPU.

        Raises:
            ValueError: if a sample has no such path.
        """


class Automaton(NamedTuple):
    """The regular language of a finite automaton that reads tokens and starts in state 0.

    Attributes:
        sources: (A,) int64, the state that each arc leaves.
        labels: (A,) int64, the token that each arc reads.
        targets: (A,) int64, the state that each arc enters.
        accepting: (S,) bool, whether an output may end in the state.
    """

    sources: Tensor
    labels: Tensor
    targets: Tensor
    accepting: Tensor

    def to(self, device: torch.device) -> "Automaton":
        """Return the same automaton on another device without a synchronisation."""
        return Automaton(*(part.to(device, non_blocking=True) for part in self))

    def ending_in(self, label: int) -> "Automaton":
        """Return the automaton that also accepts each valid output followed by `label`."""
        ends = self.accepting.nonzero()[:, 0]
        sources = torch.cat([self.sources, ends])
        labels = torch.cat([self.labels, torch.full_like(ends, label)])
        targets = torch.cat([self.targets, torch.full_like(ends, len(self.accepting))])
        return Automaton(sources, labels, targets, torch.cat([self.accepting, self.accepting.new_ones(1)]))

    def keep(self, arcs: Tensor) -> "Automaton":
        """Return the automaton with the marked arcs, (A,) bool, alone."""
        return Automaton(self.sources[arcs], self.labels[arcs], self.targets[arcs], self.accepting)

    def alphabet(self) -> Tensor:
        """Return the distinct labels that the automaton reads."""
        return self.labels.unique()

    def accepts(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Tell which outputs are valid: (B, T), (B,) -> (B,) bool."""
        reached = torch.zeros(len(tokens), len(self.accepting), dtype=torch.bool, device=tokens.device)
        reached[:, 0] = True
        for place in range(tokens.size(1)):
            arcs = reached[:, self.sources] & (tokens[:, place, None] == self.labels)
            after = torch.zeros_like(reached).index_add(1, self.targets, arcs)
            reached = torch.where((place < lengths)[:, None], after, reached)
        return (reached & self.accepting).any(1)

    def best_paths(self, log_probs: Tensor, *, blank: int) -> Paths:
        """Return each sample's most probable path to a valid output; see `OutputConstraint.best_paths`."""
        vocabulary, automaton = self.numbered()
        read = Emissions.of(log_probs, vocabulary.expand(len(log_probs), -1), blank=blank)
        paths, scores = automaton.search(read.log_probs, blank=len(vocabulary))
        if bool((scores == NEVER).any()):
            raise no_path(log_probs)
        return read.paths(paths)

    def numbered(self) -> tuple[Tensor, "Automaton"]:
        """Return the sorted labels of the automaton, (K,), and the automaton that reads their indices instead."""
        vocabulary, numbers = self.labels.unique(return_inverse=True)
        return vocabulary, self._replace(labels=numbers)

    def search(self, log_probs: Tensor, *, blank: int) -> tuple[Tensor, Tensor]:
        """Return each sample's most probable path and its log-probability.

        Dynamic programming over (query, last arc, whether blanks followed it) takes O(N A) operations a sample.

        Args:
            log_probs: (B, N, V).
            blank: the label of the blank.

        Returns:
            (B, N) labels and (B,) log-probabilities, -inf for a sample without a path.
        """
        batch, num_queries, _ = log_probs.shape
        sources, labels, targets, accepting = self
        num_arcs, num_states = len(labels), len(accepting)
        emissions = log_probs[:, :, labels]
        # A path so far ends in an arc's label (B, A), or it ends in a blank or is empty (B, S).
        in_label = log_probs.new_full((batch, num_arcs), NEVER)
        in_blank = log_probs.new_full((batch, num_states), NEVER)
        in_blank[:, 0] = 0.0
        here = torch.arange(num_arcs, device=labels.device).expand(batch, -1)
        there = num_arcs + torch.arange(num_states, device=labels.device).expand(batch, -1)
        moves = []  # (B, A + S) each: the predecessor on the best path to each arc and state; states count from A
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
    """Return the automaton of the outputs whose token i is one of `allowed[i]`.

    Args:
        allowed: T tensors, each int64 (K,).

    Returns:
        The automaton of outputs of T tokens.
    """
    places = [torch.full_like(labels, place) for place, labels in enumerate(allowed)]
    sources = torch.cat(places)
    accepting = torch.zeros(len(allowed) + 1, dtype=torch.bool, device=sources.device)
    accepting[-1] = True
    return Automaton(sources, torch.cat(list(allowed)), sources + 1, accepting)


def one_of(sequences: Iterable[Sequence[int]]) -> Automaton:
    """Return the automaton, a trie, of the outputs in `sequences`."""
    rows = [torch.tensor(sequence, dtype=torch.int64) for sequence in sequences]
    trie = build_trie(pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows]))
    accepting = torch.zeros(len(trie.parents), dtype=torch.bool)
    accepting[trie.ends] = True
    places = torch.arange(1, len(trie.parents))
    return Automaton(trie.parents[1:], trie.labels[1:], places, accepting)


class LengthRange(NamedTuple):
    """All outputs of `minimum` to `maximum` tokens.

    Attributes:
        minimum: the least number of tokens.
        maximum: the greatest number of tokens.
        end: a label that may come last and does not count; None for no such label.
    """

    minimum: int
    maximum: int
    end: int | None = None

    def to(self, device: torch.device) -> "LengthRange":
        """Return the constraint itself; it holds no tensors."""
        return self

    def ending_in(self, label: int) -> "LengthRange":
        """Return the constraint on outputs without `label`, except that it may come last and does not count."""
        return LengthRange(self.minimum, self.maximum, label)

    def alphabet(self) -> None:
        """Return None: any label may occur."""
        return

    def accepts(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Tell which outputs are valid: (B, T), (B,) -> (B,) bool."""
        within = torch.ones_like(lengths, dtype=torch.bool)
        if self.end is not None:
            place = torch.arange(tokens.size(1), device=tokens.device)
            is_end = (tokens == self.end) & (place < lengths[:, None])
            is_last = place == lengths[:, None] - 1
            within = ~(is_end & ~is_last).any(1)
            lengths = lengths - (is_end & is_last).sum(1)
        return within & (lengths >= self.minimum) & (lengths <= self.maximum)

    def best_paths(self, log_probs: Tensor, *, blank: int) -> Paths:
        """Return each sample's most probable path to a valid output; see `OutputConstraint.best_paths`."""
        num_queries = log_probs.size(1)
        excluded = [blank] if self.end is None else [blank, self.end]
        found = torch.stack([labels_of_best_runs(row, excluded) for row in log_probs])  # with duplicates
        if self.end is not None:
            found = torch.cat([found, found.new_full((len(found), 1), self.end)], 1)
        read = Emissions.of(log_probs, found, blank=blank)
        paths = []
        end, number_of_blank = found.size(1) - 1, found.size(1)
        for read_labels, row in zip(read.labels[:, :-1], read.log_probs, strict=True):
            labels, which = read_labels.unique(return_inverse=True)
            # The index of each label; a label that was read more than once may take any of its indices.
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
    """Return the labels among the three most probable of some run of neighbouring queries.

    If only the number of tokens counts, some best path consists of these labels alone. At most two of a run's best
    three labels equal the labels of its neighbours. The third can replace the run's label.

    Args:
        log_probs: (N, V).
        excluded: labels that are found only if no others remain.

    Returns:
        (K,) labels, with duplicates; K depends on the shape of `log_probs` alone.
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
    """The log-probabilities that a search reads, on the CPU.

    Attributes:
        labels: (B, K + 1); the blank is last.
        log_probs: (B, N, K + 1), the log-probability of each label at each query.
    """

    labels: Tensor
    log_probs: Tensor

    @classmethod
    def of(cls, log_probs: Tensor, labels: Tensor, *, blank: int) -> "Emissions":
        """Gather the log-probabilities of some labels and of the blank with one synchronisation.

        Args:
            log_probs: (B, N, V).
            labels: (B, K).
            blank: the label of the blank.

        Returns:
            The log-probabilities, on the CPU.
        """
        index = torch.cat([labels, labels.new_full((len(labels), 1), blank)], 1)
        there = index.to(log_probs.device, non_blocking=True)
        return to_host(cls(there, log_probs.gather(2, there[:, None].expand(-1, log_probs.size(1), -1))))

    def paths(self, numbers: Tensor) -> Paths:
        """Return the paths (B, N) whose entries index `labels`."""
        return Paths.of(self.log_probs, numbers, blank=self.labels.size(1) - 1)._replace(
            labels=self.labels.gather(1, numbers)
        )


def no_path(log_probs: Tensor) -> ValueError:
    """Return the error for a sample without a path to a valid output."""
    return ValueError(f"{log_probs.size(1)} queries have no path with a probability to any output of the language")


class Arrivals(NamedTuple):
    """The best arc into each state, and the best arc that reads a different label.

    Attributes:
        scores: (B, S), the score of the best arc.
        arcs: (B, S), the best arc.
        other_scores: (B, S), the score of the best arc that reads a different label.
        other_arcs: (B, S), that arc.
        first_labels: (B, S), the label of the best arc.
    """

    scores: Tensor
    arcs: Tensor
    other_scores: Tensor
    other_arcs: Tensor
    first_labels: Tensor

    @classmethod
    def of(cls, in_label: Tensor, labels: Tensor, targets: Tensor, num_states: int) -> "Arrivals":
        """Group the arcs by the state they enter: (B, A), (A,), (A,)."""
        scores, arcs = best_by_state(in_label, targets, num_states)
        first_labels = labels[arcs]
        same = first_labels[:, targets] == labels
        others = best_by_state(in_label.masked_fill(same, NEVER), targets, num_states)
        return cls(scores, arcs, *others, first_labels)

    def other_than(self, labels: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best arrival at each arc's source after a label other than the arc's own.

        The same label at two neighbouring queries would merge into one token.

        Args:
            labels: (A,), the label of each arc.
            sources: (A,), the source of each arc.

        Returns:
            The scores and the arcs that arrive, (B, A) each.
        """
        same = self.first_labels[:, sources] == labels
        scores = torch.where(same, self.other_scores[:, sources], self.scores[:, sources])
        return scores, torch.where(same, self.other_arcs[:, sources], self.arcs[:, sources])


def best_by_state(scores: Tensor, targets: Tensor, num_states: int) -> tuple[Tensor, Tensor]:
    """Return the best arc into each state.

    Args:
        scores: (B, A).
        targets: (A,), the state that each arc enters.
        num_states: the number of states S.

    Returns:
        The largest score and such an arc, (B, S) each; the last arc for a state that no arc enters.
    """
    batch, num_arcs = scores.shape
    index = targets.expand(batch, -1)
    best = scores.new_full((batch, num_states), NEVER).scatter_reduce(1, index, scores, "amax")
    arcs = torch.arange(num_arcs, device=scores.device).expand(batch, -1)
    candidates = torch.where(scores == best[:, targets], arcs, num_arcs - 1)
    last = arcs.new_full((batch, num_states), num_arcs - 1)
    return best, last.scatter_reduce(1, index, candidates, "amin")
