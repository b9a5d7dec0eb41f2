"""Query-CTC as a fairseq criterion: all ways of spelling the target with the queries count."""

from fairseq.criterions import register_criterion
from torch import Tensor

from criterions.query_criterion import QueryCriterion, QueryCriterionConfig
from narvl_plugin.ctc import query_ctc_loss


@register_criterion("qctc", dataclass=QueryCriterionConfig)
class QueryCtcCriterion(QueryCriterion):
    """Negative log of the summed probability of all query paths that collapse to the target.

    Source: NARVL (arXiv 2403.02249), section 3.2.
    """

    def sample_losses(self, logits: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int) -> Tensor:
        """Query-CTC loss of each target: (B, N, V), (B, T), (B,) -> (B,), in nats."""
        return query_ctc_loss(logits, targets, target_lengths, blank=blank, reduction="none")
