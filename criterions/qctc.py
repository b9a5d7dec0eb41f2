"""Query-CTC as a fairseq criterion: all query paths that collapse to the target count."""

from dataclasses import dataclass, field

from fairseq.criterions import register_criterion
from fairseq.tasks import FairseqTask
from torch import Tensor

from criterions.expected_score import ScoredCriterionConfig, check_scores, check_weights, score_losses
from criterions.query_criterion import QueryCriterion, smoothing_losses
from narvl_plugin.ctc import bigram_f1, query_ctc_any_loss


@dataclass
class QueryCtcConfig(ScoredCriterionConfig):
    """Options of `qctc`."""

    bigram_weight: float = field(
        default=0.0,
        metadata={
            "help": "weight of 1 - F1 of the expected bigrams of the output, for each bigram of the target, in nats; "
            "it makes neighbouring words belong to one wording (10 works well)"
        },
    )
    reference_loss: bool = field(
        default=False,
        metadata={
            "help": "use the loss of the authors' code, to continue training its checkpoints: </s> is kept, each "
            "sample's loss is divided by its target's length, samples are averaged, and smoothing includes the blank"
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
        bigram_weight: float = 0.0,
        score_weight: float = 0.0,
        reference_loss: bool = False,
    ) -> None:
        super().__init__(task, sentence_avg or reference_loss, keep_eos or reference_loss, label_smoothing)
        check_weights(bigram_weight=bigram_weight, score_weight=score_weight)
        check_scores(task, score_weight)
        self.bigram_weight = bigram_weight
        self.score_weight = score_weight
        self.reference_loss = reference_loss

    def losses_over_references(self, logits: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int) -> Tensor:
        """Return the Query-CTC loss over each sample's targets: (B, N, V), (B, K, T), (B, K) -> (B,), in nats."""
        return query_ctc_any_loss(logits, targets, target_lengths, blank=blank, checked=True)

    def auxiliary_losses(
        self, logits: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int
    ) -> Tensor | float:
        """Return the bigram and score losses, in nats: (B, N, V), (B, K, T), (B, K) -> (B,), or 0.

        The bigram loss compares with the target of the highest bigram F1.
        """
        loss: Tensor | float = 0.0
        if self.bigram_weight:
            f1, best = bigram_f1(logits, targets, target_lengths, blank=blank).max(1)
            bigrams = (target_lengths.gather(1, best[:, None])[:, 0] - 1).clamp(min=0)
            loss += self.bigram_weight * bigrams * (1 - f1)
        if self.score_weight:
            loss += self.score_weight * score_losses(self.task, logits, targets, target_lengths, blank=blank)
        return loss

    def smoothed(self, nll: Tensor, logits: Tensor, target_lengths: Tensor, *, blank: int) -> Tensor:
        """Return the loss of each sample from its negative log-likelihood: (B,), (B, N, V), (B,) -> (B,), in nats."""
        if not self.reference_loss:
            return super().smoothed(nll, logits, target_lengths, blank=blank)
        smoothing = smoothing_losses(logits) if self.label_smoothing else 0.0
        return (1 - self.label_smoothing) * nll / target_lengths + self.label_smoothing * smoothing
