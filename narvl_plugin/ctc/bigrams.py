"""Expected bigrams: how many pairs of neighbouring tokens the queries will say, in closed form.

The likelihood of a target asks that all its tokens stand in their order. What a student that mixes two good wordings
gets wrong are neighbours, and of those the queries' independence allows the exact expectation: token a at query i and
token b at a later query j are neighbours in the output when all queries between them say blank.

Legend: B batch, N queries, V labels, K targets of a sample, S padded target length.
"""

import torch
from torch import Tensor

from narvl_plugin.ctc.lattice import accumulation_dtype, gather_labels, inside


def silence_between(blank_log_probs: Tensor) -> Tensor:
    """Probability that all queries between two say blank: (B, N) -> (B, N, N), zero unless the first comes first."""
    through = blank_log_probs.cumsum(1)
    before = through - blank_log_probs
    later = torch.ones(through.size(1), through.size(1), dtype=torch.bool, device=through.device).triu(1)
    # Masked before the exponential: a difference of the wrong sign would overflow it, and spoil its gradient.
    gaps = (before[:, None, :] - through[:, :, None]).masked_fill(~later, 0.0)
    return gaps.exp() * later


def expected_length(probs: Tensor, *, blank: int) -> Tensor:
    """Expected number of tokens of the collapsed output, exactly: (B, N, V) -> (B,).

    A query says a new token unless it says blank or repeats the label of the query before it.
    """
    spoken = 1 - probs[:, :, blank]
    repeated = (probs[:, 1:] * probs[:, :-1]).sum(2) - probs[:, 1:, blank] * probs[:, :-1, blank]
    return spoken.sum(1) - repeated.sum(1)


def bigram_f1(logits: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int) -> Tensor:
    """F1 of the bigrams that the queries are expected to say against those of each target.

    A bigram counts as found up to as often as the target has it; where the output is certain this is the F1 of its
    bigrams. logits: (B, N, V), unnormalised; targets: (B, K, S) labels, padded with anything; target_lengths: (B, K),
    less than 2 for a target that has no bigram, whose F1 is 0. Returns (B, K) between 0 and 1, in float32 (double
    stays), with gradients.

    Source: Shao and Feng, Non-Monotonic Latent Alignments for CTC-Based Non-Autoregressive Machine Translation,
    NeurIPS 2022 (https://arxiv.org/abs/2210.03953).
    """
    batch, num_targets, longest = targets.shape
    probs = logits.softmax(2, dtype=accumulation_dtype(logits.dtype))
    if longest < 2:
        return probs.new_zeros(batch, num_targets)
    within = inside(target_lengths.flatten(), longest).view_as(targets)
    labels = targets.masked_fill(~within, blank)
    present = within[:, :, 1:]  # (B, K, S - 1): bigram s is token s and the next

    tiny = torch.finfo(probs.dtype).tiny
    silence = silence_between(probs[:, :, blank].clamp(min=tiny).log())
    said = gather_labels(probs, labels.flatten(1)).transpose(1, 2)
    said = said.unflatten(1, (num_targets, longest))  # (B, K, S, N)
    first, second = said[:, :, :-1], said[:, :, 1:]
    with torch.autocast(logits.device.type, enabled=False):
        counts = (torch.einsum("bksi,bij->bksj", first, silence) * second).sum(3)
    # Equal labels at neighbouring queries are one token.
    repeated = labels[:, :, 1:] == labels[:, :, :-1]
    counts = counts - repeated * (first[..., :-1] * second[..., 1:]).sum(3)

    # Equal bigrams of a target are one kind, counted where it first appears.
    pairs = torch.stack([labels[:, :, :-1], labels[:, :, 1:]], dim=3)
    equal = (pairs[:, :, :, None] == pairs[:, :, None]).all(4) & present[:, :, None] & present[:, :, :, None]
    times = equal.sum(3)
    is_first = present & ~equal.tril(-1).any(3)
    found = (torch.minimum(counts, times.to(counts.dtype)) * is_first).sum(2)
    # An output of T tokens has T - 1 bigrams, or none where T is 0.
    said_in_all = expected_length(probs, blank=blank) - 1 + probs[:, :, blank].prod(1)
    return 2 * found / (said_in_all.clamp(min=0)[:, None] + present.sum(2)).clamp(min=1)
