"""The benchmark that compares a student with its FLOPs alone."""

import pytest

from narvl_plugin.bench.floor import distance_to_floor


@pytest.mark.integration
def test_all_parts_are_timed_and_counted() -> None:
    found = distance_to_floor(size="nano", side=64, queries=4, repeats=1)
    assert found.others == {}
    assert min(found.plain, found.optimised, found.encoder, found.decoder) > 0
    assert found.floor == pytest.approx(1000 * found.gflop / found.gflops)
    more = distance_to_floor(size="nano", side=96, queries=4, repeats=1)
    assert more.gflop > found.gflop > 0.01


@pytest.mark.integration
def test_other_ways_are_timed() -> None:
    found = distance_to_floor(size="nano", side=64, queries=4, repeats=1, bfloat16=True, exported=["torch-export"])
    assert list(found.others) == ["bfloat16", "torch-export"]
    assert min(found.others.values()) > 0
