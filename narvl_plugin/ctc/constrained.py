"""Constrained search: the most probable path to a valid output.

Legend: B batch, N queries, V labels.
"""

from typing import NamedTuple

from torch import Tensor

from narvl_plugin.ctc.collapse import Collapsed, Hypothesis, Paths, collapse, hypotheses_of
from narvl_plugin.ctc.constraints import OutputConstraint
from narvl_plugin.ctc.host import to_host
from narvl_plugin.ctc.ngrams import NgramConstraint
from narvl_plugin.ctc.outputs import Outputs


class Greedy(NamedTuple):
    """The path of each query's most probable label.

    Attributes:
        labels: (B, N), the path.
        log_probs: (B, N, N + 1), as in `Paths`.
        collapsed: the output of the path.
        accepted: (B,), whether the output satisfies the constraint.
    """

    labels: Tensor
    log_probs: Tensor
    collapsed: Collapsed
    accepted: Tensor

    @classmethod
    def of(cls, log_probs: Tensor, constraint: OutputConstraint, *, blank: int) -> "Greedy":
        """Take the most probable labels of (B, N, V) without a synchronisation with the device."""
        labels = log_probs.argmax(2)
        collapsed = collapse(labels, blank=blank)
        accepted = constraint.to(log_probs.device).accepts(collapsed.tokens, collapsed.lengths)
        return cls(*Paths.of(log_probs, labels, blank=blank), collapsed, accepted)


class Said(NamedTuple):
    """The most probable path of each sample to a valid output, on the CPU.

    Attributes:
        paths: the paths.
        collapsed: their outputs.
        scores: (B,), the log-probabilities of the outputs, summed over all of their paths.
    """

    paths: Paths
    collapsed: Collapsed
    scores: Tensor

    @classmethod
    def of(cls, paths: Paths, collapsed: Collapsed | None = None, *, blank: int) -> "Said":
        """Return what paths on the CPU say. `collapsed` is their outputs, if they are known."""
        outputs = collapse(paths.labels, blank=blank) if collapsed is None else collapsed
        return cls(paths, outputs, paths.total_scores(outputs))

    def hypotheses(self, *, blank: int) -> list[Hypothesis]:
        """Return one hypothesis for each sample."""
        found = hypotheses_of(self.paths.labels, self.paths.positional, blank=blank, collapsed=self.collapsed)
        return [path._replace(score=score) for path, score in zip(found, self.scores, strict=True)]

    def outputs(self) -> Outputs:
        """Return the outputs (B, 1) with emissions."""
        tokens, queries, lengths = self.collapsed
        emissions = self.paths.emissions(queries)
        return Outputs(tokens[:, None], lengths[:, None], self.scores[:, None], emissions[:, None])


def constrained_search(log_probs: Tensor, constraint: OutputConstraint, *, blank: int) -> list[Hypothesis]:
    """Find the most probable path whose output satisfies a constraint.

    If the greedy path is valid, it is the best; the other samples are searched exactly. The score is the
    log-probability of the output, summed over all of its paths.

    Args:
        log_probs: (B, N, V), normalised. The device is synchronised once, or twice if some samples are searched.
        constraint: the constraint on the outputs.
        blank: the label of the blank.

    Returns:
        One hypothesis for each sample, on the CPU.

    Raises:
        ValueError: if every valid output needs more than N queries.
    """
    greedy = None if isinstance(constraint, NgramConstraint) else Greedy.of(log_probs, constraint, blank=blank)
    return constrain(to_host(greedy), log_probs, constraint, blank=blank).hypotheses(blank=blank)


def constrain(greedy: Greedy | None, log_probs: Tensor, constraint: OutputConstraint, *, blank: int) -> Said:
    """Complete a constrained search from its greedy paths.

    Args:
        greedy: the greedy paths, on the CPU; None to search all samples, because a constraint has weights.
        log_probs: (B, N, V), on any device.
        constraint: the constraint on the outputs.
        blank: the label of the blank.

    Returns:
        The paths and their outputs, on the CPU.

    Raises:
        ValueError: if every valid output needs more than N queries.
    """
    if greedy is not None and bool(greedy.accepted.all()):
        return Said.of(Paths(greedy.labels, greedy.log_probs), greedy.collapsed.trimmed(), blank=blank)
    return Said.of(_searched(greedy, log_probs, constraint, blank), blank=blank)


def _searched(greedy: Greedy | None, log_probs: Tensor, constraint: OutputConstraint, blank: int) -> Paths:
    """Return the best paths: those of `greedy` that are accepted, and the result of a search for the others."""
    if greedy is None:
        return constraint.best_paths(log_probs, blank=blank)
    labels, near, _, accepted = greedy
    rows = (~accepted).nonzero()[:, 0]
    searched = constraint.best_paths(log_probs[rows.to(log_probs.device, non_blocking=True)], blank=blank)
    return Paths(labels.index_copy(0, rows, searched.labels), near.index_copy(0, rows, searched.log_probs))
