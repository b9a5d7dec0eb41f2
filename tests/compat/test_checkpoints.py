"""Repairs of how fairseq reads and writes checkpoints, each against the call that fails without it."""

import argparse
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import CheckpointConfig
from fairseq.file_io import PathManager

from narvl_plugin.errors import InputError, MissingInput


class Attack:
    """Unpickled, it would raise what it was told to."""

    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("raise SystemExit",)


class TestCheckpointTypes:
    @pytest.mark.parametrize(
        "value",
        [
            argparse.Namespace(arch="ofa_base", sizes=[1, 2]),
            np.float64(0.5),
            np.float32(0.5),
            np.int64(3),
            np.bool_(True),
            np.arange(3.0),
        ],
        ids=repr,
    )
    def test_are_read(self, tmp_path: Path, value: object) -> None:
        history = [{"optimizer_name": "Adam", "lr_scheduler_state": {}, "num_updates": 1}]
        extra = {"best": value, "train_iterator": {"epoch": 1}}
        state = {"cfg": None, "args": None, "model": {}, "optimizer_history": history, "extra_state": extra}
        torch.save(state, tmp_path / "checkpoint.pt")
        read = checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint.pt"))["extra_state"]["best"]
        assert type(read) is type(value)
        assert np.all(read == value)

    def test_weights_of_another_tool_say_no_options(self, tmp_path: Path) -> None:
        torch.save({"model": {"weight": torch.zeros(1)}, "optimizer": {}}, tmp_path / "other.pt")
        with pytest.raises(InputError, match=r"other\.pt: is no checkpoint of fairseq: it holds no options"):
            checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "other.pt"))

    def test_others_are_still_refused(self, tmp_path: Path) -> None:
        torch.save({"model": Attack()}, tmp_path / "checkpoint.pt")
        with pytest.raises(InputError, match="asks for exec"):
            checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "checkpoint.pt"))

    def test_a_missing_one_to_start_from_is_an_error_of_the_user(self, tmp_path: Path) -> None:
        cfg = CheckpointConfig(save_dir=str(tmp_path), finetune_from_model=str(tmp_path / "gone.pt"))
        with pytest.raises(MissingInput, match=r"--finetune-from-model .*gone\.pt does not exist; give the checkpoint"):
            checkpoint_utils.load_checkpoint(cfg, SimpleNamespace(checkpoint_suffix=""))

    def test_are_refused_by_torch_alone(self, tmp_path: Path) -> None:
        torch.save({"cfg": {"model": argparse.Namespace()}}, tmp_path / "checkpoint.pt")
        script = f"import torch; torch.load({str(tmp_path / 'checkpoint.pt')!r})"
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert "Unsupported global: GLOBAL argparse.Namespace" in run.stderr


class TestCopies:
    def test_appear_at_once(self, tmp_path: Path) -> None:
        new, last = tmp_path / "checkpoint1.pt", tmp_path / "checkpoint_last.pt"
        new.write_bytes(b"new")
        last.write_bytes(b"old")
        with last.open("rb") as opened:
            PathManager.copy(str(new), str(last), overwrite=True)
            assert opened.read() == b"old"
        assert last.read_bytes() == b"new"
        assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, last.name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"restore_file": "gone.pt"}, r"^gone\.pt: no such checkpoint"),
        ({"restore_file": "there.pt/"}, r"^there\.pt/: is a file; leave out the slash at the end$"),
        ({"restore_file": "there.pt", "finetune_from_model": "there.pt"}, r"can not be specified together; leave one"),
        (
            {"reset_optimizer": True, "finetune_from_model": "there.pt"},
            r"can not be set together .*; leave one of them",
        ),
    ],
)
def test_a_training_does_not_start_anew_where_its_checkpoint_is_missing_or_named_twice(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.pt").write_bytes(b"")
    trainer = SimpleNamespace(checkpoint_suffix="", load_checkpoint=None)
    with pytest.raises(InputError, match=message):
        checkpoint_utils.load_checkpoint(CheckpointConfig(save_dir=str(tmp_path), **options), trainer)


def test_a_training_that_wrote_no_checkpoint_may_begin_under_the_name_of_its_last(tmp_path: Path) -> None:
    asked = []

    def load(name: str, *_: object, **__: object) -> None:
        asked.append(name)
        raise KeyboardInterrupt

    trainer = SimpleNamespace(checkpoint_suffix="", load_checkpoint=load)
    cfg = CheckpointConfig(restore_file=str(tmp_path / "checkpoint_last.pt"))
    with pytest.raises(KeyboardInterrupt):
        checkpoint_utils.load_checkpoint(cfg, trainer)
    assert asked == [cfg.restore_file]


def test_a_model_is_not_named_like_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(MissingInput, match=r"a\.pt/: is a file; leave out the slash"):
        checkpoint_utils.load_model_ensemble_and_task([f"{tmp_path}/a.pt/"], task=object())
