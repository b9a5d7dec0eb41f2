"""The student's generator on paths written by hand, and on a real small student."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from fairseq.data import Dictionary
from torch import Tensor, nn

from narvl_plugin.ctc import LengthRange, one_of, query_ctc_loss
from narvl_plugin.generation.parallel_generator import ParallelGenerator
from narvl_plugin.models import build
from narvl_plugin.models.narvl import NarvlModel

A, B, C, BLANK = 4, 5, 6, 7


@pytest.fixture
def dictionary() -> Dictionary:
    """`<s> <pad> </s> <unk> a b c`: the blank would be label 7."""
    dictionary = Dictionary()
    for word in "abc":
        dictionary.add_symbol(word)
    return dictionary


class Fixed(nn.Module):
    """A student whose label probabilities are given, (B, N, V)."""

    blank = BLANK
    temperature = 1.0
    odds = (1.0, 0.0)

    def __init__(self, probabilities: Tensor) -> None:
        super().__init__()
        self.logits = probabilities.log() + 3.0  # a constant changes no probability
        self.num_queries = probabilities.shape[1]

    def forward(self, src_tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the fixed logits."""
        return self.logits, {}


def path(*labels: tuple[int, float]) -> Tensor:
    """Probabilities (N, V) where each query gives `label` its probability and spreads the rest evenly."""
    rows = []
    for label, probability in labels:
        row = torch.full((BLANK + 1,), (1 - probability) / BLANK)
        row[label] = probability
        rows.append(row)
    return torch.stack(rows)


def generate(dictionary: Dictionary, *probabilities: Tensor, **options: Any) -> list[list[dict]]:
    """Generate with an ensemble of fixed students for one batch each."""
    models = [Fixed(p if p.dim() == 3 else p[None]) for p in probabilities]
    generator = ParallelGenerator(models, dictionary, **options)
    return generator.generate(models, {"net_input": {"src_tokens": torch.zeros(1, 1)}})


def test_repeats_merge_blanks_part_and_the_end_is_added(dictionary: Dictionary) -> None:
    spoken = path((A, 0.9), (A, 0.5), (BLANK, 0.8), (A, 0.6), (C, 0.7))
    silent = path(*[(BLANK, 0.9)] * 5)
    (hypothesis,), (nothing,) = generate(dictionary, torch.stack([spoken, silent]))
    assert hypothesis["tokens"].tolist() == [A, A, C, dictionary.eos()]
    assert hypothesis["alignment"].tolist() == [0, 3, 4]
    expected = [math.log(0.9), math.log(0.6), math.log(0.7), 0.0]
    assert hypothesis["positional_scores"].tolist() == pytest.approx(expected, abs=1e-5)
    loss = query_ctc_loss(spoken.log()[None], torch.tensor([[A, A, C]]), torch.tensor([3]), blank=BLANK)
    assert float(hypothesis["score"]) == pytest.approx(-float(loss), abs=1e-5)
    assert float(hypothesis["score"]) > math.log(0.9 * 0.5 * 0.8 * 0.6 * 0.7)  # of the path alone
    assert float(hypothesis["confidence"]) == pytest.approx(math.exp(-float(loss)), abs=1e-5)
    assert nothing["tokens"].tolist() == [dictionary.eos()]
    assert nothing["alignment"].tolist() == []


def test_a_spoken_end_closes_the_output(dictionary: Dictionary) -> None:
    ((hypothesis,),) = generate(dictionary, path((A, 0.9), (dictionary.eos(), 0.8), (BLANK, 0.9)))
    assert hypothesis["tokens"].tolist() == [A, dictionary.eos()]
    assert hypothesis["positional_scores"].tolist() == pytest.approx([math.log(0.9), math.log(0.8)], abs=1e-5)
    assert hypothesis["alignment"].tolist() == [0]


def test_nothing_but_the_language_is_said(dictionary: Dictionary) -> None:
    likely_b = path((A, 0.6), (B, 0.9), (BLANK, 0.8))
    ((free,),) = generate(dictionary, likely_b)
    ((bound,),) = generate(dictionary, likely_b, constraint=one_of([(A,), (A, C)]))
    assert free["tokens"].tolist() == [A, B, dictionary.eos()]
    # After the best path's a b, a blank is what costs least: all others of the second query are equally likely.
    assert bound["tokens"].tolist() in ([A, dictionary.eos()], [A, C, dictionary.eos()])
    said = bound["tokens"][None, :-1]
    loss = query_ctc_loss(likely_b.log()[None], said, torch.tensor([said.size(1)]), blank=BLANK)
    assert float(bound["score"]) == pytest.approx(-float(loss), abs=1e-6)


def test_the_end_may_be_spoken_in_a_language_too(dictionary: Dictionary) -> None:
    eos = dictionary.eos()
    ((bound,),) = generate(dictionary, path((A, 0.9), (eos, 0.9)), constraint=one_of([(A,)]))
    assert bound["tokens"].tolist() == [A, eos]
    assert bound["positional_scores"].tolist() == pytest.approx([math.log(0.9)] * 2, abs=1e-6)


def test_a_beam_returns_outputs_by_the_sum_over_their_paths(dictionary: Dictionary) -> None:
    """A silent path is the most probable one (0.36), but three paths say a (0.64)."""
    probabilities = torch.zeros(2, BLANK + 1)
    probabilities[:, A], probabilities[:, BLANK] = 0.4, 0.6
    ((silent,),) = generate(dictionary, probabilities)
    assert silent["tokens"].tolist() == [dictionary.eos()]
    ((first, second),) = generate(dictionary, probabilities, beam_size=3, nbest=3)
    assert first["tokens"].tolist() == [A, dictionary.eos()]
    assert [math.exp(first["score"]), math.exp(second["score"])] == pytest.approx([0.64, 0.36])
    assert first["alignment"].tolist() in ([0], [1])
    assert first["positional_scores"].tolist() == pytest.approx([math.log(0.4), 0.0])
    assert second["tokens"].tolist() == [dictionary.eos()]


def test_answers_of_a_list_are_scored_exactly(dictionary: Dictionary) -> None:
    probabilities = path((A, 0.6), (B, 0.9), (BLANK, 0.8))
    answers = [torch.tensor(answer) for answer in ([A, C], [A], [A, B, C, A], [B, B])]
    (found,) = generate(dictionary, probabilities, answers=answers, beam_size=4, nbest=4)
    eos = dictionary.eos()
    expected = dict.fromkeys([(A, C), (A,), (B, B)], 0.0)  # the third answer needs four queries
    for labels in itertools.product(range(BLANK + 1), repeat=3):
        said = tuple(label for label, _ in itertools.groupby(labels) if label != BLANK)
        said = said[:-1] if said and said[-1] == eos else said
        if said in expected:
            expected[said] += float(probabilities[range(3), labels].prod())
    ranked = sorted(expected, key=expected.__getitem__, reverse=True)
    assert [hypothesis["tokens"].tolist() for hypothesis in found] == [[*answer, eos] for answer in ranked]
    scores = [math.exp(hypothesis["score"]) for hypothesis in found]
    assert scores == pytest.approx([expected[answer] for answer in ranked], rel=1e-5)


ANSWERS = [torch.tensor(answer) for answer in ([A, C], [A], [A, A], [B, B, C], [C])]


@pytest.mark.parametrize("samples", [1, 3])
def test_the_best_answer_has_the_same_path_as_the_first_of_several(dictionary: Dictionary, samples: int) -> None:
    """It is the greedy path where that says the answer, and searched otherwise."""
    generator = torch.Generator().manual_seed(samples)
    probabilities = torch.rand(40, samples, 4, BLANK + 1, generator=generator).pow(4)
    probabilities[..., :A] /= 100
    probabilities /= probabilities.sum(3, keepdim=True)
    ways = set()
    for batch in probabilities:
        several = generate(dictionary, batch, answers=ANSWERS, beam_size=3, nbest=2)
        best = generate(dictionary, batch, answers=ANSWERS, beam_size=3)
        for (found,), (expected, _), distribution in zip(best, several, batch, strict=True):
            assert found.keys() == expected.keys()
            for name, value in found.items():
                assert torch.allclose(value, expected[name], atol=1e-6), name
            ways.add(found["labels"].tolist() == distribution.argmax(1).tolist())
    assert ways == {True, False}


def test_the_best_answer_may_be_another_than_the_greedy_path_says(dictionary: Dictionary) -> None:
    """The best path says a, but three paths to b are together more probable."""
    probabilities = torch.zeros(2, BLANK + 1)
    probabilities[0, [A, B, BLANK]] = torch.tensor([0.4, 0.3, 0.3])
    probabilities[1, [B, BLANK]] = torch.tensor([0.48, 0.52])
    answers = [torch.tensor([A]), torch.tensor([B])]
    ((best,),) = generate(dictionary, probabilities, answers=answers)
    assert probabilities.argmax(1).tolist() == [A, BLANK]
    assert best["tokens"].tolist() == [B, dictionary.eos()]
    assert best["labels"].tolist() == [B, BLANK]
    assert math.exp(best["score"]) == pytest.approx(0.3 * 0.52 + 0.3 * 0.48 + 0.3 * 0.48)


def test_answers_that_are_all_too_long_are_an_error(dictionary: Dictionary) -> None:
    with pytest.raises(ValueError, match="2 queries have no path"):
        generate(dictionary, path((A, 0.6), (B, 0.9)), answers=[torch.tensor([A, B, C]), torch.tensor([A, A])])


def one_of_three() -> Tensor:
    """One query that says a, b or c."""
    probabilities = torch.zeros(1, BLANK + 1)
    probabilities[0, A], probabilities[0, B], probabilities[0, C] = 0.4, 0.25, 0.35
    return probabilities


def test_two_outputs_that_agree_outweigh_a_more_probable_one(dictionary: Dictionary) -> None:
    """Gains are asked for before the beam is cut; scores and confidence stay."""
    gains = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.9], [0.0, 0.9, 1.0]])  # expected: 0.4, 0.565, 0.575

    def agreement(outputs: list[Tensor]) -> Tensor:
        place = [int(tokens) - A for tokens in outputs]
        return gains[place][:, place]

    options = {"beam_size": 3, "constraint": one_of([(A,), (B,), (C,)]), "agreement": agreement}
    ((best,),) = generate(dictionary, one_of_three(), **options)
    assert best["tokens"].tolist() == [C, dictionary.eos()]
    assert math.exp(best["score"]) == pytest.approx(0.35)
    assert float(best["confidence"]) == pytest.approx(0.35)
    (beam,) = generate(dictionary, one_of_three(), nbest=3, **options)
    assert [hypothesis["tokens"].tolist()[0] for hypothesis in beam] == [C, B, A]


@pytest.mark.parametrize("beam", [1, 3])
@pytest.mark.parametrize("end", [False, True], ids=["", "with its own </s>"])
def test_confidence_is_the_score_to_be_expected(dictionary: Dictionary, beam: int, end: bool) -> None:
    """B and C are as good as each other; who was trained to say </s> is no less sure."""

    def output_scores(outputs: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
        assert lengths.unique().tolist() == target_lengths.unique().tolist() == [1]
        return ((outputs[..., 0] == A) == (targets[..., 0] == A)).float()

    student = one_of_three()
    if end:
        student = torch.cat([student, path((dictionary.eos(), 1.0))])
    options = {
        "beam_size": beam,
        "nbest": beam,
        "constraint": one_of([(A,), (B,), (C,)]),
        "output_scores": output_scores,
    }
    (found,) = generate(dictionary, student, **options)
    expected = {A: 0.4, B: 0.6, C: 0.6}
    assert len(found) == beam
    for hypothesis in found:
        assert float(hypothesis["confidence"]) == pytest.approx(expected[int(hypothesis["tokens"][0])], abs=0.01)


def test_what_is_added_to_scores_decides(dictionary: Dictionary) -> None:
    def rescorer(sample: dict[str, Any], outputs: list[list[Tensor]]) -> list[Tensor]:
        assert "net_input" in sample
        return [torch.tensor([math.log(6.0) if int(tokens) == B else 0.0 for tokens in beam]) for beam in outputs]

    (found,) = generate(
        dictionary, one_of_three(), constraint=LengthRange(1, 1), beam_size=3, nbest=3, rescorer=rescorer
    )
    assert [hypothesis["tokens"].tolist()[0] for hypothesis in found] == [B, A, C]
    assert math.exp(found[0]["score"]) == pytest.approx(1.5)
    assert [float(one["confidence"]) for one in found] == pytest.approx([0.25, 0.4, 0.35])


def test_confidence_in_an_answer_is_its_share_of_the_whole_list(dictionary: Dictionary) -> None:
    answers = [torch.tensor([A]), torch.tensor([B])]
    for beam in (1, 2):
        ((best, *_),) = generate(dictionary, one_of_three(), answers=answers, beam_size=beam, nbest=beam)
        assert float(best["confidence"]) == pytest.approx(0.4 / 0.65)


def test_a_student_that_is_not_sure_says_nothing(dictionary: Dictionary) -> None:
    eos = dictionary.eos()
    sure, unsure = path((A, 0.9), (B, 0.9)), path((A, 0.9), (B, 0.5))
    for beam in (1, 3):
        options = {"beam_size": beam, "abstain_below": 0.6}
        (said,), (unsaid,) = generate(dictionary, torch.stack([sure, unsure]), **options)
        assert said["tokens"].tolist() == [A, B, eos]
        assert (unsaid["tokens"].tolist(), unsaid["positional_scores"].tolist()) == ([eos], [0.0])
        assert float(unsaid["confidence"]) == pytest.approx(math.exp(unsaid["score"]))


def test_a_temperature_makes_a_student_less_sure(dictionary: Dictionary) -> None:
    model = Fixed(one_of_three()[None])
    model.temperature = 2.0
    sample = {"net_input": {"src_tokens": torch.zeros(1, 1)}}
    ((found,),) = ParallelGenerator([model], dictionary).generate([model], sample)
    roots = torch.tensor([0.4, 0.25, 0.35]).sqrt()
    assert float(found["confidence"]) == pytest.approx(float(roots[0] / roots.sum()))


@pytest.mark.parametrize("beam", [1, 3])
def test_odds_change_confidence_alone(dictionary: Dictionary, beam: int) -> None:
    model = Fixed(one_of_three()[None])
    model.odds = (2.0, -0.5)
    sample = {"net_input": {"src_tokens": torch.zeros(1, 1)}}
    found, plain = (
        ParallelGenerator([student], dictionary, beam_size=beam, nbest=beam).generate([student], sample)[0]
        for student in (model, Fixed(one_of_three()[None]))
    )
    for one, other in zip(found, plain, strict=True):
        assert one["tokens"].tolist() == other["tokens"].tolist()
        assert float(one["score"]) == pytest.approx(float(other["score"]))
        sure = math.exp(other["score"])
        assert float(one["confidence"]) == pytest.approx(1 / (1 + math.exp(0.5) * ((1 - sure) / sure) ** 2), rel=1e-4)


def test_an_output_has_the_length_asked_for_and_then_its_end(dictionary: Dictionary) -> None:
    eos = dictionary.eos()
    silent = path((BLANK, 0.9), (BLANK, 0.6), (BLANK, 0.9))
    ended_early = path((A, 0.9), (eos, 0.8), (C, 0.6))
    for beam in (1, 2):
        (some,), (more,) = generate(
            dictionary, torch.stack([silent, ended_early]), constraint=LengthRange(1, 3), beam_size=beam
        )
        assert len(some["tokens"]) == 2
        assert more["tokens"].tolist() == [A, eos]
        (more,) = generate(dictionary, ended_early, constraint=LengthRange(2, 3), beam_size=beam)[0]
        assert (more["tokens"].tolist()[::2], len(more["tokens"])) == ([A, eos], 3)


def test_no_bigram_comes_twice(dictionary: Dictionary) -> None:
    stuck = path((A, 0.9), (B, 0.9), (A, 0.9), (B, 0.8))
    ((free,),) = generate(dictionary, stuck)
    assert free["tokens"].tolist()[:-1] == [A, B, A, B]
    for beam in (1, 4):
        ((other,),) = generate(dictionary, stuck, no_repeat_ngram=2, beam_size=beam)
        assert other["tokens"].tolist()[:3] == [A, B, A]
        assert other["tokens"].tolist()[3:4] != [B]


def test_an_ensemble_averages_probabilities(dictionary: Dictionary) -> None:
    sure_of_a, fairly_of_b = path((A, 0.5), (C, 0.9)), path((B, 0.8), (C, 0.5))
    ((hypothesis,),) = generate(dictionary, sure_of_a, fairly_of_b)
    assert hypothesis["tokens"].tolist() == [B, C, dictionary.eos()]
    mean_b = (0.5 / BLANK + 0.8) / 2
    assert hypothesis["positional_scores"].tolist()[:2] == pytest.approx(
        [math.log(mean_b), math.log((0.9 + 0.5) / 2)], abs=1e-5
    )


def test_printed_alignment_is_pairs_of_query_and_place(dictionary: Dictionary) -> None:
    ((hypothesis,),) = generate(dictionary, path((BLANK, 0.9), (A, 0.9), (A, 0.9), (B, 0.9)), print_alignment="hard")
    assert hypothesis["alignment"] == [(1, 0), (3, 1)]


def test_printed_alignment_is_how_probably_each_query_says_each_token(dictionary: Dictionary) -> None:
    """Of the three paths to a in 0.4 a, 0.6 blank, each query takes part in two: (0.24 + 0.16) / 0.64."""
    probabilities = torch.zeros(2, BLANK + 1)
    probabilities[:, A], probabilities[:, BLANK] = 0.4, 0.6
    ((said,),) = generate(dictionary, probabilities, constraint=LengthRange(1, 2), print_alignment="soft")
    assert said["alignment"] == [["0.625000", "0.625000"]]


def test_students_that_differ_are_no_ensemble(dictionary: Dictionary) -> None:
    models = [Fixed(path((A, 0.9))[None]), Fixed(path((A, 0.9), (B, 0.9))[None])]
    with pytest.raises(ValueError, match="agree"):
        ParallelGenerator(models, dictionary)


def test_a_prefix_is_refused(dictionary: Dictionary) -> None:
    models = [Fixed(path((A, 0.9))[None])]
    sample = {"net_input": {"src_tokens": torch.zeros(1, 1)}}
    with pytest.raises(ValueError, match="prefix"):
        ParallelGenerator(models, dictionary).generate(models, sample, prefix_tokens=torch.tensor([[A]]))


@pytest.fixture(scope="module")
def student() -> NarvlModel:
    """A small random student without dropout; weights larger than at birth, so that all inputs show."""
    torch.manual_seed(0)
    sizes = {"encoder_embed_dim": 64, "encoder_ffn_embed_dim": 128, "encoder_layers": 2, "decoder_layers": 2}
    model = build("narvl_nano", vocab_size=30, num_queries=6, vision_pretrained=False, **sizes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed_images" not in name:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def net_input() -> dict[str, Tensor]:
    """Two samples of a 64 x 64 image and a source text of 5 and 3 tokens."""
    generator = torch.Generator().manual_seed(1)
    src_tokens = torch.tensor([[0, 5, 6, 7, 2], [0, 8, 2, 1, 1]])
    return {
        "src_tokens": src_tokens,
        "src_lengths": src_tokens.ne(1).sum(1),
        "patch_images": torch.randn(2, 3, 64, 64, generator=generator),
        "patch_masks": torch.tensor([True, True]),
    }


def test_a_later_query_influences_an_earlier_output(student: NarvlModel, net_input: dict[str, Tensor]) -> None:
    queries = student.decoder.query_embed.weight
    with torch.no_grad():
        before = student(**net_input)[0]
        kept = queries[-1].clone()
        queries[-1] += torch.linspace(-2, 2, queries.shape[1])
        after = student(**net_input)[0]
        queries[-1] = kept
    assert (before[:, 0] - after[:, 0]).abs().max() > 1e-3


def test_previous_output_tokens_do_not_matter(student: NarvlModel, net_input: dict[str, Tensor]) -> None:
    with torch.no_grad():
        without = student(**net_input, prev_output_tokens=None)[0]
        other = student(**net_input, prev_output_tokens=torch.tensor([[0, 9, 10], [0, 11, 12]]))[0]
    assert torch.equal(without, other)


def test_a_real_student_gives_what_its_argmax_says(
    student: NarvlModel, net_input: dict[str, Tensor], dictionary: Dictionary
) -> None:
    generator = ParallelGenerator([student], dictionary)
    hypotheses = generator.generate([student], {"net_input": net_input})
    with torch.no_grad():
        labels = student(**net_input)[0].argmax(-1).tolist()
    for (hypothesis,), row in zip(hypotheses, labels, strict=True):
        merged = [label for place, label in enumerate(row) if place == 0 or row[place - 1] != label]
        spoken = [label for label in merged if label != student.blank]
        if dictionary.eos() in spoken:
            spoken = spoken[: spoken.index(dictionary.eos())]
        assert hypothesis["tokens"].tolist() == [*spoken, dictionary.eos()]
