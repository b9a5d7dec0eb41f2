"""Hostile, damaged and harmless files."""

import argparse
import copy
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.data.plain_pickles import read_pickle
from narvl_plugin.errors import InputError, MissingInput


class Command:
    """Unpickled the plain way, it runs a command."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.file}",)


class Evaluation:
    """Unpickled the plain way, it evaluates an expression."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return eval, ("print('run')",)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    file = tmp_path / "checkpoint.pt"
    torch.save({"cfg": {"model": argparse.Namespace(arch="ofa_base")}, "model": {"w": torch.arange(5000.0)}}, file)
    return file


class TestCheckpoint:
    @pytest.mark.parametrize("new_format", [True, False], ids=["zip", "before torch 1.6"])
    def test_is_read(self, tmp_path: Path, new_format: bool) -> None:
        state = {
            "cfg": {"model": argparse.Namespace(arch="ofa_base")},
            "model": {"w": torch.arange(3.0)},
            "extra_state": {"best": np.float64(0.5), "meters": [(1, "x", None)]},
        }
        torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=new_format)
        read = read_checkpoint(tmp_path / "a.pt")
        assert read["cfg"] == state["cfg"] and read["extra_state"] == state["extra_state"]
        assert torch.equal(read["model"]["w"], torch.arange(3.0))

    @pytest.mark.parametrize("new_format", [True, False], ids=["zip", "before torch 1.6"])
    def test_that_would_run_a_command_is_refused(self, tmp_path: Path, new_format: bool) -> None:
        hostile = {"model": {"w": torch.zeros(1)}, "cfg": Command(tmp_path / "ran")}
        torch.save(hostile, tmp_path / "a.pt", _use_new_zipfile_serialization=new_format)
        with pytest.raises(InputError, match=rf"a.pt: refused, because it asks for {os.name}.system"):
            read_checkpoint(tmp_path / "a.pt")
        assert not (tmp_path / "ran").exists()

    def test_that_would_evaluate_an_expression_is_refused_whatever_the_environment_says(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        torch.save({"model": Evaluation()}, tmp_path / "a.pt")
        with pytest.raises(InputError, match="asks for eval, which no checkpoint needs"):
            read_checkpoint(tmp_path / "a.pt")

    def test_of_a_type_that_is_not_on_the_list_is_refused(self, tmp_path: Path) -> None:
        torch.save({"model": {}, "cfg": Path("x")}, tmp_path / "a.pt")
        with pytest.raises(InputError, match="asks for pathlib"):
            read_checkpoint(tmp_path / "a.pt")

    @pytest.mark.parametrize("kept", [0.3, 0.99])
    def test_that_is_cut_off_is_refused(self, checkpoint: Path, kept: float) -> None:
        data = checkpoint.read_bytes()
        checkpoint.write_bytes(data[: int(len(data) * kept)])
        with pytest.raises(InputError, match="checkpoint.pt: is cut off or damaged"):
            read_checkpoint(checkpoint)

    def test_with_a_changed_byte_is_refused(self, checkpoint: Path) -> None:
        data = bytearray(checkpoint.read_bytes())
        data[len(data) // 2] ^= 1
        checkpoint.write_bytes(data)
        with pytest.raises(InputError, match="checkpoint.pt: is damaged: checksum of .* is wrong"):
            read_checkpoint(checkpoint)

    @pytest.mark.parametrize("content", [b"", b"no checkpoint", b"\x80\x04.", b"PK"])
    def test_that_is_none_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.pt").write_bytes(content)
        with pytest.raises(InputError, match="a.pt: is (damaged|cut off)"):
            read_checkpoint(tmp_path / "a.pt")

    def test_of_another_shape_is_refused(self, tmp_path: Path) -> None:
        torch.save([1, 2], tmp_path / "a.pt")
        with pytest.raises(InputError, match="holds a list"):
            read_checkpoint(tmp_path / "a.pt")

    def test_must_exist(self, tmp_path: Path) -> None:
        with pytest.raises(MissingInput, match="gone.pt"):
            read_checkpoint(tmp_path / "gone.pt")


class TestPickle:
    def test_of_plain_types_is_read(self, tmp_path: Path) -> None:
        answers = {"yes": 0, "no": 1, "nested": [1.5, None, ("a", {"b"})]}
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(answers))
        assert read_pickle(tmp_path / "a.pkl") == answers

    @pytest.mark.parametrize(
        "content",
        [
            b"(lp0\n(dp1\nS'sent'\np2\nVcaf\xe9\np3\nsS'raw'\np4\nS'caf\\xc3\\xa9'\np5\nsS'sent_id'\np6\nL7L\nsa.",
            b"\x80\x02]q\x00}q\x01(U\x04sentX\x05\x00\x00\x00caf\xc3\xa9U\x03rawU\x05caf\xc3\xa9U\x07sent_idK\x07ua.",
        ],
        ids=["text", "binary"],
    )
    def test_of_python_2_is_read_as_text(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "refs(unc).p").write_bytes(content)
        assert read_pickle(tmp_path / "refs(unc).p") == [{"sent": "café", "raw": "café", "sent_id": 7}]

    def test_of_python_2_in_another_encoding_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.p").write_bytes(b"S'caf\\xe9'\n.")
        with pytest.raises(InputError, match="a.p: is damaged or no pickle .*utf-8"):
            read_pickle(tmp_path / "a.p")

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_that_would_run_a_command_is_refused(self, tmp_path: Path, protocol: int) -> None:
        file = tmp_path / "trainval_ans2label.pkl"
        file.write_bytes(pickle.dumps({"yes": Command(tmp_path / "ran")}, protocol=protocol))
        with pytest.raises(InputError, match=rf"trainval_ans2label.pkl: refused, because it asks for {os.name}.system"):
            read_pickle(file)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("content", [b"", b"text", pickle.dumps([1, 2, 3])[:-3]])
    def test_that_is_damaged_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.pkl").write_bytes(content)
        with pytest.raises(InputError, match="a.pkl: is damaged or no pickle"):
            read_pickle(tmp_path / "a.pkl")

    def test_must_exist(self, tmp_path: Path) -> None:
        with pytest.raises(MissingInput, match="gone.pkl"):
            read_pickle(tmp_path / "gone.pkl")

    def test_a_file_of_any_size_is_not_read(self, tmp_path: Path) -> None:
        with (tmp_path / "a.pkl").open("wb") as file:
            file.truncate(1 << 40)  # takes no room on the disk
        with pytest.raises(InputError, match=r"a\.pkl: has 1,099,511,627,776 bytes; at most"):
            read_pickle(tmp_path / "a.pkl")

    def test_of_the_published_answers_is_read(self, goldens: Path) -> None:
        answers = read_pickle(goldens / "data" / "trainval_ans2label.pkl")
        assert isinstance(answers, dict) and all(isinstance(label, int) for label in answers.values())


def repacked(source: Path, out: Path, compression: int = zipfile.ZIP_STORED, **changes: bytes) -> Path:
    """Pack the members of an archive anew, as programs for archives do; `changes` have other bytes, by last name."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, changes.get(name.rpartition("/")[2], old.read(name)))
    return out


class TestArchive:
    @pytest.fixture
    def values(self) -> dict[str, Tensor]:
        kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
        return {str(kind): torch.randint(0, 2, (3, index + 5)).to(kind) for index, kind in enumerate(kinds)}

    @pytest.fixture
    def archive(self, tmp_path: Path, values: dict[str, Tensor]) -> Path:
        torch.save({"model": values}, tmp_path / "saved.pt")
        return tmp_path / "saved.pt"

    @staticmethod
    def assert_is_read(file: Path, values: dict[str, Tensor]) -> None:
        model = read_checkpoint(file)["model"]
        assert all(
            torch.equal(model[name], value) and model[name].dtype == value.dtype for name, value in values.items()
        )

    @pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_that_is_recompressed_is_refused(self, archive: Path, tmp_path: Path, compression: int) -> None:
        with pytest.raises(InputError, match=r"a\.pt: saved/\S+ in it is compressed"):
            read_checkpoint(repacked(archive, tmp_path / "a.pt", compression))

    def test_of_which_one_member_is_recompressed_is_refused(self, archive: Path, tmp_path: Path) -> None:
        with zipfile.ZipFile(archive) as old, zipfile.ZipFile(tmp_path / "a.pt", "w") as new:
            for name in old.namelist():
                kind = zipfile.ZIP_DEFLATED if name.endswith("data/1") else zipfile.ZIP_STORED
                new.writestr(name, old.read(name), kind)
        with pytest.raises(InputError, match=r"a\.pt: saved/data/1 in it is compressed"):
            read_checkpoint(tmp_path / "a.pt")

    def test_that_is_packed_anew_without_compression_is_read(
        self, archive: Path, tmp_path: Path, values: dict[str, Tensor]
    ) -> None:
        for shift in range(1, 9):  # whoever packs it anew does not align the numbers
            folder = "x" * shift
            with zipfile.ZipFile(archive) as old, zipfile.ZipFile(tmp_path / "a.pt", "w") as new:
                for name in old.namelist():
                    new.writestr(name.replace("saved", folder), old.read(name))
            self.assert_is_read(tmp_path / "a.pt", values)
            model = read_checkpoint(tmp_path / "a.pt")["model"]
            assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in model.values())

    def test_with_a_comment_or_behind_another_archive_is_read(self, archive: Path, values: dict[str, Tensor]) -> None:
        with zipfile.ZipFile(archive, "a") as changed:
            changed.comment = b"a comment"
        archive.write_bytes(archive.read_bytes()[:77] + archive.read_bytes())
        self.assert_is_read(archive, values)

    def test_that_expands_beyond_the_file_is_refused_at_once(self, archive: Path, tmp_path: Path) -> None:
        bomb = repacked(archive, tmp_path / "a.pt", zipfile.ZIP_DEFLATED, **{"0": bytes(10**8)})
        assert bomb.stat().st_size < 10**6
        with pytest.raises(InputError, match="in it is compressed"):
            read_checkpoint(bomb)

    def test_whose_members_share_bytes_is_refused(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            archive.writestr("a/data.pkl", bytes(1000))
            archive.filelist += [copy.copy(archive.filelist[0]) for _ in range(9)]
            for index, member in enumerate(archive.filelist[1:]):
                member.filename = f"a/data.pk{index}"
        with pytest.raises(InputError, match=r"a\.pt: is damaged"):
            read_checkpoint(tmp_path / "a.pt")

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_with_two_members_of_one_name_is_refused(self, archive: Path) -> None:
        with zipfile.ZipFile(archive, "a") as changed:
            changed.writestr("saved/data/0", b"other")
        with pytest.raises(InputError, match="saved.pt: is damaged: it holds saved/data/0 twice"):
            read_checkpoint(archive)

    @pytest.mark.parametrize(
        ("place", "value"),
        [(6, b"\1"), (8, b"\10"), (26, b"\xff\0"), (28, b"\0\0"), (28, b"\xff\xff"), (30, b"x")],
        ids=["encrypted", "compressed", "name's length", "no padding", "padding", "name"],
    )
    def test_whose_headers_disagree_is_refused_or_read_right(
        self, archive: Path, values: dict[str, Tensor], place: int, value: bytes
    ) -> None:
        with zipfile.ZipFile(archive) as opened:
            header = opened.getinfo("saved/data/1").header_offset
        data = bytearray(archive.read_bytes())
        data[header + place : header + place + len(value)] = value
        archive.write_bytes(data)
        try:
            self.assert_is_read(archive, values)
        except InputError as error:
            assert "saved.pt: is " in str(error)

    def test_that_is_encrypted_is_refused(self, archive: Path) -> None:
        data = bytearray(archive.read_bytes())
        for place in (found.start() for found in re.finditer(b"PK\1\2", bytes(data))):
            data[place + 8] |= 1
        for place in (found.start() for found in re.finditer(b"PK\3\4", bytes(data))):
            data[place + 6] |= 1
        archive.write_bytes(data)
        with pytest.raises(InputError, match=r"saved\.pt: is .* encrypted"):
            read_checkpoint(archive)

    def test_of_another_byte_order_is_refused(self, archive: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="a.pt: was written on a machine with another byte order"):
            read_checkpoint(repacked(archive, tmp_path / "a.pt", byteorder=b"big"))

    def test_without_a_description_is_refused(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            archive.writestr("a/model.txt", "x")
        with pytest.raises(InputError, match=r"a\.pt: is no checkpoint: it contains no data\.pkl"):
            read_checkpoint(tmp_path / "a.pt")

    def test_with_a_description_beyond_all_use_is_refused(self, archive: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"checkpoint: it must contain one data\.pkl of at most 8388608 bytes"):
            read_checkpoint(repacked(archive, tmp_path / "a.pt", **{"data.pkl": b")" * (2**23 + 1)}))


class Forged:
    """A tensor at a place of its own choosing within the storage of 6 values."""

    def __init__(self, *place: object) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        storage = torch.arange(6.0).untyped_storage()
        typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
        return torch._utils._rebuild_tensor_v2, (typed, *self.place)


class TestTensors:
    @pytest.mark.parametrize("new_format", [True, False], ids=["zip", "before torch 1.6"])
    @pytest.mark.parametrize(
        "place",
        [
            (0, (7,), (1,)),
            (1, (6,), (1,)),
            (-1, (2,), (1,)),
            (0, (2, 3), (4, 1)),
            (5, (2,), (-1,)),
            (0, (-2,), (1,)),
            (0, (10**6, 10**6), (0, 0)),
            (0, (2**63,), (0,)),
            (0, (2,), (2**62,)),
            (2**62, (1,), (1,)),
            (0, (2, 3), (1,)),
            (0, [6], [1]),
            (0, (1,) * 200, (1,) * 200),
            (0, (2.0,), (1,)),
            ("0", (2,), (1,)),
        ],
    )
    def test_outside_their_storage_are_refused(
        self, tmp_path: Path, place: tuple[object, ...], new_format: bool
    ) -> None:
        forged = Forged(*place, False, OrderedDict())
        torch.save({"model": {"w": forged}}, tmp_path / "a.pt", _use_new_zipfile_serialization=new_format)
        with pytest.raises(InputError, match=r"a\.pt: is damaged or no checkpoint of fairseq \(a tensor"):
            read_checkpoint(tmp_path / "a.pt")

    @pytest.mark.parametrize("new_format", [True, False], ids=["zip", "before torch 1.6"])
    def test_of_any_layout_are_read(self, tmp_path: Path, new_format: bool) -> None:
        whole = torch.arange(24.0).reshape(2, 3, 4)
        views = {
            "t": whole.transpose(0, 2),
            "row": whole[1, ::2],
            "one": whole[1, 1, 1],
            "none": whole[:, :0],
            "all": whole,
        }
        torch.save({"model": views}, tmp_path / "a.pt", _use_new_zipfile_serialization=new_format)
        read = read_checkpoint(tmp_path / "a.pt")["model"]
        assert all(torch.equal(read[name], view) for name, view in views.items())
        assert read["t"].stride() == views["t"].stride()
        assert read["t"].data_ptr() == read["all"].data_ptr()

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize(
        "make",
        [
            lambda: torch.eye(2).to_sparse(),
            lambda: torch.eye(2).to_sparse_csr(),
            lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            lambda: torch.empty(2**40, device="meta"),
            lambda: torch.ones(2, dtype=torch.complex64),
            lambda: torch.ones(2, dtype=torch.complex64).conj(),
            lambda: torch.ones(2).to(torch.float8_e4m3fn),
            lambda: torch.ones(2, dtype=torch.uint16),
            lambda: torch.ones(2).untyped_storage(),
        ],
        ids=["sparse", "csr", "quantized", "meta", "complex", "conj", "float8", "uint16", "storage"],
    )
    def test_that_are_not_dense_or_of_plain_numbers_are_refused(
        self, tmp_path: Path, make: Callable[[], object]
    ) -> None:
        torch.save({"extra_state": {"x": make()}}, tmp_path / "a.pt")
        with pytest.raises(InputError, match=r"a\.pt: (refused|is damaged)"):
            read_checkpoint(tmp_path / "a.pt")

    def test_whose_storage_is_of_another_size_are_refused(self, checkpoint: Path, tmp_path: Path) -> None:
        for size in (19_999, 20_004, 0):
            with pytest.raises(InputError, match=f"the storage 0 of {size} bytes in place of 20000"):
                read_checkpoint(repacked(checkpoint, tmp_path / "a.pt", **{"0": bytes(size)}))

    def test_before_torch_1_6_take_no_more_memory_than_the_file(self, tmp_path: Path) -> None:
        torch.save({"model": {"w": torch.ones(5)}}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
        data = (tmp_path / "a.pt").read_bytes()
        assert data.count(b"K\x05Nt") == 1
        (tmp_path / "a.pt").write_bytes(data.replace(b"K\x05Nt", b"\x8a\x05\0\0\0\0\x10Nt"))
        with pytest.raises(InputError, match="storages larger than the file"):
            read_checkpoint(tmp_path / "a.pt")

    def test_before_torch_1_6_must_be_there(self, tmp_path: Path) -> None:
        torch.save({"model": {"w": torch.ones(5)}}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
        data = (tmp_path / "a.pt").read_bytes()
        for damaged in (data[:-1], data[:-20], data[:-28] + bytes(28)):
            (tmp_path / "a.pt").write_bytes(damaged)
            with pytest.raises(InputError, match=r"a\.pt: is damaged"):
                read_checkpoint(tmp_path / "a.pt")


class TestParts:
    @pytest.mark.parametrize(
        ("state", "message"),
        [
            ({"model": [1]}, "its model is a list"),
            ({"model": {"w": 1}}, "its model is not a dict of tensors by name"),
            ({"model": {1: torch.ones(1)}}, "its model is not a dict of tensors by name"),
            ({"cfg": ["x"]}, "its cfg is a list"),
            ({"args": {"arch": "x"}}, "its args is a dict"),
            ({"extra_state": 3}, "its extra_state is a int"),
            ({"task_state": ()}, "its task_state is a tuple"),
            ({"optimizer_history": {}}, "its optimizer_history is a dict"),
        ],
    )
    def test_of_another_type_are_refused(self, tmp_path: Path, state: dict[str, object], message: str) -> None:
        torch.save(state, tmp_path / "a.pt")
        with pytest.raises(InputError, match=f"a.pt: is no checkpoint of fairseq: {message}"):
            read_checkpoint(tmp_path / "a.pt")

    @pytest.mark.parametrize(
        "state",
        [
            {"cfg": {"a": {"x": "${oc.env:HOME}"}}},
            {"cfg": {f"a{index}": f"${{a{index + 1}}}${{a{index + 1}}}" for index in range(60)}},
            {"cfg": {"model": argparse.Namespace(x=["a ${b}"])}},
            {"args": argparse.Namespace(x="${a}")},
            {"task_state": {"members": {"x": {"data": "${a}"}}}},
        ],
    )
    def test_that_refer_to_other_values_are_refused(self, tmp_path: Path, state: dict[str, object]) -> None:
        torch.save(state, tmp_path / "a.pt")
        with pytest.raises(InputError, match=r"refused, because its \w+ refers to other values: .*\$\{"):
            read_checkpoint(tmp_path / "a.pt")

    @pytest.mark.parametrize(
        ("description", "message"),
        [
            ('{"cfg": ' + '{"a": ' * 200 + "1" + "}" * 201, "nests lists more than 100 deep"),
            ('{"cfg": ' + "[" * 100_000, "is not JSON"),
            ('{"cfg": {"a": ' + "9" * 5000 + "}}", "is not JSON"),
            ('{"cfg": {"a": "\\ud800"}}', "is not JSON"),
            ('{"cfg": {"a": [' + "1," * 30_000 + "1]}}", "its cfg unfolds to more than 20000 values"),
        ],
        ids=["deep", "very deep", "number", "half a surrogate pair", "many"],
    )
    def test_in_json_are_limited_too(self, tmp_path: Path, description: str, message: str) -> None:
        safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
        (tmp_path / "a.json").write_text(description)
        with pytest.raises(InputError, match=message):
            read_checkpoint(tmp_path / "a.safetensors")


def test_safetensors_may_begin_like_a_pickle(tmp_path: Path) -> None:
    weights = {"w" * length: torch.ones(2) for length in range(1, 40)}
    for number in range(1, len(weights) + 1):  # one of these headers is 0x80 bytes long, or more by a multiple of 256
        file = tmp_path / f"{number}.safetensors"
        safetensors.torch.save_file(dict(list(weights.items())[:number]), file)
        (tmp_path / f"{number}.json").write_text('{"cfg": {}}')
        assert len(read_checkpoint(file)["model"]) == number
    assert any(file.read_bytes()[:1] == b"\x80" for file in tmp_path.glob("*.safetensors"))
