"""Fixes for data: files in place of folders, and the position in an epoch at which a training resumes."""

import functools
import logging
import os
from typing import Any

from fairseq.data import data_utils, iterators

from narvl_plugin.data.for_fairseq import FairseqRows
from narvl_plugin.errors import InputError

logger = logging.getLogger(__name__)


def accept_files_as_data() -> None:
    """Allow files in the data argument.

    Fixes `fairseq-train train.tsv,valid.tsv`. fairseq lists the data argument as a folder, to look for additional
    validation sets, and raises FileNotFoundError.
    """
    find_in_folders = data_utils._find_extra_valid_paths

    @functools.wraps(find_in_folders)
    def find_extra_valid_paths(dataset_path: str) -> set[str]:
        return find_in_folders(dataset_path) if os.path.isdir(dataset_path) else set()

    data_utils._find_extra_valid_paths = find_extra_valid_paths


def check_place_in_epoch() -> None:
    """Report the rows that a training reads twice or never if it resumes within an epoch, and why it cannot resume.

    Fixes `EpochBatchIterator.load_state_dict(state)`. It skips as many batches as were read before, even if they have
    other rows now. With larger batches, it may ask the user to report this to the developers of fairseq. Else it reads
    rows again or leaves them out, without a message.
    """
    get_state, set_state = iterators.EpochBatchIterator.state_dict, iterators.EpochBatchIterator.load_state_dict

    @functools.wraps(get_state)
    def state_dict(self: iterators.EpochBatchIterator) -> dict[str, Any]:
        state: dict[str, Any] = get_state(self)
        if isinstance(self.dataset, FairseqRows) and state["iterations_in_epoch"]:
            state |= rows_of(self, state["iterations_in_epoch"])
        return state

    @functools.wraps(set_state)
    def load_state_dict(self: iterators.EpochBatchIterator, state: dict[str, Any]) -> None:
        if isinstance(self.dataset, FairseqRows) and state.get("iterations_in_epoch") and state.get("version") == 2:
            compare_places(self, state)
        set_state(self, state)

    iterators.EpochBatchIterator.state_dict = state_dict
    iterators.EpochBatchIterator.load_state_dict = load_state_dict


def rows_of(iterator: iterators.EpochBatchIterator, position: int) -> dict[str, int]:
    """Return numbers that identify the rows read in an epoch when each process has read `position` batches."""
    sizes = list(map(len, iterator.frozen_batches))
    rows_read = sum(sizes[: position * iterator.num_shards])
    return {"rows": sum(sizes), "rows_read": rows_read, "batch_size": max(sizes), "processes": iterator.num_shards}


def compare_places(iterator: iterators.EpochBatchIterator, state: dict[str, Any]) -> None:
    """Warn if the batches that a checkpoint's training has read have other rows now.

    Checkpoints of versions before `rows_of` do not have its numbers.

    Raises:
        InputError: if no batches of the epoch remain.
    """
    position = state["iterations_in_epoch"]
    now = rows_of(iterator, position)
    before = {name: state.get(name, value) for name, value in now.items()}
    texts = {"rows": "{} rows, was {}", "batch_size": "batches of {}, was {}", "processes": "{} processes, was {}"}
    changes = [text.format(now[name], before[name]) for name, text in texts.items() if now[name] != before[name]]
    place = f"the checkpoint was written after {position} batches of epoch {state['epoch']}"
    advice = (
        f"({'; '.join(changes) or 'with other batches'}); keep --batch-size or --max-tokens, the number of processes "
        "and the training file as they were, or start at epoch 1 again with --reset-dataloader"
    )
    if position >= len(iterator):
        raise InputError(f"{place}, but the epoch now has only {len(iterator)} {advice}")
    read_again = before["rows_read"] - now["rows_read"]
    if now["rows"] != before["rows"]:
        logger.warning("%s, which now has other rows: some will be read twice, others never %s", place, advice)
    elif read_again:
        what = "read again" if read_again > 0 else "left out"
        logger.warning("%s; %d rows of it will be %s %s", place, abs(read_again), what, advice)
