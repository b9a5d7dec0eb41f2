"""The student's generator: one parallel pass, then a search over the queries' labels.

Legend: B batch, N queries, V labels, T tokens of an output, W outputs in a beam, H outputs of a sample, M outputs or
paths of a sample, K targets of a sample, S tokens of a target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from narvl_plugin.ctc import (
    AnswerList,
    BeamAndGreedy,
    Collapsed,
    Greedy,
    Hypothesis,
    LengthRange,
    NgramConstraint,
    OutputConstraint,
    Outputs,
    Paths,
    Said,
    best_states,
    build_lattice,
    collapse,
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
from narvl_plugin.models.captured import in_bucket
from narvl_plugin.models.memo import believing
from narvl_plugin.models.narvl import NarvlModel

Agreement = Callable[[Sequence[Tensor]], Tensor]
"""Maps H outputs, (T,) each, to gains (H, H): the gain of each output (row) if another (column) is correct."""
OutputScores = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Maps tokens (B, M, T) and lengths (B, M) of outputs, and tokens (B, K, S) and lengths (B, K) of correct targets, to
the scores (B, M) of the outputs, from 0 to 1."""
ElementScores = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps M outputs of a sample, tokens (M, T) and lengths (M,), and another output (S,) to the probability of each of its
elements."""
Rescorer = Callable[[dict[str, Any], Sequence[Sequence[Tensor]]], list[Tensor]]
"""Maps a batch and the outputs of each of its samples to the terms that are added to the outputs' log-probabilities, in
nats."""


class Student(Protocol):
    """The parts of a student that the generator needs; see `NarvlModel`."""

    @property
    def blank(self) -> int:
        """The label of the blank."""

    @property
    def num_queries(self) -> int:
        """The number of queries N."""

    @property
    def temperature(self) -> float:
        """The divisor of the logits."""

    @property
    def odds(self) -> tuple[float, float]:
        """Slope and offset that calibrate the log-odds of a confidence."""

    def __call__(self, **net_input: Any) -> tuple[Tensor, Any]:
        """Return logits (B, N, V), and anything else."""

    def eval(self) -> Any:
        """Set evaluation mode."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the weights."""


class Listed(NamedTuple):
    """The best answers of a closed list.

    Attributes:
        outputs: the answers; without emissions if there are greedy paths.
        totals: (B, 1), the log-probability of all answers together.
        greedy: the most probable label of each query (B, N) and its log-probability (B, N); None if several answers
            are explained.
    """

    outputs: Outputs
    totals: Tensor
    greedy: tuple[Tensor, Tensor] | None


Asked = Greedy | BeamAndGreedy | Listed | None
"""A search that was started on a device."""
LABELS_TRIED = 32
"""Number of the most probable labels of each query by which beam search extends outputs."""
UNCHANGED = (1.0, 0.0)
"""Slope and offset that do not change log-odds."""
PATHS_DRAWN = 256
"""Number of paths drawn from each sample to estimate the expected score of an output."""


class ParallelGenerator:
    """Generates all tokens of a sample at once, in place of fairseq's `SequenceGenerator`.

    Args:
        models: students that share a vocabulary and a number of queries. Several form an ensemble, whose label
            probabilities are averaged query by query. The logits of each student are divided by its own temperature.
            The odds of a confidence are calibrated only for a single student.
        dictionary: the task's target dictionary, without the blank.
        print_alignment: fairseq-generate's option. With "hard", an alignment is the list of pairs (query, position in
            the output) that it prints. With "soft", it is the probability of each token at each query, as text.
        beam_size: the number of outputs in a prefix beam search; 1 takes the most probable path instead.
        nbest: the number of outputs to return for each sample.
        constraint: the set of allowed outputs; None allows every sequence of tokens.
        no_repeat_ngram: the size of n-grams that an output may not repeat; 0 allows repeats. A beam of 1 then follows
            a single output.
        answers: a closed list of outputs, (T,) each, all of which are scored; None for no list.
        agreement: the gain of each output if another one is correct. The outputs of the beam are then ordered by
            expected gain, not by probability.
        output_scores: the scores of outputs if another one is correct. The confidence in an output is then the expected
            score of the student's paths if the output is correct.
        element_scores: for outputs that are sets, the probability of each element, given outputs of the student's
            paths; takes effect with `output_scores`.
        rescorer: terms that are added to the scores of a beam's outputs before they are ordered.
        abstain_below: the confidence below which the output is empty.
        abstain_by_element: for outputs that are sets, of which an empty one says that there is no element: compare the
            probability of the most probable element with `abstain_below`, in place of the confidence.

    Raises:
        ValueError: if the students differ in blank or number of queries.
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
        element_scores: ElementScores | None = None,
        rescorer: Rescorer | None = None,
        abstain_below: float = 0.0,
        abstain_by_element: bool = False,
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
        self.element_scores = element_scores
        self.rescorer = rescorer
        self.abstain_below = abstain_below
        self.abstain_by_element = abstain_by_element
        for model in models:
            model.eval()

    @property
    def follows_one_path(self) -> bool:
        """Whether outputs are those of the most probable paths, which are the same at all temperatures."""
        searched = self.answers is None and self.beam_size == 1 and not self.no_repeat_ngram
        return searched and not isinstance(self.constraint, NgramConstraint) and not self.abstain_below

    @torch.no_grad()
    def generate(
        self,
        models: Sequence[Student],
        sample: dict[str, Any],
        prefix_tokens: Tensor | None = None,
        constraints: Tensor | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Return the hypotheses of each of the B samples in fairseq's form, best first.

        A hypothesis has these values:

        - `tokens` (T + 1,): the output, closed by `</s>`.
        - `score`: the log-probability of the output in nats, summed over all paths to it, plus the rescorer's term.
        - `positional_scores` (T + 1,): the log-probability of each token at its query on the most probable path; 0 for
          a `</s>` that is implied.
        - `alignment` (T,): the query of each token except `</s>`.
        - `attention`: empty.
        - `confidence`: the student's own probability that the output is correct. It is the output's share of the
          probability of all outputs, or the result of `output_scores`.
        - `element_confidences` (K,): with `element_scores`, the probability of each element of the output. An output
          that is left empty for them has the probability that its most probable element is wrong as its confidence.
        - `labels` and `label_scores` (N,): the label of each query on the most probable path, and its log-probability.

        Raises:
            ValueError: if prefix tokens or constraints are given; a parallel pass does not support them.
        """
        if prefix_tokens is not None or constraints is not None:
            raise ValueError("parallel generation takes neither --prefix-size nor --constraints")
        with believing() as doubts:
            log_probs, asked = self._begin(models, sample["net_input"])
        drawn = None if self.output_scores is None else quasi_random_paths(log_probs, PATHS_DRAWN)
        # This synchronises with a GPU. A search for paths under the constraint does it once more. All else is on the
        # CPU.
        asked, drawn, flags = to_host((asked, drawn, doubts.flags))
        if not doubts.settled(flags):
            return self.generate(models, sample)
        if asked is None or isinstance(asked, Greedy):
            said = constrain(asked, log_probs, self.constraint, blank=self.blank)
            paths = [[path] for path in said.hypotheses(blank=self.blank)]
            confidences: Tensor | list[Tensor] = said.scores.exp()[:, None]
            outputs = said.outputs() if self.print_alignment is not None else None
        else:
            if isinstance(self.rescorer, TeacherRescorer):
                self.rescorer.follow(models[0].parameters())
            outputs, confidences = self._choose(*self._rank(asked, log_probs, sample))
            greedy = asked.greedy if isinstance(asked, Listed) else None
            paths = explain(outputs, log_probs, greedy, blank=self.blank)
        sampled = None if drawn is None else self._outputs_of(drawn)
        if sampled is not None:
            confidences = self._expected_scores(*sampled, paths)
        if len(models) == 1 and models[0].odds != UNCHANGED:
            confidences = [change_odds(sure, *models[0].odds) for sure in confidences]
        found = [
            [self._finish(path, confidence) for path, confidence in zip(beam, sure, strict=False)]
            for beam, sure in zip(paths, confidences, strict=True)
        ]
        if self.element_scores is not None and sampled is not None:
            for row, (tokens, lengths) in enumerate(zip(*sampled, strict=True)):
                for place, one in enumerate(found[row]):
                    shares = self.element_scores(tokens, lengths, one["tokens"][:-1])
                    if self.abstain_by_element and len(shares) and shares.amax() < self.abstain_below:
                        one = found[row][place] = self._finish(_emptied(paths[row][place]), 1 - shares.amax())
                        shares = shares[:0]
                    one["element_confidences"] = shares
        if outputs is not None and self.print_alignment is not None:
            self._write_alignments(outputs, found)
        return found

    @torch.no_grad()
    def path_confidences(self, models: Sequence[Student], net_input: dict[str, Any], labels: Tensor) -> Tensor:
        """Return the confidence in the outputs of paths that `generate` has found with other temperatures.

        Args:
            models: the students, whose odds are ignored.
            net_input: the input of a batch.
            labels: (B, N), the paths, on the CPU.

        Returns:
            (B,), on the CPU.
        """
        log_probs = self._log_probs(models, net_input)
        paths = Paths.of(log_probs, labels.to(log_probs.device), blank=self.blank)
        drawn = None if self.output_scores is None else quasi_random_paths(log_probs, PATHS_DRAWN)
        paths, drawn = to_host((paths, drawn))
        said = Said.of(paths, blank=self.blank)
        if drawn is None:
            return said.scores.exp()
        beams = [[path] for path in said.hypotheses(blank=self.blank)]
        return torch.cat(self._expected_scores(*self._outputs_of(drawn), beams))

    def _begin(self, models: Sequence[Student], net_input: dict[str, Any]) -> tuple[Tensor, Asked]:
        """Run the students and start the search, on their device, without a synchronisation.

        A single student's pass is a CUDA graph where it can be; see `Graphs`. The graph includes the most probable path
        if the constraint is a range of lengths. Other constraints are copied from the CPU, which no graph can.

        Returns:
            The log-probabilities (B, N, V), and the result of `_ask`.
        """
        model, is_padding_known = models[0], net_input.get("padded") is not None
        if len(models) > 1 or not isinstance(model, NarvlModel) or model.graphs is None or not is_padding_known:
            log_probs = self._log_probs(models, net_input)
            return log_probs, self._ask(log_probs)
        range_alone = isinstance(self.constraint, LengthRange) and self.answers is None
        is_greedy = range_alone and self.beam_size == 1 and not self.no_repeat_ngram

        def run(**inputs: Any) -> tuple[Tensor, Asked]:
            log_probs = self._log_probs([model], inputs)
            return log_probs, self._ask(log_probs) if is_greedy else None

        key = (model.member, model.temperature, self.constraint if is_greedy else None)
        log_probs, asked = model.graphs.run(model, key, run, in_bucket(net_input))
        return log_probs, asked if is_greedy else self._ask(log_probs)

    def _log_probs(self, models: Sequence[Student], net_input: dict[str, Any]) -> Tensor:
        """Return the ensemble's log-probabilities (B, N, V)."""
        model = models[0]
        if len(models) == 1 and isinstance(model, NarvlModel) and model.exported is not None:
            found = model.exported.log_probs(net_input)
            if found is not None:
                return found
        log_probs = [torch.log_softmax(model(**net_input)[0].float() / model.temperature, dim=-1) for model in models]
        if len(log_probs) == 1:
            return log_probs[0]
        return torch.logsumexp(torch.stack(log_probs), dim=0) - math.log(len(log_probs))

    def _ask(self, log_probs: Tensor) -> Asked:
        """Start the search in log-probabilities (B, N, V), on their device, without a synchronisation.

        The result is None if `constrain` does all of it.
        """
        if self.answers is not None:
            outputs, totals = self.answers.best(log_probs, self.beam_size, self.blank)
            if self.nbest == 1 and self.print_alignment is None:
                scores, labels = log_probs.max(2)
                return Listed(outputs, totals, (labels, scores))
            return Listed(outputs.explained_by(log_probs, blank=self.blank), totals, None)
        if self.beam_size == 1 and not self.no_repeat_ngram:
            if isinstance(self.constraint, NgramConstraint):  # whose weights may prefer another path to the greedy one
                return None
            return Greedy.of(log_probs, self.constraint, blank=self.blank)
        sizes = {"beam_size": self.beam_size, "top_k": LABELS_TRIED, "no_repeat_ngram": self.no_repeat_ngram}
        return BeamAndGreedy.of(log_probs, self.constraint, blank=self.blank, **sizes)

    def _rank(self, asked: BeamAndGreedy | Listed, log_probs: Tensor, sample: dict[str, Any]) -> tuple[Outputs, Tensor]:
        """Rank the most probable outputs of each sample.

        Args:
            asked: the result of `_ask`, on the CPU.
            log_probs: (B, N, V), on any device.
            sample: the batch.

        Returns:
            The outputs, scored by the sum over all of their paths plus the rescorer's terms; and their shares (B, W) of
            the probability of all allowed outputs.

        Raises:
            ValueError: if no answer has a path with a probability above 0, for example because all need more than N
                queries.
        """
        if isinstance(asked, BeamAndGreedy):
            outputs = asked.join(log_probs, self.constraint, blank=self.blank, no_repeat_ngram=self.no_repeat_ngram)
            assert outputs.emissions is not None
            scores = total_scores(outputs.emissions.flatten(0, 1), outputs.lattice(blank=self.blank))
            scores = scores.view(outputs.scores.shape)
            outputs = outputs.with_scores(scores.masked_fill(outputs.scores == -torch.inf, -torch.inf))
            totals = scores.new_zeros(len(scores), 1)
        else:
            outputs, totals, _ = asked
            if bool((totals == -torch.inf).any()):
                raise ValueError(
                    f"{log_probs.size(1)} queries have no path to any of the answers whose probability is above 0"
                )
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
        """Return the best outputs of each sample, at most `nbest`, and their confidences: (B, W), (B, W).

        With an agreement, outputs are ordered by their expected gain over the beam (minimum-Bayes-risk decoding).

        Source: Kumar and Byrne, NAACL 2004.
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

    def _outputs_of(self, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens (B, M, T) and the lengths (B, M) of drawn paths (B, M, N), up to a predicted `</s>`."""
        tokens, _ = outputs_of(drawn, blank=self.blank)
        return tokens, ((tokens != self.blank) & (tokens != self.eos)).cumprod(2).sum(2)

    def _expected_scores(self, tokens: Tensor, lengths: Tensor, beams: list[list[Hypothesis]]) -> list[Tensor]:
        """Return the expected score of the student's paths if an output is correct, for each output of each beam.

        Args:
            tokens: (B, M, T), the outputs of paths drawn from the student.
            lengths: (B, M).
            beams: the outputs of each sample.
        """
        assert self.output_scores is not None
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
        """Close a collapsed path with `</s>`: the first predicted one if there is one, else an implied one."""
        if float(confidence) < self.abstain_below and not self.abstain_by_element:
            path = _emptied(path)
        tokens, score, positional, queries, labels, label_scores = path
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
            "labels": labels,
            "label_scores": label_scores,
        }

    def _write_alignments(self, outputs: Outputs, found: list[list[dict[str, Any]]]) -> None:
        """Set the alignments of hypotheses (B, W) in the form that fairseq-generate prints."""
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


def _emptied(path: Hypothesis) -> Hypothesis:
    """Return a path whose output is left empty."""
    return path._replace(
        tokens=path.tokens[:0], positional_scores=path.positional_scores[:0], alignment=path.alignment[:0]
    )


def change_odds(confidence: Tensor, slope: float, offset: float) -> Tensor:
    """Multiply the log-odds of confidences by a slope and add an offset; return confidences of the same shape.

    Source: Platt, Probabilistic outputs for support vector machines, 1999.
    """
    return torch.sigmoid(slope * torch.logit(confidence.clamp(0, 1)) + offset)  # sums over paths may round to above 1


def explain(
    outputs: Outputs, log_probs: Tensor, greedy: tuple[Tensor, Tensor] | None, *, blank: int
) -> list[list[Hypothesis]]:
    """Return the most probable path to each output. It shows which query predicts each token.

    Args:
        outputs: the outputs, on the CPU; without emissions if `greedy` is given.
        log_probs: (B, N, V), on any device.
        greedy: as in `Listed`, on the CPU. These paths are the best of all, so where they say the outputs (B, 1), they
            are the best to those. Otherwise the paths are searched.
        blank: the label of the blank.
    """
    if greedy is not None:
        labels, scores = greedy
        collapsed = collapse(labels, blank=blank)
        if outputs.are(collapsed):
            paths = hypotheses_of(labels, scores.to(outputs.scores.dtype), blank=blank, collapsed=collapsed)
            return [[path._replace(score=score)] for path, score in zip(paths, outputs.scores[:, 0], strict=True)]
        outputs = outputs.explained_by(log_probs, blank=blank)
    assert outputs.emissions is not None
    emissions = outputs.emissions.flatten(0, 1)
    best = best_states(emissions, outputs.lattice(blank=blank))
    states = (2 * best.positions + 1).clamp(min=0)  # all blank states have the score of the first
    scores = emissions.gather(2, states[..., None])[..., 0]
    tokens, lengths = outputs.tokens.flatten(0, 1), outputs.lengths.flatten()
    first = (best.positions[..., None] == torch.arange(tokens.size(1))).int().argmax(1)  # the first query of each token
    paths = hypotheses_of(best.labels, scores, blank=blank, collapsed=Collapsed(tokens, first, lengths))
    found = [path._replace(score=score) for path, score in zip(paths, outputs.scores.flatten(), strict=True)]
    width = outputs.scores.size(1)
    there = (outputs.scores > -torch.inf).sum(1).tolist()  # the best are first
    return [found[row * width : row * width + number] for row, number in enumerate(there)]
