"""What tasks with short answers share: inference by kind of model, prompts, options that do not go together."""

import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from omegaconf import OmegaConf

from narvl_plugin.errors import InputError
from narvl_plugin.generation.candidates import CandidateGenerator
from narvl_plugin.generation.parallel_generator import ParallelGenerator
from narvl_plugin.generation.teacher import TrieSequenceGenerator
from narvl_plugin.models.registered import RegisteredNarvlConfig as NarvlConfig
from narvl_plugin.models.registered import RegisteredOfaConfig as OfaConfig
from narvl_plugin.models.registered import build
from narvl_plugin.tasks.registered import VqaGenConfig, VqaGenTask

Rows = list[list[str]]


@pytest.fixture
def make_task(
    vocabulary: Path, write_tsv: Callable[..., Path], vqa_rows: Rows, tmp_path: Path
) -> Callable[..., VqaGenTask]:
    """Make a task on rows of questions, on request with a closed list of answers."""

    def make(closed: bool = False, **options: Any) -> VqaGenTask:
        path = write_tsv("valid.tsv", vqa_rows)
        if closed:
            (tmp_path / "answers.pkl").write_bytes(pickle.dumps({"red": 0, "two": 1, "a red hat": 2, "a cat": 3}))
            options["ans2label_file"] = str(tmp_path / "answers.pkl")
        values = {"patch_image_size": 32, "num_bins": 10} | options
        return VqaGenTask.setup_task(VqaGenConfig(data=f"train.tsv,{path}", bpe_dir=str(vocabulary), **values))

    return make


def teacher_of(task: VqaGenTask) -> torch.nn.Module:
    torch.manual_seed(1)
    return build("ofa_nano", vocab_size=len(task.target_dictionary), vision_pretrained=False).eval()


@pytest.mark.parametrize(
    ("closed", "inference", "kind"),
    [
        (True, "allcand", CandidateGenerator),
        (True, "beamsearch", TrieSequenceGenerator),
        (False, "beamsearch", SequenceGenerator),
    ],
)
def test_teachers_answer_as_they_are_told(
    make_task: Callable[..., VqaGenTask], closed: bool, inference: str, kind: type
) -> None:
    task = make_task(closed, val_inference_type=inference)
    generator = task.build_generator([teacher_of(task)], Namespace(beam=3, unnormalized=True))
    assert type(generator) is kind


def test_students_say_their_most_probable_path_to_an_answer(make_task: Callable[..., VqaGenTask]) -> None:
    for inference in ("allcand", "beamsearch"):
        task = make_task(closed=True, val_inference_type=inference)
        size = len(task.target_dictionary) + 1
        student = build("narvl_nano", vocab_size=size, num_queries=6, vision_pretrained=False)
        generator = task.build_generator([student], Namespace())
        assert isinstance(generator, ParallelGenerator)
        task.load_dataset("valid")
        dataset = task.dataset("valid")
        hypotheses = task.inference_step(generator, [student], dataset.collater([dataset[0], dataset[1]]))
        assert [len(beam) for beam in hypotheses] == [1, 1]
        assert all(task.codec.decode(best["tokens"]) in ("red", "two", "a red hat", "a cat") for (best,) in hypotheses)


@pytest.mark.parametrize("closed", [True, False])
def test_hypotheses_of_a_beam_come_without_the_prompt(make_task: Callable[..., VqaGenTask], closed: bool) -> None:
    task = make_task(closed, prompt_type="prev_output", val_inference_type="beamsearch")
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    batch = dataset.collater([dataset[row] for row in range(4)])
    teacher = teacher_of(task)
    generator = task.build_generator([teacher], Namespace(beam=2, max_len_b=12))
    whole = generator.generate([teacher], batch, prefix_tokens=batch["prefix_tokens"], bos_token=0)
    hypotheses = task.inference_step(generator, [teacher], batch)
    for beam, beam_with_prompt, prompt in zip(hypotheses, whole, batch["decoder_prompts"], strict=True):
        for one, with_prompt in zip(beam, beam_with_prompt, strict=True):
            assert torch.equal(torch.cat([prompt[1:], one["tokens"]]), with_prompt["tokens"])
            assert len(one["positional_scores"]) == len(one["tokens"])
            assert not closed or task.codec.decode(one["tokens"]) in task.trie


def test_options_that_do_not_go_together_are_named(make_task: Callable[..., VqaGenTask]) -> None:
    task = make_task()
    with pytest.raises(InputError, match="allcand needs a list of answers .*--ans2label-file"):
        task.build_generator([teacher_of(task)], Namespace())
    task = make_task(prompt_type="src", val_inference_type="beamsearch")
    with pytest.raises(InputError, match="--prompt-type src ends in </s>"):
        task.build_generator([teacher_of(task)], Namespace())


def test_prompts_are_for_teachers(make_task: Callable[..., VqaGenTask]) -> None:
    task = make_task(prompt_type="src")
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "vision_trunk": "resnet50"}
    with pytest.raises(InputError, match="--prompt-type src is for teachers"):
        task.build_model(OmegaConf.structured(NarvlConfig(_name="narvl", **sizes)))
    task.build_model(OmegaConf.structured(OfaConfig(_name="ofa", **sizes)))


def test_tokens_of_answers_that_a_decoder_reads_are_known(make_task: Callable[..., VqaGenTask]) -> None:
    """Those of the longest answer, or of its longest beginning that others share, where answers are asked for."""
    task = make_task(True, val_inference_type="beamsearch")
    assert task.answer_room("train") == task.answer_room("valid") == 0
    assert task.trie is not None
    assert task.answer_room("test") == max(map(len, task.trie.tokens)) - 1
    task.cfg.eval_acc = True
    assert task.answer_room("valid") == task.answer_room("test")
    task.cfg.val_inference_type = "allcand"
    assert task.answer_room("test") == max(map(len, task.trie.branches())) < max(map(len, task.trie.tokens))
    task.trie = None
    assert task.answer_room("test") == 0
