"""Where a checkpoint's weights are: in a file, in the folder of a port, or in one on the Hugging Face hub."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from narvl_plugin.data.foreign_files import file_in
from narvl_plugin.errors import InputError, MissingInput

CONFIG_FILE = "config.json"
"""File of the configuration of a port."""
SETTINGS_FILE = "configuration.json"
"""File in which a ModelScope port may keep options of its task."""
INDEX_SUFFIX = ".index.json"
"""End of the name of a file that says which of several files holds which weight."""
WEIGHTS = tuple(name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", INDEX_SUFFIX))
"""Files of the weights of a port. The first that is there is read."""

HUB = re.compile("hf:/+(.*)")
"""A model on the Hugging Face hub. A `Path` has one of the two slashes."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
FETCHED = (
    ("*.json", "merges.txt", "vocab.txt", "model*.safetensors"),
    ("pytorch_model*.bin",),
)
"""Files to download: those of a port with its weights in safetensors; then pickles, for a port without these."""


def existing(path: str | Path) -> Path:
    """Return the file that holds the weights of a checkpoint, or that says which files hold them.

    Args:
        path: the file itself, the folder of a port, or `hf://OWNER/NAME`.

    Raises:
        MissingInput: if the file does not exist, is a folder of another kind, or its name ends in a slash.
        InputError: if a folder's file is a link out of it, or a model of the hub cannot be downloaded.
    """
    path = local(path)
    if str(path).endswith("/") and Path(path).is_file():
        raise MissingInput(f"{path}: is a file; leave out the slash at the end")
    file = Path(path)
    if file.is_dir():
        return _weights_in(file)
    if not file.is_file():
        hub = HUB_NAME.fullmatch(str(path)) and not file.suffix
        hint = f"; for a model of the Hugging Face hub give hf://{path}" if hub else ""
        raise MissingInput(f"{path}: no such checkpoint; train the model first, or check the path{hint}")
    return file


def local(path: str | Path) -> str | Path:
    """Return the path of a checkpoint on this machine. A model of the hub is downloaded.

    Raises:
        InputError: if it cannot be.
    """
    found = HUB.fullmatch(str(path))
    return _downloaded(found[1]) if found else path


def local_paths(paths: str) -> str:
    """Return paths that colons join, as those of --path, with models of the hub downloaded.

    Raises:
        InputError: as `local`.
    """
    name = re.compile(rf"(?<![^:])hf:/+({HUB_NAME.pattern})(?![^:])", re.ASCII)
    return name.sub(lambda found: str(_downloaded(found[1])), paths)


def _weights_in(folder: Path) -> Path:
    if file_in(folder, CONFIG_FILE) is None:
        raise MissingInput(
            f"{folder}: is a folder; give the checkpoint in it, such as {folder / 'checkpoint_best.pt'}, or a folder "
            f"with {CONFIG_FILE} of a Hugging Face or ModelScope port of OFA"
        )
    for name in WEIGHTS:
        if (file := file_in(folder, name)) is not None:
            return file
    raise MissingInput(f"{folder}: holds {CONFIG_FILE}, but no weights; put one of {', '.join(WEIGHTS)} there")


@cache
def _downloaded(name: str) -> Path:
    """Return the folder into which a model of the Hugging Face hub was downloaded, now or before."""
    if not HUB_NAME.fullmatch(name):
        raise InputError(f"hf://{name}: is no name of a model on the Hugging Face hub; give hf://OWNER/NAME")
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(f"hf://{name}: needs the package huggingface_hub; pip install 'narvl[hub]'") from error
    try:
        for patterns in FETCHED:
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
            if any((folder / file).is_file() for file in WEIGHTS):
                break
    except Exception as error:  # the library raises errors of many types for unknown names and without a network
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"hf://{name}: cannot be downloaded ({reason:.300}); check the name and the network, or download the "
            "folder on another machine and give its path"
        ) from error
    return folder
