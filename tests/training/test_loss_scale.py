"""The loss scale of --amp, which fairseq uses on a GPU, with torch's scaler for CPUs in its place."""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq.optim.amp_optimizer import AMPOptimizer
from omegaconf import OmegaConf
from torch import Tensor, nn

Losses = dict[int, float]
SCALE = 2**16
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adam", "fused_adam"])
GRADIENTS = (torch.tensor([3e-4, -4e-4]), torch.tensor([0.0, 1.2e-3]))


@pytest.fixture
def scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fairseq make a scaler that works without a GPU."""
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", functools.partial(torch.amp.GradScaler, "cpu"))


@pytest.fixture
def amp() -> Callable[..., tuple[AMPOptimizer, list[nn.Parameter], list[list[Tensor]]]]:
    """Give a function that makes fairseq's optimizer of --amp, two weights, and what the inner optimizer receives."""

    def make(
        optimizer: str = "adam", scale: int = SCALE, min_loss_scale: float = 1e-4
    ) -> tuple[AMPOptimizer, list[nn.Parameter], list[list[Tensor]]]:
        common = Namespace(fp16_init_scale=scale, amp_scale_window=None, min_loss_scale=min_loss_scale)
        options = {"adam_betas": [0.9, 0.999], "adam_eps": 1e-8, "use_old_adam": True, "fp16_adam_stats": False}
        options |= {"_name": optimizer, "lr": [0.1], "weight_decay": 0.0, "tpu": False}
        weights = [nn.Parameter(torch.ones(2)) for _ in GRADIENTS]
        made = AMPOptimizer.build_optimizer(Namespace(common=common, optimizer=OmegaConf.create(options)), weights[:1])
        made.optimizer.add_param_group({"params": weights[1:]})
        received: list[list[Tensor]] = []
        take_step = made.optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            received.append([weight.grad.clone() for weight in weights if weight.grad is not None])
            return take_step(*args, **kwargs)

        made.optimizer.step = step
        return made, weights, received

    return make


def update(made: AMPOptimizer, weights: list[nn.Parameter], clip_norm: float = 0.0, factor: float = 1.0) -> float:
    """Do what fairseq's trainer does with a loss whose gradients are GRADIENTS times a factor, in two steps."""
    made.zero_grad()
    for _ in range(2):
        loss = sum((weight * gradient * factor).sum() for weight, gradient in zip(weights, GRADIENTS, strict=True))
        made.backward(loss)
    made.multiply_grads(0.5)
    norm = made.clip_grad_norm(clip_norm)
    made.step()
    return float(norm)


@OPTIMIZERS
@pytest.mark.parametrize("clip_norm", [0.0, 6.5e-4, 1.0])
def test_gradients_are_divided_by_the_loss_scale_once(
    scaler: None, amp: Callable[..., Any], optimizer: str, clip_norm: float
) -> None:
    made, weights, received = amp(optimizer)
    norm = 1.3e-3  # of 3e-4, -4e-4 and 1.2e-3
    kept = min(1, (clip_norm or 1) / norm)
    for _ in range(3):
        assert update(made, weights, clip_norm) == pytest.approx(norm, rel=1e-5)
        for gradient, expected in zip(received[-1], GRADIENTS, strict=True):
            torch.testing.assert_close(gradient, expected * kept, rtol=2e-3, atol=0)
    assert len(received) == 3
    assert made.scaler.get_scale() == SCALE


@OPTIMIZERS
def test_an_overflow_skips_the_step_and_lowers_the_scale(scaler: None, amp: Callable[..., Any], optimizer: str) -> None:
    made, weights, received = amp(optimizer)
    other, expected, _ = amp(optimizer)
    for _ in range(2):
        update(other, expected)
    update(made, weights)
    before = [weight.detach().clone() for weight in weights]
    for number, factor in enumerate((float("inf"), float("nan"), 1e37), start=1):
        assert not torch.isfinite(torch.tensor(update(made, weights, clip_norm=1.0, factor=factor)))
        assert made.scaler.get_scale() == SCALE / 2**number
        assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    update(made, weights)
    assert len(received) == 2
    for weight, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight, wanted)


def test_the_smallest_loss_scale_ends_the_training(scaler: None, amp: Callable[..., Any]) -> None:
    made, weights, _ = amp(min_loss_scale=SCALE / 4)
    update(made, weights, factor=float("inf"))
    with pytest.raises(FloatingPointError, match=r"minimum loss scale is reached \(16384"):
        update(made, weights, factor=float("inf"))


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler is enabled")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the scaler works on a GPU")
def test_without_a_scaler_a_gradient_that_is_not_finite_is_an_error(amp: Callable[..., Any]) -> None:
    made, weights, received = amp()
    assert update(made, weights) == pytest.approx(1.3e-3, rel=1e-5)
    with pytest.raises(FloatingPointError, match="gradients are Nan/Inf"):
        update(made, weights, factor=float("nan"))
    assert len(received) == 1


@pytest.fixture
def short(options: list[object], tmp_path: Path) -> list[object]:
    """Give options of a short training with --amp, in which two batches make an update."""
    options += ["--amp", "--batch-size", 3, "--update-freq", 2, "--num-workers", 0, "--max-update", 3]
    return [*options, "--save-dir", tmp_path, "--no-save", "--disable-validation"]


@pytest.mark.integration
@pytest.mark.parametrize("optimizer", ["adam", "fused_adam"])
@pytest.mark.parametrize("exponent", [16, 126])
def test_the_loss_scale_changes_no_loss(
    short: list[object],
    train: Callable[..., Losses],
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    exponent: int,
) -> None:
    """Powers of two round nothing; those too large overflow, and then the same batches are tried again."""
    short += ["--optimizer", optimizer]
    with monkeypatch.context() as disabled:
        disabled.setattr(torch.cuda.amp, "GradScaler", functools.partial(torch.amp.GradScaler, "cpu", enabled=False))
        expected = train(*short)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**exponent)
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda **_: scaler)
    assert train(*short, "--amp-batch-retries", 100) == expected
    assert scaler.get_scale() == 2**exponent if exponent == 16 else scaler.get_scale() < 2.0**exponent
    assert len(expected) == 3


@pytest.mark.filterwarnings("ignore:torch.cuda.amp.GradScaler is enabled")
def test_a_training_without_a_scaler_ends_with_the_first_nan(short: list[object], train: Callable[..., Losses]) -> None:
    with pytest.raises(FloatingPointError, match="gradients are Nan/Inf"):
        train(*short, "--lr", 1e30)
