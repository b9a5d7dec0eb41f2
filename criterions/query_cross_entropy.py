"""Cross entropy over the queries, the baseline of Query-CTC: exactly one path counts, fixed beforehand.

Legend: B batch, N queries, V labels, T padded target length.
"""

import torch
from fairseq.criterions import register_criterion
from torch import Tensor

from criterions.query_criterion import QueryCriterion, QueryCriterionConfig
from narvl_plugin.ctc.lattice import accumulation_dtype, inside, repeats


def straight_paths(targets: Tensor, target_lengths: Tensor, num_queries: int, *, blank: int) -> Tensor:
    """Write each target to the queries from the first on, a query a token, and blanks after the last.

    Between two equal tokens stands a blank as well: without it the path would collapse to one of them.
    targets: (B, T) padded with anything and known to fit; target_lengths: (B,). Returns (B, num_queries) labels.
    """
    paths = targets.new_full((targets.size(0), num_queries + 1), blank)
    query = torch.arange(targets.size(1), device=targets.device) + repeats(targets, target_lengths).cumsum(1)
    # Padding is written to one query more, which is cut off.
    query = torch.where(inside(target_lengths, targets.size(1)), query, num_queries)
    return paths.scatter_(1, query, targets)[:, :num_queries]


@register_criterion("query_cross_entropy", dataclass=QueryCriterionConfig)
class QueryCrossEntropyCriterion(QueryCriterion):
    """Negative log-probability of the one path that says token i at query i and blank after the last token."""

    def any_losses(self, logits: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int) -> Tensor:
        """Cross entropy of any of each sample's straight paths: (B, N, V), (B, K, T), (B, K) -> (B,), in nats."""
        shape = target_lengths.shape
        lengths = target_lengths.clamp(min=0).flatten()
        paths = straight_paths(targets.flatten(0, 1), lengths, logits.size(1), blank=blank).unflatten(0, shape)
        log_probs = logits.log_softmax(2, dtype=accumulation_dtype(logits.dtype))
        scores = log_probs.gather(2, paths.transpose(1, 2)).sum(1)  # (B, K)
        return -scores.masked_fill(target_lengths < 0, float("-inf")).logsumexp(1)
