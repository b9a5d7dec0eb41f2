"""The exact probability of every answer of a closed list; answers share their common prefixes.

Legend: B batch, N queries, V labels, K answers, S padded length of an answer, M nodes of the trie.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from narvl_plugin.ctc.lattice import IMPOSSIBLE, gather_labels
from narvl_plugin.ctc.outputs import Outputs


class Trie(NamedTuple):
    """The prefixes of all answers, each as one node; node 0 is the empty prefix.

    Attributes:
        parents: (M,), the node of the prefix without its last token; node 0 is its own parent.
        labels: (M,), the last token of the prefix; any label for node 0.
        repeats: (M,), whether the last two tokens of the prefix are equal.
        ends: (K,), the node of each complete answer.
    """

    parents: Tensor
    labels: Tensor
    repeats: Tensor
    ends: Tensor


def build_trie(candidates: Tensor, candidate_lengths: Tensor) -> Trie:
    """Build the trie of some answers.

    Args:
        candidates: (K, S), padded with any label.
        candidate_lengths: (K,).

    Returns:
        The trie of the answers' prefixes.
    """
    ends = torch.zeros_like(candidate_lengths)
    parents, labels = [ends.new_zeros(1)], [candidates.new_zeros(1)]
    size = 1
    for place in range(candidates.size(1)):
        longer = candidate_lengths > place
        added, which = torch.stack([ends[longer], candidates[longer, place]], 1).unique(dim=0, return_inverse=True)
        ends[longer] = size + which
        size += len(added)
        parents.append(added[:, 0])
        labels.append(added[:, 1])
    parent, label = torch.cat(parents), torch.cat(labels)
    return Trie(parent, label, (label == label[parent]) & (parent > 0), ends)


def score_candidates(log_probs: Tensor, candidates: Tensor, candidate_lengths: Tensor, *, blank: int) -> Tensor:
    """Return the log-probability of every answer, summed over all paths.

    Args:
        log_probs: (B, N, V), normalised.
        candidates: (K, S), padded with any label.
        candidate_lengths: (K,).
        blank: the label of the blank.

    Returns:
        (B, K), in nats; -inf for an answer without a path.
    """
    return score_trie(log_probs, build_trie(candidates, candidate_lengths), blank=blank)


def score_trie(log_probs: Tensor, trie: Trie, *, blank: int) -> Tensor:
    """Return the log-probability of every answer of a trie, in O(N M) operations a sample.

    Args:
        log_probs: (B, N, V), normalised.
        trie: the trie of the answers, from `build_trie`.
        blank: the label of the blank.

    Returns:
        (B, K), in nats; -inf for an answer without a path.
    """
    parents, labels, repeats, ends = trie
    emissions = gather_labels(log_probs, labels.expand(len(log_probs), -1)).clamp(min=IMPOSSIBLE)
    emissions[:, :, 0] = IMPOSSIBLE  # no label leads to the empty prefix
    blanks = log_probs[:, :, blank, None].to(emissions.dtype).clamp(min=IMPOSSIBLE)
    # Paths to each prefix that end in its last token, and those that end in a blank.
    in_label = emissions.new_full((len(log_probs), len(parents)), IMPOSSIBLE)
    in_blank = in_label.clone()
    in_blank[:, 0] = 0.0
    # Equal neighbouring labels merge, so only a path that ends in a blank can repeat its last token.
    sources = torch.where(repeats, parents, parents + len(parents))
    for emission, silence in zip(emissions.unbind(1), blanks.unbind(1), strict=True):
        said = torch.logaddexp(in_blank, in_label)
        arrived = torch.cat([in_blank, said], 1).index_select(1, sources)
        in_label = torch.logaddexp(in_label, arrived) + emission
        in_blank = said + silence
    scores = torch.logaddexp(in_blank, in_label)[:, ends]
    return scores.masked_fill(scores < IMPOSSIBLE / 2, -torch.inf)


class AnswerList(NamedTuple):
    """A closed list of answers, prepared for exact search.

    Attributes:
        tokens: (K, S), padded.
        lengths: (K,).
        trie: of all answers, first without and then with `</s>`.
    """

    tokens: Tensor
    lengths: Tensor
    trie: Trie

    @classmethod
    def of(cls, answers: Sequence[Tensor], eos: int, blank: int) -> "AnswerList":
        """Prepare answers, K tensors (T,)."""
        spelled = [*answers, *(torch.cat([answer, answer.new_tensor([eos])]) for answer in answers)]
        lengths = torch.tensor([len(answer) for answer in spelled])
        tokens = torch.nn.utils.rnn.pad_sequence(spelled, batch_first=True, padding_value=blank)
        return cls(tokens[: len(answers)], lengths[: len(answers)], build_trie(tokens, lengths))

    def best(self, log_probs: Tensor, number: int, blank: int) -> tuple[Outputs, Tensor]:
        """Find the most probable answers of each sample, without emissions. A device is not waited for.

        Args:
            log_probs: (B, N, V).
            number: of answers to return.
            blank: the label of the blank.

        Returns:
            The answers, and the log-probability of all answers together (B, 1).
        """
        tokens, lengths, *trie = (part.to(log_probs.device, non_blocking=True) for part in (*self[:2], *self.trie))
        scores = score_trie(log_probs, Trie(*trie), blank=blank).unflatten(1, (2, -1)).logsumexp(1)
        totals = scores.logsumexp(1, keepdim=True)
        scores, best = scores.topk(min(number, len(self.tokens)), dim=1)
        return Outputs(tokens[best], lengths[best], scores), totals
