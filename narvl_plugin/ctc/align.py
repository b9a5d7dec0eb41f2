"""Alignment: the single most probable path of the queries that spells a given target.

Legend: B batch, N queries, V labels, S padded target length, L = 2 S + 1 lattice states.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from narvl_plugin.ctc.lattice import (
    IMPOSSIBLE,
    arrivals,
    build_lattice,
    check_targets,
    gather_labels,
    skip_costs,
    start_scores,
)


class Alignment(NamedTuple):
    """Which query says which token.

    labels: (B, N) label of each query; positions: (B, N) index in the target of the token it says, -1 for blank;
    scores: (B,) log-probability of the path.
    """

    labels: Tensor
    positions: Tensor
    scores: Tensor


def viterbi(log_probs: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int) -> Alignment:
    """Find the most probable path that collapses to each target.

    log_probs: (B, N, V); targets: (B, S) padded with anything; target_lengths: (B,).
    Raises TargetsDoNotFit and ValueError as `query_ctc_loss` does. Source: Viterbi's algorithm on CTC's lattice.
    """
    batch, num_queries, num_labels = log_probs.shape
    query_lengths = torch.full_like(target_lengths, num_queries)
    check_targets(targets, target_lengths, query_lengths, blank=blank, num_labels=num_labels)
    lattice = build_lattice(targets, target_lengths, blank=blank)
    emissions = gather_labels(log_probs.detach(), lattice.labels).clamp(min=IMPOSSIBLE)
    skip_cost = skip_costs(lattice, emissions)

    scores = start_scores(emissions)
    moves = []  # (B, L) each: by how many states the best path to a state moved at that query
    for query in range(num_queries):
        best, move = torch.stack(arrivals(scores, skip_cost)).max(0)
        scores = best + emissions[:, query]
        moves.append(move)

    path_scores, state = scores.masked_fill(~lattice.final, IMPOSSIBLE).max(1)
    states = []
    for move in reversed(moves):
        states.append(state)
        state = state - move.gather(1, state[:, None])[:, 0]
    path = torch.stack(states[::-1], 1) if states else state.new_empty(batch, 0)
    labels = lattice.labels.gather(1, path)
    return Alignment(labels, torch.where(path % 2 == 1, path // 2, -1), path_scores)
