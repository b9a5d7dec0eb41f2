"""--glancing: a second pass of a small student's decoder reads some labels of the target, in training alone."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.logging import metrics
from torch import Tensor, nn

from criterions import QueryCtcCriterion, qctc
from criterions.qctc import QueryCtcConfig
from narvl_plugin.errors import SkipBudget
from narvl_plugin.models.registered import build

BLANK = 10
MakeBatch = Callable[..., dict[str, Any]]
SMALL = {
    **{"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 32, "encoder_attention_heads": 2, "num_queries": 6},
    **{"encoder_layers": 1, "decoder_layers": 2, "vision_trunk": "test_resnet", "freeze_resnet": True},
}


def student(**options: Any) -> nn.Module:
    """A student of 11 labels, the same every time."""
    torch.manual_seed(3)
    return build("narvl_tiny", vocab_size=BLANK + 1, **SMALL | {"dropout": 0.0} | options).train()


def criterion(task: SimpleNamespace, **options: Any) -> QueryCtcCriterion:
    """The criterion made the way fairseq makes it, at the start of a training."""
    task.progress = 0.0
    made: QueryCtcCriterion = QueryCtcCriterion.build_criterion(
        QueryCtcConfig(**{"sentence_avg": False, **options}), task
    )
    return made


@pytest.fixture
def batch(make_batch: MakeBatch) -> dict[str, Any]:
    """Three captions, with prompts in place of the features."""
    return make_batch(["a b c", "d", "e e"]) | {"net_input": {"src_tokens": torch.tensor([[4, 5], [6, 7], [8, 9]])}}


def inputs_of_passes(model: nn.Module, run: Callable[[], Any]) -> list[Tensor]:
    """The input (B, N, D) of the decoder's first layer in each pass."""
    seen: list[Tensor] = []
    hook = model.decoder.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    run()
    hook.remove()
    return seen


@pytest.mark.parametrize("query_input", ["learned", "positions", "source"])
def test_the_input_of_exactly_the_revealed_queries_changes(
    query_input: str, task: SimpleNamespace, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student gets all queries wrong, so with a ratio of 1 all labels of all targets are revealed."""
    glances = []
    monkeypatch.setattr(
        qctc, "glance", lambda *a, original=qctc.glance, **k: glances.append(original(*a, **k)) or glances[-1]
    )
    model = student(query_input=query_input)
    always_f = nn.functional.one_hot(torch.tensor(9), BLANK + 1) * 100.0
    model.decoder.output_projection.register_forward_hook(lambda _, __, logits: logits + always_f)
    encoded = []
    model.encoder.register_forward_hook(lambda *_: encoded.append(1))
    first, second = inputs_of_passes(model, lambda: criterion(task, glancing=1.0)(model, batch))
    labels = glances[0]
    for row, words in enumerate([{4, 5, 6}, {7}, {8}]):
        assert set(labels[row].tolist()) - {BLANK} == words
    assert torch.equal((first != second).any(2), labels != BLANK)
    embedded = model.decoder.layernorm_embedding(model.decoder.embed_tokens(labels))
    torch.testing.assert_close(second - first, embedded * (labels != BLANK)[..., None])
    assert len(encoded) == 1


def test_without_the_option_there_is_one_pass(task: SimpleNamespace, batch: dict[str, Any]) -> None:
    """The loss is that of a criterion that knows no such option, to the bit, with dropout."""
    model = student(dropout=0.1)
    off, plain = criterion(task, glancing=0.0), QueryCtcCriterion(task, False, False, 0.0)
    assert len(inputs_of_passes(model, lambda: off(model, batch))) == 1
    losses = []
    for each in (off, plain):
        torch.manual_seed(1)
        losses.append(each(model, batch)[0])
    assert torch.equal(*losses)


def test_a_pass_in_which_nothing_is_revealed_changes_nothing(batch: dict[str, Any]) -> None:
    model = student()
    plain, _ = model(**batch["net_input"])
    seen: list[Tensor] = []

    def nothing(logits: Tensor) -> Tensor:
        seen.append(logits)
        return torch.full(logits.shape[:2], BLANK)

    second, _ = model(**batch["net_input"], glance=nothing)
    assert torch.equal(plain, second)
    torch.testing.assert_close(plain, seen[0])
    assert second.requires_grad
    assert not seen[0].requires_grad


def test_validation_reveals_nothing(task: SimpleNamespace, batch: dict[str, Any]) -> None:
    model = student(dropout=0.1).eval()
    glancing, plain = criterion(task, glancing=1.0).eval(), criterion(task).eval()
    loss, _, log = glancing(model, batch)
    assert torch.equal(loss, plain(model, batch)[0])
    assert "revealed" not in log


@pytest.mark.parametrize("amp", [False, True])
def test_all_weights_have_the_gradient_of_the_second_pass(
    amp: bool, task: SimpleNamespace, batch: dict[str, Any]
) -> None:
    """Also where older versions of torch would use the weights that autocast has converted without a gradient."""

    def gradients(**options: Any) -> dict[str, Tensor]:
        model = student()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss, _, log = criterion(task, **options)(model, batch)
        loss.backward()
        assert bool(options) == (log.get("revealed", 0) > 0)
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    plain, glancing = gradients(), gradients(glancing=1.0)
    assert plain.keys() == glancing.keys()
    assert len(plain) > 50
    without = [name for name, gradient in glancing.items() if not gradient.any() and plain[name].any()]
    assert not without
    name = "decoder.layers.1.fc1.weight"
    assert not torch.allclose(plain[name], glancing[name])


def test_queries_of_a_member(task: SimpleNamespace, batch: dict[str, Any]) -> None:
    """A mixture's batch names its member; only that member's queries are read, in both passes."""
    model = student(member_queries="one:2,two:4")
    batch["net_input"]["queries"] = "two"
    first, second = inputs_of_passes(model, lambda: criterion(task, glancing=1.0)(model, batch))
    assert first.shape == second.shape == (3, 4, 16)


def test_samples_that_do_not_fit_are_not_revealed_anything(task: SimpleNamespace, make_batch: MakeBatch) -> None:
    task.skip_budget = SkipBudget(1)
    model = student()
    prompts = {"net_input": {"src_tokens": torch.tensor([[4, 5], [6, 7]])}}
    both = make_batch(["a b c d e f a", "a b"]) | prompts
    first, second = inputs_of_passes(model, lambda: criterion(task, glancing=1.0)(model, both))
    assert (first != second).any(2).any(1).tolist() == [False, True]
    log = criterion(task, glancing=1.0)(model, both)[2]
    assert (log["did_not_fit"], log["nsentences"], log["queries"]) == (1, 1, 6)


@pytest.mark.parametrize("glancing", [-0.1, 1.1, float("nan")])
def test_ratio_out_of_range_is_refused(glancing: float, task: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="--glancing"):
        criterion(task, glancing=glancing)


def test_share_of_revealed_queries_is_logged(task: SimpleNamespace, batch: dict[str, Any]) -> None:
    made, model = criterion(task, glancing=1.0), student()
    first, second = inputs_of_passes(model, lambda: made(model, batch))
    logs = [made(model, batch)[2]] * 2
    with metrics.aggregate() as meters:
        QueryCtcCriterion.reduce_metrics(logs)
    share = float((first != second).any(2).float().mean())
    assert share > 0
    assert meters.get_smoothed_values()["revealed"] == pytest.approx(share, abs=1e-3)


@pytest.mark.integration
def test_ratio_falls_over_a_training(make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Four updates of a real training: 0.5, and a fifth of it after the last."""
    ratios = []
    monkeypatch.setattr(
        qctc, "glance", lambda *a, original=qctc.glance, **k: ratios.append(k["ratio"]) or original(*a, **k)
    )
    make_model("narvl_tiny", "qctc", "--num-queries", 30, "--glancing", 0.5, updates=4)
    assert ratios == pytest.approx([0.5, 0.4, 0.3, 0.2])
