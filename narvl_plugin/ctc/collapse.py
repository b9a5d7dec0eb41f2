"""Decoding: from the label of every query to a sequence of tokens.

Legend: B batch, N queries, V labels, T tokens of the longest output.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from narvl_plugin.ctc.host import longest_of
from narvl_plugin.ctc.lattice import accumulation_dtype, gather_labels
from narvl_plugin.ctc.loss import log_sum_exp

SlotKind = Literal["token", "repeat", "blank"]


class Collapsed(NamedTuple):
    """The tokens that remain after merging repeats and removing blanks.

    Attributes:
        tokens: (B, T), padded with the blank.
        queries: (B, T), the first query of each token's run, padded with -1.
        lengths: (B,), the number of tokens of each sample.
    """

    tokens: Tensor
    queries: Tensor
    lengths: Tensor

    def trimmed(self) -> "Collapsed":
        """Return the same tokens, on the CPU, where T is the length of the longest output."""
        longest = longest_of(self.lengths, self.tokens.size(1))
        return self._replace(tokens=self.tokens[:, :longest], queries=self.queries[:, :longest])


class Hypothesis(NamedTuple):
    """One decoded sample.

    Attributes:
        tokens: (T,).
        score: the log-probability of the path, in nats, a scalar tensor.
        positional_scores: (T,), the log-probability of each token at its query.
        alignment: (T,), the query of each token.
        labels: (N,), the label of each query on the path.
        label_scores: (N,), the log-probability of each query's label.
    """

    tokens: Tensor
    score: Tensor
    positional_scores: Tensor
    alignment: Tensor
    labels: Tensor
    label_scores: Tensor


class Paths(NamedTuple):
    """One path of each sample, with the log-probabilities that score its output.

    Attributes:
        labels: (B, N), the label of each query.
        log_probs: (B, N, N + 1), at each query, the log-probability of every label on the path; the blank is last.
    """

    labels: Tensor
    log_probs: Tensor

    @classmethod
    def of(cls, log_probs: Tensor, labels: Tensor, *, blank: int) -> "Paths":
        """Gather the log-probabilities that score paths.

        Args:
            log_probs: (B, N, V).
            labels: (B, N), the paths.
            blank: the label of the blank.

        Returns:
            The paths with their log-probabilities.
        """
        index = torch.cat([labels, labels.new_full((len(labels), 1), blank)], 1)
        return cls(labels, log_probs.gather(2, index[:, None].expand(-1, labels.size(1), -1)))

    @property
    def positional(self) -> Tensor:
        """(B, N): the log-probability of the path's label at each query."""
        return self.log_probs.diagonal(dim1=1, dim2=2)

    def emissions(self, queries: Tensor) -> Tensor:
        """Return the log-probabilities of the lattice states of the paths' outputs.

        Args:
            queries: (B, T), the query of each token, -1 on padding.

        Returns:
            (B, N, 2 T + 1).
        """
        blank = self.labels.size(1)
        index = queries.new_full((len(queries), 2 * queries.size(1) + 1), blank)
        index[:, 1::2] = torch.where(queries < 0, blank, queries)
        return gather_labels(self.log_probs, index)

    def total_scores(self, collapsed: "Collapsed") -> Tensor:
        """Return the log-probabilities of the paths' outputs, summed over all of their paths, by torch's own CTC.

        Args:
            collapsed: the outputs, on the CPU.

        Returns:
            (B,), in nats.
        """
        batch, num_queries = self.labels.shape
        # A token stands for the first query of the path that has it, and N for the blank.
        first = (self.labels[:, :, None] == self.labels[:, None]).int().argmax(2)
        places = first.gather(1, collapsed.queries.clamp(min=0)) if collapsed.queries.size(1) else first[:, :1]
        queries = torch.full((batch,), num_queries)
        log_probs = self.log_probs.transpose(0, 1).to(accumulation_dtype(self.log_probs.dtype))
        return -F.ctc_loss(log_probs, places, queries, collapsed.lengths, blank=num_queries, reduction="none")


def collapse(labels: Tensor, *, blank: int) -> Collapsed:
    """Merge runs of the same label, then remove blanks.

    Source: Graves et al., ICML 2006, section 3.1 (the map B).

    Args:
        labels: (B, N), one label for each query.
        blank: the label of the blank.

    Returns:
        The tokens. On the CPU, T is the length of the longest output. On a device, T is N, because reading that length
        would synchronise with the device.
    """
    batch, num_queries = labels.shape
    kept = labels != blank
    kept[:, 1:] &= labels[:, 1:] != labels[:, :-1]
    lengths = kept.sum(1)
    longest = longest_of(lengths, num_queries)
    # Each kept query has a position in the output; the others are written to an extra column, which is removed.
    place = torch.where(kept, kept.cumsum(1) - 1, longest)
    query = torch.arange(num_queries, device=labels.device).expand(batch, -1)
    tokens = labels.new_full((batch, longest + 1), blank).scatter_(1, place, labels)
    queries = query.new_full((batch, longest + 1), -1).scatter_(1, place, query)
    return Collapsed(tokens[:, :longest], queries[:, :longest], lengths)


def greedy(logits: Tensor, *, blank: int) -> list[Hypothesis]:
    """Take every query's most probable label and collapse: the most probable path, in one pass.

    Source: NARVL (arXiv 2403.02249), section 3.3.

    Args:
        logits: (B, N, V), normalised or not.
        blank: the label of the blank.

    Returns:
        One hypothesis for each sample.
    """
    best, labels = logits.detach().max(2)
    return hypotheses_of(labels, best - log_sum_exp(logits), blank=blank)


def hypotheses_of(
    labels: Tensor, log_probs: Tensor, *, blank: int, collapsed: Collapsed | None = None
) -> list[Hypothesis]:
    """Collapse the paths of a batch.

    Args:
        labels: (B, N), the label of each query.
        log_probs: (B, N), the log-probability of each label.
        blank: the label of the blank.
        collapsed: the result of `collapse` on the labels, if it is known.

    Returns:
        One hypothesis for each sample.
    """
    tokens, queries, lengths = collapsed or collapse(labels, blank=blank)
    positional = log_probs.gather(1, queries.clamp(min=0))
    return [
        Hypothesis(
            tokens[sample, :length],
            score,
            positional[sample, :length],
            queries[sample, :length],
            labels[sample],
            log_probs[sample],
        )
        for sample, (length, score) in enumerate(zip(lengths.tolist(), log_probs.sum(1), strict=True))
    ]


def slot_kinds(labels: Tensor, *, blank: int) -> list[SlotKind]:
    """Return the kind of each label of a path.

    Args:
        labels: (N,), the label of each query.
        blank: the label of the blank.

    Returns:
        `token` for a label that adds to the output, `repeat` for one that merges with the same label before it, and
        `blank`.
    """
    speaking = set(collapse(labels[None], blank=blank).queries[0].tolist())
    return [
        "blank" if label == blank else "token" if query in speaking else "repeat"
        for query, label in enumerate(labels.tolist())
    ]
