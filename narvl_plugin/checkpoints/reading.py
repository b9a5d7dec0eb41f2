"""Reading of checkpoints in all layouts: fairseq's, safetensors with a description, ports of OFA."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from narvl_plugin.checkpoints.finding import CONFIG_FILE, INDEX_SUFFIX, existing
from narvl_plugin.checkpoints.ports import is_bare, port_checkpoint, read_shards, shard_files
from narvl_plugin.checkpoints.weight_files import SAFETENSORS_SUFFIX, check_head, naming_damage, read_file
from narvl_plugin.data.foreign_files import file_in
from narvl_plugin.data.mistaken_files import read_head
from narvl_plugin.data.plain_json import read_json
from narvl_plugin.data.resumable import fingerprint
from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.safe_pickle import Refused, brief, check_extent, texts_of

LARGEST_DESCRIPTION = 2**24
"""Largest size of NAME.json beside NAME.safetensors, in bytes."""

LARGEST_CONFIGURATION = 20_000
"""Largest number of values in a configuration. OmegaConf takes 0.1 ms for each; fairseq's has 700."""

LARGEST_FLAGS = 2_000
"""Largest number of values in the flags of an older checkpoint. Hydra takes 2 ms for each; fairseq's have 400."""

PARTS = {
    "model": dict | NoneType,
    "cfg": dict | NoneType,
    "args": Namespace | NoneType,
    "extra_state": dict | NoneType,
    "task_state": dict | NoneType,
    "optimizer_history": list | NoneType,
}
"""Types of the parts of a checkpoint that are read by name."""


def read_checkpoint(file: str | Path) -> dict[str, Any]:
    """Return the content of a checkpoint. Its tensors are mapped from the file, so only used ones take memory.

    A file `NAME.safetensors` holds the weights, and `NAME.json` beside it the rest. In the folder of a port, a file
    holds weights alone, and config.json the configuration. The content decides what a file is, not its name. Tensors
    are on the CPU, without gradients.

    Args:
        file: the file, the folder of a port, or `hf://OWNER/NAME`.

    Raises:
        MissingInput: if the file does not exist.
        InputError: if the file is cut off, damaged, compressed or not a checkpoint, or if it asks for types, functions
            or a number of values that no checkpoint of its size needs.
    """
    file = existing(file)
    state = read_shards(file) if file.name.endswith(INDEX_SUFFIX) else _content(file)
    if is_bare(state) and file_in(file.parent, CONFIG_FILE) is not None:
        state = whole_checkpoint(*port_checkpoint(file.parent, state))
    with naming_damage(file, read_head(file)):
        _check_parts(file, state)
    whole: dict[str, Any] = state
    return whole


def _content(file: Path) -> Any:
    """Return the content of a file, together with that of NAME.json beside NAME.safetensors.

    Raises:
        MissingInput, InputError: as `read_checkpoint`.
    """
    description = file.with_suffix(".json")
    in_port = not description.is_file() and file_in(file.parent, CONFIG_FILE) is not None
    if file.suffix != SAFETENSORS_SUFFIX or in_port:
        return read_file(file)
    check_head(file)
    if not description.is_file():
        raise MissingInput(f"{description}: no such file; it says which model the weights of {file} are for")
    state = read_json(description, LARGEST_DESCRIPTION)
    if not isinstance(state.get("cfg"), dict):
        raise InputError(f"{description}: holds no configuration (cfg), so its model is unknown")
    return whole_checkpoint(read_file(file), state["cfg"]) | {"task_state": state.get("task_state", {})}


def checkpoint_fingerprint(path: str | Path) -> str:
    """Return a short hash that distinguishes versions of a checkpoint without reading all of it; see `fingerprint`.

    Raises:
        MissingInput, InputError: if a file of the checkpoint is missing.
    """
    file = existing(path)
    parts = shard_files(file) if file.name.endswith(INDEX_SUFFIX) else []
    return "-".join(map(fingerprint, [file, *parts]))


def whole_checkpoint(weights: dict[str, torch.Tensor], cfg: dict[str, Any]) -> dict[str, Any]:
    """Return weights and configuration as a checkpoint of fairseq for the start of a training."""
    history: dict[str, Any] = {
        "criterion_name": None,
        "optimizer_name": None,
        "lr_scheduler_state": {},
        "num_updates": 0,
    }
    return {
        "args": None,
        "cfg": cfg,
        "model": weights,
        "criterion": None,
        "optimizer_history": [history],
        "task_state": {},
        "extra_state": {
            "train_iterator": {"version": 2, "epoch": 1, "iterations_in_epoch": 0, "shuffle": True},
        },
        "last_optimizer_state": None,
    }


def _check_parts(file: Path, state: Any) -> None:
    """Raise InputError unless a checkpoint is a dict whose parts have fairseq's types."""
    if not isinstance(state, dict):
        raise InputError(f"{file}: is no checkpoint of fairseq: it holds a {type(state).__name__}, not a dict")
    for name, types in PARTS.items():
        if not isinstance(state.get(name), types):
            raise InputError(f"{file}: is no checkpoint of fairseq: its {name} is a {type(state[name]).__name__}")
    weights = state.get("model") or {}
    if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in weights.items()):
        raise InputError(f"{file}: is no checkpoint of fairseq: its model is not a dict of tensors by name")
    for name, largest in (
        ("cfg", LARGEST_CONFIGURATION),
        ("args", LARGEST_FLAGS),
        ("task_state", LARGEST_CONFIGURATION),
    ):
        try:
            check_extent(state.get(name), largest)
        except Refused as error:
            raise InputError(f"{file}: refused, because its {name} {error}") from error
        for text in texts_of(state.get(name)):
            if "${" in text:  # OmegaConf would replace it by another value, or from the environment
                raise InputError(f"{file}: refused, because its {name} refers to other values: {brief(text)}")
