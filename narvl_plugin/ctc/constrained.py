"""Constrained search: the most probable path whose tokens lie in a regular language.

Legend: B batch, N queries, V labels, A arcs and S states of an automaton, T tokens of an output.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from narvl_plugin.ctc.candidates import build_trie
from narvl_plugin.ctc.search import Hypothesis, collapse, hypotheses_of

NEVER = -torch.inf


class Automaton(NamedTuple):
    """A finite automaton that reads tokens; it starts in state 0.

    sources, labels, targets: (A,) int64, of each arc the state it leaves, the token it reads, the state it enters;
    accepting: (S,) bool, the states in which an output may end.
    """

    sources: Tensor
    labels: Tensor
    targets: Tensor
    accepting: Tensor

    def to(self, device: torch.device) -> "Automaton":
        """Return the same automaton on another device."""
        return Automaton(*(part.to(device) for part in self))


def sequence_of(allowed: Sequence[Tensor]) -> Automaton:
    """Return the automaton of outputs whose i-th token is one of `allowed[i]`, each int64 (K,): T = len(allowed)."""
    places = [torch.full_like(labels, place) for place, labels in enumerate(allowed)]
    sources = torch.cat(places)
    accepting = torch.zeros(len(allowed) + 1, dtype=torch.bool)
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


def may_end_in(automaton: Automaton, label: int) -> Automaton:
    """Return the automaton of the same outputs, and of each of them with `label` after it."""
    ends = automaton.accepting.nonzero()[:, 0]
    sources = torch.cat([automaton.sources, ends])
    labels = torch.cat([automaton.labels, torch.full_like(ends, label)])
    targets = torch.cat([automaton.targets, torch.full_like(ends, len(automaton.accepting))])
    return Automaton(sources, labels, targets, torch.cat([automaton.accepting, automaton.accepting.new_ones(1)]))


def constrained_search(log_probs: Tensor, automaton: Automaton, *, blank: int) -> list[Hypothesis]:
    """Find the most probable path that collapses to an output of the automaton's language.

    Where each query's most probable label gives such a path there is none better; the others are searched exactly. The
    score is that of the path, and not the sum over all paths of its output.

    log_probs: (B, N, V). Returns one hypothesis a sample. Raises ValueError if every output needs more than N queries.
    """
    automaton = automaton.to(log_probs.device)
    labels = log_probs.argmax(2)
    to_search = ~accepted(*collapse(labels, blank=blank)[::2], automaton)
    if bool(to_search.any()):
        labels[to_search] = best_paths(log_probs[to_search], automaton, blank=blank)
    return hypotheses_of(labels, log_probs.gather(2, labels[..., None])[..., 0], blank=blank)


def accepted(tokens: Tensor, lengths: Tensor, automaton: Automaton) -> Tensor:
    """Tell which outputs are in the automaton's language: (B, T), (B,) -> (B,)."""
    sources, labels, targets, accepting = automaton
    reached = torch.zeros(len(tokens), len(accepting), dtype=torch.bool, device=tokens.device)
    reached[:, 0] = True
    for place in range(tokens.size(1)):
        arcs = reached[:, sources] & (tokens[:, place, None] == labels)
        after = torch.zeros_like(reached).index_add(1, targets, arcs)
        reached = torch.where((place < lengths)[:, None], after, reached)
    return (reached & accepting).any(1)


def best_paths(log_probs: Tensor, automaton: Automaton, *, blank: int) -> Tensor:
    """Return the labels of each sample's most probable path into the language: (B, N, V) -> (B, N).

    By dynamic programming over (query, last arc, whether blanks followed it): O(N A) for each sample. Raises ValueError
    if there is none.
    """
    batch, num_queries, _ = log_probs.shape
    sources, labels, targets, accepting = automaton
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
    if bool((scores == NEVER).any()):
        raise ValueError(f"{num_queries} queries have no path with a probability to any output of the language")
    said = torch.cat([labels, labels.new_full((num_states,), blank)])
    path = []
    for move in reversed(moves):
        path.append(said[place])
        place = move.gather(1, place[:, None])[:, 0]
    return torch.stack(path[::-1], 1)


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
