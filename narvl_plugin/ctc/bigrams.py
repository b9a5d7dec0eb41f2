"""Expected bigrams: the expected count of each pair of neighbouring output tokens, in closed form.

The likelihood of a target requires all of its tokens in order. A student that mixes two correct wordings gets
neighbouring tokens wrong. Queries are independent, so the expected count of neighbours is exact. Token a at query i
and token b at a later query j are neighbours if all queries between them predict the blank.

Legend: B batch, N queries, V labels, K targets of a sample, S padded target length.
"""

import torch
from torch import Tensor

from narvl_plugin.ctc.lattice import accumulation_dtype, gather_labels, length_mask


def silence_between(blank_log_probs: Tensor) -> Tensor:
    """Return the probability that all queries between two queries predict the blank.

    Args:
        blank_log_probs: (B, N), the log-probability of the blank at each query.

    Returns:
        (B, N, N), zero unless the first query precedes the second.
    """
    through = blank_log_probs.cumsum(1)
    before = through - blank_log_probs
    later = torch.ones(through.size(1), through.size(1), dtype=torch.bool, device=through.device).triu(1)
    # Masked before the exponential: a difference of the wrong sign would overflow and make its gradient NaN.
    gaps = (before[:, None, :] - through[:, :, None]).masked_fill(~later, 0.0)
    return gaps.exp() * later


def expected_length(probs: Tensor, *, blank: int) -> Tensor:
    """Return the exact expected number of tokens of the collapsed output: (B, N, V) -> (B,).

    A query adds a token unless it predicts the blank or repeats the label of the query before it.
    """
    spoken = 1 - probs[:, :, blank]
    repeated = (probs[:, 1:] * probs[:, :-1]).sum(2) - probs[:, 1:, blank] * probs[:, :-1, blank]
    return spoken.sum(1) - repeated.sum(1)


def bigram_f1(logits: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int) -> Tensor:
    """Return the F1 between the expected bigrams of the output and those of each target.

    A bigram counts as found at most as often as the target contains it. If the output is certain, the result is the F1
    of its bigrams.

    Source: Shao and Feng, Non-Monotonic Latent Alignments for CTC-Based Non-Autoregressive Machine Translation,
    NeurIPS 2022 (https://arxiv.org/abs/2210.03953).

    Args:
        logits: (B, N, V), unnormalised.
        targets: (B, K, S) labels, padded with any label.
        target_lengths: (B, K); a target of fewer than 2 tokens has no bigram, and its F1 is 0.
        blank: the label of the blank.

    Returns:
        (B, K), between 0 and 1, in float32 (float64 stays), with gradients.
    """
    batch, num_targets, longest = targets.shape
    probs = logits.softmax(2, dtype=accumulation_dtype(logits.dtype))
    if longest < 2:
        return probs.new_zeros(batch, num_targets)
    within = length_mask(target_lengths.flatten(), longest).view_as(targets)
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
    # An output of T tokens has T - 1 bigrams; an empty output has 0.
    said_in_all = expected_length(probs, blank=blank) - 1 + probs[:, :, blank].prod(1)
    return 2 * found / (said_in_all.clamp(min=0)[:, None] + present.sum(2)).clamp(min=1)
