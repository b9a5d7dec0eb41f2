"""Cross entropy over the queries, the baseline of Query-CTC: only one path counts, and it is fixed in advance.

Legend: B batch, N queries, V labels, K targets of a sample, T padded target length.
"""

import torch
from fairseq.criterions import register_criterion
from torch import Tensor

from criterions.query_criterion import QueryCriterion, QueryCriterionConfig
from narvl_plugin.ctc.lattice import accumulation_dtype, length_mask, repeats


def straight_paths(targets: Tensor, target_lengths: Tensor, num_queries: int, *, blank: int) -> Tensor:
    """Assign the tokens of each target to the first queries, one query a token, and the blank to the others.

    A blank also separates two equal tokens, because they would merge without it.

    Args:
        targets: (B, T), padded with any label; they must fit.
        target_lengths: (B,).
        num_queries: the number of queries N.
        blank: the label of the blank.

    Returns:
        (B, N) labels.
    """
    paths = targets.new_full((targets.size(0), num_queries + 1), blank)
    query = torch.arange(targets.size(1), device=targets.device) + repeats(targets, target_lengths).cumsum(1)
    # Padding is written to an extra query, which is removed.
    query = torch.where(length_mask(target_lengths, targets.size(1)), query, num_queries)
    return paths.scatter_(1, query, targets)[:, :num_queries]


@register_criterion("query_cross_entropy", dataclass=QueryCriterionConfig)
class QueryCrossEntropyCriterion(QueryCriterion):
    """Negative log-probability of the one path that assigns the tokens to the first queries; see `straight_paths`."""

    def losses_over_references(self, logits: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int) -> Tensor:
        """Return the cross entropy over each sample's straight paths: (B, N, V), (B, K, T), (B, K) -> (B,), in nats."""
        shape = target_lengths.shape
        lengths = target_lengths.clamp(min=0).flatten()
        paths = straight_paths(targets.flatten(0, 1), lengths, logits.size(1), blank=blank).unflatten(0, shape)
        log_probs = logits.log_softmax(2, dtype=accumulation_dtype(logits.dtype))
        scores = log_probs.gather(2, paths.transpose(1, 2)).sum(1)  # (B, K)
        return -scores.masked_fill(target_lengths < 0, float("-inf")).logsumexp(1)
