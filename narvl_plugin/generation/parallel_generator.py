"""The student's generator: one pass, and a search for what the queries say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from fairseq.data import Dictionary
from torch import Tensor, nn

from narvl_plugin.ctc import (
    Automaton,
    Hypothesis,
    Scored,
    Trie,
    build_trie,
    constrained_search,
    greedy,
    hypotheses_of,
    may_end_in,
    prefix_beam_search,
    score_trie,
    viterbi,
)
from narvl_plugin.data.collate import pad_tokens

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
        beam_size: 1 takes the most probable path; more are the outputs that a prefix beam search follows and returns.
        language: the outputs that there are, where not all sequences of tokens are; then nothing else is said, but
            the most probable path to one of them.
        answers: the outputs that there are, each (T,), where they are a closed list: each one's probability is summed
            over all of its paths, and the `beam_size` most probable are returned.

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
        language: Automaton | None = None,
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
        self.language = None if language is None else may_end_in(language, self.eos)
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

        A hypothesis has `tokens` (T + 1,), closed by `</s>`; `score`, the log-probability in nats of the path, or,
        where outputs and not paths were searched for, of the output: the sum over its paths; `positional_scores`
        (T + 1,), the log-probability of each token at its query on the path, the most probable one (0 for a `</s>`
        that it leaves implied); `alignment` (T,), the query of each token but `</s>`; and an empty `attention`.

        Raises:
            ValueError: prefix tokens or constraints are given; one pass cannot obey them.
        """
        if prefix_tokens is not None or constraints is not None:
            raise ValueError("parallel generation takes neither --prefix-size nor --constraints")
        log_probs = self._log_probs(models, sample["net_input"])
        return [[self._finish(*hypothesis) for hypothesis in found] for found in self._search(log_probs)]

    def _search(self, log_probs: Tensor) -> list[list[Hypothesis]]:
        """Search for the outputs of each sample: (B, N, V)."""
        if self.answers is not None:
            return explain(log_probs, self.answers.best(log_probs, self.beam_size, self.blank), blank=self.blank)
        if self.language is not None:
            found = constrained_search(log_probs, self.language, blank=self.blank)
            return [[hypothesis] for hypothesis in found]
        if self.beam_size > 1:
            outputs = prefix_beam_search(
                log_probs, blank=self.blank, beam_size=self.beam_size, nbest=self.beam_size, top_k=LABELS_TRIED
            )
            return explain(log_probs, outputs, blank=self.blank)
        return [[hypothesis] for hypothesis in greedy(log_probs, blank=self.blank)]

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
        """Return the most probable answers of each sample, best first: (B, N, V)."""
        trie = Trie(*(part.to(log_probs.device) for part in self.trie))
        scores = score_trie(log_probs, trie, blank=blank).unflatten(1, (2, -1)).logsumexp(1)
        scores, best = scores.topk(min(number, len(self.tokens)), dim=1)
        return [
            [
                Scored(self.tokens[answer].to(log_probs.device), score)
                for answer, score in zip(answers, row, strict=True)
                if score > -torch.inf
            ]
            for answers, row in zip(best.tolist(), scores, strict=True)
        ]


def explain(log_probs: Tensor, outputs: list[list[Scored]], *, blank: int) -> list[list[Hypothesis]]:
    """Find the most probable path to each output, which says from which query each token comes: (B, N, V)."""
    samples = torch.tensor([row for row, found in enumerate(outputs) for _ in found], device=log_probs.device)
    if not len(samples):
        return [[] for _ in outputs]
    flat = [scored for found in outputs for scored in found]
    lengths = torch.tensor([len(tokens) for tokens, _ in flat], device=log_probs.device)
    labels = viterbi(log_probs[samples], pad_tokens([tokens for tokens, _ in flat], blank), lengths, blank=blank).labels
    positional = log_probs[samples[:, None], torch.arange(labels.size(1), device=labels.device), labels]
    paths = iter(hypotheses_of(labels, positional, blank=blank))
    return [[next(paths)._replace(score=scored.score) for scored in found] for found in outputs]
