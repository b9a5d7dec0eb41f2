"""The benchmark of the loss: what it measures, and that the gradient is right."""

import sys

import pytest

from narvl_plugin.bench.loss import loss_costs, structured_costs


def test_both_losses_are_measured() -> None:
    costs = loss_costs(batch=4, queries=8, labels=50_000, length=3, repeats=1)
    assert list(costs) == ["query_ctc", "torch"]
    assert all(cost.ms > 0 and 0 < cost.error < 1e-4 for cost in costs.values())
    assert costs["query_ctc"].error < 1e-5


def test_the_loss_of_sets_is_measured() -> None:
    times = structured_costs(batch=2, queries=8, labels=500, elements=2, length=2, repeats=1)
    assert list(times) == ["sequence", "set"] and all(ms > 0 for ms in times.values())


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux alone")
def test_torch_keeps_log_probabilities_and_ours_does_not() -> None:
    """One (B, N, V) tensor has 61 MiB here."""
    costs = loss_costs(batch=16, queries=20, labels=50_000, length=3, repeats=1)
    assert costs["torch"].extra_mb > 100
    assert costs["query_ctc"].extra_mb < 30
