"""A training that would go on with another model than it began with is refused, in one line with both values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from narvl_plugin.errors import InputError
from narvl_plugin.models.interop import EMBEDDING
from narvl_plugin.training.resuming import check_resumed

STUDENT = {"_name": "narvl_tiny", "num_queries": 20, "encoder_layers": 4, "freeze_embedding": False, "dropout": 0.1}
STUDENT |= {"vocabulary": "0f"}
CFG = {
    "model": STUDENT,
    **{"criterion": {"_name": "qctc"}, "optimizer": {"_name": "adam"}, "lr_scheduler": {"_name": "fixed"}},
}
STATE = {"model": {EMBEDDING: torch.zeros(2, 2)}, "cfg": CFG, "last_optimizer_state": {"state": {}}}


def changed(**parts: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a training with other options."""
    return CFG | {name: {**CFG[name], **options} for name, options in parts.items()}


@pytest.mark.parametrize(
    ("now", "difference"),
    [
        ({"model": {"num_queries": 30}}, "--num-queries 20, now 30"),
        ({"model": {"num_queries": 6}}, "--num-queries 20, now 6"),
        ({"model": {"_name": "narvl_base", "encoder_layers": 6}}, r"--encoder-layers 4, now 6 \(--arch narvl_tiny, "),
        ({"model": {"_name": "ofa_tiny"}}, "--arch narvl_tiny, now ofa_tiny"),
        ({"model": {"freeze_embedding": True}}, "--freeze-embedding False, now True"),
        ({"model": {"member_queries": "caption:20"}}, "queries of one task, now caption:20"),
        ({"criterion": {"_name": "query_cross_entropy"}}, "--criterion qctc, now query_cross_entropy"),
        ({"optimizer": {"_name": "fused_adam"}}, "--optimizer adam, now fused_adam"),
        (
            {"lr_scheduler": {"_name": "polynomial_decay_ratio"}},
            "--lr-scheduler fixed, now polynomial_decay_ratio; .* or --reset-lr-scheduler",
        ),
        (
            {"model": {"vocabulary": "5a"}},
            r"another --bpe-dir or --num-bins \(checksums 0f, now 5a\); .*--reset-optimizer",
        ),
    ],
)
def test_both_values_are_named(now: dict[str, Any], difference: str) -> None:
    with pytest.raises(InputError, match=rf"^last\.pt: its training began with {difference}"):
        check_resumed("last.pt", STATE, changed(**now), reset_lr_scheduler=False)


def test_members_of_a_mixture_keep_their_queries_and_their_order() -> None:
    before = {**STATE, "cfg": changed(model={"member_queries": "caption:20,refcoco:7", "num_queries": 27})}
    now = changed(model={"member_queries": "refcoco:7,caption:20", "num_queries": 27})
    with pytest.raises(InputError, match="began with queries caption:20,refcoco:7, now refcoco:7,caption:20; give"):
        check_resumed("last.pt", before, now, reset_lr_scheduler=False)


@pytest.mark.parametrize(
    "state",
    [
        STATE,
        {**STATE, "last_optimizer_state": None},
        {"cfg": None, "model": None, "last_optimizer_state": {}},
        {**STATE, "cfg": {"model": {"_name": "transformer"}}},
    ],
)
def test_what_may_change_and_what_is_no_training_to_go_on_with_pass(state: dict[str, Any]) -> None:
    more = {"num_queries": 30} if state is not STATE else {}
    now = changed(model={"dropout": 0.0, **more}, lr_scheduler={"_name": "inverse_sqrt"})
    check_resumed("last.pt", state, now, reset_lr_scheduler=True)


@pytest.mark.integration
def test_fairseq_train_with_other_queries_ends_before_its_first_update(
    make_model: Callable[..., Path],
) -> None:
    checkpoint = make_model("narvl", "qctc", "--num-queries", 12)
    before = checkpoint.stat().st_mtime_ns
    with pytest.raises(InputError, match=r"checkpoint_last\.pt: its training began with --num-queries 12, now 14"):
        make_model("narvl", "qctc", "--num-queries", 14, updates=2)
    assert checkpoint.stat().st_mtime_ns == before
    make_model("narvl", "qctc", "--num-queries", 12, updates=2)
    make_model("narvl", "qctc", "--num-queries", 14, "--reset-optimizer", updates=3)
