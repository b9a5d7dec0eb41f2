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
    Scored,
    Trie,
    build_trie,
    constrained_beam_search,
    constrained_search,
    greedy,
    hypotheses_of,
    prefix_beam_search,
    score_trie,
    viterbi,
)
from narvl_plugin.data.collate import pad_tokens

Agreement = Callable[[Sequence[Tensor]], Tensor]
"""Gives, of H outputs, (T,) each, how much is gained in saying each where each is right: (H, H)."""

LABELS_TRIED = 32
"""Of each query, in beam search: the most probable labels, by which outputs are lengthened."""


class ParallelGenerator:
    """Generates all tokens of a sample at once, in place of fairseq's `SequenceGenerator`.

    Args:
        models: students that share a vocabulary and a number of queries; several are an ensemble, whose label
            probabilities are averaged query by query.
        dictionary: the task's target dictionary, which does not hold the blank.
        print_alignment: fairseq-generate's option. With "hard" an alignment is the list of pairs that it
            prints (query, place in the output).
        beam_size: 1 takes the most probable path; more are the outputs that a prefix beam search follows.
        nbest: outputs of the beam to return of each sample.
        agreement: the gain in saying one output where another one is right, (H, H) of H outputs; then those of the beam
            are ordered by their expected gain, and not by their probability.
        language: the outputs that there are, where not all sequences of tokens are; then nothing else is said, but
            the most probable path to one of them.
        no_repeat_ngram: where above 0, the size of n-grams of which no output may have one twice; a beam of 1 then
            follows a single output.
        answers: the outputs that there are, each (T,), where they are a closed list: each one's probability is summed
            over all of its paths.

    Raises:
        ValueError: the students differ in blank or queries, or `print_alignment` asks for what a path of
            single labels does not have.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        dictionary: Dictionary,
        *,
        print_alignment: str | None = None,
        beam_size: int = 1,
        nbest: int = 1,
        agreement: Agreement | None = None,
        language: Language | None = None,
        no_repeat_ngram: int = 0,
        answers: Sequence[Tensor] | None = None,
    ) -> None:
        sizes = {(int(model.blank), int(model.num_queries)) for model in models}
        if len(sizes) > 1:
            raise ValueError(f"students of an ensemble must agree in (blank, queries); these have {sorted(sizes)}")
        if print_alignment not in (None, "hard"):
            raise ValueError(f"--print-alignment {print_alignment}: a parallel student has hard alignments only")
        self.blank, _ = sizes.pop()
        self.eos = dictionary.eos()
        self.symbols_to_strip_from_output = {self.eos}
        self.print_alignment = print_alignment
        self.beam_size = beam_size
        self.nbest = nbest
        self.agreement = agreement
        self.language = None if language is None else language.ending_in(self.eos)
        self.no_repeat_ngram = no_repeat_ngram
        self.answers = None if answers is None else Answers.of(answers, self.eos)
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
        over the paths that were followed (of the path alone where any output may be said and the beam is 1);
        `positional_scores` (T + 1,), the log-probability of each token at its query on the most probable path (0 for a
        `</s>` that it leaves implied); `alignment` (T,), the query of each token but `</s>`; and an empty `attention`.

        Raises:
            ValueError: prefix tokens or constraints are given; one pass cannot obey them.
        """
        if prefix_tokens is not None or constraints is not None:
            raise ValueError("parallel generation takes neither --prefix-size nor --constraints")
        log_probs = self._log_probs(models, sample["net_input"])
        return [[self._finish(*hypothesis) for hypothesis in found] for found in self._search(log_probs)]

    def _search(self, log_probs: Tensor) -> list[list[Hypothesis]]:
        """Search for the outputs of each sample: (B, N, V)."""
        if self.answers is None and self.beam_size == 1 and not self.no_repeat_ngram:  # for paths
            if self.language is None:
                return [[hypothesis] for hypothesis in greedy(log_probs, blank=self.blank)]
            found = constrained_search(log_probs, self.language, blank=self.blank)
            return [[hypothesis] for hypothesis in found]
        outputs = self._search_outputs(log_probs)
        if self.agreement is not None:
            outputs = [by_expected_gain(found, self.agreement) for found in outputs]
        return explain(log_probs, [found[: self.nbest] for found in outputs], blank=self.blank)

    def _search_outputs(self, log_probs: Tensor) -> list[list[Scored]]:
        """Search for the outputs of each sample that are the most probable, summed over their paths: (B, N, V)."""
        if self.answers is not None:
            return self.answers.best(log_probs, self.beam_size, self.blank)
        sizes = {"beam_size": self.beam_size, "top_k": LABELS_TRIED, "no_repeat_ngram": self.no_repeat_ngram}
        if self.language is not None:
            return constrained_beam_search(log_probs, self.language, blank=self.blank, **sizes)
        return prefix_beam_search(log_probs, blank=self.blank, nbest=self.beam_size, **sizes)

    def _log_probs(self, models: Sequence[nn.Module], net_input: dict[str, Any]) -> Tensor:
        """Return the ensemble's log-probabilities, (B, N, V)."""
        log_probs = [torch.log_softmax(model(**net_input)[0].float(), dim=-1) for model in models]
        return torch.logsumexp(torch.stack(log_probs), dim=0) - math.log(len(log_probs))

    def _finish(self, tokens: Tensor, score: Tensor, positional: Tensor, queries: Tensor) -> dict[str, Any]:
        """Close a collapsed path with `</s>`: its own first one, if the student was trained to say it."""
        ends = (tokens == self.eos).nonzero()
        if len(ends):
            length = int(ends[0])
            positional = positional[: length + 1]
        else:
            length = len(tokens)
            positional = torch.cat([positional, positional.new_zeros(1)])
        queries = queries[:length]
        alignment: Tensor | list[tuple[int, int]] = queries
        if self.print_alignment == "hard":
            alignment = [(query, place) for place, query in enumerate(queries.tolist())]
        return {
            "tokens": torch.cat([tokens[:length], tokens.new_tensor([self.eos])]),
            "score": score,
            "attention": torch.empty(0),
            "alignment": alignment,
            "positional_scores": positional,
        }


class Answers(NamedTuple):
    """A closed list: the tokens of each answer, (T,), and the trie of all, without and then with `</s>` after them."""

    tokens: Sequence[Tensor]
    trie: Trie

    @classmethod
    def of(cls, tokens: Sequence[Tensor], eos: int) -> Answers:
        """Build the trie."""
        spelled = [*tokens, *(torch.cat([answer, answer.new_tensor([eos])]) for answer in tokens)]
        return cls(tokens, build_trie(pad_tokens(spelled, eos), torch.tensor([len(answer) for answer in spelled])))

    def best(self, log_probs: Tensor, number: int, blank: int) -> list[list[Scored]]:
        """Return the most probable answers of each sample, best first: (B, N, V).

        Raises ValueError if every answer needs more than N queries.
        """
        trie = Trie(*(part.to(log_probs.device) for part in self.trie))
        scores = score_trie(log_probs, trie, blank=blank).unflatten(1, (2, -1)).logsumexp(1)
        scores, best = scores.topk(min(number, len(self.tokens)), dim=1)
        if bool((scores[:, 0] == -torch.inf).any()):
            raise ValueError(f"{log_probs.size(1)} queries have no path with a probability to any of the answers")
        return [
            [
                Scored(self.tokens[answer].to(log_probs.device), score)
                for answer, score in zip(answers, row, strict=True)
                if score > -torch.inf
            ]
            for answers, row in zip(best.tolist(), scores, strict=True)
        ]


def by_expected_gain(found: list[Scored], agreement: Agreement) -> list[Scored]:
    """Order the outputs of a sample by the gain to expect from each, as if there were no others.

    Minimum-Bayes-risk decoding. Source: Kumar and Byrne, NAACL 2004.
    """
    if len(found) < 2:
        return found
    gains = agreement([tokens for tokens, _ in found])
    weights = torch.stack([score for _, score in found]).softmax(0)
    order = (gains @ weights.to(gains)).argsort(descending=True, stable=True)
    return [found[place] for place in order.tolist()]


def explain(log_probs: Tensor, outputs: list[list[Scored]], *, blank: int) -> list[list[Hypothesis]]:
    """Find the most probable path to each output, which says from which query each token comes: (B, N, V)."""
    explained: list[list[Hypothesis]] = [[] for _ in outputs]
    for rank in range(max(map(len, outputs), default=0)):
        rows = [row for row, found in enumerate(outputs) if len(found) > rank]
        ranked = [outputs[row][rank] for row in rows]
        of_rows = log_probs if len(rows) == len(outputs) else log_probs[rows]
        lengths = torch.tensor([len(tokens) for tokens, _ in ranked], device=log_probs.device)
        targets = pad_tokens([tokens for tokens, _ in ranked], blank)
        labels = viterbi(of_rows, targets, lengths, blank=blank).labels
        paths = hypotheses_of(labels, of_rows.gather(2, labels[..., None])[..., 0], blank=blank)
        for row, path, (_, score) in zip(rows, paths, ranked, strict=True):
            explained[row].append(path._replace(score=score))
    return explained
