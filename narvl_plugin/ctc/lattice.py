"""The label lattice of CTC: the labels that each query may take, and the forward and backward sums over its paths.

Legend: B batch, N queries, V labels, S padded target length, L = 2 S + 1 lattice states.

State 2k of a target y is the blank before token k, and state 2k + 1 is token k itself. The last state is the blank
after the last token. A path gives every query one state. From query to query it stays or moves forward by one state.
It may skip a blank only between two different tokens, because equal tokens without a blank merge.
Source: Graves et al., Connectionist Temporal Classification, ICML 2006, section 4.1.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Represents log 0. It is finite, so sums and their gradients never meet inf - inf. No sum of real log-probabilities
# comes near it, and its sum over any number of queries still fits into a float32.
IMPOSSIBLE = -1e30


class TargetsDoNotFit(ValueError):
    """Some targets need more queries than are available.

    Attributes:
        indices: the positions of those samples in the batch.
        needs: the number of queries that each of them needs.
        available: the number of queries that each of them has.
    """

    def __init__(self, indices: list[int], needs: list[int], available: list[int]) -> None:
        self.indices, self.needs, self.available = indices, needs, available
        rows = "; ".join(
            f"target {index} needs {need} queries but has {has}"
            for index, need, has in zip(indices, needs, available, strict=True)
        )
        super().__init__(f"{len(indices)} target(s) do not fit: {rows}. Use more queries or shorter targets.")


class Lattice(NamedTuple):
    """The states of a batch of targets.

    Attributes:
        labels: (B, L), the label that each state emits; the blank on padding.
        skip: (B, L), whether a path may enter the state from two states before it.
        final: (B, L), whether a path may end in the state.
    """

    labels: Tensor
    skip: Tensor
    final: Tensor


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """Return the mask of positions before each length: (...) lengths -> (..., size) bool."""
    return torch.arange(size, device=lengths.device) < lengths[..., None]


def repeats(targets: Tensor, target_lengths: Tensor) -> Tensor:
    """Mark the tokens that equal the token before them: (B, S), (B,) -> (B, S) bool, false on padding."""
    equal = F.pad(targets[:, 1:] == targets[:, :-1], (min(1, targets.size(1)), 0))
    return equal & length_mask(target_lengths, targets.size(1))


def min_queries(targets: Tensor, target_lengths: Tensor) -> Tensor:
    """Count the queries of the shortest path of each target: its tokens, and a blank between equal neighbours.

    Args:
        targets: (B, S), padded with any label.
        target_lengths: (B,).

    Returns:
        (B,) integers.
    """
    return target_lengths + repeats(targets, target_lengths).sum(1)


def check_targets(
    targets: Tensor, target_lengths: Tensor, query_lengths: Tensor, *, blank: int, num_queries: int, num_labels: int
) -> None:
    """Check that every target has a path.

    Args:
        targets: (B, S), padded with any label.
        target_lengths: (B,).
        query_lengths: (B,), the number of queries of each sample.
        blank: the label of the blank.
        num_queries: the largest allowed query length.
        num_labels: the number of labels V.

    Raises:
        ValueError: for a target length outside [0, S] or a query length outside [0, num_queries]. Also for a label
            outside [0, num_labels) or equal to the blank.
        TargetsDoNotFit: for targets that need more queries than `query_lengths` grants.
    """
    bounded = (("target", target_lengths, targets.size(1)), ("query", query_lengths, num_queries))
    outside = [(lengths < 0) | (lengths > limit) for _, lengths, limit in bounded]
    unusable = (targets < 0) | (targets >= num_labels) | (targets == blank)
    unusable &= length_mask(target_lengths, targets.size(1))
    needs = min_queries(targets, target_lengths)
    too_long = needs > query_lengths
    if not bool(unusable.any() | (too_long | outside[0] | outside[1]).any()):  # one synchronisation if all is well
        return
    for (name, lengths, limit), wrong in zip(bounded, outside, strict=True):
        if bool(wrong.any()):
            raise ValueError(f"{name} lengths {lengths.tolist()} must be in [0, {limit}]")
    if bool(unusable.any()):
        sample, position = unusable.nonzero()[0].tolist()
        raise ValueError(
            f"target {sample} has label {targets[sample, position].item()} at position {position}; "
            f"labels must be in [0, {num_labels}) and differ from the blank, which is {blank}"
        )
    raise TargetsDoNotFit(
        too_long.nonzero().flatten().tolist(), needs[too_long].tolist(), query_lengths[too_long].tolist()
    )


def build_lattice(targets: Tensor, target_lengths: Tensor, *, blank: int) -> Lattice:
    """Build the states of each target: blank, y1, blank, y2, ..., blank.

    Args:
        targets: (B, S), padded with any label.
        target_lengths: (B,).
        blank: the label of the blank.

    Returns:
        The lattice, (B, L).
    """
    batch, longest = targets.shape
    labels = targets.new_full((batch, 2 * longest + 1), blank, dtype=torch.long)
    labels[:, 1::2] = torch.where(length_mask(target_lengths, longest), targets, blank)
    skip = torch.zeros_like(labels, dtype=torch.bool)  # nothing lies two states before the first two
    skip[:, 2:] = (labels[:, 2:] != blank) & (labels[:, 2:] != labels[:, :-2])
    tokens_begun = torch.arange(1, labels.size(1) + 1, device=labels.device) // 2  # up to each state
    return Lattice(labels, skip, tokens_begun == target_lengths[:, None])


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of sums: float64 for float64, float32 for every other float type."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather_labels(scores: Tensor, labels: Tensor) -> Tensor:
    """Gather the scores of labels: (B, N, V) scores, (B, L) -> (B, N, L) in float32 (float64 stays)."""
    index = labels[:, None].expand(-1, scores.size(1), -1)
    return scores.gather(2, index).to(accumulation_dtype(scores.dtype))


def state_emissions(scores: Tensor, lattice: Lattice) -> Tensor:
    """Return the score of each state's label at each query.

    Args:
        scores: (B, N, V).
        lattice: the lattice of K targets of each sample, (B K, L); they share one pass over the scores.

    Returns:
        (B K, N, L), in float32 (float64 stays).
    """
    states = lattice.labels.size(1)
    side_by_side = lattice.labels.reshape(len(scores), len(lattice.labels) // max(1, len(scores)) * states)
    return gather_labels(scores, side_by_side).unflatten(2, (-1, states)).transpose(1, 2).flatten(0, 1)


def arrivals(scores: Tensor, skip_cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scores of the paths that stay in each state, step into it and skip into it.

    Args:
        scores: (B, L), the scores of the states before the move.
        skip_cost: (B, L), 0 where a skip into the state is allowed.

    Returns:
        Three tensors (B, L).
    """
    padded = F.pad(scores, (2, 0), value=IMPOSSIBLE)
    return scores, padded[:, 1:-1], padded[:, :-2] + skip_cost


def start_scores(emissions: Tensor) -> Tensor:
    """Return the scores of the states before the first query: (B, N, L) -> (B, L), as if a blank had just been read.

    The usual moves from there reach exactly the states in which a path may begin. The first query is then no special
    case, and an empty target is complete without any query.
    """
    start = emissions.new_full((emissions.size(0), emissions.size(2)), IMPOSSIBLE)
    start[:, 0] = 0.0
    return start


def skip_costs(lattice: Lattice, like: Tensor) -> Tensor:
    """Convert the lattice's allowed skips to scores: (B, L), 0 or IMPOSSIBLE, of the type of `like`."""
    return torch.zeros_like(lattice.skip, dtype=like.dtype).masked_fill(~lattice.skip, IMPOSSIBLE)


def forward_scores(emissions: Tensor, lattice: Lattice, query_lengths: Tensor) -> Tensor:
    """Sum over the beginnings of all paths, in logs (alpha).

    Args:
        emissions: (B, N, L), the log-probability of each state's label at each query.
        lattice: the lattice of the targets, (B, L).
        query_lengths: (B,), the number of queries in use.

    Returns:
        (B, N + 1, L). Entry [b, t, s] is the log of the summed probability of the first t queries. The sum is over all
        paths that are then in state s. It is constant after the queries in use.
    """
    emissions = emissions.clamp(min=IMPOSSIBLE)
    skip_cost = skip_costs(lattice, emissions)
    scores = start_scores(emissions)
    history = [scores]
    for query in range(emissions.size(1)):
        stay, step, skip = arrivals(scores, skip_cost)
        moved = torch.logaddexp(torch.logaddexp(stay, step), skip) + emissions[:, query]
        scores = torch.where((query < query_lengths)[:, None], moved, scores)
        history.append(scores)
    return torch.stack(history, dim=1)


def backward_scores(emissions: Tensor, lattice: Lattice, query_lengths: Tensor) -> Tensor:
    """Sum over the ends of all paths, in logs (beta).

    Args:
        emissions: (B, N, L), the log-probability of each state's label at each query.
        lattice: the lattice of the targets, (B, L).
        query_lengths: (B,), the number of queries in use.

    Returns:
        (B, N + 1, L). Entry [b, t, s] is the log of the summed probability of the queries from t on, counted from 0.
        The sum is over all paths that are in state s before these queries and end in a final state.
    """
    emissions = emissions.clamp(min=IMPOSSIBLE)
    skip_cost = skip_costs(lattice, emissions)
    scores = torch.zeros_like(skip_cost).masked_fill(~lattice.final, IMPOSSIBLE)
    history = [scores]
    for query in reversed(range(emissions.size(1))):
        ahead = emissions[:, query] + scores
        step = F.pad(ahead, (0, 2), value=IMPOSSIBLE)[:, 1:-1]
        skip = F.pad(ahead + skip_cost, (0, 2), value=IMPOSSIBLE)[:, 2:]
        moved = torch.logaddexp(torch.logaddexp(ahead, step), skip)
        scores = torch.where((query < query_lengths)[:, None], moved, scores)
        history.append(scores)
    return torch.stack(history[::-1], dim=1)


def log_marginals(forward: Tensor, lattice: Lattice) -> Tensor:
    """Sum over all complete paths, in logs: (B, N + 1, L) forward scores -> (B,), -inf where no path is possible."""
    total = forward[:, -1].masked_fill(~lattice.final, IMPOSSIBLE).logsumexp(1)
    return total.masked_fill(total < IMPOSSIBLE / 2, float("-inf"))


def posteriors(forward: Tensor, backward: Tensor) -> Tensor:
    """Return the probability of each state at each query, given the target.

    The softmax divides by each query's own sum, which is the marginal up to rounding. Rounding errors thus do not
    accumulate over the queries.

    Args:
        forward: (B, N + 1, L), from `forward_scores`.
        backward: (B, N + 1, L), from `backward_scores`.

    Returns:
        (B, N, L), which sums to 1 over the states.
    """
    return (forward[:, 1:] + backward[:, 1:]).softmax(2)
