"""Sampled paths: what the queries say if each label is drawn from its query's distribution.

Legend: B batch, N queries, V labels, M paths drawn of each sample, T tokens of the longest output.
"""

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from narvl_plugin.ctc.collapse import collapse
from narvl_plugin.ctc.lattice import accumulation_dtype


def sample_paths(logits: Tensor, number: int) -> Tensor:
    """Draw paths of each sample, by torch's own random numbers: (B, N, V), unnormalised -> (B, M, N) labels."""
    probabilities = logits.detach().flatten(0, 1).softmax(1, dtype=accumulation_dtype(logits.dtype))
    drawn = torch.multinomial(probabilities, number, replacement=True)
    return drawn.unflatten(0, logits.shape[:2]).transpose(1, 2)


def spread_paths(log_probs: Tensor, number: int) -> Tensor:
    """Draw paths evenly, without random numbers: (B, N, V), normalised -> (B, M, N) labels, the same each time.

    Means over them are nearer to the expectation than over as many random paths; best where M is a power of two.
    Source: Sobol's sequence (Sobol, 1967), in the middle of its cells.
    """
    points = SobolEngine(log_probs.size(1)).draw(number).to(log_probs, non_blocking=True) + 0.5 / number  # (M, N)
    reached = log_probs.exp().cumsum(2)
    labels = torch.searchsorted(reached, points.T.repeat(len(log_probs), 1, 1))
    return labels.clamp(max=log_probs.size(2) - 1).transpose(1, 2)


def outputs_of(paths: Tensor, *, blank: int) -> tuple[Tensor, Tensor]:
    """Return what paths (B, M, N) say, (B, M, T), padded with the blank, and its lengths, (B, M)."""
    said = collapse(paths.flatten(0, 1), blank=blank)
    drawn = paths.shape[:2]
    return said.tokens.unflatten(0, drawn), said.lengths.view(drawn)


def expected_score(logits: Tensor, paths: Tensor, scores: Tensor) -> Tensor:
    """Estimate the score to expect of a sample's output, with the gradient that raises it.

    logits: (B, N, V), unnormalised; paths: (B, M, N), drawn from them, M > 1; scores: (B, M) of what each path says.
    Returns (B,), the mean of the scores. Its gradient follows each path as far as its score is above the mean of the
    others', which is right on average whatever the scores are. Sources: Williams, Machine Learning 8, 1992; Kool et
    al., Buy 4 REINFORCE samples, get a baseline for free, 2019.
    """
    logits = logits.to(accumulation_dtype(logits.dtype))
    number = paths.size(1)
    log_probs = logits.gather(2, paths.transpose(1, 2)).sum(1) - logits.logsumexp(2).sum(1, keepdim=True)  # (B, M)
    mean = scores.mean(1, keepdim=True)
    advantage = (scores - mean) * (number / (number - 1))  # over the mean of the other paths
    direction = (advantage * log_probs).mean(1)
    return mean[:, 0] + direction - direction.detach()
