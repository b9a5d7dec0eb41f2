"""Query-CTC as a fairseq criterion: all ways of spelling the target with the queries count."""

from dataclasses import dataclass, field

from fairseq.criterions import register_criterion
from fairseq.tasks import FairseqTask
from torch import Tensor

from criterions.query_criterion import QueryCriterion, QueryCriterionConfig, smoothing_losses
from narvl_plugin.ctc import query_ctc_any_loss, query_ctc_loss


@dataclass
class QueryCtcConfig(QueryCriterionConfig):
    """Options of `qctc`."""

    reference_loss: bool = field(
        default=False,
        metadata={
            "help": "the loss of the authors' code, for going on with its checkpoints: </s> is kept, each sample's "
            "loss is divided by its target's length, samples are averaged, and smoothing covers the blank, too"
        },
    )


@register_criterion("qctc", dataclass=QueryCtcConfig)
class QueryCtcCriterion(QueryCriterion):
    """Negative log of the summed probability of all query paths that collapse to the target.

    Source: NARVL (arXiv 2403.02249), section 3.2.
    """

    def __init__(
        self,
        task: FairseqTask,
        sentence_avg: bool,
        keep_eos: bool,
        label_smoothing: float,
        reference_loss: bool = False,
    ) -> None:
        super().__init__(task, sentence_avg or reference_loss, keep_eos or reference_loss, label_smoothing)
        self.reference_loss = reference_loss

    def sample_losses(self, logits: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int) -> Tensor:
        """Query-CTC loss of each target: (B, N, V), (B, T), (B,) -> (B,), in nats."""
        return query_ctc_loss(logits, targets, target_lengths, blank=blank, reduction="none")

    def any_losses(self, logits: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int) -> Tensor:
        """Query-CTC loss of any of each sample's targets: (B, N, V), (B, K, T), (B, K) -> (B,), in nats."""
        return query_ctc_any_loss(logits, targets, target_lengths, blank=blank)

    def smoothed(self, nll: Tensor, logits: Tensor, target_lengths: Tensor, *, blank: int) -> Tensor:
        """Loss of each sample from its negative log-likelihood: (B,), (B, N, V), (B,) -> (B,), in nats."""
        if not self.reference_loss:
            return super().smoothed(nll, logits, target_lengths, blank=blank)
        smoothing = smoothing_losses(logits) if self.label_smoothing else 0.0
        return (1 - self.label_smoothing) * nll / target_lengths + self.label_smoothing * smoothing
