"""Given targets: their probability, the query that predicts each token, and the most probable path.

Legend: B batch, N queries, V labels, K targets of a sample, S padded target length, L = 2 S + 1 lattice states.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from narvl_plugin.ctc.lattice import (
    IMPOSSIBLE,
    Lattice,
    backward_scores,
    build_lattice,
    check_targets,
    forward_scores,
    length_mask,
    log_marginals,
    posteriors,
    skip_costs,
    state_emissions,
)


class Alignment(NamedTuple):
    """The token that each query predicts.

    Attributes:
        labels: (B, N), the label of each query.
        positions: (B, N), the index in the target of the predicted token; -1 for the blank.
        scores: (B,), the log-probability of the path.
    """

    labels: Tensor
    positions: Tensor
    scores: Tensor


def score_targets(log_probs: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int) -> Tensor:
    """Return the log-probability of K targets of each sample, summed over all paths.

    It equals `-query_ctc_loss`, without the gradient and the normalisation.

    Args:
        log_probs: (B, N, V), normalised.
        targets: (B, K, S), padded with any label.
        target_lengths: (B, K).
        blank: the label of the blank.

    Returns:
        (B, K), in nats; -inf for a target without a path.
    """
    lattice = build_lattice(targets.flatten(0, 1), target_lengths.flatten(), blank=blank)
    return total_scores(state_emissions(log_probs, lattice), lattice).view(target_lengths.shape)


def total_scores(emissions: Tensor, lattice: Lattice) -> Tensor:
    """Return the log-probabilities of targets from their emissions.

    Without a gradient on the CPU, torch's own CTC sums over the paths, in a tenth of the time for a single target.

    Args:
        emissions: (M, N, L), the log-probabilities of the states' labels.
        lattice: the lattice of the targets, (M, L).

    Returns:
        (M,), in nats; -inf for a target without a path.
    """
    has_tokens = bool(emissions.numel()) and emissions.size(2) > 1
    if has_tokens and emissions.device.type == "cpu" and not emissions.requires_grad:
        return _scores_by_torch(emissions, lattice)
    query_lengths = lattice.labels.new_full((len(emissions),), emissions.size(1))
    return log_marginals(forward_scores(emissions, lattice, query_lengths), lattice)


def _scores_by_torch(emissions: Tensor, lattice: Lattice) -> Tensor:
    """Return what `total_scores` returns. A label stands for its first place in the target, so that few are passed."""
    lengths = (lattice.final * torch.arange(lattice.final.size(1))).amax(1) // 2
    tokens = lattice.labels[:, 1::2]
    places = 1 + (tokens[:, :, None] == tokens[:, None]).int().argmax(2)
    log_probs = torch.cat([emissions[:, :, :1], emissions[:, :, 1::2]], 2).transpose(0, 1)
    queries = torch.full_like(lengths, len(log_probs))
    scores = -F.ctc_loss(log_probs, places, queries, lengths, blank=0, reduction="none")
    return scores.masked_fill(scores < IMPOSSIBLE / 2, -torch.inf)


def token_posteriors(log_probs: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int) -> Tensor:
    """Return the probability that a query predicts a token of the target, given the target.

    Several neighbouring queries may predict one token, so a token's row sums to 1 or more.

    Args:
        log_probs: (B, N, V), normalised.
        targets: (B, S), padded with any label.
        target_lengths: (B,).
        blank: the label of the blank.

    Returns:
        (B, S, N), 0 on padding.
    """
    lattice = build_lattice(targets, target_lengths, blank=blank)
    shares = state_posteriors(state_emissions(log_probs, lattice), lattice)[:, :, 1::2].transpose(1, 2)
    return shares * length_mask(target_lengths, targets.size(1))[..., None]


def state_posteriors(emissions: Tensor, lattice: Lattice) -> Tensor:
    """Return the probability of each lattice state at each query, given the target.

    Args:
        emissions: (B, N, L), the log-probabilities of the states' labels.
        lattice: the lattice of the targets, (B, L).

    Returns:
        (B, N, L).
    """
    query_lengths = lattice.labels.new_full((len(emissions),), emissions.size(1))
    forward = forward_scores(emissions, lattice, query_lengths)
    return posteriors(forward, backward_scores(emissions, lattice, query_lengths))


def viterbi(log_probs: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int) -> Alignment:
    """Find the most probable path that collapses to each target.

    Source: Viterbi's algorithm on CTC's lattice.

    Args:
        log_probs: (B, N, V).
        targets: (B, S), padded with any label.
        target_lengths: (B,).
        blank: the label of the blank.

    Returns:
        The path of each sample.

    Raises:
        TargetsDoNotFit: if a target needs more than N queries.
        ValueError: for labels and lengths that `query_ctc_loss` rejects.
    """
    num_queries, num_labels = log_probs.shape[1:]
    query_lengths = torch.full_like(target_lengths, num_queries)
    check_targets(targets, target_lengths, query_lengths, blank=blank, num_queries=num_queries, num_labels=num_labels)
    lattice = build_lattice(targets, target_lengths, blank=blank)
    return best_states(state_emissions(log_probs.detach(), lattice), lattice)


def best_states(emissions: Tensor, lattice: Lattice) -> Alignment:
    """Find the most probable path to each target from its emissions. The search runs on the CPU.

    Args:
        emissions: (B, N, L), the log-probabilities of the states' labels.
        lattice: the lattice of the targets, (B, L).

    Returns:
        The path of each sample.
    """
    skip_cost = skip_costs(lattice, emissions).numpy(force=True)
    heard = emissions.clamp(min=IMPOSSIBLE).numpy(force=True)
    rows = np.arange(len(heard))

    # In numpy: these arrays are so small that torch would spend its time on the calls.
    padded = np.full((len(heard), 2 + heard.shape[2]), IMPOSSIBLE, heard.dtype)
    scores, one_before, two_before = padded[:, 2:], padded[:, 1:-1], padded[:, :-2]
    scores[:, :1] = 0.0
    moves = []  # (B, L) each: by how many states the best path to a state moved at that query
    for query in range(heard.shape[1]):
        arrived = np.stack([scores, one_before, two_before + skip_cost])
        moves.append(arrived.argmax(0))
        scores[:] = arrived.max(0) + heard[:, query]

    ends = np.where(lattice.final.numpy(force=True), scores, IMPOSSIBLE)
    state = ends.argmax(1)
    path = np.empty(heard.shape[:2], np.int64)
    for query in reversed(range(len(moves))):
        path[:, query] = state
        state = state - moves[query][rows, state]
    states = torch.from_numpy(path).to(emissions.device)
    positions = torch.where(states % 2 == 1, states // 2, -1)
    path_scores = torch.from_numpy(ends.max(1)).to(emissions.device)
    return Alignment(lattice.labels.gather(1, states), positions, path_scores)
