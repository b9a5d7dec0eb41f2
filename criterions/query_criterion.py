"""What the criterions of a parallel model share: targets, samples that do not fit, weights, smoothing, logging.

Legend: B batch, N queries, V labels, T padded target length.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq import utils
from fairseq.criterions import FairseqCriterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from fairseq.tasks import FairseqTask
from omegaconf import II
from torch import Tensor, nn

from narvl_plugin.ctc import queries_needed
from narvl_plugin.ctc.lattice import accumulation_dtype
from narvl_plugin.data.survey import does_not_fit


@dataclass
class QueryCriterionConfig(FairseqDataclass):
    """Options of every criterion of a parallel model."""

    keep_eos: bool = field(
        default=False,
        metadata={"help": "keep </s> in the targets; it costs a query, and blanks already say that nothing follows"},
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "weight of the mean negative log-probability over all queries and all labels but the blank"},
    )
    sentence_avg: bool = II("optimization.sentence_avg")


def smoothing_losses(logits: Tensor, *, without: int | None = None) -> Tensor:
    """Average the negative log-probability of each sample over its queries and all labels, or all `without` one.

    Without the blank, because pulling every query towards it is not smoothing but a preference for short output.
    logits: (B, N, V). Returns (B,).
    """
    log_probs = logits.log_softmax(2, dtype=accumulation_dtype(logits.dtype))
    if without is None:
        return -log_probs.mean((1, 2))
    return -(log_probs.sum(2) - log_probs[:, :, without]).mean(1) / (logits.size(2) - 1)


class QueryCriterion(FairseqCriterion):
    """Sums a loss over samples whose every query predicts a label or blank; subclasses give `any_losses`.

    The model's logits are (B, N, V) and its attribute `blank` is the blank's label. A batch holds `target` (B, T),
    right-padded and ending in </s>; `where` ["FILE:ROW", ...]; if its samples have weights, `conf` (B,); if a sample
    has several good targets, `alternatives` (B, K, T), of which any will do; and `target_lengths` and `target_needs`,
    see `sizes`.
    Losses are in nats and summed, and the sample size is additive too, so that fairseq's division of the summed
    gradient by the summed sample size gives one result however a batch is cut into steps or processes.
    """

    def __init__(self, task: FairseqTask, sentence_avg: bool, keep_eos: bool, label_smoothing: float) -> None:
        super().__init__(task)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"--label-smoothing {label_smoothing} must be in [0, 1)")
        self.sentence_avg = sentence_avg
        self.keep_eos = keep_eos
        self.label_smoothing = label_smoothing
        self.eos = task.target_dictionary.eos()

    def any_losses(self, logits: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int) -> Tensor:
        """Negative log of the summed likelihood of each sample's targets: (B, N, V), (B, K, T), (B, K) -> (B,).

        In nats. A length of -1 means that a target does not count.
        """
        raise NotImplementedError

    def forward(
        self, model: nn.Module, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """Return the loss (summed; (B,) unless `reduce`), the sample size and what to log.

        A target that needs more queries than the model has is left out and counted. In training it also draws on the
        task's skip budget. Raises ValueError for a model without a blank, and BadRow when the budget is spent.
        """
        blank = getattr(model, "blank", None)
        if blank is None:
            raise ValueError(
                f"{type(self).__name__} trains a parallel model (--arch narvl_...), and {type(model).__name__} has no "
                "blank; train it with --criterion label_smoothed_cross_entropy"
            )
        logits, _ = model(**sample["net_input"])
        targets = sample["target"]
        lengths = self.target_lengths(targets)
        weights = sample.get("conf")

        alternatives = sample.get("alternatives")

        # What decides is counted on the host: the device would have to be waited for.
        said, needs = self.sizes(sample)
        fits = self.fits(needs, logits.size(1), sample["where"], is_training=self.training)
        if len(fits) < len(targets):
            # A list would be copied to the device for each tensor, and waited for.
            kept = torch.tensor(fits, dtype=torch.int64).to(logits.device, non_blocking=True)
            logits, targets, lengths = logits[kept], targets[kept], lengths[kept]
            weights = None if weights is None else weights[kept]
            alternatives = None if alternatives is None else alternatives[kept]

        choices, choice_lengths = targets[:, None], lengths[:, None]
        if alternatives is not None:
            choices, choice_lengths = alternatives, self.alternative_lengths(alternatives, logits.size(1))
        nll = self.any_losses(logits, choices, choice_lengths, blank=blank)
        losses = self.smoothed(nll, logits, lengths, blank=blank)
        losses = losses + self.auxiliary_losses(logits, choices, choice_lengths, blank=blank)
        if weights is not None:
            losses = losses * weights.to(losses.dtype)

        num_tokens, num_sentences = sum(said[index] for index in fits), len(fits)
        sample_size = num_sentences if self.sentence_avg else num_tokens
        silent = logits[:, :, blank] >= logits.amax(2)
        logging_output = {
            "loss": losses.detach().sum(),
            "nll_loss": nll.detach().sum(),
            "ntokens": num_tokens,
            "nsentences": num_sentences,
            "sample_size": sample_size,
            "blanks": silent.sum(),
            "queries": silent.numel(),
            "did_not_fit": len(sample["target"]) - num_sentences,
        }
        return losses.sum() if reduce else losses, sample_size, logging_output

    def smoothed(self, nll: Tensor, logits: Tensor, target_lengths: Tensor, *, blank: int) -> Tensor:
        """Loss of each sample from its negative log-likelihood: (B,), (B, N, V), (B,) -> (B,), in nats."""
        if not self.label_smoothing:
            return nll
        return (1 - self.label_smoothing) * nll + self.label_smoothing * smoothing_losses(logits, without=blank)

    def auxiliary_losses(
        self, logits: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int
    ) -> Tensor | float:
        """Return what a criterion adds to its loss: (B, N, V), (B, K, T), (B, K) -> (B,), or 0."""
        return 0.0

    def alternative_lengths(self, alternatives: Tensor, num_queries: int) -> Tensor:
        """Count the tokens of targets of which any will do: (B, K, T) -> (B, K).

        Those that are empty (all padding) or need more queries than there are do not count: their length is -1.
        """
        targets = alternatives.flatten(0, 1)
        lengths = self.target_lengths(targets)
        counts = (lengths > 0) & (queries_needed(targets, lengths) <= num_queries)
        return lengths.masked_fill(~counts, -1).view(alternatives.shape[:2])

    def target_lengths(self, targets: Tensor) -> Tensor:
        """Count the tokens to be spelled, without padding and, unless kept, without the final </s>: (B, T) -> (B,)."""
        lengths = targets.ne(self.padding_idx).sum(1)
        if self.keep_eos or targets.size(1) == 0:
            return lengths
        last = targets.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
        return lengths - last.eq(self.eos).long()

    def sizes(self, sample: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Return the tokens to be spelled of each of B targets, and the queries that they need, on the host.

        Where any of several targets will do, the need is that of the one that takes the fewest. A batch from another
        data set than ours has no such numbers; they are counted, for which its device is waited for.
        """
        if "target_needs" in sample:
            closing = int(self.keep_eos)
            return tuple([size + closing for size in sample[key]] for key in ("target_lengths", "target_needs"))
        targets = sample["target"]
        lengths = self.target_lengths(targets)
        needs = queries_needed(targets, lengths)
        if "alternatives" in sample:
            shape = sample["alternatives"].shape[:2]
            others = sample["alternatives"].flatten(0, 1)
            of_each = self.target_lengths(others)
            unlimited = torch.iinfo(of_each.dtype).max
            needs = queries_needed(others, of_each).masked_fill(of_each == 0, unlimited).view(shape).amin(1)
        return lengths.tolist(), needs.tolist()

    def fits(self, needs: list[int], num_queries: int, where: list[str], *, is_training: bool) -> list[int]:
        """Find the samples that the queries can spell, and in training hand the others to the task's skip budget.

        needs: queries that each of B samples needs; where: "FILE:ROW" of each. Returns their indices.
        """
        for need, place in zip(needs, where, strict=True):
            if need > num_queries and is_training:
                self.task.skip_budget.skip(does_not_fit(place, need, num_queries))
        return [index for index, need in enumerate(needs) if need <= num_queries]

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Log what the steps or processes summed up; losses are turned from nats into bits, as fairseq does.

        loss: per unit of sample size, as trained on; nll_loss: per target token, without weights and smoothing;
        blank_share: of the queries whose most probable label is the blank; did_not_fit: samples left out.
        """

        def total(key: str) -> Any:
            return sum(log.get(key, 0) for log in logging_outputs)

        sample_size, num_tokens, num_queries = total("sample_size"), total("ntokens"), total("queries")
        # A step whose samples were all left out has nothing to divide by.
        metrics.log_scalar("loss", total("loss") / (sample_size or 1) / math.log(2), sample_size, round=3)
        metrics.log_scalar("nll_loss", total("nll_loss") / (num_tokens or 1) / math.log(2), num_tokens, round=3)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["nll_loss"].avg))
        metrics.log_scalar("blank_share", total("blanks") / (num_queries or 1), num_queries, round=3)
        metrics.log_scalar_sum("did_not_fit", total("did_not_fit"))

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Say that logging outputs of several steps or processes may be added key by key."""
        return True
