"""Constrained search: the most probable path to an output of a language.

Legend: B batch, N queries, V labels.
"""

from typing import NamedTuple

from torch import Tensor

from narvl_plugin.ctc.alignment import total_scores
from narvl_plugin.ctc.collapse import Hypothesis, Paths, collapse, hypotheses_of
from narvl_plugin.ctc.constraints import Language
from narvl_plugin.ctc.host import to_host
from narvl_plugin.ctc.lattice import build_lattice
from narvl_plugin.ctc.outputs import Outputs


class Greedy(NamedTuple):
    """The path of each query's most probable label, and (B,) whether it leads into a language."""

    labels: Tensor
    log_probs: Tensor
    accepted: Tensor

    @classmethod
    def of(cls, log_probs: Tensor, language: Language, *, blank: int) -> "Greedy":
        """Take the most probable labels of (B, N, V); a device is not waited for."""
        labels = log_probs.argmax(2)
        tokens, _, lengths = collapse(labels, blank=blank)
        accepted = language.to(log_probs.device).accepts(tokens, lengths)
        return cls(*Paths.of(log_probs, labels, blank=blank), accepted)


def constrained_search(log_probs: Tensor, language: Language, *, blank: int) -> list[Hypothesis]:
    """Find the most probable path that collapses to an output of the language.

    Where each query's most probable label gives such a path there is none better; the others are searched exactly. The
    score is the log-probability of the output: the sum over all paths to it.

    log_probs: (B, N, V), normalised, on a device that is waited for once, or twice where some samples are searched.
    Returns one hypothesis a sample, on the CPU. Raises ValueError if every output needs more than N queries.
    """
    greedy = to_host(Greedy.of(log_probs, language, blank=blank))
    return constrain(greedy, log_probs, language, blank=blank)[0]


def constrain(greedy: Greedy, log_probs: Tensor, language: Language, *, blank: int) -> tuple[list[Hypothesis], Outputs]:
    """Do the same, with the most probable labels on the CPU, and the log-probabilities (B, N, V) on any device.

    Returns the hypotheses, and what they say with its emissions, (B, 1), on the CPU.
    """
    labels, near, accepted = greedy
    rows = (~accepted).nonzero()[:, 0]
    if len(rows):
        searched = language.best_paths(log_probs[rows.to(log_probs.device, non_blocking=True)], blank=blank)
        labels, near = labels.index_copy(0, rows, searched.labels), near.index_copy(0, rows, searched.log_probs)
    paths = Paths(labels, near)
    tokens, queries, lengths = collapse(labels, blank=blank)
    emissions = paths.emissions(queries)
    scores = total_scores(emissions, build_lattice(tokens, lengths, blank=blank))
    found = hypotheses_of(labels, paths.positional, blank=blank)
    outputs = Outputs(tokens[:, None], lengths[:, None], scores[:, None], emissions[:, None])
    return [path._replace(score=score) for path, score in zip(found, scores, strict=True)], outputs
