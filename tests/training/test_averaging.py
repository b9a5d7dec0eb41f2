"""Averaged weights (--store-ema): what they are, what validates, starts and generates with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.dataclass.configs import EMAConfig
from torch import nn

from narvl_plugin.convert import convert
from narvl_plugin.ema import AveragedModel
from narvl_plugin.errors import InputError
from narvl_plugin.models import build
from narvl_plugin.safe_reading import read_checkpoint
from narvl_plugin.tasks.caption import CaptionConfig, CaptionTask

Losses = dict[int, float]
DECAY = 0.75


class TiedModel(nn.Module):
    """One embedding under two names, a frozen layer, and a batch norm with its count of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        self.output = nn.Linear(2, 3, bias=False)
        self.output.weight = self.embedding.weight
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.norm = nn.BatchNorm1d(2)


@pytest.mark.parametrize(
    ("dtype", "ema_fp32", "tolerance"),
    [(torch.float32, False, 1e-6), (torch.float32, True, 1e-6), (torch.float16, True, 1e-3)],
)
def test_each_tensor_is_averaged_once(dtype: torch.dtype, ema_fp32: bool, tolerance: float) -> None:
    torch.manual_seed(0)
    model = TiedModel().to(dtype)
    averaged = AveragedModel(model, EMAConfig(store_ema=True, ema_decay=DECAY, ema_fp32=ema_fp32, ema_start_update=2))
    frozen = model.frozen.weight.clone()
    weights = []
    for update in range(1, 5):
        with torch.no_grad():
            model.embedding.weight.add_(update)
            model.norm.running_mean.add_(1)
            model.norm.num_batches_tracked.add_(1)
        weights.append(model.embedding.weight.detach().double().clone())
        averaged.step(model, update)
    # Up to the second update it is the model; from there on a quarter of the way to it.
    expected = weights[0]
    for weight in weights[1:]:
        expected = DECAY * expected + (1 - DECAY) * weight
    found = averaged.get_model()
    torch.testing.assert_close(found.embedding.weight.double(), expected, rtol=tolerance, atol=tolerance)
    assert found.output.weight is found.embedding.weight
    mean = 1 + 0.25 + 0.25 * 1.75 + 0.25 * 2.3125  # of 1, 2, 3, 4
    torch.testing.assert_close(found.norm.running_mean.double(), torch.full((2,), mean).double(), rtol=1e-3, atol=1e-3)
    assert found.norm.num_batches_tracked == 4
    assert torch.equal(found.frozen.weight, frozen)
    if ema_fp32:
        kept = averaged.fp32_params["embedding.weight"]
        assert kept.dtype == torch.float32
        torch.testing.assert_close(kept.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_teacher_searches_with_the_averaged_model(
    vocabulary: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 32, "eval_cider": True}
    task = CaptionTask.setup_task(CaptionConfig(data=data, **values))
    task.load_dataset("valid")
    sizes = {"encoder_embed_dim": 16, "encoder_layers": 1, "decoder_layers": 1, "vision_trunk": "test_resnet"}
    model, averaged = (build("ofa_tiny", vocab_size=len(task.target_dictionary), **sizes).eval() for _ in range(2))
    task.generator = task.build_generator([model], task.generator_options())
    monkeypatch.setattr(model.encoder, "forward", lambda *_, **__: pytest.fail("the last weights were used"))
    batch = task.dataset("valid").collater([task.dataset("valid")[0]])
    criterion = LabelSmoothedCrossEntropyCriterion(task, sentence_avg=False, label_smoothing=0.0)
    _, _, logged = task.valid_step(batch, model, criterion, ema_model=averaged)
    assert logged["_cider_count"] == 1


@pytest.fixture
def short(options: list[object]) -> list[object]:
    """Give options of a short training whose average never leaves the weights it starts from."""
    options += ["--batch-size", 3, "--num-workers", 0, "--max-update", 3, "--dropout", 0, "--ema-decay", 1.0]
    return [*options, "--save-interval-updates", 1]


def weights(folder: Path, averaged: bool = False) -> dict[str, torch.Tensor]:
    state = read_checkpoint(folder / "checkpoint_last.pt")
    found: dict[str, torch.Tensor] = state["extra_state"]["ema"] if averaged else state["model"]
    return found


def test_validation_is_of_the_averaged_weights(
    short: list[object], train: Callable[..., Losses], tmp_path: Path
) -> None:
    def validated(folder: Path) -> list[float]:
        files = sorted(folder.glob("checkpoint_*_[123].pt")) + [folder / "checkpoint_last.pt"]
        return [read_checkpoint(file)["extra_state"]["val_loss"] for file in files]

    train(*short, "--store-ema", "--save-dir", tmp_path / "averaged")
    first, *others = validated(tmp_path / "averaged")
    assert others and others == [first] * len(others)  # the first weights have one loss
    train(*short, "--save-dir", tmp_path / "plain")
    assert len(set(validated(tmp_path / "plain"))) > 1  # the weights themselves move


def test_a_new_training_averages_from_its_own_start(
    short: list[object], train: Callable[..., Losses], tmp_path: Path, differences: Callable[[Any, Any], list[str]]
) -> None:
    plain, averaged, again, seeded = (tmp_path / name for name in ("plain", "averaged", "again", "seeded"))
    train(*short, "--save-dir", plain)
    # From a checkpoint without averages, from one with them, and from another one's averages.
    start = "--finetune-from-model"
    train(*short, "--store-ema", start, plain / "checkpoint_last.pt", "--save-dir", averaged)
    assert differences(weights(averaged, averaged=True), weights(plain)) == []
    assert differences(weights(averaged), weights(plain)) != []
    train(*short, "--store-ema", start, averaged / "checkpoint_last.pt", "--save-dir", again)
    assert differences(weights(again, averaged=True), weights(averaged)) == []
    seed = ["--ema-seed-model", averaged / "checkpoint_last.pt"]
    train(*short, "--store-ema", *seed, start, plain / "checkpoint_last.pt", "--save-dir", seeded)
    assert differences(weights(seeded, averaged=True), weights(averaged, averaged=True)) == []


@pytest.mark.integration
def test_generation_with_averaged_weights(
    short: list[object],
    train: Callable[..., Losses],
    run_generate: Callable[..., None],
    data: str,
    vocabulary: Path,
    tmp_path: Path,
) -> None:
    train(*short, "--store-ema", "--ema-fp32", "--lr", 0.1, "--save-dir", tmp_path)
    checkpoint = tmp_path / "checkpoint_last.pt"
    convert(checkpoint, tmp_path / "converted.pt", ema=True)

    def generated(file: Path, *options: object) -> list[str]:
        run_generate(
            *(data, "--task", "caption", "--bpe-dir", vocabulary, "--num-bins", 10, "--patch-image-size", 32, "--cpu"),
            *("--path", file, "--results-path", tmp_path, "--batch-size", 5, "--gen-subset", "test", *options),
        )
        lines = (tmp_path / "generate-test.txt").read_text().splitlines()
        return [line for line in lines if line.startswith("H-")]

    averaged = generated(checkpoint, "--ema-eval")
    assert len(averaged) == 5
    assert averaged == generated(tmp_path / "converted.pt")
    assert averaged != generated(checkpoint)
    with pytest.raises(InputError, match=r"converted\.pt: holds no averaged weights"):
        generated(tmp_path / "converted.pt", "--ema-eval")
