"""Soft targets of an averaged model: what --average-weight adds to a student's loss."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from criterions import QueryCtcCriterion
from criterions.qctc import QueryCtcConfig

MakeBatch = Callable[..., dict[str, Any]]


@pytest.fixture
def build(task: SimpleNamespace) -> Callable[..., QueryCtcCriterion]:
    """A criterion with default options but those given."""
    return lambda **options: QueryCtcCriterion.build_criterion(QueryCtcConfig(sentence_avg=False, **options), task)


def test_the_divergence_from_the_soft_targets_is_added(
    build: Callable[..., QueryCtcCriterion], model: nn.Module, make_batch: MakeBatch
) -> None:
    """Of each sample that fits, with its weight; and the gradient is that of the student's logits alone."""
    batch = make_batch(["a b", "a b c d e f a", "c c"]) | {"conf": torch.tensor([0.5, 9.0, 2.0])}
    soft = torch.randn(3, 6, 11, requires_grad=True)
    logits = model(**batch["net_input"])[0]
    p, q = soft.detach().softmax(2), logits.softmax(2)
    between = (p * (p / q).log()).sum((1, 2)) * batch["conf"]
    plain, plain_size, plain_log = build()(model, batch, reduce=False)
    losses, sample_size, log = build(average_weight=3.0)(model, batch | {"soft_logits": soft}, reduce=False)
    torch.testing.assert_close(losses, plain + 3.0 * between[[0, 2]])
    assert sample_size == plain_size and torch.equal(log["nll_loss"], plain_log["nll_loss"])
    torch.testing.assert_close(log["loss"], losses.detach().sum())
    of_logits = torch.autograd.grad((losses - plain).sum(), model.project.weight, retain_graph=True)[0]
    expected = torch.autograd.grad(
        (logits * 3.0 * (q - p).detach() * batch["conf"][:, None, None])[[0, 2]].sum(), model.project.weight
    )[0]
    torch.testing.assert_close(of_logits, expected)
    losses.sum().backward()
    assert soft.grad is None


def test_equal_weights_add_nothing(
    build: Callable[..., QueryCtcCriterion], model: nn.Module, make_batch: MakeBatch
) -> None:
    batch = make_batch(["a b", "c c"])
    expected, *_ = build()(model, batch)
    loss, *_ = build(average_weight=50.0)(model, batch | {"soft_logits": model(**batch["net_input"])[0]})
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("training", [True, False])
def test_validation_and_weight_0_take_no_soft_targets(
    training: bool, build: Callable[..., QueryCtcCriterion], model: nn.Module, make_batch: MakeBatch
) -> None:
    batch = make_batch(["a b", "c c"])
    criterion = build(average_weight=0.0 if training else 2.0).train(training)
    expected, _, expected_log = build().train(training)(model, batch)
    for more in ({}, {"soft_logits": torch.randn(2, 6, 11)}):
        loss, _, log = criterion(model, batch | more)
        assert torch.equal(loss, expected) and log == expected_log


def test_what_cannot_be_is_refused(
    build: Callable[..., QueryCtcCriterion], model: nn.Module, make_batch: MakeBatch
) -> None:
    with pytest.raises(ValueError, match="--average-weight -1.0 must not be negative"):
        build(average_weight=-1.0)
    with pytest.raises(ValueError, match="--average-weight 2.0: needs the averaged model; give --store-ema"):
        build(average_weight=2.0)(model, make_batch(["a"]))
