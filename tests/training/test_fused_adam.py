"""The fused optimizer moves weights as fairseq's does."""

from __future__ import annotations

import torch
from fairseq.optim import FairseqOptimizer, build_optimizer
from omegaconf import OmegaConf
from torch import nn

import narvl_plugin  # noqa: F401  # registers the optimizer


def make(name: str, weights: list[nn.Parameter]) -> FairseqOptimizer:
    options = {"adam_betas": "(0.9, 0.99)", "adam_eps": 1e-3, "weight_decay": 0.1, "lr": [0.1], "tpu": False}
    return build_optimizer(
        OmegaConf.create({"_name": name, "use_old_adam": True, "fp16_adam_stats": False, **options}), weights
    )


def weights() -> list[nn.Parameter]:
    torch.manual_seed(1)
    return [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2))]


def update(optimizer: FairseqOptimizer, parameters: list[nn.Parameter], number: int) -> None:
    """Update by gradients some of which are as small as epsilon; the last weight never has one."""
    torch.manual_seed(number)
    optimizer.set_lr(0.1 / number)
    for parameter in parameters[:-1]:
        parameter.grad = torch.randn_like(parameter) * torch.logspace(-6, 0, parameter.shape[-1])
    optimizer.step()


def test_weights_are_those_of_fairseqs_adam() -> None:
    ours, theirs = weights(), weights()
    fused, plain = make("fused_adam", ours), make("adam", theirs)
    for number in range(1, 6):
        update(fused, ours, number)
        update(plain, theirs, number)
        torch.testing.assert_close(ours, theirs)


def test_a_resumed_training_goes_on_bit_by_bit() -> None:
    whole, parts = weights(), weights()
    optimizer, first = make("fused_adam", whole), make("fused_adam", parts)
    for number in (1, 2):
        update(optimizer, whole, number)
        update(first, parts, number)
    second = make("fused_adam", parts)
    second.load_state_dict(first.state_dict(), second.optimizer_config)
    for number in (3, 4):
        update(optimizer, whole, number)
        update(second, parts, number)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(parts, whole, strict=True))
