"""Query-CTC over sets as a fairseq criterion: the elements of a target count in any order."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from fairseq.criterions import register_criterion
from fairseq.dataclass import ChoiceEnum
from fairseq.tasks import FairseqTask
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from criterions.query_criterion import QueryCriterion, QueryCriterionConfig
from narvl_plugin.ctc import best_path_of, collapse, language_loss, min_queries, query_ctc_loss, set_of

Elements = Sequence[tuple[int, ...]]

Order = ChoiceEnum(["all", "given", "random", "best"])


@dataclass
class QuerySetConfig(QueryCriterionConfig):
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

    The task tells the elements of a target, see `CommonTask.elements`. Validation always sums over all orders.
    """

    def __init__(
        self,
        task: FairseqTask,
        sentence_avg: bool,
        keep_eos: bool,
        label_smoothing: float,
        order: str = "all",
        window: int = 0,
    ) -> None:
        super().__init__(task, sentence_avg, keep_eos, label_smoothing)
        if window < 0:
            raise ValueError(f"--window {window} must not be negative")
        if keep_eos:
            raise ValueError("--keep-eos: </s> is no element of a set; the blanks mark the end of the output")
        self.order = str(order)
        self.window = window or None

    def losses_over_references(self, logits: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int) -> Tensor:
        """Return the loss of each sample's set: (B, N, V), (B, 1, T), (B, 1) -> (B,), in nats."""
        rows = zip(targets[:, 0].tolist(), target_lengths[:, 0].tolist(), strict=True)
        sets = [self.task.elements(row[:length]) for row, length in rows]
        order = self.order if self.training else "all"
        if order in ("all", "best"):
            automata = [set_of(elements, window=self.window) for elements in sets]
            if order == "all":
                return language_loss(logits, automata, blank=blank, reduction="none")
            paths, _ = best_path_of(logits, automata, blank=blank)
            said = collapse(paths, blank=blank)
            return query_ctc_loss(logits, said.tokens, said.lengths, blank=blank, reduction="none")
        if order == "random":
            sets = [shuffled(elements, logits.size(1)) for elements in sets]
        tokens = [torch.tensor(list(chain(*elements)), dtype=torch.int64) for elements in sets]
        lengths = torch.tensor([len(row) for row in tokens], dtype=torch.int64)
        padded = pad_sequence(tokens, batch_first=True) if tokens else torch.zeros(0, 0, dtype=torch.int64)
        there = [part.to(logits.device, non_blocking=True) for part in (padded, lengths)]
        return query_ctc_loss(logits, *there, blank=blank, reduction="none")


def shuffled(elements: Elements, num_queries: int) -> Elements:
    """Return elements in a random order, by torch's generator; the given order if the drawn one does not fit.

    Another order may need more queries than the given one: blanks, where equal tokens of two elements adjoin.

    Args:
        elements: the elements.
        num_queries: the number of queries N.
    """
    order = random.Random(int(torch.randint(1 << 62, ()))).sample(elements, len(elements))
    tokens = torch.tensor([list(chain(*order))], dtype=torch.int64)
    return order if int(min_queries(tokens, torch.tensor([tokens.size(1)]))) <= num_queries else elements
