"""Pickles that ask for too much, each in a file of answers and in checkpoints of both formats."""

import argparse
import io
import pickle
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.data.plain_pickles import read_pickle
from narvl_plugin.errors import InputError

Read = Callable[[bytes], Any]


class Call:
    """Pickled as a call of a function, and with a state if one is given."""

    def __init__(self, *call: Any, state: Any = None) -> None:
        self.call, self.state = call, state

    def __reduce__(self) -> tuple[Any, ...]:
        function, *arguments = self.call
        return function, tuple(arguments), *([] if self.state is None else [self.state])


def text(value: str) -> bytes:
    """Return what pushes a text."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def named(module: str, name: str) -> bytes:
    """Return what pushes a function."""
    return f"c{module}\n{name}\n".encode()


def doubled(times: int, first: bytes = b"K\x01\x85", pair: bytes = b"0h%ch%c\x86") -> bytes:
    """Return what pushes a pair of one pair, that of another, and so on: as many values as 2 to the power of times."""
    steps = [first, *(pair % (index, index) for index in range(times))]
    return b"".join(step + b"q" + bytes([index]) for index, step in enumerate(steps))


def archive_of(pickled: bytes) -> bytes:
    """Return a checkpoint in torch's format that holds no tensors."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    return stream.getvalue()


def old_format_of(pickled: bytes) -> bytes:
    """Return a checkpoint in the format before torch 1.6 that holds no tensors."""
    header = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True}]
    return b"".join([*(pickle.dumps(part, 2) for part in header), pickled, pickle.dumps([], 2)])


@pytest.fixture(params=["zip", "before torch 1.6"])
def read_value(request: pytest.FixtureRequest, tmp_path: Path) -> Read:
    """Give a function that reads a checkpoint with a value, written as operations, under `x`."""
    wrapped = archive_of if request.param == "zip" else old_format_of

    def read(operations: bytes) -> Any:
        (tmp_path / "a.pt").write_bytes(wrapped(b"\x80\x02}" + text("x") + operations + b"s."))
        return read_checkpoint(tmp_path / "a.pt")["x"]

    return read


@pytest.fixture(params=["answers", "zip", "before torch 1.6"])
def read_any(request: pytest.FixtureRequest, tmp_path: Path) -> Read:
    """Give a function that reads a value, written as operations, as a pickle or in a checkpoint."""

    def read(operations: bytes) -> Any:
        if request.param == "answers":
            (tmp_path / "a.pt").write_bytes(b"\x80\x02" + operations + b".")
            return read_pickle(tmp_path / "a.pt")
        wrapped = archive_of if request.param == "zip" else old_format_of
        (tmp_path / "a.pt").write_bytes(wrapped(b"\x80\x02}" + text("x") + operations + b"s."))
        return read_checkpoint(tmp_path / "a.pt")["x"]

    return read


FORGED = {
    "an array of pointers": Call(np.ndarray, (1,), "O8", b"A" * 8),
    "an array of numbers by hand": Call(np.ndarray, (1,), "f8", b"A" * 8),
    "a type of objects": np.dtype("O"),
    "a type of objects with its order": Call(np.dtype, "|O8", False, True),
    "a type of fields": np.dtype([("a", "f8"), ("b", "O")]),
    "a type of text": np.dtype("U5"),
    "a type of dates": np.dtype("M8[s]"),
    "a type of bytes": np.dtype("V8"),
    "a type whose state has fields": Call(
        np.dtype, "f8", False, True, state=(3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 27)
    ),
    "a type whose state is of objects": Call(np.dtype, "f8", False, True, state=(3, "|", None, None, None, -1, -1, 63)),
    "a type in another byte order": np.dtype(">f8"),
    "a number of objects": Call(np._core.multiarray.scalar, np.dtype("O"), "x"),
    "a number that is too short": Call(np._core.multiarray.scalar, np.dtype("f8"), b"A" * 4),
    "a number that is too long": Call(np._core.multiarray.scalar, np.dtype("f8"), b"A" * 16),
    "a number without a type": Call(np._core.multiarray.scalar, "f8", b"A" * 8),
    "an array of objects": np.array([{}, None], dtype=object),
    "an array whose state is of objects": Call(
        np._core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, (1,), np.dtype("O"), False, b"A" * 8)
    ),
    "an array of another class": Call(np._core.multiarray._reconstruct, np.matrix, (0,), b"b"),
    "an array that is too large": Call(
        np._core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, (2**40,), np.dtype("f8"), False, b"A" * 8)
    ),
    "an array of less than nothing": Call(
        np._core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, (-1,), np.dtype("f8"), False, b"A" * 8)
    ),
    "an array of no rows of many columns": Call(
        np._core.multiarray._reconstruct,
        *(np.ndarray, (0,), b"b"),
        state=(1, (0, 2**62, 2**62), np.dtype("f8"), False, b""),
    ),
    "an array of a list": Call(
        np._core.multiarray._reconstruct, np.ndarray, (0,), b"b", state=(1, (1,), np.dtype("f8"), False, [1.0])
    ),
    "a bare type": np.float64,
    "a bare array type": np.ndarray,
    "much memory": Call(bytearray, 10**12),
}


class TestNumpy:
    @pytest.mark.parametrize("protocol", [2, 4])
    @pytest.mark.parametrize("name", FORGED)
    def test_forged_objects_are_refused(self, tmp_path: Path, name: str, protocol: int) -> None:
        torch.save({"x": FORGED[name]}, tmp_path / "a.pt", pickle_protocol=protocol)
        with pytest.raises(InputError, match=r"a\.pt: (refused|is damaged)"):
            read_checkpoint(tmp_path / "a.pt")

    @pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
    def test_numbers_are_read_under_the_names_of_both_versions(self, read_value: Read, module: str) -> None:
        dtype = named("numpy", "dtype") + b"(" + text("f8") + b"\x89\x88tR(K\x03" + text("<") + b"NNN"
        dtype += b"J\xff\xff\xff\xff" * 2 + b"K\x00tb"
        data = b"(" + text(struct.pack("<d", 0.5).decode("latin1")) + text("latin1") + b"t"
        number = read_value(named(module, "scalar") + b"(" + dtype + named("_codecs", "encode") + data + b"RtR")
        assert type(number) is np.float64 and number == 0.5

    @pytest.mark.parametrize("kind", ["b1", "i1", "i4", "i8", "u1", "u8", "f2", "f4", "f8"])
    def test_numbers_and_arrays_of_plain_types_are_read(self, tmp_path: Path, kind: str) -> None:
        array = np.arange(6).reshape(2, 3).astype(kind)
        torch.save({"x": array, "y": array.T, "z": array[1, 1]}, tmp_path / "a.pt")
        read = read_checkpoint(tmp_path / "a.pt")
        for name, expected in {"x": array, "y": array.T, "z": array[1, 1]}.items():
            assert type(read[name]) is type(expected) and read[name].dtype == expected.dtype
            assert np.array_equal(read[name], expected)


class TestKeys:
    @pytest.mark.parametrize(
        "operations",
        [
            b"}" + doubled(24) + b"Ns",
            b"}(" + doubled(24) + b"Nu",
            b"(" + doubled(24) + b"Nd",
            b"\x8f(" + doubled(24) + b"\x90",
            b"(" + doubled(24) + b"\x91",
            named("builtins", "set") + b"](" + doubled(24) + b"e\x85R",
            b"}" + doubled(24, b"(K\x01\x91", b"0(h%ch%cK\x01\x91") + b"Ns",
        ],
        ids=["setitem", "setitems", "dict", "additems", "frozenset", "set", "frozensets"],
    )
    def test_that_take_long_to_hash_are_refused(self, read_any: Read, operations: bytes) -> None:
        with pytest.raises(InputError, match="has a key of type (tuple|frozenset) that is nested"):
            read_any(operations)

    def test_whose_hashes_collide_are_refused(self, read_any: Read) -> None:
        same_hash = [index * (2**61 - 1) for index in range(3000)]
        with pytest.raises(InputError, match="has a key of type int"):
            read_any(pickle.dumps(dict.fromkeys(same_hash), 2)[2:-1])

    def test_of_storages_are_not_hashed(self, read_value: Read) -> None:
        storage = b"(" + text("storage") + named("torch", "FloatStorage") + doubled(24) + text("cpu") + b"K\x01tQ"
        with pytest.raises(InputError, match="a storage that is not named as torch does"):
            read_value(storage)

    def test_of_plain_types_are_read(self, read_any: Read) -> None:
        value = {"a": 1, 2: {"b"}, ("a", "few", 3, None): frozenset({True}), 2**40: (), b"c": None}
        assert read_any(pickle.dumps(value, 4)[2:-1]) == value


class TestExtent:
    @pytest.mark.parametrize(
        ("operations", "message"),
        [
            (doubled(80), "unfolds to more than"),
            (doubled(80, b"]", b"0](h%ch%ce"), "unfolds to more than"),
            (doubled(80, b"]", b"0}(" + text("a") + b"h%c" + text("b") + b"h%cu"), "unfolds to more than"),
            (text("a" * 9000) + b"q\x000(" + b"h\x00" * 90_000 + b"l", "unfolds to more than"),
            (b"]q\x00h\x00a", "puts one into itself"),
            (b"}q\x00K\x01h\x00s", "puts one into itself"),
            (b"](" + b"]q\x00h\x00aN0e", "puts one into itself"),
            (b")" + b"\x85" * 50_000, "nests lists more than 100 deep"),
            (b"]" * 5000 + b"a" * 4999, "nests lists more than 100 deep"),
            (b"\x8b" + struct.pack("<i", 2**20) + b"\x7f" * 2**20, "a whole number of 8388607 bits"),
            (text("a" * 10**5) + b"q\x000(" + (named("_codecs", "encode") + b"h\x00" + text("latin1") + b"\x86R") * 99
             + b"l", "copies its values again and again"),
            (b"](" + b"N" * 10**4 + b"eq\x000(" + (named("builtins", "set") + b"h\x00\x85R") * 99 + b"l",
             "copies its values again and again"),
        ],
        ids=["tuples", "lists", "dicts", "text", "list in itself", "dict in itself", "list in itself, deeper",
             "deep tuples", "deep lists", "number", "bytes copied", "sets copied"],
    )  # fmt: skip
    def test_out_of_proportion_is_refused_at_once(self, read_any: Read, operations: bytes, message: str) -> None:
        begun = time.process_time()
        with pytest.raises(InputError, match=message):
            read_any(operations)
        assert time.process_time() - begun < 2

    def test_of_namespaces_counts(self, read_value: Read) -> None:
        namespace = named("argparse", "Namespace") + b")\x81}" + text("a")
        with pytest.raises(InputError, match="nests lists more than 100 deep"):
            read_value(namespace * 2000 + b"N" + b"sb" * 2000)
        with pytest.raises(InputError, match="puts one into itself"):
            read_value(named("argparse", "Namespace") + b")\x81q\x00}" + text("a") + b"h\x00sb")
        with pytest.raises(InputError, match="copies its values again and again"):
            names = b"}(" + b"".join(text(f"k{index}") + b"N" for index in range(10**4)) + b"uq\x000("
            read_value(names + (named("argparse", "Namespace") + b")\x81h\x00b") * 99 + b"l")

    @pytest.mark.parametrize(
        "operations",
        [
            b"\x8b\xff\xff\xff\x7f",
            b"\x8e\xff\xff\xff\xff\xff\x00\x00\x00",
            b"\x8d\xff\xff\xff\xff\xff\x00\x00\x00",
            b"\x96\xff\xff\xff\xff\xff\x00\x00\x00",
            b"\x95\xff\xff\xff\xff\xff\x00\x00\x00",
            b"L" + b"9" * 10**6 + b"L\n",
            text("half a pair: ").replace(b": ", b"\xed\xa0"),
        ],
        ids=["number", "bytes", "text", "bytearray", "frame", "digits", "half a surrogate pair"],
    )
    def test_that_is_only_claimed_takes_no_memory(self, read_any: Read, operations: bytes) -> None:
        with pytest.raises(InputError, match="is damaged"):
            read_any(operations)

    def test_of_memo_places_takes_no_memory(self, read_any: Read) -> None:
        assert read_any(text("a") + b"r\xff\xff\xff\x7f") == "a"

    def test_of_a_few_shared_lists_is_read(self, read_any: Read) -> None:
        shared = list(range(1000))
        assert read_any(pickle.dumps([shared] * 20, 2)[2:-1]) == [shared] * 20

    def test_of_a_configuration_is_limited(self, tmp_path: Path) -> None:
        torch.save({"cfg": {"task": {"x": list(range(30_000))}}, "model": {}}, tmp_path / "a.pt")
        with pytest.raises(InputError, match="its cfg unfolds to more than 20000 values"):
            read_checkpoint(tmp_path / "a.pt")


class TestOperations:
    @pytest.mark.parametrize(
        "operations",
        [
            b"\x82\x01",
            b"(ios\nsystem\n",
            b"(" + text("x") + b"o",
            b"Pabc\n",
            text("abc") + b"Q",
            doubled(24) + b"Q",
            b"})R",
            text("x") + b")\x81",
            b"]}b",
            b"K\x01" + text("a") + b"Ns",
            text("a") + b"Na",
            text("a") + b"(Ne",
            b"](N\x90",
        ],
    )
    def test_on_what_they_are_not_for_are_refused(self, read_any: Read, operations: bytes) -> None:
        with pytest.raises(InputError, match="is damaged"):
            read_any(operations)

    @pytest.mark.parametrize("name", ["Namespace", "OrderedDict", "FloatStorage"])
    def test_leave_no_function_behind(self, read_value: Read, name: str) -> None:
        module = {"Namespace": "argparse", "OrderedDict": "collections", "FloatStorage": "torch"}[name]
        with pytest.raises(InputError, match="holds a (function|dtype), and only plain values are read"):
            read_value(named(module, name))

    def test_name_what_they_ask_for_on_one_line(self, read_any: Read) -> None:
        asked = text("a\nb\x1b[2J") + text("c" * 9000) + b"\x93"
        with pytest.raises(InputError, match="asks for ") as raised:
            read_any(asked)
        assert str(raised.value).isprintable() and len(str(raised.value)) < 600

    def test_of_all_that_a_checkpoint_holds_are_read(self, tmp_path: Path) -> None:
        weights = OrderedDict(a=torch.nn.Parameter(torch.ones(2)), b=torch.arange(3.0, dtype=torch.bfloat16))
        weights._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
        state = {
            "args": argparse.Namespace(arch="x", betas=(0.9, 0.98), inner=argparse.Namespace(a=[1])),
            "model": weights,
            "values": [None, True, -1, 2**40, 1.5, "é", b"\xff", (1,), {1}, frozenset()],
        }
        torch.save(state, tmp_path / "a.pt")
        read = read_checkpoint(tmp_path / "a.pt")
        assert read["args"] == state["args"] and read["values"] == state["values"]
        assert isinstance(read["model"], OrderedDict) and list(read["model"]) == ["a", "b"]
        for name, tensor in weights.items():
            assert torch.equal(read["model"][name], tensor) and read["model"][name].dtype == tensor.dtype
            assert not read["model"][name].requires_grad
