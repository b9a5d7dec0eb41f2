"""Prefix beam search: the outputs of highest probability, each summed over its paths.

Legend: B batch, N queries, V labels, W outputs in the beam, K labels tried at a query, T tokens of an output.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from narvl_plugin.ctc.constrained import Greedy, constrain
from narvl_plugin.ctc.constraints import Language
from narvl_plugin.ctc.host import to_host
from narvl_plugin.ctc.lattice import IMPOSSIBLE, accumulation_dtype
from narvl_plugin.ctc.outputs import Outputs, Scored


class Beam(NamedTuple):
    """The outputs that are followed.

    tokens: (B, W, N), the blank after their last; lengths: (B, W); in_blank, in_label: (B, W) log of the summed
    probability of the paths to each that end in a blank, or in its last token.
    """

    tokens: Tensor
    lengths: Tensor
    in_blank: Tensor
    in_label: Tensor

    @property
    def scores(self) -> Tensor:
        """(B, W): log of the summed probability of all paths to each output."""
        return torch.logaddexp(self.in_blank, self.in_label)

    @property
    def last(self) -> Tensor:
        """(B, W): the last token of each output, and whatever stands first of one without any."""
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
    """Find the outputs of highest probability, best first, at most `nbest` of each sample; see `beam_outputs`."""
    if nbest < 1:
        raise ValueError(f"nbest {nbest} must be at least 1")
    found = beam_outputs(log_probs, blank=blank, beam_size=beam_size, top_k=top_k, no_repeat_ngram=no_repeat_ngram)
    return found.first(nbest).lists()


def beam_outputs(
    log_probs: Tensor, *, blank: int, beam_size: int, top_k: int | None = None, no_repeat_ngram: int = 0
) -> Outputs:
    """Find the outputs of highest probability, `beam_size` of each sample.

    At each query the `beam_size` best outputs go on, each lengthened by the `top_k` most probable labels (by all
    where None). What this leaves out is missing in the scores, so that they are lower bounds; they are exact where
    nothing is left out. With `no_repeat_ngram` of n > 0 no output that has n neighbouring tokens twice is followed,
    so that the best of the others are found, among those that the beam follows.

    log_probs: (B, N, V), normalised. Raises ValueError for sizes below 1. Source: Graves, Sequence Transduction, 2012,
    algorithm 1, in the form for CTC of Hannun et al., arXiv 1408.2873.
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


def language_outputs(
    log_probs: Tensor,
    language: Language,
    *,
    blank: int,
    beam_size: int,
    top_k: int | None = None,
    no_repeat_ngram: int = 0,
) -> Outputs:
    """Find the outputs of highest probability that lie in a language, at most `beam_size` and one of each sample.

    The beam follows all outputs of the language's labels, and what it ends with is sifted. The output of the most
    probable path into the language is always there, so that a narrow beam is never worse; with `no_repeat_ngram` only
    where nothing else is, since it may have an n-gram twice.

    log_probs: (B, N, V), normalised. Raises ValueError if every output needs more than N queries.
    """
    asked = BeamAndGreedy.of(
        log_probs, language, blank=blank, beam_size=beam_size, top_k=top_k, no_repeat_ngram=no_repeat_ngram
    )
    found = to_host(asked).join(log_probs, language, blank=blank, no_repeat_ngram=no_repeat_ngram)
    tokens, lengths, scores, _ = found
    return Outputs(*(part.to(log_probs.device) for part in (tokens, lengths, scores)))


class BeamAndGreedy(NamedTuple):
    """What a beam search finds in a language, with its emissions, and the path of each query's most probable label."""

    beam: Outputs
    greedy: Greedy

    @classmethod
    def of(
        cls,
        log_probs: Tensor,
        language: Language,
        *,
        blank: int,
        beam_size: int,
        top_k: int | None,
        no_repeat_ngram: int,
    ) -> "BeamAndGreedy":
        """Search (B, N, V); a device is not waited for."""
        search = partial(beam_outputs, beam_size=beam_size, top_k=top_k, no_repeat_ngram=no_repeat_ngram)
        labels = language.alphabet()
        if labels is None:
            found = search(log_probs, blank=blank)
        else:
            index = torch.cat([labels, labels.new_tensor([blank])]).to(log_probs.device, non_blocking=True)
            found = search(log_probs[:, :, index], blank=len(labels))
            found = found._replace(tokens=index[found.tokens])
        longest = log_probs.size(1)
        if log_probs.device.type == "cpu":  # a device would be waited for
            longest = int(found.lengths.max()) if len(log_probs) else 0
        fits = language.to(log_probs.device).accepts(
            found.tokens[:, :, :longest].flatten(0, 1), found.lengths.flatten()
        )
        found = found._replace(scores=found.scores.masked_fill(~fits.view_as(found.lengths), -torch.inf))
        return cls(found.explained_by(log_probs, blank=blank), Greedy.of(log_probs, language, blank=blank))

    def join(self, log_probs: Tensor, language: Language, *, blank: int, no_repeat_ngram: int) -> Outputs:
        """Return, on the CPU, the outputs of both, best first, on any device (B, N, V) where paths are searched."""
        found, scores = self.beam, self.beam.scores
        _, best = constrain(self.greedy, log_probs, language, blank=blank)
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
    """Return the beam before any query: scores (B, W), all impossible, but the first output is empty and certain."""
    tokens = scores.new_full((*scores.shape, num_queries), blank, dtype=torch.int64)
    in_blank = scores.clone()
    in_blank[:, 0] = 0.0
    return Beam(tokens, tokens.new_zeros(scores.shape), in_blank, scores)


def _last_of_ngrams(beam: Beam, size: int, blank: int) -> Tensor:
    """Return the tokens that would repeat an n-gram of `size` tokens of each output right after it: (B, W, P).

    The blank stands where there is none.
    """
    tokens, lengths = beam.tokens, beam.lengths
    ngrams = tokens.unfold(2, size, 1)  # (B, W, P, size)
    place = lengths[..., None] - torch.arange(size - 1, 0, -1, device=lengths.device)
    context = tokens.gather(2, place.clamp(min=0))
    said = torch.arange(ngrams.size(2), device=lengths.device) + size <= lengths[..., None]
    repeats = (ngrams[..., :-1] == context[:, :, None]).all(3) & said
    return ngrams[..., -1].masked_fill(~repeats, blank)


def _read_query(beam: Beam, best: Tensor, labels: Tensor, blanks: Tensor, again: Tensor, blank: int) -> Beam:
    """Follow all outputs over one query, and keep the best.

    labels: (B, K) to lengthen outputs by; best: (B, 1 or W, K) their log-probabilities; blanks: (B,) that of the blank;
    again: (B, W) of each output's last token.
    """
    tokens, lengths, in_blank, in_label = beam
    size = lengths.size(1)
    scores, last = beam.scores, beam.last
    # One output may be another and a token more; what lengthens that one to it is the same output, and adds to it.
    shorter = tokens.scatter(2, (lengths - 1).clamp(min=0)[..., None], blank)
    followed = (lengths > 0) & (scores > IMPOSSIBLE / 2)
    lengthens = (shorter[:, :, None] == tokens[:, None]).all(3) & followed[..., None]  # (B, W, W)
    # A token right after itself is read as one, so that only what ends in a blank can repeat it.
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
