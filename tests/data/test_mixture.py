"""A mixture of data sets: how often its rows are drawn, and batches of one member each."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from narvl_plugin.data.caption import CaptionDataset
from narvl_plugin.data.collate import Batch
from narvl_plugin.data.dataset import DatasetOptions
from narvl_plugin.data.for_fairseq import FairseqRows
from narvl_plugin.data.mixture import Mixture, drawn
from narvl_plugin.data.text import TextCodec
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import SkipBudget

Rows = list[list[str]]
SIZES = {"many": 20, "some": 12, "few": 3}
WEIGHTS = {"many": 0.5, "some": 1.0, "few": 2.5}
EXPECTED = {"many": 10, "some": 12, "few": 8}  # round(0.5 * 20), 12, and 2.5 * 3 = 7.5 to the even 8


@pytest.fixture
def dataset(write_tsv: Callable[..., Path], caption_rows: Rows, codec: TextCodec) -> Callable[..., CaptionDataset]:
    """Make a data set of some rows, whose ids begin with its name."""

    def make(name: str, size: int, split: str = "train", skipped: int = 0) -> CaptionDataset:
        rows = [[f"{name}-{row}", *caption_rows[row % 6][1:]] for row in range(size)]
        options = DatasetOptions(codec, 8, 20, 20, False, SkipBudget(skipped))
        return CaptionDataset(TsvFile(write_tsv(f"{name}.tsv", rows), "0,4,2"), options, split)

    return make


@pytest.fixture
def mixture(dataset: Callable[..., CaptionDataset]) -> Mixture:
    """Give a mixture of three members to train on."""
    return Mixture({name: dataset(name, size) for name, size in SIZES.items()}, WEIGHTS)


def batches_of(mixture: Mixture, seed: int, **limits: int) -> list[Batch]:
    """Return the batches of an epoch as fairseq makes them, seeded."""
    np.random.seed(seed)
    batches = FairseqRows(mixture).batch_by_size(mixture.ordered_indices(), **limits)
    return [mixture.collater([mixture[index] for index in batch]) for batch in batches]


def test_each_member_is_drawn_by_its_weight(mixture: Mixture) -> None:
    batches = batches_of(mixture, 1, max_sentences=5)
    ids = [name for batch in batches for name in batch["id"].tolist()]
    assert Counter(name.split("-")[0] for name in ids) == EXPECTED
    counts = Counter(ids)
    assert all(counts[f"some-{row}"] == 1 for row in range(12))
    assert sorted(counts[f"few-{row}"] for row in range(3)) == [2, 3, 3]  # two passes, and a part of a third
    assert max(count for name, count in counts.items() if name.startswith("many")) == 1


def test_a_part_is_another_one_in_each_epoch(mixture: Mixture) -> None:
    halves = []
    for seed in range(40):
        np.random.seed(seed)
        rows = mixture.ordered_indices()
        halves.append(frozenset(rows[rows < 20].tolist()))
    assert len(set(halves)) > 30
    means = np.array([[row in half for row in range(20)] for half in halves]).mean(0)
    assert means.min() > 0.15 and means.max() < 0.85  # four deviations of the mean of 40 fair coins: 0.32


def test_a_batch_is_of_one_member_and_says_which(mixture: Mixture) -> None:
    batches = batches_of(mixture, 1, max_sentences=5)
    for batch in batches:
        assert {name.split("-")[0] for name in batch["id"].tolist()} == {batch["member"]}
    sizes = {name: sorted(len(batch["id"]) for batch in batches if batch["member"] == name) for name in SIZES}
    assert sizes == {"many": [5, 5], "some": [2, 5, 5], "few": [3, 5]}
    by_tokens = [len(batch["id"]) for batch in batches_of(mixture, 1, max_tokens=7000)]
    assert sorted(by_tokens) == [1, 3, 5, 7, 7, 7]


def test_members_take_turns_at_random(mixture: Mixture) -> None:
    orders = [[batch["member"] for batch in batches_of(mixture, seed, max_sentences=2)] for seed in range(20)]
    assert Counter(orders[0]) == {"many": 5, "some": 6, "few": 4}
    assert len({tuple(order) for order in orders}) > 15
    firsts = Counter(order[0] for order in orders)
    assert set(firsts) == set(SIZES)


def test_the_order_follows_the_seed(mixture: Mixture) -> None:
    first, again, other = (
        [batch["id"].tolist() for batch in batches_of(mixture, seed, max_sentences=5)] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_mixture_to_evaluate_on_is_read_once_and_in_order(dataset: Callable[..., CaptionDataset]) -> None:
    members = {name: dataset(name, size, "valid") for name, size in SIZES.items()}
    mixture = Mixture(members, dict.fromkeys(SIZES, 1.0))
    assert mixture.ordered_indices().tolist() == list(range(len(mixture))) == list(range(35))
    assert [mixture[index][1]["id"] for index in (0, 19, 20, 31, 32, 34)] == [
        *("many-0", "many-19", "some-0", "some-11", "few-0", "few-2")
    ]
    assert mixture.can_reuse_epoch_itr_across_epochs


def test_the_least_weight_still_draws_a_row(dataset: Callable[..., CaptionDataset]) -> None:
    assert len(drawn(dataset("some", 12), 0.001)) == 1


def test_epochs_reach_the_members(mixture: Mixture) -> None:
    mixture.set_epoch(7)
    assert [member.epoch for member in mixture.members] == [7, 7, 7]
    assert not mixture.can_reuse_epoch_itr_across_epochs


def test_bad_rows_are_replaced_by_rows_of_their_own_member(
    dataset: Callable[..., CaptionDataset], caption_rows: Rows
) -> None:
    good = dataset("good", 3)
    caption_rows[0][2] = ""
    bad = dataset("bad", 3, skipped=1)
    mixture = Mixture({"good": good, "bad": bad}, {"good": 1.0, "bad": 1.0})
    batch = mixture.collater([mixture[3]])
    assert (batch["member"], batch["id"].tolist()) == ("bad", ["bad-1"])
    assert mixture.collater([]) == {}
