"""What is said where a training goes on amid an epoch, and the batches are others than before."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from narvl_plugin.errors import InputError
from narvl_plugin.tasks.registered import CaptionConfig, CaptionTask

Place = dict[str, Any]


@pytest.fixture
def go_on(vocabulary: Path, write_tsv: Callable[..., Path], caption_rows: list[list[str]]) -> Callable[..., Place]:
    """Give a function that goes on from a place of an epoch of 20 rows, if any, and reads so many batches more."""

    def read(batches: int, place: Place | None = None, rows: int = 20, **options: Any) -> Place:
        training = write_tsv("train.tsv", [[str(number), *caption_rows[number % 6][1:]] for number in range(rows)])
        data = f"{training},{write_tsv('valid.tsv', caption_rows)}"
        config = CaptionConfig(data=data, bpe_dir=str(vocabulary), num_bins=10, patch_image_size=8)
        task = CaptionTask.setup_task(config)
        task.load_dataset("train")
        iterator = task.get_batch_iterator(task.dataset("train"), seed=1, epoch=1, **options)
        if place:
            iterator.load_state_dict(place)
        epoch = iterator.next_epoch_itr()
        for _ in range(batches):
            next(epoch)
        return iterator.state_dict()

    return read


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_sentences": 1}, "; 6 rows of it will be read again (batches of 1, was 2); keep --batch-size or"),
        ({"max_tokens": 1000}, "; 6 rows of it will be read again (batches of 1, was 2); keep"),
        ({"max_sentences": 3}, "; 6 rows of it will be left out (batches of 3, was 2); keep"),
        ({"max_sentences": 2, "rows": 18}, "other rows: some will be read twice, others never (18 rows, was 20); keep"),
        ({"max_sentences": 1, "num_shards": 2}, ""),  # the same rows, by other processes
        ({"max_tokens": 2500}, ""),
        ({"max_sentences": 2}, ""),
    ],
)
def test_rows_that_are_read_again_or_left_out_are_counted(
    options: Place, message: str, go_on: Callable[..., Place], caplog: pytest.LogCaptureFixture
) -> None:
    place = go_on(6, max_sentences=2)
    with caplog.at_level(logging.WARNING):
        go_on(0, place, **options)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == bool(message)
    assert not message or ("after 6 batches of epoch 1" in warnings[0] and message in warnings[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_sentences": 4},
            r"but the epoch now has only 5 \(batches of 4, was 2\); keep .* at epoch 1 .*--reset-dataloader",
        ),
        ({"max_tokens": 20_000}, r"but the epoch now has only 1 \(batches of 20, was 2\)"),
        ({"max_sentences": 2, "num_shards": 2}, r"but the epoch now has only 5 \(2 processes, was 1\)"),
        ({"max_sentences": 2, "rows": 5}, r"but the epoch now has only 3 \(5 rows, was 20\)"),
    ],
)
def test_an_epoch_without_batches_left_is_an_error(options: Place, message: str, go_on: Callable[..., Place]) -> None:
    place = go_on(6, max_sentences=2)
    with pytest.raises(InputError, match=f"after 6 batches of epoch 1, {message}"):
        go_on(0, place, **options)


def test_the_next_epoch_may_have_other_batches(go_on: Callable[..., Place], caplog: pytest.LogCaptureFixture) -> None:
    place = go_on(10, max_sentences=2)
    assert place == {"version": 2, "epoch": 2, "iterations_in_epoch": 0, "shuffle": False}
    go_on(1, place, max_sentences=7, rows=9)
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]
