"""The teacher's cross entropy for weighted samples and closed lists of answers, under OFA's name.

Legend: B batch, T padded target length, V labels.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask
from omegaconf import II
from torch import Tensor, nn


@dataclass
class AdjustLabelSmoothedCrossEntropyConfig(FairseqDataclass):
    """Options of `adjust_label_smoothed_cross_entropy`."""

    label_smoothing: float = field(
        default=0.0, metadata={"help": "share of the probability that is spread over the other allowed labels"}
    )
    sentence_avg: bool = II("optimization.sentence_avg")


@register_criterion("adjust_label_smoothed_cross_entropy", dataclass=AdjustLabelSmoothedCrossEntropyConfig)
class AdjustLabelSmoothedCrossEntropyCriterion(LabelSmoothedCrossEntropyCriterion):
    """fairseq's label-smoothed cross entropy over the allowed labels, weighted by sample.

    A batch may hold `constraint_masks` (B, T, V), the labels allowed at each position. It may also hold `conf` (B,),
    the factors of the samples' losses. Without either, the loss equals fairseq's `label_smoothed_cross_entropy`.
    """

    def __init__(self, task: FairseqTask, sentence_avg: bool, label_smoothing: float) -> None:
        FairseqCriterion.__init__(self, task)
        self.sentence_avg = sentence_avg
        self.eps = label_smoothing
        self.report_accuracy = False

    def compute_loss(
        self, model: nn.Module, net_output: tuple[Tensor, Any], sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the negative log-likelihood, in nats.

        Args:
            model: the teacher.
            net_output: its output; the first entry is the logits, (B, T, V).
            sample: the batch.
            reduce: whether to sum over the tokens.

        Returns:
            Two scalars, or one entry for each token, 0 on padding.
        """
        # Padding is computed, too, because to leave it out would synchronise with the device.
        targets = sample["target"].flatten()
        padding = targets.eq(self.padding_idx)
        logits = net_output[0].flatten(0, 1).float()
        masks = sample.get("constraint_masks")
        # Something must be allowed everywhere, or the gradient is not a number.
        allowed = torch.ones_like(logits).bool() if masks is None else masks.flatten(0, 1) | padding[:, None]
        log_probs = logits.masked_fill(~allowed, float("-inf")).log_softmax(1)
        nll = -log_probs.gather(1, targets[:, None])[:, 0]
        # If only one label is allowed, its loss is zero, and no other label can receive a share.
        share = self.eps / (allowed.sum(1) - 1).clamp(min=1)
        loss = (1 - self.eps - share) * nll - share * log_probs.masked_fill(~allowed, 0).sum(1)
        if "conf" in sample:
            weights = sample["conf"][:, None].expand_as(sample["target"]).flatten().float()
            loss, nll = loss * weights, nll * weights
        loss, nll = loss.masked_fill(padding, 0.0), nll.masked_fill(padding, 0.0)
        return (loss.sum(), nll.sum()) if reduce else (loss, nll)
