"""The exact probability of every answer of a closed list, which share what they begin with.

Legend: B batch, N queries, V labels, K answers, S padded length of an answer, M places of the trie.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from narvl_plugin.ctc.lattice import IMPOSSIBLE, gather_labels


class Trie(NamedTuple):
    """The beginnings of all answers, each once, as places; the first is the empty one.

    parents: (M,) the place that is a token shorter (the first is its own); labels: (M,) the token that was added (any
    for the first); repeats: (M,) whether the token before it is the same; ends: (K,) the place of each whole answer.
    """

    parents: Tensor
    labels: Tensor
    repeats: Tensor
    ends: Tensor


def build_trie(candidates: Tensor, candidate_lengths: Tensor) -> Trie:
    """Sort out the beginnings of answers: candidates (K, S) padded with anything, candidate_lengths (K,)."""
    ends = torch.zeros_like(candidate_lengths)
    parents, labels = [ends.new_zeros(1)], [candidates.new_zeros(1)]
    size = 1
    for place in range(candidates.size(1)):
        longer = candidate_lengths > place
        added, which = torch.stack([ends[longer], candidates[longer, place]], 1).unique(dim=0, return_inverse=True)
        ends[longer] = size + which
        size += len(added)
        parents.append(added[:, 0])
        labels.append(added[:, 1])
    parent, label = torch.cat(parents), torch.cat(labels)
    return Trie(parent, label, (label == label[parent]) & (parent > 0), ends)


def score_candidates(log_probs: Tensor, candidates: Tensor, candidate_lengths: Tensor, *, blank: int) -> Tensor:
    """Return log p(answer) of every answer, in nats, summed over all paths: (B, K), -inf where no path is possible.

    log_probs: (B, N, V), normalised; candidates: (K, S) padded with anything; candidate_lengths: (K,).
    """
    return score_trie(log_probs, build_trie(candidates, candidate_lengths), blank=blank)


def score_trie(log_probs: Tensor, trie: Trie, *, blank: int) -> Tensor:
    """Do the same for answers whose trie is there already: (B, N, V) -> (B, K). O(N M) for each sample."""
    parents, labels, repeats, ends = trie
    emissions = gather_labels(log_probs, labels.expand(len(log_probs), -1)).clamp(min=IMPOSSIBLE)
    blanks = log_probs[:, :, blank, None].to(emissions.dtype).clamp(min=IMPOSSIBLE)
    # Paths that have said a beginning, and end in its last token or in a blank.
    in_label = emissions.new_full((len(log_probs), len(parents)), IMPOSSIBLE)
    in_blank = in_label.clone()
    in_blank[:, 0] = 0.0
    for query in range(log_probs.size(1)):
        said = torch.logaddexp(in_blank, in_label)
        # A token right after itself is read as one, so that only what ends in a blank can repeat it.
        arrived = torch.where(repeats, in_blank[:, parents], said[:, parents])
        arrived[:, 0] = IMPOSSIBLE
        in_label = torch.logaddexp(in_label, arrived) + emissions[:, query]
        in_blank = said + blanks[:, query]
    scores = torch.logaddexp(in_blank, in_label)[:, ends]
    return scores.masked_fill(scores < IMPOSSIBLE / 2, -torch.inf)
