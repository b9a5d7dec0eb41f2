"""The learning rate with a warm-up that is a share of the training."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fairseq import trainer
from fairseq.optim import FairseqOptimizer
from fairseq.optim.lr_scheduler import build_lr_scheduler
from omegaconf import OmegaConf

from narvl import plugin_folder
from narvl_plugin.errors import InputError

Losses = dict[int, float]


class Optimizer(FairseqOptimizer):
    """Has a learning rate, and nothing to learn."""

    def __init__(self) -> None:
        super().__init__(None)
        self._optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.0)


def schedule(**options: Any) -> Any:
    values = {"_name": "polynomial_decay_ratio", "lr": [1.0], "total_num_update": 10} | options
    return build_lr_scheduler(OmegaConf.create(values), Optimizer())


def test_rates_rise_over_the_share_and_fall_to_the_end() -> None:
    planned = schedule(warmup_ratio=0.2)
    rates = [planned.step_update(update) for update in range(12)]
    assert rates == pytest.approx([0, 1 / 2, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0, 0])
    assert rates == [schedule(warmup_updates=2).step_update(update) for update in range(12)]


def test_the_share_is_rounded_to_whole_updates() -> None:
    assert schedule(warmup_ratio=0.29, total_num_update=100).cfg.warmup_updates == 29  # 0.29 * 100 < 29 in floats


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_ratio": 0.1, "warmup_updates": 5}, "--warmup-ratio 0.1 and --warmup-updates 5 both say"),
        ({"warmup_ratio": 1.0}, r"--warmup-ratio 1.0: expected a share"),
        ({"warmup_ratio": -0.1}, r"--warmup-ratio -0.1: expected a share"),
    ],
)
def test_what_contradicts_itself_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        schedule(**options)


def test_a_training_without_an_end_is_refused() -> None:
    with pytest.raises(InputError, match="give --max-update, --total-num-update or --max-epoch"):
        schedule(total_num_update=None).step_begin_epoch(1)


# The data has files of 9 and 7 rows, which take turns.
@pytest.mark.integration
@pytest.mark.parametrize(
    ("length", "total"),
    [
        (["--max-epoch", 3, "--batch-size", 2], 5 + 4 + 5),
        (["--max-epoch", 3, "--batch-size", 2, "--update-freq", "1,3"], 5 + 2 + 2),
        (["--max-epoch", 3, "--max-tokens", 4000], 3 + 2 + 3),
        (["--max-epoch", 3, "--max-update", 4, "--batch-size", 2], 4),
        (["--max-update", 4, "--total-num-update", 8, "--batch-size", 2], 8),
    ],
)
def test_the_end_is_that_of_the_training(
    length: list[object],
    total: int,
    options: list[object],
    train: Callable[..., Losses],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates: dict[int, float] = {}
    step = trainer.Trainer.lr_step_update
    monkeypatch.setattr(
        trainer.Trainer, "lr_step_update", lambda self: rates.setdefault(self.get_num_updates(), step(self))
    )
    options += ["--lr-scheduler", "polynomial_decay_ratio", "--warmup-ratio", 0.25, "--num-workers", 0, "--no-save"]
    train(*options, *length, "--lr", 1.0, "--save-dir", tmp_path, "--disable-validation", "--clip-norm", 1e-6)
    warmup = round(total / 4)
    expected = [min(update / warmup, (total - update) / (total - warmup)) for update in range(max(rates) + 1)]
    assert list(rates.values()) == pytest.approx(expected)
    assert total == max(rates) or "--total-num-update" in length


@pytest.mark.integration
def test_from_yaml(data: str, vocabulary: Path, programs: Path, tmp_path: Path) -> None:
    configuration = {
        "common": {"user_dir": str(plugin_folder()), "cpu": True, "log_format": "json", "log_interval": 1},
        "task": {"_name": "caption", "data": data, "bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 32},
        "model": {
            **{"_name": "narvl", "encoder_embed_dim": 16, "encoder_ffn_embed_dim": 32, "encoder_attention_heads": 2},
            **{"encoder_layers": 1, "decoder_layers": 1, "vision_trunk": "test_resnet", "freeze_resnet": True},
        },
        "criterion": {"_name": "qctc"},
        "dataset": {"batch_size": 2, "num_workers": 0, "disable_validation": True},
        "optimization": {"max_update": 4, "lr": [0.001], "update_freq": [1]},
        "optimizer": {"_name": "adam"},
        "lr_scheduler": {"_name": "polynomial_decay_ratio", "warmup_ratio": 0.5},
        "checkpoint": {"no_save": True, "save_dir": str(tmp_path / "out")},
    }
    (tmp_path / "recipe.yaml").write_text("# @package _group_\n" + yaml.safe_dump(configuration))
    command = [programs / "fairseq-hydra-train", "--config-dir", tmp_path, "--config-name", "recipe"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    words = [str(word) for word in [*command, f"hydra.run.dir={tmp_path}"]]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rates = [line.split('"lr": "')[1].split('"')[0] for line in done.stdout.splitlines() if '"lr": "' in line]
    assert rates == ["0.0005", "0.001", "0.0005", "0"]
