"""Safe reading of files of weights: code in a file is never run.

A file can build only plain values, tensors and few other types (see `safe_pickle`). Reading takes no more memory than
the file's size.
"""

from __future__ import annotations

import io
import struct
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

from narvl_plugin.checkpoints.unpickling import NOT_NEEDED, CheckpointUnpickler, Storage
from narvl_plugin.data.mistaken_files import PICKLE, ZIP, as_text, mistaken, read_head
from narvl_plugin.data.plain_pickles import reason_of
from narvl_plugin.errors import InputError
from narvl_plugin.safe_pickle import PlainUnpickler, Refused, allowance, brief, check_extent

SAFETENSORS_SUFFIX = ".safetensors"

LARGEST_PICKLE = 2**23
"""Largest size of a checkpoint's pickle, without the values of tensors, in bytes. It allows some 40,000 tensors."""

LARGEST_HEADER = 2**23
"""Largest size of the header of a file of safetensors, in bytes. It allows some 60,000 tensors."""

OLD_FORMAT = torch.serialization.MAGIC_NUMBER.to_bytes(10, "little")
"""Content of the first pickle in a file of torch before 1.6."""


def read_file(file: Path) -> Any:
    """Return the content of a file of torch.save or of safetensors. Its tensors are mapped from the file.

    Raises:
        InputError: if the file is cut off, damaged, compressed or of another kind, or if it asks for types, functions
            or a number of values that no checkpoint of its size needs.
    """
    head = check_head(file)
    with naming_damage(file, head):
        if file.suffix == SAFETENSORS_SUFFIX:
            return _read_safetensors(file, head)
        if head.startswith(ZIP):  # torch's format since 1.6
            return _read_archive(file)
        return _read_old_format(file)


@contextmanager
def naming_damage(file: Path, head: bytes) -> Iterator[None]:
    """Name the file in each error of reading it.

    Args:
        file: the file.
        head: its first bytes.

    Raises:
        InputError: if the block raises an error.
    """
    try:
        yield
    except InputError:
        raise
    except Refused as error:
        raise InputError(f"{file}: refused, because it {error}") from error
    except Exception as error:  # a damaged file raises nearly anything
        reason = reason_of(error, head)
        raise InputError(
            f"{file}: is damaged or no checkpoint of fairseq ({reason}); copy or download it again"
        ) from error


def check_head(file: Path) -> bytes:
    """Return the first bytes of a file.

    Raises:
        InputError: if they show that it is not a checkpoint. The message has the kind of the file.
    """
    head = read_head(file)
    if not head:
        raise InputError(f"{file}: is cut off: it is empty; copy or download it again")
    is_safetensors = head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < file.stat().st_size
    if is_safetensors and file.suffix != SAFETENSORS_SUFFIX:
        raise InputError(
            f"{file}: is a safetensors file; name it NAME{SAFETENSORS_SUFFIX}, and put NAME.json, with the model's "
            "configuration, beside it"
        )
    if is_safetensors:  # whose first byte may be that of a pickle
        return head
    what = mistaken(head, () if file.suffix == SAFETENSORS_SUFFIX else (ZIP, PICKLE))
    if what is None and head.startswith(PICKLE) and OLD_FORMAT not in head:
        what = "is damaged or no checkpoint: it is a pickle of Python, not as torch.save writes it"
    if what is None and head.lstrip()[:1] in (b"{", b"["):
        what = "is JSON, not a checkpoint; give the file of the weights"
    if what is None and as_text(head) and b"\t" in head:
        what = "is a table of text (TSV), not a checkpoint; check the order of the files"
    if what is not None:
        raise InputError(f"{file}: {what}")
    return head


def _read_safetensors(file: Path, head: bytes) -> dict[str, torch.Tensor]:
    if int.from_bytes(head[:8], "little") > LARGEST_HEADER:
        raise InputError(f"{file}: has a header of more than {LARGEST_HEADER:,} bytes, which no checkpoint needs")
    try:
        return safetensors.torch.load_file(file)
    except Exception as error:  # such as KeyError, for number types that torch does not know
        raise InputError(f"{file}: is cut off, damaged or no safetensors file ({reason_of(error, head)})") from error


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
