"""A teacher's answers of a closed list, against every answer scored by itself, token by token."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fairseq.data import Dictionary
from torch import Tensor, nn

from narvl_plugin.data.answers import AnswerTrie
from narvl_plugin.generation.candidates import CandidateGenerator
from narvl_plugin.generation.teacher import TrieSequenceGenerator
from narvl_plugin.models import build
from narvl_plugin.models.ofa import OfaModel

ANSWERS = ["w1", "w1 w2", "w1 w3 w4", "w5 w6", "w7", "w7 w7 w7", "w8 w1"]


class Words:
    """A codec of words that are symbols."""

    def __init__(self) -> None:
        self.dictionary = Dictionary()
        for number in range(12):
            self.dictionary.add_symbol(f"w{number}")

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self.dictionary.index(word) for word in text.split()])


@pytest.fixture(scope="module")
def codec() -> Words:
    return Words()


@pytest.fixture(scope="module")
def trie(codec: Words) -> AnswerTrie:
    return AnswerTrie(ANSWERS, codec)


@pytest.fixture(scope="module")
def make_teacher(codec: Words) -> Callable[[int], OfaModel]:
    """Make a small random teacher in double precision that says varied things."""

    def make(seed: int) -> OfaModel:
        torch.manual_seed(seed)
        sizes = {"encoder_embed_dim": 64, "encoder_ffn_embed_dim": 128, "encoder_layers": 2, "decoder_layers": 2}
        size = len(codec.dictionary)
        model = build("ofa_nano", vocab_size=size, vision_pretrained=False, **sizes).eval().double()
        with torch.no_grad():
            model.decoder.output_projection.weight = nn.Parameter(torch.zeros(size, 64).double())
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and "embed_images" not in name:
                    parameter.normal_(std=0.3)
        return model

    return make


@pytest.fixture(scope="module")
def teacher(make_teacher: Callable[[int], OfaModel]) -> OfaModel:
    return make_teacher(2)


@pytest.fixture(scope="module")
def sample() -> dict[str, Any]:
    """Three samples whose decoders start from prompts of different lengths."""
    generator = torch.Generator().manual_seed(1)
    src_tokens = torch.tensor([[0, 5, 6, 7, 2], [0, 8, 2, 1, 1], [0, 9, 10, 2, 1]])
    prompts = [torch.tensor(prompt) for prompt in ([0, 5, 6, 7], [0], [0, 9])]
    return {
        "net_input": {
            "src_tokens": src_tokens,
            "src_lengths": src_tokens.ne(1).sum(1),
            "patch_images": torch.randn(3, 3, 64, 64, generator=generator).double(),
            "patch_masks": torch.tensor([True, True, False]),
        },
        "decoder_prompts": prompts,
        "prefix_tokens": torch.tensor([[5, 6, 7], [1, 1, 1], [9, 1, 1]]),
    }


def by_itself(models: list[OfaModel], sample: dict[str, Any], trie: AnswerTrie) -> list[list[list[float]]]:
    """Return the log-probability of each token of each answer to each sample, running one answer after another."""
    scores = []
    for row, prompt in enumerate(sample["decoder_prompts"]):
        net_input = {name: value[row : row + 1] for name, value in sample["net_input"].items()}
        answers = []
        for tokens in trie.tokens:
            whole = torch.cat([prompt, tokens])[None]
            with torch.no_grad():
                logits = [model(**net_input, prev_output_tokens=whole[:, :-1])[0][0] for model in models]
            probabilities = sum(one.softmax(1) for one in logits)[len(prompt) - 1 :]
            parts = []
            for place, token in enumerate(tokens.tolist()):
                allowed = trie.allowed(tokens[:place].tolist())
                parts.append(math.log(probabilities[place, token] / probabilities[place, allowed].sum()))
            answers.append(parts)
        scores.append(answers)
    return scores


@pytest.mark.integration
@pytest.mark.parametrize("batch_size", [1, 2, 50])
@pytest.mark.parametrize("ensemble", [False, True])
def test_every_answer_is_scored(
    teacher: OfaModel,
    make_teacher: Callable[[int], OfaModel],
    sample: dict[str, Any],
    trie: AnswerTrie,
    codec: Words,
    batch_size: int,
    ensemble: bool,
) -> None:
    models = [teacher, make_teacher(3)] if ensemble else [teacher]
    expected = by_itself(models, sample, trie)
    generator = CandidateGenerator(models, codec.dictionary, trie, nbest=len(ANSWERS), batch_size=batch_size)
    hypotheses = generator.generate(models, sample)
    for beam, answers in zip(hypotheses, expected, strict=True):
        order = sorted(range(len(ANSWERS)), key=lambda answer, answers=answers: -sum(answers[answer]))
        assert [one["tokens"].tolist() for one in beam] == [trie.tokens[answer].tolist() for answer in order]
        for one, answer in zip(beam, order, strict=True):
            assert one["positional_scores"].tolist() == pytest.approx(answers[answer], abs=1e-5)
            assert float(one["score"]) == pytest.approx(sum(answers[answer]), abs=1e-5)
        assert sum(math.exp(one["score"]) for one in beam) == pytest.approx(1)  # one of them it must be


def test_the_best_answers_are_returned(
    teacher: OfaModel, sample: dict[str, Any], trie: AnswerTrie, codec: Words
) -> None:
    whole = CandidateGenerator([teacher], codec.dictionary, trie, nbest=99, batch_size=9).generate([teacher], sample)
    best = CandidateGenerator([teacher], codec.dictionary, trie, nbest=2, batch_size=9).generate([teacher], sample)
    assert [len(beam) for beam in whole] == [len(ANSWERS)] * 3
    for few, all_of_them in zip(best, whole, strict=True):
        assert [one["tokens"].tolist() for one in few] == [one["tokens"].tolist() for one in all_of_them[:2]]


@pytest.mark.parametrize("beam_size", [len(ANSWERS), 50])
def test_a_beam_as_wide_as_the_list_finds_the_same(
    teacher: OfaModel, sample: dict[str, Any], trie: AnswerTrie, codec: Words, beam_size: int
) -> None:
    exact = CandidateGenerator([teacher], codec.dictionary, trie, nbest=99, batch_size=9).generate([teacher], sample)
    search = TrieSequenceGenerator(
        [teacher], codec.dictionary, trie=trie, beam_size=beam_size, normalize_scores=False, max_len_b=1
    )
    found = search.generate([teacher], sample, prefix_tokens=sample["prefix_tokens"], bos_token=0)
    for beam, answers, prompt in zip(found, exact, sample["decoder_prompts"], strict=True):
        begin = len(prompt) - 1
        assert [one["tokens"][begin:].tolist() for one in beam] == [one["tokens"].tolist() for one in answers]
        for one, answer in zip(beam, answers, strict=True):
            parts = one["positional_scores"][begin:]
            assert parts.tolist() == pytest.approx(answer["positional_scores"].tolist(), abs=1e-5)


@pytest.mark.parametrize("beam_size", [1, 2, 3, 4])
def test_a_narrow_beam_says_answers_of_the_list(
    teacher: OfaModel, sample: dict[str, Any], trie: AnswerTrie, codec: Words, beam_size: int
) -> None:
    known = [tokens.tolist() for tokens in trie.tokens]
    search = TrieSequenceGenerator([teacher], codec.dictionary, trie=trie, beam_size=beam_size)
    found = search.generate([teacher], sample, prefix_tokens=sample["prefix_tokens"], bos_token=0)
    for beam, prompt in zip(found, sample["decoder_prompts"], strict=True):
        said = [one["tokens"][len(prompt) - 1 :].tolist() for one in beam]
        assert len(said) == beam_size
        assert all(tokens in known for tokens in said)
        assert len({tuple(tokens) for tokens in said}) == beam_size


def test_a_single_answer_is_certain(teacher: OfaModel, sample: dict[str, Any], codec: Words) -> None:
    trie = AnswerTrie(["w1 w2"], codec)
    generator = CandidateGenerator([teacher], codec.dictionary, trie, nbest=5, batch_size=9)
    for (only,) in generator.generate([teacher], sample):
        assert only["tokens"].tolist() == trie.tokens[0].tolist()
        assert float(only["score"]) == 0
