"""Hostile, damaged and harmless files."""

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.safe_reading import read_checkpoint, read_pickle


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

    def test_of_the_published_answers_is_read(self, goldens: Path) -> None:
        answers = read_pickle(goldens / "data" / "trainval_ans2label.pkl")
        assert isinstance(answers, dict) and all(isinstance(label, int) for label in answers.values())
