"""Consistency of two views: what a view is, and what the loss of two of them adds."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from criterions import QueryCtcCriterion
from criterions.qctc import QueryCtcConfig
from criterions.views import ERASED, two_views

MakeBatch = Callable[..., dict[str, Any]]
CAPTIONS = ["a b c", "b b"]


class Noisy(nn.Module):
    """A model whose features have dropout, so that two views differ."""

    def __init__(self, model: nn.Module, dropout: float = 0.5) -> None:
        super().__init__()
        self.model, self.dropout, self.blank = model, nn.Dropout(dropout), model.blank

    def forward(self, features: Tensor) -> Any:
        return self.model(self.dropout(features))


class Given(nn.Module):
    """A model with given logits (B, N, V)."""

    blank = 10

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, features: Tensor) -> tuple[Tensor, dict[str, Any]]:
        assert len(features) == len(self.logits)
        return self.logits, {}


@pytest.fixture
def build(task: SimpleNamespace) -> Callable[..., QueryCtcCriterion]:
    """A criterion with default options but those given."""
    return lambda **options: QueryCtcCriterion.build_criterion(QueryCtcConfig(sentence_avg=False, **options), task)


def logits_of_views(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    first, second = model(**two_views(batch)["net_input"])[0].chunk(2)
    assert not torch.equal(first, second)
    return first, second


def test_the_loss_is_the_mean_of_both_views_and_their_divergence(
    build: Callable[..., QueryCtcCriterion], model: nn.Module, make_batch: MakeBatch
) -> None:
    noisy, batch = Noisy(model), make_batch(CAPTIONS)
    views = logits_of_views(noisy, batch)
    p, q = (logits.softmax(2) for logits in views)
    between = ((p * (p / q).log()).sum((1, 2)) + (q * (q / p).log()).sum((1, 2))) / 2
    plain = [build()(Given(logits), batch, reduce=False)[0] for logits in views]
    torch.manual_seed(3)
    losses, sample_size, log = build(consistency=0.7)(noisy, batch, reduce=False)
    torch.testing.assert_close(losses, (plain[0] + plain[1]) / 2 + 0.7 * between)
    assert (sample_size, log["ntokens"], log["nsentences"], log["did_not_fit"]) == (5, 5, 2, 0)
    torch.testing.assert_close(log["loss"], losses.detach().sum())
    torch.testing.assert_close(log["nll_loss"], (plain[0] + plain[1]).detach().sum() / 2)


def test_each_view_is_a_fixed_target_of_the_other(
    build: Callable[..., QueryCtcCriterion], make_batch: MakeBatch
) -> None:
    """The gradient of the divergence from a fixed target is the difference of the probabilities."""
    batch = make_batch(CAPTIONS)
    given = Given(torch.randn(4, 6, 11))
    gradients = []
    for weight in (1e-30, 3.0):
        given.zero_grad()
        build(consistency=weight)(given, batch)[0].backward()
        gradients.append(given.logits.grad.clone())
    first, second = given.logits.detach().softmax(2).chunk(2)
    expected = 3.0 / 2 * torch.cat([first - second, second - first])
    torch.testing.assert_close(gradients[1] - gradients[0], expected, rtol=1e-4, atol=1e-5)


def test_equal_views_add_nothing(
    build: Callable[..., QueryCtcCriterion], model: nn.Module, make_batch: MakeBatch
) -> None:
    """Without dropout and images. Several targets, weights and samples that do not fit count as without views."""
    batch = make_batch(["a b", "a b c d e f a", "c c"])
    others = make_batch(["d", "a a a a a a a", "e"])["target"]
    batch |= {"conf": torch.tensor([0.5, 9.0, 2.0]), "alternatives": torch.stack([batch["target"], others], 1)}
    plain, seen = build(bigram_weight=2.0), build(bigram_weight=2.0, consistency=50.0)
    expected, expected_size, expected_log = plain(model, batch)
    expected.backward()
    gradient = model.project.weight.grad.clone()
    model.zero_grad()
    loss, sample_size, log = seen(model, batch)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.project.weight.grad, gradient)
    assert sample_size == expected_size and plain.task.skip_budget.count == log["did_not_fit"] == 1
    shares = [float(each["blanks"] / each["queries"]) for each in (log, expected_log)]
    assert shares[0] == shares[1]
    same = ("loss", "nll_loss", "ntokens", "nsentences", "sample_size", "did_not_fit")
    assert {key: float(log[key]) for key in same} == pytest.approx({key: float(expected_log[key]) for key in same})


def test_nothing_fits(build: Callable[..., QueryCtcCriterion], model: nn.Module, make_batch: MakeBatch) -> None:
    loss, sample_size, log = build(consistency=0.2)(model, make_batch(["a b c d e f a"]))
    loss.backward()
    assert loss.item() == sample_size == 0 and log["did_not_fit"] == 1


def test_weights_multiply_the_divergence_too(
    build: Callable[..., QueryCtcCriterion], model: nn.Module, make_batch: MakeBatch
) -> None:
    noisy, batch = Noisy(model), make_batch(CAPTIONS)
    criterion, conf = build(consistency=0.7), torch.tensor([0.5, 3.0])
    torch.manual_seed(3)
    plain, *_ = criterion(noisy, batch, reduce=False)
    torch.manual_seed(3)
    weighted, *_ = criterion(noisy, batch | {"conf": conf}, reduce=False)
    torch.testing.assert_close(weighted, plain * conf)


@pytest.mark.parametrize("training", [True, False])
def test_validation_and_weight_0_see_the_batch_itself(
    training: bool, build: Callable[..., QueryCtcCriterion], model: nn.Module, make_batch: MakeBatch
) -> None:
    batch = make_batch(CAPTIONS)
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, __, given: seen.append(given["features"]), with_kwargs=True)
    criterion = build(consistency=0.0 if training else 0.2).train(training)
    loss, _, log = criterion(model, batch)
    assert len(seen) == 1 and seen[0] is batch["net_input"]["features"]
    expected, _, expected_log = build().train(training)(model, batch)
    assert torch.equal(loss, expected) and log == expected_log


def test_a_negative_weight_is_refused(build: Callable[..., QueryCtcCriterion]) -> None:
    with pytest.raises(ValueError, match="--consistency -0.2 must not be negative"):
        build(consistency=-0.2)


@pytest.mark.parametrize(("shape", "patches"), [((3, 64, 96), 24), ((3, 60, 96), 24), ((80, 6, 4), 24)])
def test_each_view_shows_other_patches(shape: tuple[int, ...], patches: int) -> None:
    torch.manual_seed(1)
    masks = torch.ones(400, dtype=torch.bool)
    masks[7] = False
    inputs = {"patch_images": torch.zeros(400, *shape), "patch_masks": masks, "queries": "caption", "padded": ~masks}
    sample = {"net_input": inputs | {"padded": (~masks).numpy()}, "where": ["a:1"] * 400, "id": np.arange(400)}
    views = two_views(sample)
    first, second = views["net_input"]["patch_masks"].chunk(2)
    assert first.shape == second.shape == (400, patches)
    assert not first[7].any() and not second[7].any()
    for shown in (first, second):
        assert float(shown[8:].float().mean()) == pytest.approx(1 - ERASED, abs=0.02)
    both = float((first | second)[8:].logical_not().float().mean())
    assert both == pytest.approx(ERASED**2, abs=0.01)  # of independent views
    assert views["net_input"]["padded"].all() and len(views["net_input"]["padded"]) == 800
    assert views["net_input"]["queries"] == "caption" and len(views["where"]) == len(views["id"]) == 800
    assert inputs["patch_masks"] is masks  # of the batch
