"""How often a training step of ours asks what a GPU has computed: never, since the GPU stands still meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from device_waits import DeviceWaits
from fairseq.criterions import CRITERION_REGISTRY, FairseqCriterion
from fairseq.tasks import TASK_DATACLASS_REGISTRY, setup_task
from omegaconf import OmegaConf
from torch import Tensor, nn

from narvl_plugin.models.registered import build
from narvl_plugin.tasks.base import BaseTask

Rows = list[list[str]]
STUDENT, TEACHER = "narvl_tiny", "ofa_tiny"
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "captions": ("caption", "qctc", {}, {}),
    "any reference": ("caption", "qctc", {"any_reference": True}, {"bigram_weight": 10.0, "label_smoothing": 0.1}),
    "loss of the authors' code": ("caption", "qctc", {}, {"reference_loss": True, "label_smoothing": 0.1}),
    "captions that are scored": ("caption", "qctc", {"any_reference": True}, {"score_weight": 10.0}),
    "cross entropy": ("caption", "query_cross_entropy", {"any_reference": True}, {}),
    "boxes": ("refcoco", "qctc", {}, {"score_weight": 10.0}),
    "answers": ("vqa_gen", "qctc", {}, {}),
    "answers of a teacher": ("vqa_gen", "adjust_label_smoothed_cross_entropy", {}, {"label_smoothing": 0.1}),
    "answers after a prompt": (
        *("vqa_gen", "adjust_label_smoothed_cross_entropy"),
        *({"prompt_type": "prev_output"}, {"label_smoothing": 0.1}),
    ),
    "captions of which some do not fit": ("caption", "qctc", {"skip_bad_rows": 3}, {"bigram_weight": 10.0}),
    "references of which some do not fit": ("caption", "qctc", {"any_reference": True, "skip_bad_rows": 3}, {}),
    "boxes of which none fits": ("refcoco", "query_cross_entropy", {"skip_bad_rows": 3}, {"label_smoothing": 0.1}),
    "answers of which some do not fit": ("vqa_gen", "qctc", {"skip_bad_rows": 3}, {}),
    "entailment": ("snli_ve", "qctc", {}, {}),
    "entailment of a teacher": ("snli_ve", "adjust_label_smoothed_cross_entropy", {}, {}),
}
QUERIES = {
    "captions of which some do not fit": 2,
    "references of which some do not fit": 2,
    "boxes of which none fits": 3,
    "answers of which some do not fit": 1,
}


@pytest.fixture
def make_step(
    write_tsv: Callable[..., Path],
    answer_vocabulary: Path,
    caption_rows: Rows,
    refcoco_rows: Rows,
    vqa_rows: Rows,
    snli_ve_rows: Rows,
) -> Callable[[str], tuple[nn.Module, FairseqCriterion, dict[str, Any]]]:
    """Give a function that makes a case's model, criterion and batch."""
    caption_rows[0][2] = "two dogs&&a cat"
    rows = {"caption": caption_rows, "refcoco": refcoco_rows, "vqa_gen": vqa_rows, "snli_ve": snli_ve_rows}

    def make(case: str) -> tuple[nn.Module, FairseqCriterion, dict[str, Any]]:
        name, criterion_name, task_options, criterion_options = CASES[case]
        given = {"bpe_dir": str(answer_vocabulary), "num_bins": 10, "patch_image_size": 32, "max_image_size": 32}
        config = TASK_DATACLASS_REGISTRY[name]
        known = {key: value for key, value in given.items() if hasattr(config, key)} | task_options
        options = config(_name=name, data=str(write_tsv("train.tsv", rows[name])), **known)
        task = setup_task(OmegaConf.structured(options))
        assert isinstance(task, BaseTask)
        task.load_dataset("train")
        dataset = task.datasets["train"]
        arch = TEACHER if criterion_name.startswith("adjust") else STUDENT
        sizes = {"num_queries": QUERIES.get(case, 30)} if arch == STUDENT else {}
        small = {"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 32, "encoder_attention_heads": 2}
        layers = {"encoder_layers": 1, "decoder_layers": 1, "vision_trunk": "test_resnet", "freeze_resnet": True}
        labels = len(task.target_dictionary) + (arch == STUDENT)  # with the blank
        model = build(arch, vocab_size=labels, **small, **layers, **sizes).train()
        criterion_class = CRITERION_REGISTRY[criterion_name]
        defaults = {"sentence_avg": False, "label_smoothing": 0.0}
        defaults |= {} if criterion_name.startswith("adjust") else {"keep_eos": False}
        criterion = criterion_class(task, **defaults | criterion_options)
        return model, criterion, dataset.collater([dataset[row] for row in range(3)])

    return make


@pytest.mark.integration
@pytest.mark.parametrize("case", CASES)
def test_a_training_step_never_waits_for_the_device(
    case: str, make_step: Callable[[str], tuple[nn.Module, FairseqCriterion, dict[str, Any]]], device: DeviceWaits
) -> None:
    """The loss, its gradient and what is logged are those of the CPU."""
    model, criterion, batch = make_step(case)
    torch.manual_seed(1)
    expected, expected_size, expected_log = criterion(model, batch)
    expected.backward()
    names: dict[nn.Parameter, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(weight, []).append(name)
    # On the pretended device a weight of two names becomes two.
    gradients = {own[0]: weight.grad for weight, own in names.items() if weight.grad is not None and len(own) == 1}
    assert len(gradients) > 20
    model.zero_grad()

    device.move(model)
    batch = device.move(batch)
    device.clear()
    torch.manual_seed(1)
    loss, size, log = criterion(model, batch)
    loss.backward()
    assert not device.ours, [str(wait) for wait in device.ours]
    assert (log.get("did_not_fit", 0) > 0) == (case in QUERIES)
    assert size == expected_size
    torch.testing.assert_close(loss.cpu(), expected)
    assert {key: float(value) for key, value in log.items()} == pytest.approx(
        {key: float(value) for key, value in expected_log.items()}, rel=1e-5
    )
    for name, weight in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(weight.grad.cpu(), gradients[name])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_torch_finds_no_wait_on_a_gpu(
    case: str, make_step: Callable[[str], tuple[nn.Module, FairseqCriterion, dict[str, Any]]]
) -> None:
    model, criterion, batch = make_step(case)
    model.cuda()
    batch = torch.utils._pytree.tree_map(lambda part: part.cuda() if isinstance(part, Tensor) else part, batch)
    for mode in ("default", "error"):  # in the first step kernels are compiled
        torch.cuda.set_sync_debug_mode(mode)
        try:
            criterion(model, batch)[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
