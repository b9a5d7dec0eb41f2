"""The teacher's loss by hand, with and without weights and lists of allowed labels."""

from collections.abc import Callable
from math import log
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.data import Dictionary
from torch import Tensor, nn

from criterions import AdjustLabelSmoothedCrossEntropyCriterion

PAD, NUM_LABELS = 1, 5
TARGET = torch.tensor([[3, 2], [4, PAD]])


class Fixed(nn.Module):
    """A model that always gives the same logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **net_input: Any) -> tuple[Tensor, dict[str, Any]]:
        return self.logits, {}

    def get_normalized_probs(self, net_output: tuple[Tensor, Any], log_probs: bool) -> Tensor:
        return net_output[0].log_softmax(-1)

    def get_targets(self, sample: dict[str, Any], net_output: object) -> Tensor:
        return sample["target"]


@pytest.fixture
def make() -> Callable[..., AdjustLabelSmoothedCrossEntropyCriterion]:
    task: Any = SimpleNamespace(target_dictionary=Dictionary())
    return lambda smoothing, sentence_avg=False: AdjustLabelSmoothedCrossEntropyCriterion(task, sentence_avg, smoothing)


@pytest.fixture
def model() -> Fixed:
    """A model whose logits are logarithms of 1 to 5, so that label k has (k + 1) / 15; and random on padding."""
    logits = torch.arange(1.0, NUM_LABELS + 1).log().repeat(2, 2, 1)
    logits[1, 1] = torch.randn(NUM_LABELS)
    return Fixed(logits)


def sample(**more: Any) -> dict[str, Any]:
    return {"net_input": {}, "target": TARGET, "ntokens": 3} | more


def test_plain(make: Callable[..., Any], model: Fixed) -> None:
    loss, sample_size, logged = make(0.0)(model, sample())
    assert float(loss) == pytest.approx(-log(4 / 15) - log(3 / 15) - log(5 / 15))
    assert (sample_size, logged["ntokens"], logged["nsentences"]) == (3, 3, 2)
    assert make(0.0, sentence_avg=True)(model, sample())[1] == 2


def test_smoothing_is_fairseqs(make: Callable[..., Any], model: Fixed) -> None:
    task: Any = SimpleNamespace(target_dictionary=Dictionary())
    expected = LabelSmoothedCrossEntropyCriterion(task, False, 0.1)(model, sample())
    found = make(0.1)(model, sample())
    assert float(found[0]) == pytest.approx(float(expected[0]))
    assert float(found[2]["nll_loss"]) == pytest.approx(float(expected[2]["nll_loss"]))


def test_samples_are_weighted(make: Callable[..., Any], model: Fixed) -> None:
    loss, sample_size, logged = make(0.0)(model, sample(conf=torch.tensor([0.5, 0.25])))
    expected = 0.5 * (-log(4 / 15) - log(3 / 15)) + 0.25 * -log(5 / 15)
    assert float(loss) == pytest.approx(expected)
    assert float(logged["nll_loss"]) == pytest.approx(expected)
    assert sample_size == 3


def test_only_allowed_labels_count(make: Callable[..., Any], model: Fixed) -> None:
    masks = torch.zeros(2, 2, NUM_LABELS, dtype=torch.bool)
    masks[0, 0, [3, 0]] = True  # 4 and 1 of 5
    masks[0, 1, 2] = True  # only the right one
    masks[1, 0, [4, 3, 2]] = True  # 5, 4 and 3 of 12; nothing is allowed on padding
    loss, _, logged = make(0.2)(model, sample(constraint_masks=masks))
    assert float(logged["nll_loss"]) == pytest.approx(-log(4 / 5) - log(5 / 12))
    # A fifth is shared by the others: by one, by none, by two.
    expected = -0.8 * log(4 / 5) - 0.2 * log(1 / 5) - 0.8 * log(5 / 12) - 0.1 * log(4 / 12) - 0.1 * log(3 / 12)
    assert float(loss) == pytest.approx(expected)


def test_what_is_not_allowed_has_no_gradient(make: Callable[..., Any], model: Fixed) -> None:
    model.logits.requires_grad_()
    masks = torch.zeros(2, 2, NUM_LABELS, dtype=torch.bool)
    masks[0, 0, [3, 0]] = masks[0, 1, 2] = masks[1, 0, [4, 3]] = True
    make(0.1)(model, sample(constraint_masks=masks))[0].backward()
    assert model.logits.grad.isfinite().all()
    assert torch.equal(model.logits.grad.ne(0).nonzero(), torch.tensor([[0, 0, 0], [0, 0, 3], [1, 0, 3], [1, 0, 4]]))


def test_losses_of_tokens_add_up(make: Callable[..., Any], model: Fixed) -> None:
    each, whole = make(0.1)(model, sample(), reduce=False)[0], make(0.1)(model, sample())[0]
    assert each.shape == (4,)
    assert each[3] == 0  # padding
    assert float(each.sum()) == pytest.approx(float(whole))
