"""Files of others, read without running what is in them.

A pickle is a program: reading one the plain way calls whatever it names. Here only types of a list are built.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors.torch
import torch

from narvl_plugin.errors import InputError, MissingInput

SAFETENSORS_SUFFIX = ".safetensors"

_NUMPY_FUNCTIONS = {name: getattr(np._core.multiarray, name) for name in ("scalar", "_reconstruct")}
_ALLOWED_TYPES = [
    argparse.Namespace,  # the flags of published checkpoints
    np.ndarray,  # the rest: best metrics, as numpy numbers
    np.dtype,
    *(getattr(np.dtypes, f"{kind}DType") for kind in ("Bool", "Int32", "Int64", "Float32", "Float64")),
    # numpy 1 and 2 write the same functions under different module names.
    *((function, f"numpy._core.multiarray.{name}") for name, function in _NUMPY_FUNCTIONS.items()),
    *((function, f"numpy.core.multiarray.{name}") for name, function in _NUMPY_FUNCTIONS.items()),
]
"""What a checkpoint may hold beside tensors and Python's plain types."""

_NAMED_TYPE = re.compile(r"GLOBAL ([\w.]+)")
"""Where torch's message names what it refuses to build or call."""


def existing(file: Path) -> Path:
    """Return the path of a checkpoint; raises MissingInput if it is not there."""
    if not file.is_file():
        raise MissingInput(f"{file}: no such checkpoint; train the model first, or check the path")
    return file


def read_checkpoint(file: str | Path) -> dict[str, Any]:
    """Return what a checkpoint holds, its tensors mapped from the file: only what is used takes memory.

    A file `NAME.safetensors` holds the weights, and `NAME.json` beside it the rest.

    Raises:
        MissingInput: the file does not exist.
        InputError: it is cut off, damaged or no checkpoint, or it names a type that a checkpoint does not need.
    """
    file = existing(Path(file))
    if file.suffix == SAFETENSORS_SUFFIX:
        return _read_safetensors(file)
    is_archive = _check_archive(file)
    try:
        with torch.serialization.safe_globals(_ALLOWED_TYPES):
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        named = _NAMED_TYPE.search(str(error))
        if named is None:
            _not_a_checkpoint(file, error)
        raise InputError(
            f"{file}: refused, because it asks for {named[1]}, which no checkpoint needs; reading it the plain way "
            "could run any command"
        ) from error
    except (RuntimeError, EOFError, KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        _not_a_checkpoint(file, error)
    if not isinstance(state, dict):
        raise InputError(f"{file}: is no checkpoint of fairseq: it holds a {type(state).__name__}, not a dict")
    return state


def read_pickle(file: str | Path) -> Any:
    """Return what a pickle of plain types holds: numbers, strings, lists, dicts, such as OFA's answer lists.

    The byte strings that Python 2 wrote for text, as in RefCOCO's files, are read as UTF-8.

    Raises:
        MissingInput: the file does not exist.
        InputError: it is damaged, or it names any type or function.
    """
    file = Path(file)
    if not file.is_file():
        raise MissingInput(f"{file}: no such file")

    class PlainUnpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> NoReturn:
            raise InputError(
                f"{file}: refused, because it asks for {module}.{name}, and only numbers, strings, lists and dicts "
                "are read; reading it the plain way could run any command"
            )

    with file.open("rb") as stream:
        try:
            return PlainUnpickler(stream, encoding="utf-8").load()
        except InputError:
            raise
        except Exception as error:  # a damaged pickle raises nearly anything
            raise InputError(f"{file}: is damaged or no pickle ({error})") from error


def whole_checkpoint(weights: dict[str, torch.Tensor], cfg: dict[str, Any]) -> dict[str, Any]:
    """Return weights and configuration as a checkpoint of fairseq, from which a training starts anew."""
    history = {"criterion_name": None, "optimizer_name": None, "lr_scheduler_state": {}, "num_updates": 0}
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


def _check_archive(file: Path) -> bool:
    """Say whether a checkpoint is a zip archive, as torch has written them since 1.6, and check its bytes."""
    with file.open("rb") as stream:
        looks_like_one = stream.read(2) == b"PK"
    if not looks_like_one:
        return False
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise InputError(f"{file}: is cut off or damaged ({error}); copy or download it again") from error
    if damaged is not None:
        raise InputError(f"{file}: is damaged: checksum of {damaged} is wrong; copy or download it again")
    return True


def _read_safetensors(file: Path) -> dict[str, Any]:
    description = file.with_suffix(".json")
    if not description.is_file():
        raise MissingInput(f"{description}: no such file; it says which model the weights of {file} are for")
    try:
        state: dict[str, Any] = json.loads(description.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{description}: is not JSON ({error})") from error
    if not isinstance(state, dict) or not isinstance(state.get("cfg"), dict):
        raise InputError(f"{description}: holds no configuration (cfg), so it cannot be told which model it is")
    try:
        return whole_checkpoint(safetensors.torch.load_file(file), state["cfg"])
    except safetensors.SafetensorError as error:
        raise InputError(f"{file}: is cut off, damaged or no safetensors file ({error})") from error


def _not_a_checkpoint(file: Path, error: Exception) -> NoReturn:
    reason = str(error).rpartition("WeightsUnpickler error:")[2].split("\n\nCheck the documentation")[0]
    reason = " ".join(reason.split()) or type(error).__name__
    raise InputError(f"{file}: is damaged or no checkpoint of fairseq ({reason})") from error
