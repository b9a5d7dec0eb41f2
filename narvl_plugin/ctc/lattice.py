"""The label lattice of CTC: which label each query may take, and the forward and backward sums over its paths.

Legend: B batch, N queries, V labels, S padded target length, L = 2 S + 1 lattice states.

State 2k of a target y stands for the blank before token k, state 2k + 1 for token k itself, and the last state for
the blank after the last token. A path gives every query one state; it never goes back, moves by one state or stays,
and may jump over a blank only between two different tokens (over the blank between equal ones it would be read as
one token). Source: Graves et al., Connectionist Temporal Classification, ICML 2006, section 4.1.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Stands for log 0. It is finite so that neither sums nor their gradients ever meet inf - inf; it is so low that
# no sum of real log-probabilities comes near it, and a float32 still holds it added up over any number of queries.
IMPOSSIBLE = -1e30


class TargetsDoNotFit(ValueError):
    """Some targets need more queries than there are.

    indices: positions of those samples in the batch; needs: queries each of them needs; available: queries it has.
    """

    def __init__(self, indices: list[int], needs: list[int], available: list[int]) -> None:
        self.indices, self.needs, self.available = indices, needs, available
        rows = "; ".join(
            f"target {index} needs {need} queries but has {has}"
            for index, need, has in zip(indices, needs, available, strict=True)
        )
        super().__init__(f"{len(indices)} target(s) do not fit: {rows}. Use more queries or shorter targets.")


class Lattice(NamedTuple):
    """The states that paths of a batch of targets run through.

    labels: (B, L) the label each state emits, blank on padding; skip: (B, L) whether the state may be entered from
    two states before it; final: (B, L) whether a path may end in it.
    """

    labels: Tensor
    skip: Tensor
    final: Tensor


def inside(lengths: Tensor, size: int) -> Tensor:
    """Mark what is not padding: (B,) lengths -> (B, size) bool, true at positions before the sample's length."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def repeats(targets: Tensor, target_lengths: Tensor) -> Tensor:
    """Mark the tokens that equal the token before them: (B, S), (B,) -> (B, S) bool, false on padding."""
    equal = F.pad(targets[:, 1:] == targets[:, :-1], (min(1, targets.size(1)), 0))
    return equal & inside(target_lengths, targets.size(1))


def queries_needed(targets: Tensor, target_lengths: Tensor) -> Tensor:
    """Count the queries of the shortest path of each target: its tokens, and a blank between equal neighbours.

    targets: (B, S) padded with anything; target_lengths: (B,). Returns (B,) integers.
    """
    return target_lengths + repeats(targets, target_lengths).sum(1)


def check_targets(
    targets: Tensor, target_lengths: Tensor, query_lengths: Tensor, *, blank: int, num_queries: int, num_labels: int
) -> None:
    """Refuse targets that no path can spell.

    targets: (B, S) padded with anything; target_lengths, query_lengths: (B,).
    Raises ValueError for lengths outside [0, S] and [0, num_queries], and one that names the sample for a label outside
    [0, num_labels) or equal to the blank; TargetsDoNotFit for targets that need more queries than query_lengths grants.
    """
    bounded = (("target", target_lengths, targets.size(1)), ("query", query_lengths, num_queries))
    outside = [(lengths < 0) | (lengths > limit) for _, lengths, limit in bounded]
    unusable = (targets < 0) | (targets >= num_labels) | (targets == blank)
    unusable &= inside(target_lengths, targets.size(1))
    needs = queries_needed(targets, target_lengths)
    too_long = needs > query_lengths
    if not bool(unusable.any() | (too_long | outside[0] | outside[1]).any()):  # in the usual case one wait
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
    """Lay out the states of each target: blank, y1, blank, y2, ..., blank.

    targets: (B, S) padded with anything; target_lengths: (B,).
    """
    batch, longest = targets.shape
    within = inside(target_lengths, longest)
    labels = targets.new_full((batch, 2 * longest + 1), blank, dtype=torch.long)
    labels[:, 1::2] = targets.masked_fill(~within, blank)
    skip = torch.zeros_like(labels, dtype=torch.bool)
    skip[:, 1::2] = within & ~repeats(targets, target_lengths)
    skip[:, :2] = False  # nothing lies two states before these
    last = 2 * target_lengths[:, None]
    state = torch.arange(labels.size(1), device=labels.device)
    return Lattice(labels, skip, (state == last) | (state == last - 1))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Name the type to compute in: float64 stays, every other float type is summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather_labels(scores: Tensor, labels: Tensor) -> Tensor:
    """Pick labels out of the vocabulary: (B, N, V) scores, (B, L) -> (B, N, L) in float32 (double stays)."""
    index = labels[:, None].expand(-1, scores.size(1), -1)
    return scores.gather(2, index).to(accumulation_dtype(scores.dtype))


def state_emissions(scores: Tensor, lattice: Lattice) -> Tensor:
    """Give each state the score of its label at each query, in float32 (double stays).

    scores: (B, N, V); the lattice is that of K targets a sample, (B K, L), all of which share one pass over the
    scores. Returns (B K, N, L).
    """
    states = lattice.labels.size(1)
    side_by_side = lattice.labels.reshape(len(scores), len(lattice.labels) // max(1, len(scores)) * states)
    return gather_labels(scores, side_by_side).unflatten(2, (-1, states)).transpose(1, 2).flatten(0, 1)


def arrivals(scores: Tensor, skip_cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Line up, for every state, the scores of the paths that stay in it, step into it and skip into it.

    scores: (B, L) of the states before the move; skip_cost: (B, L), 0 where a skip into the state is allowed.
    Returns three (B, L).
    """
    padded = F.pad(scores, (2, 0), value=IMPOSSIBLE)
    return scores, padded[:, 1:-1], padded[:, :-2] + skip_cost


def start_scores(emissions: Tensor) -> Tensor:
    """Score the states before any query has spoken: (B, N, L) -> (B, L), as if a blank had just been read.

    From there the usual moves reach exactly the states a path may begin in, so that the first query is no special
    case, and a target of no tokens is complete even with no query at all.
    """
    start = emissions.new_full((emissions.size(0), emissions.size(2)), IMPOSSIBLE)
    start[:, 0] = 0.0
    return start


def skip_costs(lattice: Lattice, like: Tensor) -> Tensor:
    """Turn the lattice's permissions to skip into scores: (B, L), 0 or IMPOSSIBLE, of the type of `like`."""
    return torch.zeros_like(lattice.skip, dtype=like.dtype).masked_fill(~lattice.skip, IMPOSSIBLE)


def forward_scores(emissions: Tensor, lattice: Lattice, query_lengths: Tensor) -> Tensor:
    """Sum, in logs, over the beginnings of all paths (alpha).

    emissions: (B, N, L) log-probability of each state's label at each query; query_lengths: (B,) queries in use.
    Returns (B, N + 1, L): entry [b, t, s] is the log of the summed probability of the first t queries along all
    paths that are then in state s; past the queries in use it stays as it is.
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
    """Sum, in logs, over the ends of all paths (beta).

    Shapes as in `forward_scores`; entry [b, t, s] is the log of the summed probability of the queries from t on
    (counted from 0) along all paths that are in state s before them and end in a final state.
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
    """Sum, in logs, over all complete paths: (B, N + 1, L) forward scores -> (B,), -inf where no path is possible."""
    total = forward[:, -1].masked_fill(~lattice.final, IMPOSSIBLE).logsumexp(1)
    return total.masked_fill(total < IMPOSSIBLE / 2, float("-inf"))


def posteriors(forward: Tensor, backward: Tensor) -> Tensor:
    """Say how probable each state is at each query, given the target.

    forward, backward: (B, N + 1, L). Returns (B, N, L) that sums to 1 over the states. The softmax divides by each
    query's own sum, which is the marginal up to rounding, so that rounding does not add up over the queries.
    """
    return (forward[:, 1:] + backward[:, 1:]).softmax(2)
