"""Constrained search: the most probable path to an output of a language.

Legend: B batch, N queries, V labels.
"""

from torch import Tensor

from narvl_plugin.ctc.align import score_targets
from narvl_plugin.ctc.languages import Language
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
    paths = hypotheses_of(labels, log_probs.gather(2, labels[..., None])[..., 0], blank=blank)
    tokens, _, lengths = collapse(labels, blank=blank)
    scores = score_targets(log_probs, tokens[:, None], lengths[:, None], blank=blank)[:, 0]
    return [path._replace(score=score) for path, score in zip(paths, scores, strict=True)]
