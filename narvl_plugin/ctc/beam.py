"""Prefix beam search: the outputs of highest probability, each summed over its paths.

Legend: B batch, N queries, V labels, W outputs in the beam, K labels tried at a query, T tokens of an output.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from narvl_plugin.ctc.constrained import Greedy, constrain
from narvl_plugin.ctc.constraints import OutputConstraint
from narvl_plugin.ctc.host import longest_of, to_host
from narvl_plugin.ctc.lattice import IMPOSSIBLE, accumulation_dtype
from narvl_plugin.ctc.outputs import Outputs, Scored


class Beam(NamedTuple):
    """The outputs that the search follows.

    Attributes:
        tokens: (B, W, N), padded with the blank.
        lengths: (B, W).
        in_blank: (B, W), the log of the summed probability of an output's paths that end in a blank.
        in_label: (B, W), the same for the paths that end in the output's last token.
    """

    tokens: Tensor
    lengths: Tensor
    in_blank: Tensor
    in_label: Tensor

    @property
    def scores(self) -> Tensor:
        """(B, W): the log of the summed probability of all paths to each output."""
        return torch.logaddexp(self.in_blank, self.in_label)

    @property
    def last(self) -> Tensor:
        """(B, W): the last token of each output; its first padding if the output is empty."""
        return self.tokens.gather(2, (self.lengths - 1).clamp(min=0)[..., None])[..., 0]


def prefix_beam_search(
    log_probs: Tensor,
    *,
    blank: int,
    beam_size: int,
    nbest: int = 1,
    top_k: int | None = None,
    no_repeat_ngram: int = 0,
) -> list[list[Scored]]:
    """Find the most probable outputs of each sample.

    Args:
        log_probs: (B, N, V), normalised.
        blank: the label of the blank.
        beam_size: see `beam_outputs`.
        nbest: the number of outputs to return for each sample, at most.
        top_k: see `beam_outputs`.
        no_repeat_ngram: see `beam_outputs`.

    Returns:
        The outputs of each sample, best first.

    Raises:
        ValueError: if `nbest`, `beam_size` or `top_k` is below 1.
    """
    if nbest < 1:
        raise ValueError(f"nbest {nbest} must be at least 1")
    found = beam_outputs(log_probs, blank=blank, beam_size=beam_size, top_k=top_k, no_repeat_ngram=no_repeat_ngram)
    return found.first(nbest).lists()


def beam_outputs(
    log_probs: Tensor, *, blank: int, beam_size: int, top_k: int | None = None, no_repeat_ngram: int = 0
) -> Outputs:
    """Find the `beam_size` most probable outputs of each sample.

    At each query, the search keeps the `beam_size` best outputs and extends each by the `top_k` most probable labels.
    The scores are lower bounds, because discarded paths are missing. They are exact if nothing is discarded.

    Source: Graves, Sequence Transduction, 2012, algorithm 1, in the form for CTC of Hannun et al., arXiv 1408.2873.

    Args:
        log_probs: (B, N, V), normalised.
        blank: the label of the blank.
        beam_size: the number of outputs W that are kept.
        top_k: the number of labels K that extend an output at each query; None for all.
        no_repeat_ngram: if n > 0, the search drops every output that repeats an n-gram.

    Returns:
        W outputs of each sample, best first.

    Raises:
        ValueError: if `beam_size` or `top_k` is below 1.
    """
    if min(beam_size, 1 if top_k is None else top_k) < 1:
        raise ValueError(f"beam_size {beam_size} and top_k {top_k} must be at least 1")
    batch, num_queries, num_labels = log_probs.shape
    dtype = accumulation_dtype(log_probs.dtype)
    best, labels = log_probs.topk(min(top_k or num_labels, num_labels), dim=2)
    best = best.to(dtype).clamp(min=IMPOSSIBLE).masked_fill(labels == blank, IMPOSSIBLE)
    blanks = log_probs[:, :, blank].to(dtype).clamp(min=IMPOSSIBLE)

    beam = _nothing_said(log_probs.new_full((batch, beam_size), IMPOSSIBLE, dtype=dtype), num_queries, blank)
    for query in range(num_queries):
        again = log_probs[:, query].gather(1, beam.last).to(dtype).clamp(min=IMPOSSIBLE)
        longer = best[:, query, None]
        if 0 < no_repeat_ngram <= num_queries:
            repeats = _last_of_ngrams(beam, no_repeat_ngram, blank)
            longer = longer.masked_fill((labels[:, query, None, :, None] == repeats[:, :, None]).any(3), IMPOSSIBLE)
        beam = _read_query(beam, longer, labels[:, query], blanks[:, query], again, blank)

    scores = beam.scores
    found = Outputs(beam.tokens, beam.lengths, scores)
    return found.with_scores(scores.masked_fill(scores < IMPOSSIBLE / 2, -torch.inf))


def constrained_outputs(
    log_probs: Tensor,
    constraint: OutputConstraint,
    *,
    blank: int,
    beam_size: int,
    top_k: int | None = None,
    no_repeat_ngram: int = 0,
) -> Outputs:
    """Find the most probable outputs that satisfy a constraint.

    The beam follows all outputs of the constraint's labels; those that violate it are removed at the end. The output of
    the most probable valid path is always included, so a narrow beam is never worse. With `no_repeat_ngram`, it is
    included only if the beam finds nothing else, because it may repeat an n-gram.

    Args:
        log_probs: (B, N, V), normalised.
        constraint: the constraint on the outputs.
        blank: the label of the blank.
        beam_size: see `beam_outputs`.
        top_k: see `beam_outputs`.
        no_repeat_ngram: see `beam_outputs`.

    Returns:
        At most `beam_size` + 1 outputs of each sample, best first.

    Raises:
        ValueError: if every valid output needs more than N queries.
    """
    asked = BeamAndGreedy.of(
        log_probs, constraint, blank=blank, beam_size=beam_size, top_k=top_k, no_repeat_ngram=no_repeat_ngram
    )
    found = to_host(asked).join(log_probs, constraint, blank=blank, no_repeat_ngram=no_repeat_ngram)
    tokens, lengths, scores, _ = found
    return Outputs(*(part.to(log_probs.device) for part in (tokens, lengths, scores)))


class BeamAndGreedy(NamedTuple):
    """The valid outputs of a beam search with their emissions, and the path of each query's most probable label."""

    beam: Outputs
    greedy: Greedy

    @classmethod
    def of(
        cls,
        log_probs: Tensor,
        constraint: OutputConstraint,
        *,
        blank: int,
        beam_size: int,
        top_k: int | None,
        no_repeat_ngram: int,
    ) -> "BeamAndGreedy":
        """Run both searches on (B, N, V) without a synchronisation with the device."""
        search = partial(beam_outputs, beam_size=beam_size, top_k=top_k, no_repeat_ngram=no_repeat_ngram)
        labels = constraint.alphabet()
        if labels is None:
            found = search(log_probs, blank=blank)
        else:
            index = torch.cat([labels, labels.new_tensor([blank])]).to(log_probs.device, non_blocking=True)
            found = search(log_probs[:, :, index], blank=len(labels))
            found = found._replace(tokens=index[found.tokens])
        longest = longest_of(found.lengths, log_probs.size(1))
        fits = constraint.to(log_probs.device).accepts(
            found.tokens[:, :, :longest].flatten(0, 1), found.lengths.flatten()
        )
        found = found._replace(scores=found.scores.masked_fill(~fits.view_as(found.lengths), -torch.inf))
        return cls(found.explained_by(log_probs, blank=blank), Greedy.of(log_probs, constraint, blank=blank))

    def join(self, log_probs: Tensor, constraint: OutputConstraint, *, blank: int, no_repeat_ngram: int) -> Outputs:
        """Merge the outputs of both searches on the CPU.

        Args:
            log_probs: (B, N, V), on any device; paths are searched in it.
            constraint: the constraint on the outputs.
            blank: the label of the blank.
            no_repeat_ngram: see `constrained_outputs`.

        Returns:
            The outputs of each sample on the CPU, best first.
        """
        found, scores = self.beam, self.beam.scores
        best = constrain(self.greedy, log_probs, constraint, blank=blank).outputs()
        tokens = F.pad(best.tokens, (0, found.tokens.size(2) - best.tokens.size(2)), value=blank)
        known = ((found.tokens == tokens).all(2) & (scores > -torch.inf)).any(1, keepdim=True)
        if no_repeat_ngram:
            known |= (scores > -torch.inf).any(1, keepdim=True)
        emissions = None
        if found.emissions is not None and best.emissions is not None:
            padding = best.emissions[..., :1].expand(-1, -1, -1, found.emissions.size(3) - best.emissions.size(3))
            emissions = torch.cat([found.emissions, torch.cat([best.emissions, padding], 3)], 1)
        outputs = Outputs(
            torch.cat([found.tokens, tokens], 1), torch.cat([found.lengths, best.lengths], 1), scores, emissions
        )
        return outputs.with_scores(torch.cat([scores, best.scores.masked_fill(known, -torch.inf)], 1))


def _nothing_said(scores: Tensor, num_queries: int, blank: int) -> Beam:
    """Return the beam before any query, from impossible scores (B, W): the first output is empty and certain."""
    tokens = scores.new_full((*scores.shape, num_queries), blank, dtype=torch.int64)
    in_blank = scores.clone()
    in_blank[:, 0] = 0.0
    return Beam(tokens, tokens.new_zeros(scores.shape), in_blank, scores)


def _last_of_ngrams(beam: Beam, size: int, blank: int) -> Tensor:
    """Return the tokens that would complete a repeated n-gram of `size` tokens: (B, W, P).

    Entries without such a token hold the blank.
    """
    tokens, lengths = beam.tokens, beam.lengths
    ngrams = tokens.unfold(2, size, 1)  # (B, W, P, size)
    place = lengths[..., None] - torch.arange(size - 1, 0, -1, device=lengths.device)
    context = tokens.gather(2, place.clamp(min=0))
    said = torch.arange(ngrams.size(2), device=lengths.device) + size <= lengths[..., None]
    repeats = (ngrams[..., :-1] == context[:, :, None]).all(3) & said
    return ngrams[..., -1].masked_fill(~repeats, blank)


def _read_query(beam: Beam, best: Tensor, labels: Tensor, blanks: Tensor, again: Tensor, blank: int) -> Beam:
    """Extend all outputs by one query and keep the best.

    Args:
        beam: the outputs so far.
        best: (B, 1 or W, K), the log-probabilities of `labels`.
        labels: (B, K), the labels that extend outputs.
        blanks: (B,), the log-probability of the blank.
        again: (B, W), the log-probability of each output's last token.
        blank: the label of the blank.

    Returns:
        The beam after the query.
    """
    tokens, lengths, in_blank, in_label = beam
    size = lengths.size(1)
    scores, last = beam.scores, beam.last
    # An output in the beam may extend another one by a token. Paths that extend the shorter one add to the longer one.
    said = tokens[..., : max(1, longest_of(lengths, tokens.size(2)))]
    shorter = said.scatter(2, (lengths - 1).clamp(min=0)[..., None], blank)
    followed = (lengths > 0) & (scores > IMPOSSIBLE / 2)
    lengthens = (shorter[:, :, None] == said[:, None]).all(3) & followed[..., None]  # (B, W, W)
    # Equal neighbouring labels merge, so only a path that ends in a blank can repeat its last token.
    before = torch.where(last[:, :, None] == last[:, None], in_blank[:, None], scores[:, None])
    before = before.masked_fill(~lengthens, IMPOSSIBLE).amax(2)
    stay_in_label = torch.logaddexp(in_label, before) + again
    stay_in_blank = scores + blanks[:, None]

    longer = torch.where(labels[:, None] == last[..., None], in_blank[..., None], scores[..., None]) + best
    by_label = last[:, :, None] == labels[:, None]  # (B, W, K)
    there_already = lengthens.transpose(1, 2).to(longer.dtype) @ by_label.to(longer.dtype)
    longer = longer.masked_fill(there_already > 0, IMPOSSIBLE)

    candidates = torch.cat([torch.logaddexp(stay_in_blank, stay_in_label), longer.flatten(1)], 1)
    kept, place = candidates.topk(size, dim=1)
    stays = place < size
    source = torch.where(stays, place, (place - size) // labels.size(1))
    label = labels.gather(1, (place - size).remainder(labels.size(1)))
    tokens = tokens.gather(1, source[..., None].expand_as(tokens))
    lengths = lengths.gather(1, source)
    end = lengths.clamp(max=tokens.size(2) - 1)[..., None]
    tokens = torch.where(stays[..., None], tokens, tokens.scatter(2, end, label[..., None]))
    return Beam(
        tokens,
        lengths + ~stays,
        stay_in_blank.gather(1, source).masked_fill(~stays, IMPOSSIBLE),
        torch.where(stays, stay_in_label.gather(1, source), kept),
    )
