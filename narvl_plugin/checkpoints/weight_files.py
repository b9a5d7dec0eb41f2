"""Safe reading of checkpoints: code in a file is never run.

A file can build only plain values, tensors and few other types (see `safe_pickle`). Reading takes no more memory than
the file's size.
"""

from __future__ import annotations

import io
import json
import struct
import sys
import zipfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, BinaryIO

import safetensors.torch
import torch

from narvl_plugin.checkpoints.unpickling import NOT_NEEDED, CheckpointUnpickler, Storage
from narvl_plugin.data.mistaken_files import HEAD, PICKLE, ZIP, as_text, mistaken, read_head
from narvl_plugin.data.plain_pickles import reason_of
from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.safe_pickle import PlainUnpickler, Refused, allowance, brief, check_extent, texts_of

SAFETENSORS_SUFFIX = ".safetensors"

LARGEST_PICKLE = 2**23
"""Largest size of a checkpoint's pickle, without the values of tensors, in bytes. It allows some 40,000 tensors."""

LARGEST_CONFIGURATION = 20_000
"""Largest number of values in a configuration. OmegaConf takes 0.1 ms for each; fairseq's has 700."""

LARGEST_FLAGS = 2_000
"""Largest number of values in the flags of an older checkpoint. Hydra takes 2 ms for each; fairseq's have 400."""

OLD_FORMAT = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
"""Content of the first pickle in a file of torch before 1.6."""

PARTS = {
    "model": dict | NoneType,
    "cfg": dict | NoneType,
    "args": Namespace | NoneType,
    "extra_state": dict | NoneType,
    "task_state": dict | NoneType,
    "optimizer_history": list | NoneType,
}
"""Types of the parts of a checkpoint that are read by name."""


def existing(file: str | Path) -> Path:
    """Return the path of a checkpoint.

    Raises:
        MissingInput: if the file does not exist, is a folder, or its name ends in a slash.
    """
    if str(file).endswith("/") and Path(file).is_file():
        raise MissingInput(f"{file}: is a file; leave out the slash at the end")
    file = Path(file)
    if file.is_dir():
        raise MissingInput(f"{file}: is a folder; give the checkpoint in it, such as {file / 'checkpoint_best.pt'}")
    if not file.is_file():
        raise MissingInput(f"{file}: no such checkpoint; train the model first, or check the path")
    return file


def read_checkpoint(file: str | Path) -> dict[str, Any]:
    """Return the content of a checkpoint. Its tensors are mapped from the file, so only used ones take memory.

    A file `NAME.safetensors` holds the weights, and `NAME.json` beside it the rest. Tensors are on the CPU, without
    gradients.

    Raises:
        MissingInput: if the file does not exist.
        InputError: if the file is cut off, damaged, compressed or not a checkpoint, or if it asks for types, functions
            or a number of values that no checkpoint of its size needs.
    """
    file = existing(file)
    head = read_head(file)
    _check_head(file, head)
    try:
        if file.suffix == SAFETENSORS_SUFFIX:
            state = _read_safetensors(file)
        elif head.startswith(ZIP):  # torch's format since 1.6
            state = _read_archive(file)
        else:
            state = _read_old_format(file)
        _check_parts(file, state)
    except InputError:
        raise
    except Refused as error:
        raise InputError(f"{file}: refused, because it {error}") from error
    except Exception as error:  # a damaged file raises nearly anything
        reason = reason_of(error, head)
        raise InputError(
            f"{file}: is damaged or no checkpoint of fairseq ({reason}); copy or download it again"
        ) from error
    return state


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


def _check_head(file: Path, head: bytes) -> None:
    """Raise InputError, with the kind of the file, if its first bytes show that it is not a checkpoint."""
    if not head:
        raise InputError(f"{file}: is cut off: it is empty; copy or download it again")
    is_safetensors = head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < file.stat().st_size
    if is_safetensors and file.suffix != SAFETENSORS_SUFFIX:
        raise InputError(
            f"{file}: is a safetensors file; name it NAME{SAFETENSORS_SUFFIX}, and put NAME.json, with the model's "
            "configuration, beside it"
        )
    wanted = () if file.suffix == SAFETENSORS_SUFFIX else (ZIP, PICKLE)
    what = None if is_safetensors else mistaken(head, wanted)
    if what is None and head.startswith(PICKLE) and OLD_FORMAT not in head:
        what = "is damaged or no checkpoint: it is a pickle of Python, not as torch.save writes it"
    if what is None and head.lstrip()[:1] in (b"{", b"["):
        what = "is JSON, not a checkpoint; give the file of the weights"
    if what is None and as_text(head) and b"\t" in head:
        what = "is a table of text (TSV), not a checkpoint; check the order of the files"
    if what is not None:
        raise InputError(f"{file}: {what}")


def _read_archive(file: Path) -> Any:
    """Read a zip archive: `NAME/data.pkl`, and a member `NAME/data/KEY` for each storage."""
    try:
        with zipfile.ZipFile(file) as archive:
            if what := _other_archive(archive.namelist()):
                raise InputError(f"{file}: {what}")
            members = _checked_members(file, archive)
            found = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(found) != 1 or members[found[0]][1] > LARGEST_PICKLE:
                raise InputError(
                    f"{file}: is no checkpoint: it must contain one data.pkl of at most {LARGEST_PICKLE} bytes"
                )
            pickled = archive.read(found[0])
            folder = found[0].removesuffix("data.pkl")
            order = f"{folder}byteorder"
            byte_order = archive.read(order) if order in members else b"little"
    except InputError:
        raise
    except Exception as error:  # a damaged archive raises nearly anything
        raise InputError(f"{file}: is cut off or damaged ({reason_of(error)}); copy or download it again") from error
    if byte_order != sys.byteorder.encode():
        raise InputError(f"{file}: was written on a machine with another byte order; convert it there")

    mapped = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)

    def read_storage(name: str, size: int) -> torch.UntypedStorage:
        offset, length = members[f"{folder}data/{name}"]
        if size != length:
            raise ValueError(f"the storage {name} of {length} bytes in place of {size}")
        part = mapped[offset : offset + size]
        return part if offset % 8 == 0 else part.clone()  # a copy is aligned; torch itself writes aligned storages

    state = CheckpointUnpickler(io.BytesIO(pickled), len(pickled), read_storage).load()
    check_extent(state, allowance(len(pickled)))
    return state


def _other_archive(names: Sequence[str]) -> str | None:
    """Return what a zip archive is, by the names of its members, and what to do; None for a file of torch.save."""
    if names and all(name.endswith(".npy") for name in names):
        return "is a file of numpy's arrays (.npz), not a checkpoint"
    if not any(name.endswith("/data.pkl") for name in names):
        return "is no checkpoint: it contains no data.pkl; unpack it, and give the file in it"
    if any(name.endswith("/constants.pkl") for name in names):
        return "is a model of TorchScript (torch.jit); give the checkpoint that it was made from"
    return None


def _checked_members(file: Path, archive: zipfile.ZipFile) -> dict[str, tuple[int, int]]:
    """Check the members of an archive; return the offset in the file and the size of each, in bytes.

    Exactly the checked bytes are mapped later: members must be uncompressed, and their names unique.
    """
    members: dict[str, tuple[int, int]] = {}
    remaining = file.stat().st_size
    with file.open("rb") as stream:
        for member in archive.infolist():
            name = brief(member.filename)
            if member.filename in members:
                raise InputError(f"{file}: is damaged: it holds {name} twice")
            if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                raise InputError(
                    f"{file}: {name} in it is compressed, and tensors are mapped from the file as they are; unpack it "
                    "and pack it again without compression (zip -0 -r)"
                )
            remaining -= member.file_size
            if remaining < 0:
                raise InputError(f"{file}: is damaged: its members are larger than the file")
            try:
                with archive.open(member) as content:
                    while content.read(2**20):
                        pass
            except zipfile.BadZipFile as error:
                raise InputError(
                    f"{file}: is damaged: checksum of {name} is wrong; copy or download it again"
                ) from error
            stream.seek(member.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", stream.read(4))
            members[member.filename] = (member.header_offset + 30 + name_length + extra_length, member.file_size)
    return members


def _read_old_format(file: Path) -> Any:
    """Read a file of torch before 1.6: pickles of a header, the state and the names of storages, then the storages."""
    with file.open("rb") as stream:
        head = io.BytesIO(stream.read(LARGEST_PICKLE))
        size = head.getbuffer().nbytes
        remaining = file.stat().st_size

        def read_storage(name: str, size: int) -> torch.UntypedStorage:
            nonlocal remaining
            remaining -= size
            if remaining < 0:
                raise ValueError("storages larger than the file")
            return torch.UntypedStorage(size)

        header = [PlainUnpickler(head, size, {}, NOT_NEEDED).load() for _ in range(3)]
        if header[:2] != [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION]:
            raise ValueError("its header is wrong")
        if header[2].get("little_endian") is not (sys.byteorder == "little"):
            raise InputError(f"{file}: was written on a machine with another byte order; convert it there")
        unpickler = CheckpointUnpickler(head, size, read_storage)
        state = unpickler.load()
        check_extent(state, allowance(size))
        names = PlainUnpickler(head, size, {}, NOT_NEEDED).load()
        if not all(type(name) is str for name in names) or sorted(names) != sorted(unpickler.storages):
            raise ValueError("its storages are not those of its tensors")
        stream.seek(head.tell())
        for name in names:
            _fill_storage(unpickler.storages[name], stream)
    return state


def _fill_storage(storage: Storage, stream: BinaryIO) -> None:
    """Read a storage of the old format: the number of its values, then the values."""
    length = int.from_bytes(stream.read(8), "little")
    if length != storage.length:
        raise ValueError(f"a storage of {length} values in place of {storage.length}")
    if length:
        values = torch.empty(0, dtype=torch.uint8).set_(storage.data).numpy()
        if stream.readinto(values) != len(values):  # type: ignore[attr-defined]
            raise EOFError("the file ends within a storage")


def _read_safetensors(file: Path) -> dict[str, Any]:
    description = file.with_suffix(".json")
    if not description.is_file():
        raise MissingInput(f"{description}: no such file; it says which model the weights of {file} are for")
    text = description.read_bytes()
    if what := mistaken(text[:HEAD]):
        raise InputError(f"{description}: {what}")
    try:
        state = json.loads(text.decode("utf-8-sig"))
        check_extent(state, allowance(len(text)))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{description}: is not JSON ({reason_of(error)})") from error
    except Refused as error:
        raise InputError(f"{description}: refused, because it {error}") from error
    if not isinstance(state, dict) or not isinstance(state.get("cfg"), dict):
        raise InputError(f"{description}: holds no configuration (cfg), so its model is unknown")
    try:
        whole = whole_checkpoint(safetensors.torch.load_file(file), state["cfg"])
    except Exception as error:  # such as KeyError, for number types that torch does not know
        reason = reason_of(error, read_head(file))
        raise InputError(f"{file}: is cut off, damaged or no safetensors file ({reason})") from error
    return whole | {"task_state": state.get("task_state", {})}


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
