"""Targets that are given: their probability, which query says which token, and the most probable path.

Legend: B batch, N queries, V labels, K targets of a sample, S padded target length, L = 2 S + 1 lattice states.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from narvl_plugin.ctc.lattice import (
    IMPOSSIBLE,
    Lattice,
    arrivals,
    backward_scores,
    build_lattice,
    check_targets,
    forward_scores,
    inside,
    log_marginals,
    posteriors,
    skip_costs,
    start_scores,
    state_emissions,
)


class Alignment(NamedTuple):
    """Which query says which token.

    labels: (B, N) label of each query; positions: (B, N) index in the target of the token it says, -1 for blank;
    scores: (B,) log-probability of the path.
    """

    labels: Tensor
    positions: Tensor
    scores: Tensor


def score_targets(log_probs: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int) -> Tensor:
    """Return log p(target), in nats, of K targets a sample, summed over all paths: (B, K), -inf where there is none.

    log_probs: (B, N, V), normalised; targets: (B, K, S) padded with anything; target_lengths: (B, K). The same as
    `-query_ctc_loss`, without its gradient and normalisation.
    """
    lattice = build_lattice(targets.flatten(0, 1), target_lengths.flatten(), blank=blank)
    return total_scores(state_emissions(log_probs, lattice), lattice).view(target_lengths.shape)


def total_scores(emissions: Tensor, lattice: Lattice) -> Tensor:
    """Do the same for targets of whose lattice, (M, L), the log-probabilities are known: (M, N, L) -> (M,)."""
    query_lengths = lattice.labels.new_full((len(emissions),), emissions.size(1))
    return log_marginals(forward_scores(emissions, lattice, query_lengths), lattice)


def token_posteriors(log_probs: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int) -> Tensor:
    """Return the probability that a query says a token of the target, given the target: (B, S, N).

    A token may be said by several neighbouring queries, so that its row sums to 1 or more; 0 on padding.

    log_probs: (B, N, V), normalised; targets: (B, S) padded with anything; target_lengths: (B,).
    """
    lattice = build_lattice(targets, target_lengths, blank=blank)
    shares = state_posteriors(state_emissions(log_probs, lattice), lattice)[:, :, 1::2].transpose(1, 2)
    return shares * inside(target_lengths, targets.size(1))[..., None]


def state_posteriors(emissions: Tensor, lattice: Lattice) -> Tensor:
    """Return the probability that a query is in a state of its target's lattice, (B, L), given the target: (B, N, L).

    emissions: (B, N, L), log-probabilities of the states' labels.
    """
    query_lengths = lattice.labels.new_full((len(emissions),), emissions.size(1))
    forward = forward_scores(emissions, lattice, query_lengths)
    return posteriors(forward, backward_scores(emissions, lattice, query_lengths))


def viterbi(log_probs: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int) -> Alignment:
    """Find the most probable path that collapses to each target.

    log_probs: (B, N, V); targets: (B, S) padded with anything; target_lengths: (B,).
    Raises TargetsDoNotFit and ValueError as `query_ctc_loss` does. Source: Viterbi's algorithm on CTC's lattice.
    """
    num_queries, num_labels = log_probs.shape[1:]
    query_lengths = torch.full_like(target_lengths, num_queries)
    check_targets(targets, target_lengths, query_lengths, blank=blank, num_queries=num_queries, num_labels=num_labels)
    lattice = build_lattice(targets, target_lengths, blank=blank)
    return best_states(state_emissions(log_probs.detach(), lattice), lattice)


def best_states(emissions: Tensor, lattice: Lattice) -> Alignment:
    """Do the same for targets of whose lattice, (B, L), the log-probabilities are known: (B, N, L)."""
    batch, num_queries, _ = emissions.shape
    emissions = emissions.clamp(min=IMPOSSIBLE)
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
