"""Query-CTC over sets as a fairseq criterion: the elements of a target count in any order."""

import random
from dataclasses import dataclass, field

import torch
from fairseq.criterions import register_criterion
from fairseq.dataclass import ChoiceEnum
from fairseq.tasks import FairseqTask
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from criterions.expected_score import ScoredCriterionConfig, check_scores, check_weights, score_losses
from criterions.query_criterion import QueryCriterion
from narvl_plugin.ctc import best_path_of, collapse, language_loss, min_queries, query_ctc_loss

Order = ChoiceEnum(["all", "given", "random", "best"])


@dataclass
class QuerySetConfig(ScoredCriterionConfig):
    """Options of `qset`."""

    order: Order = field(  # type: ignore[valid-type]  # fairseq makes the enumeration
        default="all",
        metadata={
            "help": "which orders of a target's elements are trained: the sum over all, the given one, a random one in "
            "each update, or the one of the student's best path"
        },
    )
    window: int = field(
        default=0,
        metadata={
            "help": "for sets of many elements: an element is said less than this number of places behind the first "
            "that is left; 0 allows all orders"
        },
    )


@register_criterion("qset", dataclass=QuerySetConfig)
class QuerySetCriterion(QueryCriterion):
    """Negative log-probability that the queries spell all elements of the target, in any order, and nothing else.

    The task tells what the elements of a target are, see `CommonTask.acceptor`. Those of a tree are sets themselves.
    Validation always sums over all orders.
    """

    def __init__(
        self,
        task: FairseqTask,
        sentence_avg: bool,
        keep_eos: bool,
        label_smoothing: float,
        order: str = "all",
        window: int = 0,
        score_weight: float = 0.0,
    ) -> None:
        super().__init__(task, sentence_avg, keep_eos, label_smoothing)
        check_weights(score_weight=score_weight)
        check_scores(task, score_weight)
        if window < 0:
            raise ValueError(f"--window {window} must not be negative")
        if keep_eos:
            raise ValueError("--keep-eos: </s> is no element of a set; the blanks mark the end of the output")
        self.order = str(order)
        self.window = window or None
        self.score_weight = score_weight

    def losses_over_references(self, logits: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int) -> Tensor:
        """Return the loss of each sample's set: (B, N, V), (B, 1, T), (B, 1) -> (B,), in nats."""
        lengths = target_lengths[:, 0].tolist()
        rows = [row[:length] for row, length in zip(targets[:, 0].tolist(), lengths, strict=True)]
        order = self.order if self.training else "all"
        if order in ("all", "best"):
            automata = [self.task.acceptor(row, self.window) for row in rows]
            if order == "all":
                return language_loss(logits, automata, blank=blank, reduction="none")
            paths, _ = best_path_of(logits, automata, blank=blank)
            said = collapse(paths, blank=blank)
            return query_ctc_loss(logits, said.tokens, said.lengths, blank=blank, reduction="none", checked=True)
        if order == "random":
            rows = [shuffled(self.task, row, logits.size(1)) for row in rows]
        tokens = [torch.tensor(row, dtype=torch.int64) for row in rows]
        padded = pad_sequence(tokens, batch_first=True) if tokens else torch.zeros(0, 0, dtype=torch.int64)
        there = [part.to(logits.device, non_blocking=True) for part in (padded, target_lengths[:, 0])]
        return query_ctc_loss(logits, *there, blank=blank, reduction="none", checked=True)

    def auxiliary_losses(
        self, logits: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int
    ) -> Tensor | float:
        """Return the score loss, in nats: (B, N, V), (B, 1, T), (B, 1) -> (B,), or 0."""
        if not self.score_weight:
            return 0.0
        return self.score_weight * score_losses(self.task, logits, targets, target_lengths, blank=blank)


def shuffled(task: FairseqTask, target: list[int], num_queries: int) -> list[int]:
    """Return a target in a random order, by torch's generator; in the given order if the drawn one does not fit.

    Another order may need more queries than the given one: blanks, where equal tokens of two elements adjoin.

    Args:
        task: tells the elements.
        target: the target without `</s>`.
        num_queries: the number of queries N.
    """
    order = task.in_random_order(target, random.Random(int(torch.randint(1 << 62, ()))))
    tokens = torch.tensor([order], dtype=torch.int64)
    return order if int(min_queries(tokens, torch.tensor([tokens.size(1)]))) <= num_queries else target
