"""Trainings in which a student learns from its own averaged weights (--average-weight)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.dataclass.configs import EMAConfig

from criterions import QueryCtcCriterion
from criterions.qctc import QueryCtcConfig
from narvl_plugin.errors import InputError
from narvl_plugin.models.memo import memos_of
from narvl_plugin.models.registered import build
from narvl_plugin.tasks.registered import CaptionConfig, CaptionTask
from narvl_plugin.training.ema import AveragedModel

Losses = dict[int, float]
SIZES: dict[str, Any] = {
    "encoder_embed_dim": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "vision_trunk": "test_resnet",
}
SIZES |= {"freeze_resnet": True, "num_queries": 20}


class Backward:
    """An optimizer that only computes gradients."""

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def test_a_step_learns_from_the_average_without_dropout(vocabulary: Path, data: str) -> None:
    options = {"bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 32}
    task = CaptionTask.setup_task(CaptionConfig(data=data, **options))
    task.load_dataset("train")
    batch = task.dataset("train").collater([task.dataset("train")[row] for row in range(3)])
    torch.manual_seed(1)
    model = build("narvl_tiny", vocab_size=len(task.target_dictionary), dropout=0.3, **SIZES).train()
    model.set_num_updates = lambda update: None
    averaged = AveragedModel(model, EMAConfig(store_ema=True, ema_decay=0.5))
    average = averaged.get_model()

    def step(weight: float) -> tuple[torch.Tensor, list[torch.Tensor]]:
        criterion = QueryCtcCriterion.build_criterion(QueryCtcConfig(average_weight=weight), task)
        model.zero_grad()
        torch.manual_seed(2)
        loss, _, _ = task.train_step(batch, model, criterion, Backward(), 0, ema_model=average)
        return loss.detach(), [weight.grad for weight in model.parameters() if weight.grad is not None]

    plain, with_average = step(0.0)[0], step(2.0)
    torch.manual_seed(2)
    logits = model(**batch["net_input"])[0]
    with torch.no_grad():
        soft = model.eval()(**batch["net_input"])[0]
    p = soft.softmax(2)
    between = (p * (p.log() - logits.log_softmax(2))).sum()
    assert float(between) > 0.01
    torch.testing.assert_close(with_average[0], plain + 2.0 * between.detach())
    assert with_average[1] and all(gradient.isfinite().all() for gradient in with_average[1])
    assert all(weight.grad is None for weight in average.parameters())
    assert not any(part.training for part in average.modules()) and model.train().training

    # After an update, nothing is left of what follows from older averages.
    assert any(memo._slot is not None for memo in memos_of(average))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    averaged.step(model, 1)
    assert all(memo._slot is None for memo in memos_of(average))


@pytest.mark.integration
@pytest.mark.parametrize("amp", [[], ["--amp"]])
def test_a_training_learns_from_its_average(
    amp: list[str], options: list[object], train: Callable[..., Losses], tmp_path: Path
) -> None:
    """Both begin with equal weights, without dropout; then they differ."""
    options += [*amp, "--batch-size", 3, "--num-workers", 0, "--max-update", 3, "--dropout", 0, "--ema-decay", 0.99]
    options += ["--store-ema", "--disable-validation"]
    plain = train(*options, "--save-dir", tmp_path / "plain")
    soft = train(*options, "--average-weight", 5.0, "--save-dir", tmp_path / "soft")
    assert soft[1] == pytest.approx(plain[1], rel=1e-5)
    assert soft[2] == pytest.approx(plain[2], rel=0.5) and soft[2] > plain[2] + 1e-4


def test_without_an_average_nothing_is_trained(
    options: list[object], run_train: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="--average-weight 0.5: needs the averaged model; give --store-ema, too"):
        run_train(*options, "--batch-size", 3, "--average-weight", 0.5, "--save-dir", tmp_path / "run")
    assert not list(tmp_path.glob("run/*.pt"))
