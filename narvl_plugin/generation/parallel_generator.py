"""The student's generator: one pass, the most probable path of the queries, collapsed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from fairseq.data import Dictionary
from torch import Tensor, nn

from narvl_plugin.ctc import Automaton, constrained_search, greedy, may_end_in


class ParallelGenerator:
    """Generates all tokens of a sample at once, in place of fairseq's `SequenceGenerator`.

    Args:
        models: students that share a vocabulary and a number of queries; several are an ensemble, whose label
            probabilities are averaged query by query.
        dictionary: the task's target dictionary, which does not hold the blank.
        print_alignment: fairseq-generate's option. With "hard" an alignment is the list of pairs that it
            prints (query, place in the output).
        language: the outputs that there are, where not all sequences of tokens are; then nothing else is said.

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
        language: Automaton | None = None,
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
        self.language = None if language is None else may_end_in(language, self.eos)
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
        """Return, for each of the B samples, a list of one hypothesis in fairseq's form.

        A hypothesis has `tokens` (T + 1,), closed by `</s>`; `score`, the log-probability of the path divided
        by the number of queries, in nats; `positional_scores` (T + 1,), the log-probability of each token at
        its query (0 for a `</s>` that the path leaves implied); `alignment` (T,), the query of each token but
        `</s>`; and an empty `attention`.

        Raises:
            ValueError: prefix tokens or constraints are given; one pass cannot obey them.
        """
        if prefix_tokens is not None or constraints is not None:
            raise ValueError("parallel generation takes neither --prefix-size nor --constraints")
        log_probs = self._log_probs(models, sample["net_input"])
        if self.language is None:
            hypotheses = greedy(log_probs, blank=self.blank)
        else:
            hypotheses = constrained_search(log_probs, self.language, blank=self.blank)
        return [[self._finish(*hypothesis, num_queries=log_probs.size(1))] for hypothesis in hypotheses]

    def _log_probs(self, models: Sequence[nn.Module], net_input: dict[str, Any]) -> Tensor:
        """Return the ensemble's log-probabilities, (B, N, V)."""
        log_probs = [torch.log_softmax(model(**net_input)[0].float(), dim=-1) for model in models]
        return torch.logsumexp(torch.stack(log_probs), dim=0) - math.log(len(log_probs))

    def _finish(
        self, tokens: Tensor, score: Tensor, positional: Tensor, queries: Tensor, *, num_queries: int
    ) -> dict[str, Any]:
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
            "score": score / num_queries,
            "attention": torch.empty(0),
            "alignment": alignment,
            "positional_scores": positional,
        }
