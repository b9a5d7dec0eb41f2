"""Sampled paths: each query's label is drawn from its own distribution.

Legend: B batch, N queries, V labels, M paths drawn of each sample, T tokens of the longest output.
"""

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from narvl_plugin.ctc.alignment import state_posteriors
from narvl_plugin.ctc.collapse import collapse
from narvl_plugin.ctc.lattice import accumulation_dtype, build_lattice, state_emissions


def sample_paths(logits: Tensor, number: int) -> Tensor:
    """Draw random paths of each sample, with torch's generator.

    Args:
        logits: (B, N, V), unnormalised.
        number: the number of paths M.

    Returns:
        (B, M, N) labels.
    """
    probabilities = logits.detach().flatten(0, 1).softmax(1, dtype=accumulation_dtype(logits.dtype))
    drawn = torch.multinomial(probabilities, number, replacement=True)
    return drawn.unflatten(0, logits.shape[:2]).transpose(1, 2)


def quasi_random_paths(log_probs: Tensor, number: int) -> Tensor:
    """Draw the same evenly spread paths each time, without random numbers.

    Means over them are closer to the expectation than means over as many random paths. A power of two is the best M.

    Source: Sobol's sequence (Sobol, 1967), in the middle of its cells.

    Args:
        log_probs: (B, N, V), normalised.
        number: the number of paths M.

    Returns:
        (B, M, N) labels.
    """
    points = SobolEngine(log_probs.size(1)).draw(number).to(log_probs, non_blocking=True) + 0.5 / number  # (M, N)
    reached = log_probs.exp().cumsum(2)
    labels = torch.searchsorted(reached, points.T.repeat(len(log_probs), 1, 1))
    return labels.clamp(max=log_probs.size(2) - 1).transpose(1, 2)


def outputs_of(paths: Tensor, *, blank: int) -> tuple[Tensor, Tensor]:
    """Collapse paths to their outputs.

    Args:
        paths: (B, M, N).
        blank: the label of the blank.

    Returns:
        The tokens (B, M, T), padded with the blank, and the lengths (B, M).
    """
    said = collapse(paths.flatten(0, 1), blank=blank)
    drawn = paths.shape[:2]
    return said.tokens.unflatten(0, drawn), said.lengths.view(drawn)


def expected_score(logits: Tensor, paths: Tensor, scores: Tensor) -> Tensor:
    """Estimate the expected score of a sample's output, with the gradient that raises it.

    The gradient weights each path by its score minus the mean score of the others. It is unbiased for any scores.

    Sources: Williams, Machine Learning 8, 1992; Kool et al., Buy 4 REINFORCE samples, get a baseline for free, 2019.

    Args:
        logits: (B, N, V), unnormalised.
        paths: (B, M, N), drawn from the logits, M > 1.
        scores: (B, M), the score of each path's output.

    Returns:
        (B,), the mean of the scores.
    """
    logits = logits.to(accumulation_dtype(logits.dtype))
    number = paths.size(1)
    log_probs = logits.gather(2, paths.transpose(1, 2)).sum(1) - logits.logsumexp(2).sum(1, keepdim=True)  # (B, M)
    mean = scores.mean(1, keepdim=True)
    advantage = (scores - mean) * (number / (number - 1))  # over the mean of the other paths
    direction = (advantage * log_probs).mean(1)
    return mean[:, 0] + direction - direction.detach()


def expected_output_score(logits: Tensor, outputs: Tensor, lengths: Tensor, scores: Tensor, *, blank: int) -> Tensor:
    """Estimate the expected score of a sample's output, with the gradient of the outputs' exact log-probabilities.

    It is the mean of `expected_score` over all paths to the drawn outputs: the gradient has the same expectation and a
    lower variance. Advantages sum to zero over a sample, so the normalisation of the queries has no gradient, and that
    of log P(y) is the posterior of each label.

    Sources: as `expected_score`; Casella and Robert, Rao-Blackwellisation of sampling schemes, Biometrika 83, 1996.

    Args:
        logits: (B, N, V), unnormalised.
        outputs: (B, M, T), of paths drawn from the logits, padded with any label; M > 1.
        lengths: (B, M).
        scores: (B, M), the score of each output.
        blank: the label of the blank.

    Returns:
        (B,), the mean of the scores.
    """
    batch, number = scores.shape
    lattice = build_lattice(outputs.flatten(0, 1), lengths.flatten(), blank=blank)
    shares = state_posteriors(state_emissions(logits.detach(), lattice), lattice)  # (B M, N, L)
    mean = scores.mean(1, keepdim=True)
    advantage = (scores - mean) / (number - 1)  # over the mean of the other outputs, divided by M
    weights = (shares.unflatten(0, (batch, number)) * advantage[..., None, None]).transpose(1, 2).flatten(2)
    labels = lattice.labels.view(batch, 1, -1).expand_as(weights)  # (B, N, M L)
    direction = (weights * logits.gather(2, labels)).sum((1, 2))
    return mean[:, 0] + direction - direction.detach()
