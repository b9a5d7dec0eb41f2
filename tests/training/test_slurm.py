"""A training that cluster=slurm submits is one of all its tasks, and goes on when it is put back into the queue."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from narvl_plugin.checkpoints.reading import read_checkpoint

ROOT = Path(__file__).parents[2]
# A user directory whose first process, in its first run, gets the signal of a preemption after update 5.
PREEMPTED = """
import os, signal
import narvl_plugin.registered
from narvl_plugin.training.trainer import NarvlTrainer

step = NarvlTrainer.train_step

def preempted(self, *arguments, **options):
    result = step(self, *arguments, **options)
    print("UPDATE", self.get_num_updates(), "OF", self.data_parallel_world_size, flush=True)
    first = os.environ["SLURM_RESTART_COUNT"] == "0" and os.environ["SLURM_PROCID"] == "0"
    if first and self.get_num_updates() == 5:
        os.kill(os.getpid(), signal.SIGUSR2)
    return result

NarvlTrainer.train_step = preempted
"""
SMALL = (
    "encoder_embed_dim=16 encoder_ffn_embed_dim=32 encoder_attention_heads=2 encoder_layers=1 decoder_layers=1 "
    "vision_trunk=test_resnet freeze_resnet=true"
)


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """Give a folder, for PATH, with stand-ins of Slurm's programs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "srun", "scontrol", "sacct"):
        words = shlex.join([sys.executable, "-SE", str(Path(__file__).with_name("slurm.py")), name])
        (folder / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def submit(folder: Path, slurm: Path, programs: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Submit a training on two machines, of one process each, and wait for its end."""
    words = ["--config-dir", ROOT / "run_scripts" / "config", "--config-name", "train", "cluster=slurm"]
    words += ["hydra.launcher.nodes=2", "hydra.launcher.gpus_per_node=null", "hydra.launcher.tasks_per_node=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PATH"] = f"{slurm}{os.pathsep}{environment['PATH']}"
    command = list(map(str, [programs / "fairseq-hydra-train", *words, *overrides]))
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)


@pytest.mark.integration
def test_a_preempted_job_goes_on_from_its_last_checkpoint(
    data: str, vocabulary: Path, slurm: Path, programs: Path, tmp_path: Path
) -> None:
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin" / "__init__.py").write_text(PREEMPTED)
    done = submit(
        tmp_path,
        slurm,
        programs,
        *(f"task.data='{data}'", f"task.bpe_dir={vocabulary}", "+task.num_bins=10", "task.patch_image_size=32"),
        *("task.eval_cider=false", "checkpoint.best_checkpoint_metric=loss", "checkpoint.finetune_from_model=null"),
        *("common.cpu=true", f"common.user_dir={tmp_path / 'plugin'}", "size=tiny", "dataset.num_workers=0"),
        *("dataset.batch_size=2", "optimization.update_freq=[1]", "optimization.max_epoch=3"),
        *("checkpoint.save_interval_updates=2", "checkpoint.save_interval=100", "checkpoint.save_dir=out"),
        *(f"+model.{option}" for option in SMALL.split()),
    )
    logs = {log.name: log.read_text() for log in tmp_path.glob("out/.submitit/7/*.out")}
    assert done.returncode == 0, done.stderr[-3000:] + "".join(text[-3000:] for text in logs.values())
    assert logs.keys() == {"7_0_log.out", "7_1_log.out"}
    updates = [re.findall(r"UPDATE (\d+) OF (\d+)", text) for text in logs.values()]
    for found in updates:  # the second process may be ended before it prints its fifth update
        assert [(str(update), "2") for update in range(5, 9)] == found[-4:]
        assert len(found) in (8, 9)
    assert "Loaded checkpoint out/checkpoint_last.pt (epoch 2 @ 4 updates)" in logs["7_0_log.out"]
    state = read_checkpoint(tmp_path / "out" / "checkpoint_last.pt")
    assert state["optimizer_history"][-1]["num_updates"] == 8


def test_what_is_missing_is_said_before_the_job_is_submitted(slurm: Path, programs: Path, tmp_path: Path) -> None:
    done = submit(tmp_path, slurm, programs, "task.bpe_dir=vocab")
    assert done.returncode == 1
    assert done.stderr.endswith("error: task.data: not given; add task.data=VALUE to the command\n")
    assert not (tmp_path / "slurm").exists()
