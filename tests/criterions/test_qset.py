"""Query-CTC over sets, on a model of one matrix."""

import itertools
from argparse import ArgumentParser
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.criterions import CRITERION_REGISTRY
from torch import nn

from criterions.qset import QuerySetConfig, QuerySetCriterion, shuffled
from narvl_plugin.ctc import query_ctc_any_loss, query_ctc_loss
from narvl_plugin.errors import InputError
from narvl_plugin.tasks.common import CommonTask

MakeBatch = Callable[..., dict[str, Any]]
BLANK = 10
SETS = ["a b c d", "e f", "", "a a b c", "c d"]
"""Words come in pairs."""


def pairs(tokens: list[int]) -> list[tuple[int, ...]]:
    return list(zip(tokens[::2], tokens[1::2], strict=True))


@pytest.fixture
def task(task: SimpleNamespace) -> SimpleNamespace:
    task.elements = pairs
    task.acceptor = partial(CommonTask.acceptor, task)
    task.in_random_order = partial(CommonTask.in_random_order, task)
    return task


def build(task: SimpleNamespace, **options: Any) -> QuerySetCriterion:
    return QuerySetCriterion.build_criterion(QuerySetConfig(**{"sentence_avg": False, **options}), task)


def orders(target: list[int]) -> list[list[int]]:
    found = itertools.permutations(pairs(target))
    return sorted({tuple(itertools.chain(*order)) for order in found})


def losses_by_order(model: nn.Module, batch: dict[str, Any]) -> list[torch.Tensor]:
    """Return for each sample the losses of all orders of its elements that fit."""
    logits, _ = model(**batch["net_input"])
    found = []
    for row, target in zip(logits, batch["target"], strict=True):
        words = [token for token in target.tolist() if token > 3]
        said = [order for order in orders(words) if len(order) + sum(map(int.__eq__, order, order[1:])) <= len(row)]
        found.append(
            torch.stack(
                [
                    query_ctc_loss(row[None], torch.tensor([order]).long(), torch.tensor([len(order)]), blank=BLANK)
                    for order in said
                ]
            )
        )
    return found


def test_options_on_the_command_line() -> None:
    parser = ArgumentParser()
    CRITERION_REGISTRY["qset"].add_args(parser)
    own = {"order": "all", "window": 0, "score_weight": 0.0}
    assert vars(parser.parse_args([])) == {"keep_eos": False, "label_smoothing": 0.0, **own}
    assert parser.parse_args(["--order", "best", "--window", "3"]).order == "best"


@pytest.mark.parametrize("order", ["all", "given", "random", "best"])
def test_the_loss_of_each_order(order: str, model: nn.Module, task: SimpleNamespace, make_batch: MakeBatch) -> None:
    batch = make_batch(SETS)
    criterion = build(task, order=order)
    losses, sample_size, log = criterion(model, batch, reduce=False)
    by_order = losses_by_order(model, batch)
    assert sample_size == log["ntokens"] == 12
    for loss, of_orders in zip(losses, by_order, strict=True):
        if order == "all":
            torch.testing.assert_close(loss, -(-of_orders).logsumexp(0))
        elif order in ("best", "random"):
            assert any(torch.isclose(loss, one) for one in of_orders)
    if order == "given":
        logits, _ = model(**batch["net_input"])
        targets = batch["target"]
        lengths = (targets > 3).sum(1)
        torch.testing.assert_close(losses, query_ctc_loss(logits, targets, lengths, blank=BLANK, reduction="none"))
    losses.sum().backward()
    assert model.project.weight.grad.isfinite().all() and model.project.weight.grad.ne(0).any()


def test_the_best_order_is_that_of_the_best_path(
    model: nn.Module, task: SimpleNamespace, make_batch: MakeBatch
) -> None:
    batch = make_batch(["a b c d"])
    with torch.no_grad():
        logits = model(**batch["net_input"])[0]
        logits[0, :4] = 0.0
        for query, label in enumerate([6, 7, 4, 5]):  # c d a b
            logits[0, query, label] = 9.0
            logits[0, 4:, BLANK] = 9.0
    fixed = lambda **_: (logits, {})  # noqa: E731
    fixed.blank = BLANK  # type: ignore[attr-defined]
    loss, *_ = build(task, order="best")(fixed, batch)
    expected = query_ctc_loss(logits, torch.tensor([[6, 7, 4, 5]]), torch.tensor([4]), blank=BLANK)
    torch.testing.assert_close(loss, expected)


def test_validation_sums_over_all_orders(model: nn.Module, task: SimpleNamespace, make_batch: MakeBatch) -> None:
    batch = make_batch(SETS)
    expected, *_ = build(task)(model, batch)
    for order in ("given", "random", "best"):
        loss, *_ = build(task, order=order).eval()(model, batch)
        torch.testing.assert_close(loss, expected)


def test_random_orders_follow_torchs_seed_and_fit(task: SimpleNamespace) -> None:
    target = [4, 5, 5, 6, 6, 4]
    torch.manual_seed(0)
    drawn = [tuple(shuffled(task, target, 9)) for _ in range(60)]
    assert set(drawn) == set(map(tuple, orders(target)))
    torch.manual_seed(0)
    assert drawn == [tuple(shuffled(task, target, 9)) for _ in range(60)]
    # In the given order, equal tokens adjoin twice and eight queries are needed; with six, no other order is taken.
    fitting = {tuple(shuffled(task, [4, 5, 6, 4, 5, 6], 6)) for _ in range(60)}
    assert tuple(target) not in fitting and len(fitting) > 1


def test_a_window_leaves_orders_out(model: nn.Module, task: SimpleNamespace, make_batch: MakeBatch) -> None:
    batch = make_batch(["a b c d e f"])
    losses = [build(task, window=window)(model, batch)[0].item() for window in (1, 2, 3, 0)]
    assert losses[0] > losses[1] > losses[2] == pytest.approx(losses[3])


def test_score_weight_adds_what_the_expected_score_lacks(
    model: nn.Module, task: SimpleNamespace, make_batch: MakeBatch
) -> None:
    """If all outputs have one score, it is known, and has no gradient. A higher score of some words has one."""
    batch = make_batch(SETS)
    task.output_scores = lambda outputs, lengths, targets, target_lengths: torch.full(lengths.shape, 0.25)
    gradients = []
    for weight in (0.0, 3.0):
        losses, *_ = build(task, score_weight=weight)(model, batch, reduce=False)
        model.zero_grad()
        losses.sum().backward()
        gradients.append((losses.detach(), model.project.weight.grad.clone()))
    (without, plain), (losses, same) = gradients
    torch.testing.assert_close(losses, without + 3 * 0.75)
    torch.testing.assert_close(same, plain)

    task.output_scores = lambda outputs, lengths, targets, target_lengths: (outputs == 4).any(2).float()
    model.zero_grad()
    build(task, score_weight=3.0)(model, batch)[0].backward()
    assert not torch.allclose(model.project.weight.grad, plain)


def test_targets_that_do_not_fit_and_options_that_cannot_be(
    model: nn.Module, task: SimpleNamespace, make_batch: MakeBatch
) -> None:
    batch = make_batch(["a b c d e f a b", "a b"])
    loss, sample_size, log = build(task)(model, batch)
    assert sample_size == 2 and log["did_not_fit"] == 1 and loss.isfinite()
    cases = (
        ({"window": -1}, "--window -1"),
        ({"score_weight": -1.0}, "--score-weight -1"),
        ({"keep_eos": True}, "element"),
    )
    for options, complaint in cases:
        with pytest.raises(ValueError, match=complaint):
            build(task, **options)
    sequences = SimpleNamespace(cfg=SimpleNamespace(_name="caption"))
    with pytest.raises(InputError, match="the targets of the task caption are sequences"):
        CommonTask.elements(sequences, [4])  # type: ignore[arg-type]


def test_no_row_has_no_loss(model: nn.Module, task: SimpleNamespace) -> None:
    criterion = build(task, order="given")
    logits = torch.zeros(0, 6, 11)
    nothing = torch.zeros(0, 1, 0, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.int64)
    assert criterion.losses_over_references(logits, *nothing, blank=BLANK).shape == (0,)
    assert query_ctc_any_loss(logits, *nothing, blank=BLANK).shape == (0,)
