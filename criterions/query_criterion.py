"""The shared part of a parallel model's criterions: targets, samples that do not fit, weights, smoothing, logging.

Legend: B batch, N queries, V labels, K targets of a sample, T padded target length.
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

from narvl_plugin.ctc import min_queries
from narvl_plugin.ctc.lattice import accumulation_dtype
from narvl_plugin.data.survey import does_not_fit


@dataclass
class QueryCriterionConfig(FairseqDataclass):
    """Options of every criterion of a parallel model."""

    keep_eos: bool = field(
        default=False,
        metadata={"help": "keep </s> in the targets; it costs a query, and blanks already mark the end of the output"},
    )
    label_smoothing: float = field(
        default=0.0,
        metadata={"help": "weight of the mean negative log-probability over all queries and all labels but the blank"},
    )
    sentence_avg: bool = II("optimization.sentence_avg")


def smoothing_losses(logits: Tensor, *, without: int | None = None) -> Tensor:
    """Average the negative log-probability of each sample over its queries and labels.

    Smoothing excludes the blank: raising the blank's probability at every query would favour short outputs.

    Args:
        logits: (B, N, V).
        without: a label to exclude; None averages over all labels.

    Returns:
        (B,), in nats.
    """
    log_probs = logits.log_softmax(2, dtype=accumulation_dtype(logits.dtype))
    if without is None:
        return -log_probs.mean((1, 2))
    return -(log_probs.sum(2) - log_probs[:, :, without]).mean(1) / (logits.size(2) - 1)


class QueryCriterion(FairseqCriterion):
    """Base class of the losses for parallel models; subclasses give `losses_over_references`.

    Every query predicts a label or the blank. The model's logits are (B, N, V), and its attribute `blank` is the
    blank's label. A batch holds:

    - `target` (B, T), right-padded, with a final </s>;
    - `where` ["FILE:ROW", ...];
    - `conf` (B,), if samples have weights;
    - `alternatives` (B, K, T), if a sample has several correct targets;
    - `target_lengths` and `target_needs`, see `sizes`.

    Losses are in nats and summed, and the sample size is additive. fairseq divides the summed gradient by the summed
    sample size. The result then does not depend on how a batch is split into steps or processes.
    """

    def __init__(self, task: FairseqTask, sentence_avg: bool, keep_eos: bool, label_smoothing: float) -> None:
        super().__init__(task)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"--label-smoothing {label_smoothing} must be in [0, 1)")
        self.sentence_avg = sentence_avg
        self.keep_eos = keep_eos
        self.label_smoothing = label_smoothing
        self.eos = task.target_dictionary.eos()

    def losses_over_references(self, logits: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int) -> Tensor:
        """Return the negative log of the summed likelihood of each sample's targets, which are known to fit.

        Args:
            logits: (B, N, V).
            targets: (B, K, T), right-padded.
            target_lengths: (B, K); -1 excludes a target.
            blank: the label of the blank.

        Returns:
            (B,), in nats.
        """
        raise NotImplementedError

    def forward(
        self, model: nn.Module, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """Return the loss, the sample size and the logging output.

        A target that needs more queries than the model has is left out and counted. In training, it also uses up the
        task's skip budget.

        Args:
            model: the parallel model.
            sample: the batch.
            reduce: whether to sum the losses over the samples.

        Returns:
            The loss, a scalar or (B,); the sample size; what to log.

        Raises:
            ValueError: for a model without a blank.
            BadRow: if the skip budget is exhausted.
        """
        blank = getattr(model, "blank", None)
        if blank is None:
            raise ValueError(
                f"{type(self).__name__} trains a parallel model (--arch narvl_...), and {type(model).__name__} has no "
                "blank; train it with --criterion label_smoothed_cross_entropy"
            )
        logits, _ = model(**sample["net_input"])
        lengths = self.target_lengths(sample["target"])
        choices, choice_lengths = self.references(sample, logits.size(1))
        weights = sample.get("conf")

        # The needs are counted on the host, because reading them from the device would synchronise.
        said, needs = self.sizes(sample)
        fits = self.fits(needs, logits.size(1), sample["where"], is_training=self.training)
        if len(fits) < len(lengths):
            # Indexing with a list would copy it to the device for each tensor and synchronise.
            kept = torch.tensor(fits, dtype=torch.int64).to(logits.device, non_blocking=True)
            logits, lengths = logits[kept], lengths[kept]
            choices, choice_lengths = choices[kept], choice_lengths[kept]
            weights = None if weights is None else weights[kept]

        nll = self.losses_over_references(logits, choices, choice_lengths, blank=blank)
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
        if not self.training:
            labels = logits.argmax(2)
            logging_output["repeats"] = ((labels[:, 1:] == labels[:, :-1]) & (labels[:, 1:] != blank)).sum()
        return losses.sum() if reduce else losses, sample_size, logging_output

    def smoothed(self, nll: Tensor, logits: Tensor, target_lengths: Tensor, *, blank: int) -> Tensor:
        """Return the loss of each sample from its negative log-likelihood: (B,), (B, N, V), (B,) -> (B,), in nats."""
        if not self.label_smoothing:
            return nll
        return (1 - self.label_smoothing) * nll + self.label_smoothing * smoothing_losses(logits, without=blank)

    def auxiliary_losses(
        self, logits: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int
    ) -> Tensor | float:
        """Return the criterion's additional losses: (B, N, V), (B, K, T), (B, K) -> (B,), or 0."""
        return 0.0

    def references(self, sample: dict[str, Any], num_queries: int) -> tuple[Tensor, Tensor]:
        """Return the targets of each sample of a batch.

        Args:
            sample: the batch.
            num_queries: the number of queries N.

        Returns:
            The targets, (B, K, T), and their lengths, (B, K); -1 excludes a target.
        """
        alternatives = sample.get("alternatives")
        if alternatives is None:
            return sample["target"][:, None], self.target_lengths(sample["target"])[:, None]
        return alternatives, self.alternative_lengths(alternatives, num_queries)

    def alternative_lengths(self, alternatives: Tensor, num_queries: int) -> Tensor:
        """Count the tokens of each sample's alternative targets.

        Args:
            alternatives: (B, K, T).
            num_queries: the number of queries N.

        Returns:
            (B, K); -1 for a target that is empty (all padding) or needs more than N queries.
        """
        targets = alternatives.flatten(0, 1)
        lengths = self.target_lengths(targets)
        counts = (lengths > 0) & (min_queries(targets, lengths) <= num_queries)
        return lengths.masked_fill(~counts, -1).view(alternatives.shape[:2])

    def target_lengths(self, targets: Tensor) -> Tensor:
        """Count the tokens of each target without padding: (B, T) -> (B,).

        The final </s> counts only with `keep_eos`.
        """
        lengths = targets.ne(self.padding_idx).sum(1)
        if self.keep_eos or targets.size(1) == 0:
            return lengths
        last = targets.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
        return lengths - last.eq(self.eos).long()

    def sizes(self, sample: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Return the number of target tokens and the number of queries they need, on the host.

        With several alternatives, the need is that of the alternative that needs the fewest queries. A batch of another
        data set has no such numbers. They are then counted, which synchronises with the device.

        Args:
            sample: the batch.

        Returns:
            Two lists of B numbers.
        """
        if "target_needs" in sample:
            closing = int(self.keep_eos)
            lengths, needs = sample["target_lengths"], sample["target_needs"]
            return [size + closing for size in lengths], [size + closing for size in needs]
        targets = sample["target"]
        lengths = self.target_lengths(targets)
        needs = min_queries(targets, lengths)
        if "alternatives" in sample:
            shape = sample["alternatives"].shape[:2]
            others = sample["alternatives"].flatten(0, 1)
            of_each = self.target_lengths(others)
            unlimited = torch.iinfo(of_each.dtype).max
            needs = min_queries(others, of_each).masked_fill(of_each == 0, unlimited).view(shape).amin(1)
        return lengths.tolist(), needs.tolist()

    def fits(self, needs: list[int], num_queries: int, where: list[str], *, is_training: bool) -> list[int]:
        """Find the samples that fit into the queries, and in training report the others to the task's skip budget.

        Args:
            needs: the number of queries that each of B samples needs.
            num_queries: the number of queries N.
            where: "FILE:ROW" of each sample.
            is_training: whether the skip budget applies.

        Returns:
            The indices of the samples that fit.

        Raises:
            BadRow: if the skip budget is exhausted.
        """
        for need, place in zip(needs, where, strict=True):
            if need > num_queries and is_training:
                self.task.skip_budget.skip(does_not_fit(place, need, num_queries))
        return [index for index, need in enumerate(needs) if need <= num_queries]

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Log the sums over steps or processes; losses are converted from nats to bits, as fairseq does.

        The metrics are:

        - loss: per unit of sample size, as trained on;
        - nll_loss: per target token, without weights and smoothing;
        - blank_share: the share of queries whose most probable label is the blank;
        - repeat_share: in validation, the share of queries whose most probable label is that of the query before;
        - did_not_fit: the number of samples left out.
        """

        def total(key: str) -> Any:
            return sum(log.get(key, 0) for log in logging_outputs)

        sample_size, num_tokens, num_queries = total("sample_size"), total("ntokens"), total("queries")
        # A step whose samples were all left out has a sample size of zero.
        metrics.log_scalar("loss", total("loss") / (sample_size or 1) / math.log(2), sample_size, round=3)
        metrics.log_scalar("nll_loss", total("nll_loss") / (num_tokens or 1) / math.log(2), num_tokens, round=3)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["nll_loss"].avg))
        metrics.log_scalar("blank_share", total("blanks") / (num_queries or 1), num_queries, round=3)
        if any("repeats" in log for log in logging_outputs):
            metrics.log_scalar("repeat_share", total("repeats") / (num_queries or 1), num_queries, round=3)
        metrics.log_scalar_sum("did_not_fit", total("did_not_fit"))

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Return True: logging outputs of several steps or processes may be added key by key."""
        return True
