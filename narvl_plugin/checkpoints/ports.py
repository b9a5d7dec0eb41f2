"""Folders in the layout of OFA's Hugging Face and ModelScope ports.

A folder holds config.json, the weights in one file or in several with an index, and the vocabulary in vocab.json and
merges.txt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from narvl_plugin.checkpoints.finding import CONFIG_FILE, INDEX_SUFFIX, SETTINGS_FILE
from narvl_plugin.checkpoints.weight_files import read_file
from narvl_plugin.data.foreign_files import file_in
from narvl_plugin.data.gpt2 import port_files
from narvl_plugin.data.plain_json import read_json
from narvl_plugin.data.text import Gpt2Codec, load_codec
from narvl_plugin.data.vocabulary import CHINESE_FILE, PORT_FILE
from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.models.config import OfaConfig
from narvl_plugin.models.interop import EMBEDDING
from narvl_plugin.models.ports import config_of_port, from_port, port_config, to_port
from narvl_plugin.safe_pickle import brief
from narvl_plugin.whole_files import whole_folder

LARGEST_CONFIGURATION = 2**20
"""Largest size of a configuration, in bytes."""
LARGEST_INDEX = 2**24
"""Largest size of an index, in bytes. Those of published models have 2% of it."""
MOST_SHARDS = 1_000
"""Largest number of files of the weights of one model."""
PICKLED = "pytorch_model.bin"
"""The file of weights that is written. All versions of the ports read it."""
TASK_OPTIONS = ("patch_image_size", "max_image_size", "imagenet_default_mean_and_std", "prompt_type")
"""Options of the task that a ModelScope port may keep."""


def is_bare(state: Any) -> TypeGuard[dict[str, Tensor]]:
    """Return whether the content of a file is nothing but weights by name, as in a port."""
    return (
        isinstance(state, dict)
        and bool(state)
        and all(isinstance(name, str) and isinstance(part, Tensor) for name, part in state.items())
    )


def read_shards(index: Path) -> dict[str, Tensor]:
    """Return the weights of all files that an index names.

    Raises:
        MissingInput: if a file is missing.
        InputError: if the index is damaged, names a file outside of its folder, or does not agree with the files.
    """
    places = _places(index)
    found: dict[str, Tensor] = {}
    for file in shard_files(index):
        weights = read_file(file)
        if not is_bare(weights):
            raise InputError(f"{file}: holds something else than weights; download it again")
        for weight in weights:
            if weight in found:
                raise InputError(f"{file}: holds {brief(weight)}, which another file of {index.name} holds, too")
            if places.get(weight) != file.name:
                raise InputError(f"{file}: holds {brief(weight)}, which {index.name} does not place there")
        found |= weights
    if missing := next((weight for weight in places if weight not in found), None):
        raise InputError(f"{index}: places {brief(missing)} in {places[missing]}, which lacks it; download both again")
    return found


def shard_files(index: Path) -> list[Path]:
    """Return the files that an index names.

    Raises:
        MissingInput: if a file is missing.
        InputError: if the index is damaged, or names a file outside of its folder or of another kind.
    """
    kind = Path(index.name.removesuffix(INDEX_SUFFIX)).suffix
    names = sorted(set(_places(index).values()))
    if len(names) > MOST_SHARDS:
        raise InputError(f"{index}: names {len(names):,} files; at most {MOST_SHARDS:,} are read")
    files = []
    for name in names:
        try:
            file = file_in(index.parent, name)
        except InputError as error:
            raise InputError(f"{index}: {error}") from error
        if not name.endswith(kind):
            raise InputError(f"{index}: names the file {brief(name)}; expected names that end in {kind}")
        if file is None:
            raise MissingInput(f"{index.parent / name}: no such file, and {index.name} names it; download it, too")
        files.append(file)
    return files


def _places(index: Path) -> dict[str, str]:
    """Return the name of the file that holds a weight, by the weight's name."""
    places = read_json(index, LARGEST_INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise InputError(f"{index}: holds no weight_map of the names of weights and of files")
    return places


def port_checkpoint(folder: Path, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights of a port by our names, and the parts of fairseq's configuration by name.

    Args:
        folder: the port's folder.
        weights: its weights by name, as they are in the file.

    Raises:
        InputError: if the configuration is not one of OFA or does not fit the weights, or the model is not supported.
    """
    file = folder / CONFIG_FILE
    options = read_json(file, LARGEST_CONFIGURATION)
    has_vocabulary = file_in(folder, PORT_FILE) is not None
    if file_in(folder, CHINESE_FILE) is not None and not has_vocabulary:
        raise InputError(f"{folder}: holds {CHINESE_FILE} of a Chinese model of OFA, which is not supported")
    try:
        config = config_of_port(options)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    try:
        found = from_port(weights)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    labels, rows = options.get("vocab_size"), len(found[EMBEDDING])
    if labels not in (None, rows):
        raise InputError(f"{file}: vocab_size={labels!r:.40}, but {EMBEDDING} has {rows:,} rows; download both again")
    task = _task_options(folder) | ({"bpe_dir": str(folder.absolute())} if has_vocabulary else {})
    return found, {"model": asdict(config), "task": task}


def _task_options(folder: Path) -> dict[str, Any]:
    """Return the options of the task that a ModelScope port keeps, at the top or in a section."""
    file = file_in(folder, SETTINGS_FILE)
    if file is None:
        return {}
    values = read_json(file, LARGEST_CONFIGURATION)
    sections = [values, *(section for section in values.values() if isinstance(section, dict))]
    return {name: section[name] for section in reversed(sections) for name in TASK_OPTIONS if name in section}


def write_port(out: Path, weights: Mapping[str, Tensor], config: OfaConfig, vocabulary: Path) -> None:
    """Write a teacher as a port. The folder appears only when it is complete.

    Args:
        out: the folder.
        weights: the teacher's weights by our names.
        config: its configuration.
        vocabulary: folder of its vocabulary.

    Raises:
        InputError: if the layout cannot hold the teacher or its vocabulary, or the folder cannot be written.
    """
    codec, labels = load_codec(vocabulary), len(weights[EMBEDDING])
    if not isinstance(codec, Gpt2Codec):
        raise InputError(f"{vocabulary}: is not GPT-2's vocabulary, which the ports of OFA have")
    if len(codec.dictionary) != labels:
        raise InputError(
            f"{vocabulary}: has {len(codec.dictionary):,} labels with codes and {codec.num_bins:,} bins, and the model "
            f"{labels:,}; the ports have all codes and {codec.num_bins:,} bins"
        )
    content = port_files(codec.pieces)
    content[CONFIG_FILE] = json.dumps(port_config(config, labels), indent=2) + "\n"
    with whole_folder(out) as part:
        for name, text in content.items():
            (part / name).write_text(text, encoding="utf-8")
        with open(part / PICKLED, "wb") as stream:  # for a path, torch's error would lack the reason
            torch.save(to_port(weights, config), stream)
