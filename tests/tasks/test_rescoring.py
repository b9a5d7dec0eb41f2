"""A teacher that rescores in validation is where the student is by then, and of its type."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from device_waits import DeviceWaits
from fairseq import utils
from fairseq.dataclass.configs import EMAConfig
from fairseq.tasks import setup_task
from omegaconf import OmegaConf
from torch import nn

from narvl_plugin.errors import BadRow
from narvl_plugin.models.registered import FAMILIES
from narvl_plugin.tasks.registered import CaptionConfig, CaptionTask
from narvl_plugin.training.ema import AveragedModel

EVAL_ARGS = '{"beam": 3, "max_len_b": 8}'


@pytest.fixture
def task(
    write_tsv: Callable[..., Path],
    caption_rows: list[list[str]],
    vocabulary: Path,
    write_checkpoint: Callable[..., Path],
) -> CaptionTask:
    """Give a task of captions whose validation rescores with a teacher."""
    common = {"bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 32}
    teacher = write_checkpoint("teacher.pt", "ofa", "caption", **common)
    cfg = CaptionConfig(
        _name="caption",
        data=str(write_tsv("valid.tsv", caption_rows)),
        eval_cider=True,
        eval_args=EVAL_ARGS,
        rescore_with=str(teacher),
        **common,
    )
    made = setup_task(OmegaConf.structured(cfg))
    made.load_dataset("valid")
    return made


def build_student(task: CaptionTask, *, from_checkpoint: bool = False) -> nn.Module:
    small = {"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 32, "encoder_attention_heads": 2, "num_queries": 10}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "vision_trunk": "test_resnet", "freeze_resnet": True}
    torch.manual_seed(5)
    cfg = OmegaConf.structured(FAMILIES["narvl"][0](_name="narvl", **small, **layers))
    return task.build_model(cfg, from_checkpoint).eval()


def batch_of(task: CaptionTask) -> dict[str, Any]:
    return task.dataset("valid").collater([task.dataset("valid")[row] for row in range(3)])


def halved(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch as fairseq's trainer makes it with --bf16."""

    def in_bfloat16(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.bfloat16() if tensor.dtype == torch.float32 else tensor

    return utils.apply_to_sample(in_bfloat16, batch)


def teachers_place(task: CaptionTask) -> tuple[torch.device, torch.dtype]:
    parameters = list(task.generator.rescorer.teacher.parameters())
    ((device, dtype),) = {(parameter.device, parameter.dtype) for parameter in parameters}
    return device, dtype


def test_in_half_precision(task: CaptionTask, criterion: Any) -> None:
    student = build_student(task)
    assert teachers_place(task) == (torch.device("cpu"), torch.float32)
    student.to(torch.bfloat16)  # as fairseq's trainer does, once the task has built the model
    _, _, logged = task.valid_step(halved(batch_of(task)), student, criterion)
    assert teachers_place(task) == (torch.device("cpu"), torch.bfloat16)
    assert logged["_cider_count"] == 3


def test_on_another_device(task: CaptionTask, criterion: Any, device: DeviceWaits) -> None:
    student = build_student(task)
    _, _, expected = task.valid_step(batch_of(task), student, criterion)
    device.move(student)
    _, _, logged = task.valid_step(device.move(batch_of(task)), student, criterion)
    assert teachers_place(task)[0] == next(student.parameters()).device
    assert logged["_cider_sum"] == pytest.approx(expected["_cider_sum"], abs=1e-3)


def test_with_averaged_weights(task: CaptionTask, criterion: Any, device: DeviceWaits) -> None:
    """These stay in float32, and multiply in the training's precision."""
    student = build_student(task).to(torch.bfloat16)
    averaged = AveragedModel(student, EMAConfig()).model
    _, _, logged = task.valid_step(halved(batch_of(task)), student, criterion, averaged)
    assert teachers_place(task)[1] == torch.float32
    assert logged["_cider_count"] == 3


def test_of_a_checkpoint_whose_weights_come_later(task: CaptionTask, criterion: Any) -> None:
    """As in fairseq-validate: the model is built on torch's meta device, and takes the checkpoint's tensors."""
    weights = build_student(task).state_dict()
    student = build_student(task, from_checkpoint=True)
    assert next(student.parameters()).is_meta
    student.load_state_dict(weights)
    _, _, logged = task.valid_step(batch_of(task), student, criterion)
    assert teachers_place(task) == (torch.device("cpu"), torch.float32)
    assert logged["_cider_count"] == 3


@pytest.mark.parametrize("part", ["text", "output"])
def test_what_is_longer_than_the_teacher_reads_is_named_with_file_and_row(
    part: str, task: CaptionTask, criterion: Any
) -> None:
    """The student may read longer texts, and say longer ones."""
    student = build_student(task)
    teacher = task.generator.rescorer.teacher
    narrow = teacher.encoder if part == "text" else teacher.decoder
    narrow.cfg = copy.copy(narrow.cfg)
    narrow.cfg.max_positions = 2
    batch = batch_of(task)
    batch["net_input"]["src_tokens"][0, 2:] = task.target_dictionary.pad()
    found = rf"valid\.tsv:{2 if part == 'text' else '[123]'}: the {part} has \d+ tokens, and the teacher of --rescore-"
    with pytest.raises(BadRow, match=found):
        task.valid_step(batch, student, criterion)
