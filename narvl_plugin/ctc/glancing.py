"""Glancing: in training, some queries are shown the labels that they are to predict, the more the worse the model is.

Legend: B batch, N queries, V labels, K targets of a sample, T padded target length.
"""

import torch
from torch import Tensor

from narvl_plugin.ctc.alignment import best_states, total_scores
from narvl_plugin.ctc.lattice import Lattice, build_lattice, state_emissions


@torch.no_grad()
def glance(logits: Tensor, targets: Tensor, target_lengths: Tensor, *, ratio: float, blank: int) -> Tensor:
    """Choose the labels to reveal, from what the model predicts without them.

    The most probable target of each sample is aligned to the queries. The distance is the number of queries whose most
    probable label is another one than in the alignment. The number of revealed labels has Poisson's distribution, with
    the ratio of the distance as its mean. They are drawn from the aligned labels that are not the blank.

    Source: https://arxiv.org/abs/2008.07905, section 3; https://arxiv.org/abs/2012.15833 for its form with CTC.

    Args:
        logits: (B, N, V), of a pass without revealed labels.
        targets: (B, K, T), padded with any label.
        target_lengths: (B, K); -1 excludes a target. Nothing is revealed to a sample without a target.
        ratio: the number of revealed labels for each query that differs, from 0 to 1.
        blank: the label of the blank.

    Returns:
        The labels (B, N) that are revealed to the queries, the blank where nothing is revealed.
    """
    num_targets = target_lengths.size(1)
    counted = targets[:, :, : logits.size(1)].flatten(0, 1)  # what is cut off belongs to excluded targets
    lattice = build_lattice(counted, target_lengths.clamp(min=0).flatten(), blank=blank)
    # Normalised logits would add the same number to all paths of a sample.
    emissions = state_emissions(logits, lattice)
    scores = total_scores(emissions, lattice).view(target_lengths.shape)
    target = scores.masked_fill(target_lengths < 0, float("-inf")).argmax(1)

    rows = torch.arange(len(logits), device=logits.device) * num_targets + target
    aligned = best_states(emissions[rows], Lattice(*(part[rows] for part in lattice))).labels
    distance = (logits.argmax(2) != aligned).sum(1)
    number = torch.poisson(ratio * distance)
    order = torch.rand(aligned.shape, device=logits.device).masked_fill(aligned == blank, 2.0)
    is_drawn = order.argsort(1).argsort(1) < number[:, None]
    return aligned.masked_fill(~is_drawn, blank)
