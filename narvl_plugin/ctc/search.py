"""Decoding: from what every query says to a sequence of tokens.

Legend: B batch, N queries, V labels, T tokens of the longest output.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from narvl_plugin.ctc.loss import log_sum_exp


class Collapsed(NamedTuple):
    """Tokens left when repeats are merged and blanks dropped.

    tokens: (B, T) padded with the blank; queries: (B, T) the query each token comes from (the first of its run),
    padded with -1; lengths: (B,) tokens of each sample.
    """

    tokens: Tensor
    queries: Tensor
    lengths: Tensor


class Hypothesis(NamedTuple):
    """One decoded sample.

    tokens: (T,); score: log-probability of the path, in nats, a scalar tensor; positional_scores: (T,)
    log-probability of each token at its query; alignment: (T,) that query.
    """

    tokens: Tensor
    score: Tensor
    positional_scores: Tensor
    alignment: Tensor


def collapse(labels: Tensor, *, blank: int) -> Collapsed:
    """Merge runs of the same label, then drop blanks: (B, N) labels, one for each query.

    Source: Graves et al., ICML 2006, section 3.1 (the map B).
    """
    batch, num_queries = labels.shape
    kept = labels != blank
    kept[:, 1:] &= labels[:, 1:] != labels[:, :-1]
    lengths = kept.sum(1)
    longest = int(lengths.max()) if batch else 0
    # Each kept query knows its place in the output; the others all go to one column more, which is cut off.
    place = torch.where(kept, kept.cumsum(1) - 1, longest)
    query = torch.arange(num_queries, device=labels.device).expand(batch, -1)
    tokens = labels.new_full((batch, longest + 1), blank).scatter_(1, place, labels)
    queries = query.new_full((batch, longest + 1), -1).scatter_(1, place, query)
    return Collapsed(tokens[:, :longest], queries[:, :longest], lengths)


def greedy(logits: Tensor, *, blank: int) -> list[Hypothesis]:
    """Take every query's most probable label and collapse: the most probable path, in one pass.

    logits: (B, N, V), normalised or not. Returns one hypothesis a sample. Source: NARVL (arXiv 2403.02249), 3.3.
    """
    best, labels = logits.detach().max(2)
    return hypotheses_of(labels, best - log_sum_exp(logits), blank=blank)


def hypotheses_of(labels: Tensor, log_probs: Tensor, *, blank: int) -> list[Hypothesis]:
    """Collapse the paths of a batch: (B, N) label of each query, and the log-probability of each."""
    tokens, queries, lengths = collapse(labels, blank=blank)
    positional = log_probs.gather(1, queries.clamp(min=0))
    return [
        Hypothesis(tokens[sample, :length], score, positional[sample, :length], queries[sample, :length])
        for sample, (length, score) in enumerate(zip(lengths.tolist(), log_probs.sum(1), strict=True))
    ]
