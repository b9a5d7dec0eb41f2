"""Constrained search: the most probable path to an output of a language.

Legend: B batch, N queries, V labels.
"""

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from narvl_plugin.ctc.languages import Language
from narvl_plugin.ctc.lattice import build_lattice, forward_scores, gather_labels, log_marginals
from narvl_plugin.ctc.search import Hypothesis, collapse, hypotheses_of


def constrained_search(log_probs: Tensor, language: Language, *, blank: int) -> list[Hypothesis]:
    """Find the most probable path that collapses to an output of the language.

    Where each query's most probable label gives such a path there is none better; the others are searched exactly. The
    score is the log-probability of the output: the sum over all paths to it.

    log_probs: (B, N, V), normalised. Returns one hypothesis a sample. Raises ValueError if every output needs more than
    N queries.
    """
    language = language.to(log_probs.device)
    labels = log_probs.argmax(2)
    tokens, _, lengths = collapse(labels, blank=blank)
    to_search = ~language.accepts(tokens, lengths)
    if bool(to_search.any()):
        labels[to_search] = language.best_paths(log_probs[to_search], blank=blank)
    found = hypotheses_of(labels, log_probs.gather(2, labels[..., None])[..., 0], blank=blank)
    return [path._replace(score=score) for path, score in zip(found, marginals(log_probs, found, blank), strict=True)]


def marginals(log_probs: Tensor, found: list[Hypothesis], blank: int) -> Tensor:
    """Return the log-probability of each sample's output, summed over all paths to it: (B, N, V) -> (B,)."""
    if not found:
        return log_probs.new_zeros(0)
    lengths = torch.tensor([len(path.tokens) for path in found], device=log_probs.device)
    targets = pad_sequence([path.tokens for path in found], batch_first=True)
    lattice = build_lattice(targets, lengths, blank=blank)
    emissions = gather_labels(log_probs, lattice.labels)
    return log_marginals(forward_scores(emissions, lattice, torch.full_like(lengths, log_probs.size(1))), lattice)
