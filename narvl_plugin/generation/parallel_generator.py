"""The student's generator: one pass, and a search for what the queries say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from narvl_plugin.ctc import (
    AnswerList,
    BeamAndGreedy,
    Greedy,
    Hypothesis,
    LengthRange,
    OutputConstraint,
    Outputs,
    best_states,
    build_lattice,
    constrain,
    hypotheses_of,
    outputs_of,
    quasi_random_paths,
    state_posteriors,
    to_host,
    total_scores,
)
from narvl_plugin.data.collate import pad_tokens
from narvl_plugin.data.vocabulary import Vocabulary
from narvl_plugin.generation.rescoring import TeacherRescorer
from narvl_plugin.models.memo import believing

Agreement = Callable[[Sequence[Tensor]], Tensor]
"""Gives, of H outputs, (T,) each, how much is gained in saying each where each is right: (H, H)."""
OutputScores = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Gives the scores (B, M), from 0 to 1, of M outputs of each sample where others are right: tokens (B, M, T) and
lengths (B, M) of the outputs, (B, K, S) and (B, K) of the others."""
Rescorer = Callable[[dict[str, Any], Sequence[Sequence[Tensor]]], list[Tensor]]
"""Gives, of a batch and outputs of each of its samples, what is added to each output's log-probability, in nats."""


class Student(Protocol):
    """What the generator needs of a student; see `NarvlModel`."""

    @property
    def blank(self) -> int:
        """The label of the blank."""

    @property
    def num_queries(self) -> int:
        """The number of queries N."""

    @property
    def temperature(self) -> float:
        """What logits are divided by."""

    @property
    def odds(self) -> tuple[float, float]:
        """Slope and offset of the log-odds of a confidence."""

    def __call__(self, **net_input: Any) -> tuple[Tensor, Any]:
        """Return logits (B, N, V), and anything."""

    def eval(self) -> Any:
        """Set the mode."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the weights."""


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
        constraint: the outputs that there are, where not all sequences of tokens are; then nothing else is said.
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
        models: Sequence[Student],
        dictionary: Vocabulary,
        *,
        print_alignment: str | None = None,
        beam_size: int = 1,
        nbest: int = 1,
        constraint: OutputConstraint | None = None,
        no_repeat_ngram: int = 0,
        answers: Sequence[Tensor] | None = None,
        agreement: Agreement | None = None,
        output_scores: OutputScores | None = None,
        rescorer: Rescorer | None = None,
        abstain_below: float = 0.0,
    ) -> None:
        sizes = {(model.blank, model.num_queries) for model in models}
        if len(sizes) > 1:
            raise ValueError(f"students of an ensemble must agree in (blank, queries); these have {sorted(sizes)}")
        self.blank, num_queries = sizes.pop()
        self.eos = dictionary.eos()
        self.symbols_to_strip_from_output = {self.eos}
        self.print_alignment = print_alignment
        self.beam_size = beam_size
        self.nbest = nbest
        self.constraint = (constraint or LengthRange(0, num_queries)).ending_in(self.eos)
        self.no_repeat_ngram = no_repeat_ngram
        self.answers = None if answers is None else AnswerList.of(answers, self.eos, self.blank)
        self.agreement = agreement
        self.output_scores = output_scores
        self.rescorer = rescorer
        self.abstain_below = abstain_below
        for model in models:
            model.eval()

    @torch.no_grad()
    def generate(
        self,
        models: Sequence[Student],
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
        with believing() as doubts:
            log_probs = self._log_probs(models, sample["net_input"])
        drawn = None if self.output_scores is None else quasi_random_paths(log_probs, PATHS_DRAWN)
        # A GPU is waited for here, and once more where paths into the language are searched; the rest is on the CPU.
        asked, drawn, flags = to_host((self._ask(log_probs), drawn, doubts.flags))
        if not doubts.settled(flags):
            return self.generate(models, sample)
        if isinstance(asked, Greedy):
            said, outputs = constrain(asked, log_probs, self.constraint, blank=self.blank)
            paths = [[path] for path in said]
            confidences: Tensor | list[Tensor] = [path.score.exp()[None] for path in said]
        else:
            if isinstance(self.rescorer, TeacherRescorer):
                self.rescorer.follow(models[0].parameters())
            outputs, confidences = self._choose(*self._rank(asked, log_probs, sample))
            paths = explain(outputs, blank=self.blank)
        if drawn is not None:
            confidences = self._expected_scores(drawn, paths)
        if len(models) == 1 and models[0].odds != UNCHANGED:
            confidences = [change_odds(sure, *models[0].odds) for sure in confidences]
        found = [
            [self._finish(path, confidence) for path, confidence in zip(beam, sure, strict=False)]
            for beam, sure in zip(paths, confidences, strict=True)
        ]
        if self.print_alignment is not None:
            self._write_alignments(outputs, found)
        return found

    def _log_probs(self, models: Sequence[Student], net_input: dict[str, Any]) -> Tensor:
        """Return the ensemble's log-probabilities, (B, N, V)."""
        log_probs = [torch.log_softmax(model(**net_input)[0].float() / model.temperature, dim=-1) for model in models]
        if len(log_probs) == 1:
            return log_probs[0]
        return torch.logsumexp(torch.stack(log_probs), dim=0) - math.log(len(log_probs))

    def _ask(self, log_probs: Tensor) -> Greedy | BeamAndGreedy | tuple[Outputs, Tensor]:
        """Return what is to be known of (B, N, V), on its device, which is not waited for."""
        if self.answers is not None:
            return self.answers.best(log_probs, self.beam_size, self.blank)
        if self.beam_size == 1 and not self.no_repeat_ngram:
            return Greedy.of(log_probs, self.constraint, blank=self.blank)
        sizes = {"beam_size": self.beam_size, "top_k": LABELS_TRIED, "no_repeat_ngram": self.no_repeat_ngram}
        return BeamAndGreedy.of(log_probs, self.constraint, blank=self.blank, **sizes)

    def _rank(
        self, asked: BeamAndGreedy | tuple[Outputs, Tensor], log_probs: Tensor, sample: dict[str, Any]
    ) -> tuple[Outputs, Tensor]:
        """Rank the most probable outputs of each sample: what was asked, on the CPU, of (B, N, V), on any device.

        Returns them, with the sums over all of their paths and what the rescorer adds; and (B, W) the share of each of
        the probability of all outputs that there are. Raises ValueError if every answer needs more than N queries.
        """
        if isinstance(asked, BeamAndGreedy):
            outputs = asked.join(log_probs, self.constraint, blank=self.blank, no_repeat_ngram=self.no_repeat_ngram)
            assert outputs.emissions is not None
            scores = total_scores(outputs.emissions.flatten(0, 1), outputs.lattice(blank=self.blank))
            scores = scores.view(outputs.scores.shape)
            outputs = outputs.with_scores(scores.masked_fill(outputs.scores == -torch.inf, -torch.inf))
            totals = scores.new_zeros(len(scores), 1)
        else:
            outputs, totals = asked
            if bool((totals == -torch.inf).any()):
                raise ValueError(f"{log_probs.size(1)} queries have no path with a probability to any of the answers")
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

    def _expected_scores(self, drawn: Tensor, beams: list[list[Hypothesis]]) -> list[Tensor]:
        """Return the score to be expected of what the student says if each output of a beam is right.

        drawn: (B, M, N), paths of what it says.
        """
        assert self.output_scores is not None
        tokens, _ = outputs_of(drawn, blank=self.blank)
        lengths = ((tokens != self.blank) & (tokens != self.eos)).cumprod(2).sum(2)  # up to a `</s>` of their own
        expected = []
        for row, beam in enumerate(beams):
            if not beam:
                expected.append(torch.empty(0))
                continue
            outputs = [path.tokens[: int((path.tokens != self.eos).sum())] for path in beam]
            right = pad_tokens(outputs, self.blank)[:, None]
            right_lengths = torch.tensor([[len(output)] for output in outputs], device=right.device)
            said = tokens[row].expand(len(beam), -1, -1), lengths[row].expand(len(beam), -1)
            expected.append(self.output_scores(*said, right, right_lengths).mean(1))
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

    def _write_alignments(self, outputs: Outputs, found: list[list[dict[str, Any]]]) -> None:
        """Put alignments as fairseq-generate prints them into the hypotheses, (B, W), of some outputs."""
        assert outputs.emissions is not None
        for emissions, beam in zip(outputs.emissions, found, strict=True):
            for hypothesis, states in zip(beam, emissions, strict=False):
                if self.print_alignment == "hard":
                    pairs = [(query, place) for place, query in enumerate(hypothesis["alignment"].tolist())]
                    hypothesis["alignment"] = pairs
                    continue
                tokens = hypothesis["tokens"][None, :-1]
                lattice = build_lattice(tokens, torch.tensor([tokens.size(1)]), blank=self.blank)
                shares = state_posteriors(states[None, :, : lattice.labels.size(1)], lattice)[0, :, 1::2].T
                hypothesis["alignment"] = [[f"{share:.6f}" for share in token] for token in shares.tolist()]


def change_odds(confidence: Tensor, slope: float, offset: float) -> Tensor:
    """Return confidences whose log-odds are multiplied by a slope and moved by an offset, of the same shape.

    Source: Platt, Probabilistic outputs for support vector machines, 1999.
    """
    return torch.sigmoid(slope * torch.logit(confidence.clamp(0, 1)) + offset)  # sums over paths may round to above 1


def explain(outputs: Outputs, *, blank: int) -> list[list[Hypothesis]]:
    """Find the most probable path to each output, which says from which query each token comes."""
    assert outputs.emissions is not None
    explained: list[list[Hypothesis]] = [[] for _ in outputs.scores]
    there = outputs.scores > -torch.inf
    for rank in range(there.size(1)):
        rows = there[:, rank].nonzero()[:, 0]
        emissions = outputs.emissions[rows, rank]
        lattice = build_lattice(outputs.tokens[rows, rank], outputs.lengths[rows, rank], blank=blank)
        best = best_states(emissions, lattice)
        states = (2 * best.positions + 1).clamp(min=0)  # all blanks are as probable as the first
        paths = hypotheses_of(best.labels, emissions.gather(2, states[..., None])[..., 0], blank=blank)
        for row, path in zip(rows.tolist(), paths, strict=True):
            explained[row].append(path._replace(score=outputs.scores[row, rank]))
    return explained
