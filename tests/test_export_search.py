"""The search that an exported student takes along: it says what the checkpoint's own generator says."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from narvl_plugin.export import search_settings
from narvl_plugin.export.search import Search, change_odds
from narvl_plugin.generation.options import generation_config
from narvl_plugin.tasks.base import BaseTask
from narvl_plugin.tasks.registered import (
    CaptionConfig,
    CaptionTask,
    RefcocoConfig,
    RefcocoTask,
    SnliVeConfig,
    SnliVeTask,
    VqaGenConfig,
    VqaGenTask,
)

NUM_BINS = 10


class FixedLogits(nn.Module):
    """A student that says the same of all images: logits (B, N, V)."""

    is_student = True

    def __init__(self, logits: torch.Tensor, *, temperature: float = 1.0, odds: tuple[float, float] = (1.0, 0.0)):
        super().__init__()
        self.logits, self.temperature, self.odds = logits, temperature, odds
        self.num_queries, self.blank = logits.shape[1], logits.shape[2] - 1

    def forward(self, **net_input: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        return self.logits, {}


def draw_logits(task: BaseTask, queries: int, favoured: list[int], number: int, seed: int) -> torch.Tensor:
    """Draw logits of several sharpness, in which some labels, the blank, and `</s>` are likelier than others."""
    generator = torch.Generator().manual_seed(seed)
    labels = len(task.target_dictionary) + 1
    logits = torch.randn(number, queries, labels, generator=generator)
    logits[:, :, favoured] += 3
    logits[:, :, [labels - 1, task.target_dictionary.eos()]] += 2
    return logits * torch.linspace(0.5, 4, number)[:, None, None]


def assert_same(task: BaseTask, model: FixedLogits, confidence: float = 1e-4) -> list[list[int]]:
    """Compare the search with the generator's at a beam of 1 for each of the samples; return what is said."""
    settings = json.loads(json.dumps(search_settings(task, model)))
    search = Search(settings["search"])
    options = {**vars(task.generator_options()), "beam": 1}
    generator = task.build_generator([model], generation_config(options))
    expected = generator.generate([model], {"net_input": {}})
    log_probs = torch.log_softmax(model.logits / model.temperature, -1).numpy()
    said = []
    for (best, *_), row in zip(expected, log_probs, strict=True):
        tokens, queries, sure, path, _ = search(row)
        assert path.tolist() == best["labels"].tolist()
        assert [*tokens, task.target_dictionary.eos()] == best["tokens"].tolist()
        np.testing.assert_allclose(row[queries, tokens], best["positional_scores"][: len(tokens)], atol=1e-4)
        assert sure == pytest.approx(float(best["confidence"]), abs=confidence)
        said.append(tokens)
    return said


@pytest.fixture(scope="module")
def make_task(answer_vocabulary: Path) -> Callable[..., BaseTask]:
    """Give a function that makes a task of options."""

    def make(task: type[BaseTask], config: Any, **options: Any) -> BaseTask:
        return task(config(data="none", bpe_dir=str(answer_vocabulary), num_bins=NUM_BINS, **options))

    return make


@pytest.mark.integration
@pytest.mark.parametrize("odds", [(1.0, 0.0), (0.5, 1.3)])
def test_boxes_and_their_confidence_are_those_of_the_checkpoint(
    make_task: Callable[..., BaseTask], odds: tuple[float, float]
) -> None:
    task = make_task(RefcocoTask, RefcocoConfig)
    first = task.target_dictionary.index("<bin_0>")
    for seed, queries in enumerate((4, 7, 9)):
        favoured = list(range(first, first + NUM_BINS))
        logits = draw_logits(task, queries, favoured, number=25, seed=seed)
        # A path that is drawn on the border between two labels may be either of them.
        said = assert_same(task, FixedLogits(logits, temperature=1.3, odds=odds), confidence=2 / 256)
        for tokens in said:
            left, top, right, bottom = (token - first for token in tokens)
            assert 0 <= left <= right < NUM_BINS and 0 <= top <= bottom < NUM_BINS


@pytest.mark.parametrize(
    "eval_args",
    [{}, {"max_len_b": 3}, {"min_len": 4, "max_len_b": 5}, {"no_repeat_ngram_size": 1}]
    + [{"no_repeat_ngram_size": 2, "max_len_b": 4}, {"no_repeat_ngram_size": 9, "min_len": 0}],
)
def test_captions_have_the_lengths_and_ngrams_of_the_checkpoint(
    make_task: Callable[..., BaseTask], eval_args: dict[str, int]
) -> None:
    task = make_task(CaptionTask, CaptionConfig, eval_args=json.dumps({"beam": 5, **eval_args}), mbr="cider")
    task_of_beam_1 = make_task(CaptionTask, CaptionConfig, eval_args=json.dumps(eval_args))
    assert search_settings(task, FixedLogits(torch.zeros(1, 6, 9)))["search"]["minimum"] == eval_args.get("min_len", 1)
    favoured = list(range(10, 14))
    said = []
    for seed in range(2):
        logits = draw_logits(task, 8, favoured, number=25, seed=seed)
        said += assert_same(task_of_beam_1, FixedLogits(logits))
    lengths = [len(tokens) for tokens in said]
    assert min(lengths) >= eval_args.get("min_len", 1)
    assert max(lengths) <= eval_args.get("max_len_b", 200)


@pytest.mark.parametrize("way", ["allcand", "beamsearch"])
@pytest.mark.parametrize("no_repeat", [0, 2])
def test_answers_are_always_of_the_list(make_task: Callable[..., BaseTask], way: str, no_repeat: int) -> None:
    eval_args = json.dumps({"beam": 5, "no_repeat_ngram_size": no_repeat})
    task = make_task(SnliVeTask, SnliVeConfig, val_inference_type=way, eval_args=eval_args)
    listed = [answer[:-1].tolist() for answer in task.trie.tokens]
    model = FixedLogits(draw_logits(task, 4, sum(listed, []), number=40, seed=3))
    assert all(tokens in listed for tokens in assert_same(task, model))


def test_confidence_of_an_answer_is_its_share_of_the_list(make_task: Callable[..., BaseTask]) -> None:
    task = make_task(SnliVeTask, SnliVeConfig)
    listed = [answer[:-1].tolist() for answer in task.trie.tokens]
    used = sorted({token for answer in listed for token in answer})
    labels = len(task.target_dictionary) + 1
    logits = torch.full((1, 3, labels), -1e4)
    logits[:, :, [*used, labels - 1]] = torch.randn(1, 3, len(used) + 1, generator=torch.Generator().manual_seed(5))
    model = FixedLogits(logits)
    # Summed over all paths, one by one.
    log_probs = torch.log_softmax(logits[0], -1)
    sums = dict.fromkeys(map(tuple, listed), 0.0)
    for path in itertools.product([*used, labels - 1], repeat=3):
        said = tuple(label for label, _ in itertools.groupby(path) if label != labels - 1)
        if said in sums:
            sums[said] += float(sum(log_probs[query, label] for query, label in enumerate(path)).exp())
    best = max(sums, key=sums.__getitem__)
    settings = search_settings(task, model)["search"]
    tokens, _, confidence, _, ranked = Search(settings)(log_probs.numpy())
    assert ranked[0] == (tokens, confidence)
    assert [sure for _, sure in ranked] == sorted((sure for _, sure in ranked), reverse=True)
    assert tuple(tokens) == best
    assert confidence == pytest.approx(sums[best] / sum(sums.values()), rel=1e-4)


def test_answers_without_a_list_are_free(make_task: Callable[..., BaseTask]) -> None:
    task = make_task(VqaGenTask, VqaGenConfig)
    assert_same(task, FixedLogits(draw_logits(task, 6, list(range(10, 14)), number=25, seed=2), odds=(2.0, -0.5)))


def test_odds_change_as_the_formula_says() -> None:
    assert change_odds(0.7, 1.0, 0.0) == 0.7
    assert change_odds(0.7, 2.0, 0.5) == pytest.approx(1 / (1 + ((1 - 0.7) / 0.7) ** 2 * np.exp(-0.5)))
    assert change_odds(0.0, 2.0, 0.5) == 0.0
    assert change_odds(1.0, 2.0, 0.5) == 1.0


def test_what_no_output_can_say_is_an_error(make_task: Callable[..., BaseTask]) -> None:
    task = make_task(RefcocoTask, RefcocoConfig)
    model = SimpleNamespace(blank=len(task.target_dictionary), num_queries=3, temperature=1.0, odds=(1.0, 0.0))
    search = Search(search_settings(task, model)["search"])
    with pytest.raises(ValueError, match="3 queries"):
        search(np.full((3, model.blank + 1), -np.log(model.blank + 1)))


def test_calibrated_captions_show_their_confidence(make_task: Callable[..., BaseTask]) -> None:
    task = make_task(CaptionTask, CaptionConfig)
    logits = torch.zeros(1, 6, 9)
    for options, shown in (({}, False), ({"temperature": 1.5}, True), ({"odds": (1.0, 0.2)}, True)):
        assert search_settings(task, FixedLogits(logits, **options))["shows_confidence"] == shown
    assert search_settings(make_task(SnliVeTask, SnliVeConfig), FixedLogits(logits))["shows_confidence"]
