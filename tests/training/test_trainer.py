"""Our trainer is the one that trains, whichever program starts the training, and stock tasks see none of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from multiprocessing import spawn
from pathlib import Path
from types import ModuleType
from typing import Any

import fairseq_cli.train
import pytest
import torch
import yaml
from fairseq import trainer

from narvl_plugin.errors import InputError
from narvl_plugin.training.trainer import NarvlTrainer, use_trainer

ROOT = Path(__file__).parents[2]
STOCK = NarvlTrainer.__bases__[0]

OURS = "THE TRAINER IS OURS"
# A user directory that ends each process of a training where its trainer is built, and says so if that is ours.
PROBE = f"""
import narvl_plugin.registered
import torch
from narvl_plugin.training.trainer import NarvlTrainer

def end(self, cfg, *_, **__):
    device = "the CPU" if cfg.common.cpu else "GPU %d" % torch.cuda.current_device()
    # In one string, since torchrun's processes write unbuffered into one stream.
    print({OURS!r} + f" in {{cfg.distributed_training.distributed_world_size}} on {{device}}", flush=True)
    raise SystemExit(0)

NarvlTrainer.__init__ = end
"""
MODULE = ["-m", "fairseq_cli.train"]
SCRIPT = [Path(sysconfig.get_path("scripts")) / "fairseq-train"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    """Give the user directory."""
    folder = tmp_path / "probe"
    folder.mkdir()
    (folder / "__init__.py").write_text(PROBE)
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def run(folder: Path, *command: object) -> subprocess.CompletedProcess[str]:
    words = list(map(str, command))
    return subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=240)


@pytest.mark.integration
@pytest.mark.parametrize(("launcher", "processes"), [(MODULE, 1), (TORCHRUN + MODULE, 2), (TORCHRUN + SCRIPT, 2)])
def test_it_trains_under_python_m_and_torchrun(
    launcher: list[object], processes: int, options: list[object], probe: Path, tmp_path: Path
) -> None:
    command = [sys.executable, *launcher, *options, "--batch-size", 2, "--user-dir", probe]
    done = run(tmp_path, *command, "--save-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"{OURS} in {processes}") == processes, done.stdout


@pytest.mark.integration
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_under_torchrun_each_process_takes_its_own_gpu(options: list[object], probe: Path, tmp_path: Path) -> None:
    gpus = torch.cuda.device_count()
    options = [word for word in options if word != "--cpu"] + ["--batch-size", 2, "--user-dir", probe]
    command = [sys.executable, *TORCHRUN[:-1], gpus, *MODULE, *options, "--save-dir", tmp_path / "out"]
    done = run(tmp_path, *command)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(rf"{OURS} in {gpus} on GPU (\d+)", done.stdout)
    assert sorted(map(int, found)) == list(range(gpus))


def test_it_trains_under_fairseq_train(options: list[object], probe: Path, programs: Path, tmp_path: Path) -> None:
    command = [programs / "fairseq-train", *options, "--batch-size", 2, "--user-dir", probe]
    done = run(tmp_path, *command, "--save-dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(OURS) == 1


@pytest.mark.parametrize("is_early", [True, False], ids=["plugin first", "plugin last"])
def test_it_trains_under_fairseq_hydra_train(
    is_early: bool, data: str, vocabulary: Path, probe: Path, programs: Path, tmp_path: Path
) -> None:
    """Also where a configuration names the user directory alone, which is imported after the training has begun."""
    configuration: dict[str, Any] = {
        "common": {"user_dir": str(probe), "cpu": True},
        "task": {"_name": "caption", "data": data, "bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 32},
        "model": {
            **{"_name": "narvl", "encoder_embed_dim": 16, "encoder_ffn_embed_dim": 32, "encoder_attention_heads": 2},
            **{"encoder_layers": 1, "decoder_layers": 1, "vision_trunk": "test_resnet", "freeze_resnet": True},
        },
        "criterion": {"_name": "qctc"},
        "dataset": {"batch_size": 2, "num_workers": 0, "disable_validation": True},
        "optimization": {"max_update": 4, "lr": [0.001]},
        "optimizer": {"_name": "adam"},
        "lr_scheduler": {"_name": "fixed"},
        "checkpoint": {"save_dir": str(tmp_path / "out")},
    }
    if is_early:
        configuration["hydra"] = {"callbacks": {"narvl": {"_target_": "narvl_plugin.hydra_start.ImportPlugin"}}}
    (tmp_path / "recipe.yaml").write_text("# @package _global_\n" + yaml.safe_dump(configuration))
    command = [programs / "fairseq-hydra-train", "--config-dir", tmp_path, "--config-name", "recipe"]
    done = run(tmp_path, *command, f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count(OURS) == 1


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have fairseq's own trainer under all names again, and `__main__` replaced by a test."""
    for name in ("__main__", "__mp_main__"):
        monkeypatch.setitem(sys.modules, name, ModuleType("__main__"))
    for module in (trainer, fairseq_cli.train):
        monkeypatch.setattr(module, "Trainer", STOCK)


def test_it_stands_under_the_names_of_modules(stock: None) -> None:
    use_trainer()
    assert trainer.Trainer is fairseq_cli.train.Trainer is NarvlTrainer


def test_it_stands_in_the_program_that_is_started_by_its_file(stock: None) -> None:
    """`python fairseq_cli/train.py`."""
    started = sys.modules["__main__"]
    vars(started).update(__file__=fairseq_cli.train.__file__, Trainer=STOCK)
    exec("def main(): return Trainer", vars(started))
    use_trainer()
    assert started.main() is NarvlTrainer


def test_it_stands_in_processes_that_the_program_spawns(stock: None) -> None:
    """Such a process imports again, under the name `__mp_main__`, what runs as `python -m fairseq_cli.train`."""
    spawn._fixup_main_from_name("fairseq_cli.train")
    names = sys.modules["__mp_main__"].main.__globals__
    assert names["Trainer"] is STOCK
    use_trainer()
    assert names["Trainer"] is NarvlTrainer


def test_a_notebook_that_has_imported_the_stock_trainer_keeps_it(stock: None) -> None:
    notebook = sys.modules["__main__"]
    notebook.Trainer = STOCK
    use_trainer()
    assert notebook.Trainer is STOCK


def test_a_stock_task_gets_its_batches_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty ones, and such as are no dictionaries."""
    taken: list[Any] = []
    monkeypatch.setattr(STOCK, "train_step", lambda self, samples, raise_oom=False: taken.extend(samples))
    batches = [{}, None, torch.ones(2, 2)]
    NarvlTrainer.__new__(NarvlTrainer).train_step(batches)
    assert all(left is right for left, right in zip(taken, batches, strict=True))


def test_an_empty_batch_is_replaced_by_one_that_counts_nothing(
    options: list[object], run_train: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a validation as well, whose last batch fairseq would take instead."""
    taken: list[dict[str, Any]] = []
    step = STOCK.train_step

    def add_empty_batch(self: NarvlTrainer, samples: list[Any], raise_oom: bool = False) -> Any:
        return NarvlTrainer.train_step(self, [*samples, {}], raise_oom)

    def keep(self: NarvlTrainer, samples: list[Any], raise_oom: bool = False) -> Any:
        taken.append(samples[-1])
        return step(self, samples, raise_oom)

    monkeypatch.setattr(STOCK, "train_step", keep)
    monkeypatch.setattr(fairseq_cli.train, "Trainer", type("Added", (NarvlTrainer,), {"train_step": add_empty_batch}))
    run_train(*options, "--batch-size", 4, "--max-epoch", 2, "--no-save", "--save-dir", tmp_path / "out")
    assert len(taken) == 3 + 2
    assert all(batch["stand_in"] for batch in taken)
    assert [len(batch["id"]) for batch in taken] == [4] * 5


@pytest.mark.parametrize("limit", [("--max-tokens-valid", 999), ("--batch-size-valid", 0)])
def test_limits_of_validation_are_checked_before_training(
    limit: tuple[str, int],
    write_tsv: Callable[..., Path],
    caption_rows: list[list[str]],
    vocabulary: Path,
    tmp_path: Path,
    run_train: Callable[..., None],
) -> None:
    data = f"{write_tsv('train.tsv', caption_rows)},{write_tsv('valid.tsv', caption_rows)}"
    options = ["--task", "caption", "--bpe-dir", vocabulary, "--num-bins", 10, "--patch-image-size", 32, "--cpu"]
    options += ["--arch", "narvl_tiny", "--encoder-layers", 1, "--decoder-layers", 1, "--encoder-embed-dim", 16]
    options += ["--encoder-attention-heads", 2, "--vision-trunk", "test_resnet", "--freeze-resnet"]
    options += ["--criterion", "qctc", "--batch-size", 2, "--optimizer", "adam"]
    with pytest.raises(InputError, match=f"{limit[0]} {limit[1]}: .*(each row counts 1000|needs 1 row)"):
        run_train(data, *options, *limit, "--save-dir", tmp_path / "run")
    assert not list(tmp_path.glob("run/*.pt"))


@pytest.mark.parametrize("option", ["--restore-file", "--finetune-from-model"])
def test_training_does_not_start_anew_from_a_folder(
    option: str,
    write_tsv: Callable[..., Path],
    caption_rows: list[list[str]],
    vocabulary: Path,
    tmp_path: Path,
    run_train: Callable[..., None],
) -> None:
    data = f"{write_tsv('train.tsv', caption_rows)},{write_tsv('valid.tsv', caption_rows)}"
    options = ["--task", "caption", "--bpe-dir", vocabulary, "--num-bins", 10, "--patch-image-size", 32, "--cpu"]
    options += ["--arch", "narvl_tiny", "--encoder-layers", 1, "--decoder-layers", 1, "--encoder-embed-dim", 16]
    options += ["--encoder-attention-heads", 2, "--vision-trunk", "test_resnet", "--freeze-resnet"]
    options += ["--criterion", "qctc", "--batch-size", 2, "--optimizer", "adam", "--save-dir", tmp_path / "run"]
    (tmp_path / "student.pt").mkdir()
    with pytest.raises(Exception, match="is a folder; give the checkpoint in it") as error:
        run_train(data, *options, option, tmp_path / "student.pt")
    assert isinstance(error.value, InputError)
