"""The student's generator: one pass, and a search for what the queries say."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from fairseq.data import Dictionary
from torch import Tensor, nn

from narvl_plugin.ctc import (
    Hypothesis,
    Language,
    Lengths,
    Outputs,
    Trie,
    build_trie,
    constrained_search,
    hypotheses_of,
    language_outputs,
    outputs_of,
    score_targets,
    score_trie,
    spread_paths,
    token_posteriors,
    viterbi,
)
from narvl_plugin.data.collate import pad_tokens

Agreement = Callable[[Sequence[Tensor]], Tensor]
"""Gives, of H outputs, (T,) each, how much is gained in saying each where each is right: (H, H)."""
OutputScores = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Gives the scores (B, M), from 0 to 1, of M outputs of each sample where others are right: tokens (B, M, T) and
lengths (B, M) of the outputs, (B, K, S) and (B, K) of the others."""
Rescorer = Callable[[dict[str, Any], Sequence[Sequence[Tensor]]], list[Tensor]]
"""Gives, of a batch and outputs of each of its samples, what is added to each output's log-probability, in nats."""

LABELS_TRIED = 32
"""Of each query, in beam search: the most probable labels, by which outputs are lengthened."""
UNCHANGED = (1.0, 0.0)
"""Slope and offset that leave log-odds as they are."""
PATHS_DRAWN = 256
"""Of each sample, to estimate the score to be expected of its output."""


class ParallelGenerator:
    """Generates all tokens of a sample at once, in place of fairseq's `SequenceGenerator`.

    Args:
        models: students that share a vocabulary and a number of queries; several are an ensemble, whose label
            probabilities are averaged query by query. Each one's logits are divided by its own temperature; the odds
            of a confidence are calibrated where there is one student.
        dictionary: the task's target dictionary, which does not hold the blank.
        print_alignment: fairseq-generate's option. With "hard" an alignment is the list of pairs that it
            prints (query, place in the output), with "soft" the probability that each query says each token, as text.
        beam_size: 1 takes the most probable path; more are the outputs that a prefix beam search follows.
        nbest: outputs of the beam to return of each sample.
        language: the outputs that there are, where not all sequences of tokens are; then nothing else is said.
        no_repeat_ngram: where above 0, the size of n-grams of which no output may have one twice; a beam of 1 then
            follows a single output.
        answers: the outputs that there are, each (T,), where they are a closed list: all are scored.
        agreement: the gain in saying one output where another one is right, (H, H) of H outputs; then those of the beam
            are ordered by their expected gain, and not by their probability.
        output_scores: the scores of outputs where another one is right. Then the confidence in an output is the score
            to be expected of what the student says if it is right.
        rescorer: what is added to the scores of the outputs of a beam before they are ordered.
        abstain_below: confidence below which nothing is said.

    Raises:
        ValueError: the students differ in blank or queries.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        dictionary: Dictionary,
        *,
        print_alignment: str | None = None,
        beam_size: int = 1,
        nbest: int = 1,
        language: Language | None = None,
        no_repeat_ngram: int = 0,
        answers: Sequence[Tensor] | None = None,
        agreement: Agreement | None = None,
        output_scores: OutputScores | None = None,
        rescorer: Rescorer | None = None,
        abstain_below: float = 0.0,
    ) -> None:
        sizes = {(int(model.blank), int(model.num_queries)) for model in models}
        if len(sizes) > 1:
            raise ValueError(f"students of an ensemble must agree in (blank, queries); these have {sorted(sizes)}")
        self.blank, num_queries = sizes.pop()
        self.eos = dictionary.eos()
        self.symbols_to_strip_from_output = {self.eos}
        self.print_alignment = print_alignment
        self.beam_size = beam_size
        self.nbest = nbest
        self.language = (language or Lengths(0, num_queries)).ending_in(self.eos)
        self.no_repeat_ngram = no_repeat_ngram
        self.answers = None if answers is None else Answers.of(answers, self.eos, self.blank)
        self.agreement = agreement
        self.output_scores = output_scores
        self.rescorer = rescorer
        self.abstain_below = abstain_below
        for model in models:
            model.eval()

    @torch.no_grad()
    def generate(
        self,
        models: Sequence[nn.Module],
        sample: dict[str, Any],
        prefix_tokens: Tensor | None = None,
        constraints: Tensor | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Return, for each of the B samples, its hypotheses in fairseq's form, best first.

        A hypothesis has `tokens` (T + 1,), closed by `</s>`; `score`, the log-probability in nats of the output, summed
        over all paths to it, and what the rescorer adds; `positional_scores` (T + 1,), the log-probability of each
        token at its query on the most probable path (0 for a `</s>` that it leaves implied); `alignment` (T,), the
        query of each token but `</s>`; an empty `attention`; and `confidence`, how probable the student alone holds the
        output to be right: its share of the probability of all outputs, or what `output_scores` say.

        Raises:
            ValueError: prefix tokens or constraints are given; one pass cannot obey them.
        """
        if prefix_tokens is not None or constraints is not None:
            raise ValueError("parallel generation takes neither --prefix-size nor --constraints")
        log_probs = self._log_probs(models, sample["net_input"])
        if self.beam_size == 1 and self.answers is None and not self.no_repeat_ngram:
            paths = [[path] for path in constrained_search(log_probs, self.language, blank=self.blank)]
            confidences = [path.score.exp()[None] for (path,) in paths]
        else:
            outputs, confidences = self._choose(*self._search(log_probs, sample))
            paths = explain(log_probs, outputs, blank=self.blank)
        if self.output_scores is not None:
            confidences = self._expected_scores(log_probs, paths)
        if len(models) == 1 and models[0].odds != UNCHANGED:
            confidences = [change_odds(sure, *models[0].odds) for sure in confidences]
        found = [
            [self._finish(*one) for one in zip(beam, sure, strict=False)]
            for beam, sure in zip(paths, confidences, strict=True)
        ]
        if self.print_alignment is not None:
            self._write_alignments(log_probs, found)
        return found

    def _log_probs(self, models: Sequence[nn.Module], net_input: dict[str, Any]) -> Tensor:
        """Return the ensemble's log-probabilities, (B, N, V)."""
        log_probs = [torch.log_softmax(model(**net_input)[0].float() / model.temperature, dim=-1) for model in models]
        if len(log_probs) == 1:
            return log_probs[0]
        return torch.logsumexp(torch.stack(log_probs), dim=0) - math.log(len(log_probs))

    def _search(self, log_probs: Tensor, sample: dict[str, Any]) -> tuple[Outputs, Tensor]:
        """Search for the most probable outputs of each sample: (B, N, V).

        Returns them, with the sums over all of their paths and what the rescorer adds; and (B, W) the share of each of
        the probability of all outputs that there are.
        """
        if self.answers is not None:
            outputs, totals = self.answers.best(log_probs, self.beam_size, self.blank)
        else:
            sizes = {"beam_size": self.beam_size, "top_k": LABELS_TRIED, "no_repeat_ngram": self.no_repeat_ngram}
            outputs = language_outputs(log_probs, self.language, blank=self.blank, **sizes)
            scores = score_targets(log_probs, outputs.tokens, outputs.lengths, blank=self.blank)
            outputs = outputs.with_scores(scores.masked_fill(outputs.scores == -torch.inf, -torch.inf))
            totals = scores.new_zeros(len(scores), 1)
        shares = (outputs.scores - totals).exp()
        if self.rescorer is not None:
            scores = outputs.scores.clone()
            added = self.rescorer(sample, [[tokens for tokens, _ in beam] for beam in outputs.lists()])
            for row, more in enumerate(added):
                scores[row, : len(more)] += more
            order = scores.argsort(dim=1, descending=True, stable=True)
            outputs, shares = outputs._replace(scores=scores).take(order), shares.gather(1, order)
        return outputs, shares

    def _choose(self, outputs: Outputs, shares: Tensor) -> tuple[Outputs, Tensor]:
        """Choose the best outputs of each sample, at most `nbest`, and give each its confidence: (B, W), (B, W).

        With an agreement they are ordered by the gain to expect from each, as if there were no others
        (minimum-Bayes-risk decoding). Source: Kumar and Byrne, NAACL 2004.
        """
        if self.agreement is None:
            return outputs.first(self.nbest), shares[:, : self.nbest]
        order = torch.arange(shares.size(1), device=shares.device).repeat(len(shares), 1)
        weights = outputs.scores.softmax(1)
        for row, beam in enumerate(outputs.lists()):
            gains = self.agreement([tokens for tokens, _ in beam]).to(weights)
            order[row, : len(beam)] = (gains @ weights[row, : len(beam)]).argsort(descending=True, stable=True)
        order = order[:, : self.nbest]
        return outputs.take(order), shares.gather(1, order)

    def _expected_scores(self, log_probs: Tensor, beams: list[list[Hypothesis]]) -> list[Tensor]:
        """Return the score to be expected of what the student says if each output of a beam is right: (B, N, V)."""
        assert self.output_scores is not None
        tokens, _ = outputs_of(spread_paths(log_probs, PATHS_DRAWN), blank=self.blank)
        lengths = ((tokens != self.blank) & (tokens != self.eos)).cumprod(2).sum(2)  # up to a `</s>` of their own
        expected = []
        for row, beam in enumerate(beams):
            if not beam:
                expected.append(log_probs.new_empty(0))
                continue
            outputs = [path.tokens[: int((path.tokens != self.eos).sum())] for path in beam]
            right = pad_tokens(outputs, self.blank)[:, None]
            right_lengths = torch.tensor([[len(output)] for output in outputs], device=right.device)
            drawn = tokens[row].expand(len(beam), -1, -1), lengths[row].expand(len(beam), -1)
            expected.append(self.output_scores(*drawn, right, right_lengths).mean(1))
        return expected

    def _finish(self, path: Hypothesis, confidence: Tensor) -> dict[str, Any]:
        """Close a collapsed path with `</s>`: its own first one, if the student was trained to say it."""
        tokens, score, positional, queries = path
        if float(confidence) < self.abstain_below:
            tokens, positional, queries = tokens[:0], positional[:0], queries[:0]
        ends = (tokens == self.eos).nonzero()
        if len(ends):
            length = int(ends[0])
            positional = positional[: length + 1]
        else:
            length = len(tokens)
            positional = torch.cat([positional, positional.new_zeros(1)])
        return {
            "tokens": torch.cat([tokens[:length], tokens.new_tensor([self.eos])]),
            "score": score,
            "confidence": confidence,
            "attention": torch.empty(0),
            "alignment": queries[:length],
            "positional_scores": positional,
        }

    def _write_alignments(self, log_probs: Tensor, found: list[list[dict[str, Any]]]) -> None:
        """Put alignments as fairseq-generate prints them into the hypotheses of each sample: (B, N, V)."""
        for row, beam in enumerate(found):
            for hypothesis in beam:
                if self.print_alignment == "hard":
                    pairs = [(query, place) for place, query in enumerate(hypothesis["alignment"].tolist())]
                    hypothesis["alignment"] = pairs
                    continue
                tokens = hypothesis["tokens"][None, :-1]
                length = torch.tensor([tokens.size(1)], device=tokens.device)
                shares = token_posteriors(log_probs[row, None], tokens, length, blank=self.blank)[0]
                hypothesis["alignment"] = [[f"{share:.6f}" for share in token] for token in shares.tolist()]


def change_odds(confidence: Tensor, slope: float, offset: float) -> Tensor:
    """Return confidences whose log-odds are multiplied by a slope and moved by an offset, of the same shape.

    Source: Platt, Probabilistic outputs for support vector machines, 1999.
    """
    return torch.sigmoid(slope * torch.logit(confidence.clamp(0, 1)) + offset)  # sums over paths may round to above 1


class Answers(NamedTuple):
    """A closed list: each answer's tokens, (K, S), and length, (K,), and the trie of all, without and with `</s>`."""

    tokens: Tensor
    lengths: Tensor
    trie: Trie

    @classmethod
    def of(cls, answers: Sequence[Tensor], eos: int, blank: int) -> Answers:
        """Build the trie."""
        spelled = [*answers, *(torch.cat([answer, answer.new_tensor([eos])]) for answer in answers)]
        lengths = torch.tensor([len(answer) for answer in spelled])
        tokens = pad_tokens(spelled, blank)
        return cls(tokens[: len(answers)], lengths[: len(answers)], build_trie(tokens, lengths))

    def best(self, log_probs: Tensor, number: int, blank: int) -> tuple[Outputs, Tensor]:
        """Return the most probable answers of each sample and, (B, 1), the log-probability of all: (B, N, V).

        Raises ValueError if every answer needs more than N queries.
        """
        device = log_probs.device
        trie = Trie(*(part.to(device) for part in self.trie))
        scores = score_trie(log_probs, trie, blank=blank).unflatten(1, (2, -1)).logsumexp(1)
        totals = scores.logsumexp(1, keepdim=True)
        if bool((totals == -torch.inf).any()):
            raise ValueError(f"{log_probs.size(1)} queries have no path with a probability to any of the answers")
        scores, best = scores.topk(min(number, len(self.tokens)), dim=1)
        return Outputs(self.tokens.to(device)[best], self.lengths.to(device)[best], scores), totals


def explain(log_probs: Tensor, outputs: Outputs, *, blank: int) -> list[list[Hypothesis]]:
    """Find the most probable path to each output, which says from which query each token comes: (B, N, V)."""
    explained: list[list[Hypothesis]] = [[] for _ in log_probs]
    there = outputs.scores > -torch.inf
    for rank in range(there.size(1)):
        rows = there[:, rank].nonzero()[:, 0]
        of_rows = log_probs if len(rows) == len(log_probs) else log_probs[rows]
        labels = viterbi(of_rows, outputs.tokens[rows, rank], outputs.lengths[rows, rank], blank=blank).labels
        paths = hypotheses_of(labels, of_rows.gather(2, labels[..., None])[..., 0], blank=blank)
        for row, path in zip(rows.tolist(), paths, strict=True):
            explained[row].append(path._replace(score=outputs.scores[row, rank]))
    return explained
