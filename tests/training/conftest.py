"""A tiny student on two training files, and fairseq-train in this process or in others, with exact losses."""

from __future__ import annotations

import base64
import io
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import trainer
from PIL import Image

from narvl import plugin_folder
from narvl_plugin.checkpoints.reading import read_checkpoint

Losses = dict[int, float]
"""Loss of each update, in nats per unit of sample size, with all its digits."""
Run = Callable[..., Losses]

ROOT = Path(__file__).parents[2]
TEXTS = ("a red square", "two dogs run", "the blue hat", "a cat", "a bird and a boat", "one tree", "a wall")

# fairseq-train that prints each update's loss with all its digits, and that kills itself after an update if told to.
LAUNCHER = """
import os, signal, sys
from fairseq import trainer
from fairseq_cli.train import cli_main

killed_after = int(sys.argv.pop(1))
reduce = trainer.Trainer._reduce_and_log_stats

def print_exactly(self, logged, sample_size, grad_norm=None):
    if grad_norm is not None:
        loss = sum(float(log["loss"]) for log in logged) / float(sample_size)
        print("EXACT", self.get_num_updates(), loss.hex(), flush=True)
    output = reduce(self, logged, sample_size, grad_norm)
    if grad_norm is not None and self.get_num_updates() == killed_after:
        os.kill(os.getpid(), signal.SIGKILL)
    return output

trainer.Trainer._reduce_and_log_stats = print_exactly
cli_main()
"""


def image(row: int) -> str:
    """Return a 32 x 32 image with a gradient of its own as base64."""
    stream = io.BytesIO()
    Image.linear_gradient("L").rotate(37 * row).resize((32, 32)).convert("RGB").save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


def rows(first: int, number: int) -> list[list[str]]:
    """Return rows with one to three references each, in the columns of captioning."""
    return [
        [str(row), f"img{row}", "&&".join(TEXTS[(row + k) % 7] for k in range(1 + row % 3)), "", image(row)]
        for row in range(first, first + number)
    ]


@pytest.fixture
def data(write_tsv: Callable[..., Path]) -> str:
    """Give the data argument: training files of 9 and 7 rows, and one of 5 to validate on."""
    files = [write_tsv("one.tsv", rows(0, 9)), write_tsv("two.tsv", rows(9, 7)), write_tsv("valid.tsv", rows(16, 5))]
    return ",".join(map(str, files))


@pytest.fixture
def options(data: str, vocabulary: Path) -> list[object]:
    """Give options of fairseq-train for a tiny student whose frozen trunk is one of timm's own test models."""
    return [
        *(data, "--task", "caption", "--bpe-dir", vocabulary, "--num-bins", 10, "--patch-image-size", 32),
        *("--arch", "narvl_tiny", "--num-queries", 20, "--criterion", "qctc"),
        *("--encoder-embed-dim", 16, "--encoder-ffn-embed-dim", 32, "--encoder-attention-heads", 2),
        *("--encoder-layers", 1, "--decoder-layers", 1, "--vision-trunk", "test_resnet", "--freeze-resnet"),
        *("--optimizer", "adam", "--lr", 5e-3, "--clip-norm", 1.0, "--weight-decay", 0.01),
        *("--cpu", "--no-progress-bar", "--log-format", "json", "--log-interval", 1, "--no-epoch-checkpoints"),
    ]


@pytest.fixture
def train(run_train: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Give a function that runs fairseq-train in this process and returns the loss of each update."""
    losses: Losses = {}
    reduce = trainer.Trainer._reduce_and_log_stats

    def keep(self: trainer.Trainer, logged: list[dict[str, Any]], sample_size: Any, grad_norm: Any = None) -> Any:
        if grad_norm is not None:
            losses[self.get_num_updates()] = sum(float(log["loss"]) for log in logged) / float(sample_size or 1)
        return reduce(self, logged, sample_size, grad_norm)

    monkeypatch.setattr(trainer.Trainer, "_reduce_and_log_stats", keep)

    def run(*arguments: object) -> Losses:
        losses.clear()
        run_train(*arguments)
        return dict(losses)

    return run


@pytest.fixture
def train_in_processes(tmp_path: Path, programs: Path) -> Iterator[Callable[..., list[Losses]]]:
    """Give a function that runs fairseq-train in some processes and returns the losses that each of them printed."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*arguments: object, processes: int = 1, killed_after: int = 0) -> list[Losses]:
        rendezvous = tmp_path / "rendezvous"
        rendezvous.unlink(missing_ok=True)
        command = [programs / "forked-python", "-c", LAUNCHER, killed_after, *arguments, "--user-dir", plugin_folder()]
        if processes > 1:
            command += [
                *("--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp", "--distributed-no-spawn"),
                *("--distributed-world-size", processes, "--distributed-init-method", f"file://{rendezvous}"),
            ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
        environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # sums depend on it
        logs = [tmp_path / f"rank{rank}.log" for rank in range(processes)]
        own = []
        for rank, log in enumerate(logs):
            of_rank = ["--distributed-rank", rank] if processes > 1 else []
            with log.open("wb") as stream:
                words = list(map(str, [*command, *of_rank]))
                own.append(subprocess.Popen(words, env=environment, stdout=stream, stderr=subprocess.STDOUT))
        started.extend(own)
        for process, log in zip(own, logs, strict=True):
            status = process.wait(timeout=240)
            assert status == (-9 if killed_after else 0), log.read_text()[-3000:]
        return [read_losses(log) for log in logs]

    yield run
    for process in started:
        process.kill()


@pytest.fixture
def last_state() -> Callable[[Path], dict[str, Any]]:
    """Give a function that returns what a folder's last checkpoint holds of a training."""

    def read(folder: Path) -> dict[str, Any]:
        whole = read_checkpoint(folder / "checkpoint_last.pt")
        extra = whole["extra_state"]
        parts = {"weights": whole["model"], "optimizer": whole["last_optimizer_state"]["state"]}
        parts |= {"average": extra.get("ema"), "place": extra["train_iterator"], "val_loss": extra["val_loss"]}
        return parts

    return read


@pytest.fixture
def differences() -> Callable[[Any, Any], list[str]]:
    """Give a function that names what differs, in any bit, between two nested dictionaries of tensors."""

    def compare(left: Any, right: Any, name: str = "") -> list[str]:
        if isinstance(left, dict):
            assert left.keys() == right.keys()
            return [line for key in left for line in compare(left[key], right[key], f"{name}/{key}")]
        same = torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
        return [] if same else [name]

    return compare


def read_losses(log: Path) -> Losses:
    """Return the losses that LAUNCHER printed."""
    words = [line.split() for line in log.read_text().splitlines() if line.startswith("EXACT ")]
    return {int(update): float.fromhex(loss) for _, update, loss in words}
