"""A tiny student on two training files, and fairseq-train in this process or in others, with exact losses."""

from __future__ import annotations

import base64
import io
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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

# fairseq-train that prints each update's loss with all its digits, the rows of each step and the checkpoints that it
# writes, and that kills itself after an update if told to.
LAUNCHER = """
import os, signal, sys
from fairseq import checkpoint_utils, trainer
from fairseq_cli.train import cli_main

killed_after = int(sys.argv.pop(1))
reduce = trainer.Trainer._reduce_and_log_stats

def print_exactly(self, logged, sample_size, grad_norm=None):
    if grad_norm is not None:
        loss = sum(float(log["loss"]) for log in logged) / float(sample_size)
        print("EXACT", self.get_num_updates(), loss.hex(), flush=True)
    output = reduce(self, logged, sample_size, grad_norm)
    if grad_norm is not None and self.get_num_updates() == killed_after:
        print("KILLED", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return output

def print_rows(kind, step):
    def run(self, batches, *arguments, **options):
        kept = [batch for batch in (batches if kind == "TRAIN" else [batches]) if batch and not batch.get("stand_in")]
        print(kind, *[row for batch in kept for row in batch["id"]], flush=True)
        return step(self, batches, *arguments, **options)
    return run

def print_file(*arguments, **options):
    print("SAVE", arguments[1], flush=True)
    return save(*arguments, **options)

trainer.Trainer._reduce_and_log_stats = print_exactly
trainer.Trainer.train_step = print_rows("TRAIN", trainer.Trainer.train_step)
trainer.Trainer.valid_step = print_rows("VALID", trainer.Trainer.valid_step)
save, checkpoint_utils.torch_persistent_save = checkpoint_utils.torch_persistent_save, print_file
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


@dataclass
class Nodes:
    """A training on some machines, all of them this one: a torchrun for each, with one process.

    Attributes:
        torchruns: the torchrun of each node.
        logs: what it and its process print.
    """

    torchruns: list[subprocess.Popen[bytes]]
    logs: list[Path]

    def wait(self, seconds: float = 240) -> list[int]:
        """Wait for the end of all nodes, and return the exit status of each."""
        end = time.monotonic() + seconds
        return [torchrun.wait(timeout=max(end - time.monotonic(), 0.1)) for torchrun in self.torchruns]

    def wait_for_a_kill(self) -> None:
        """Wait until the process of a node kills itself."""
        end = time.monotonic() + 240
        while not any("KILLED" in log.read_text() for log in self.logs):
            assert time.monotonic() < end
            time.sleep(0.1)

    def losses(self) -> list[Losses]:
        """Return the losses that each node's process printed; all nodes must have ended well."""
        statuses = self.wait()
        assert statuses == [0] * len(self.logs), "\n".join(log.read_text()[-3000:] for log in self.logs)
        return [read_losses(log) for log in self.logs]


@pytest.fixture
def train_on_nodes(tmp_path: Path, programs: Path) -> Iterator[Callable[..., Nodes]]:
    """Give a function that starts fairseq-train by a torchrun on each of two nodes, with gloo, on a CPU."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*arguments: object, killed_after: dict[int, int] | None = None) -> Nodes:
        """Start two nodes; `killed_after` has the update after which the process of a node is killed."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
        environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # sums depend on it
        nodes = Nodes([], [tmp_path / f"node{node}.log" for node in range(2)])
        for node, log in enumerate(nodes.logs):
            words: list[object] = [programs / "torchrun", "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-id", "test"]
            words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
            words += ["--no-python", programs / "forked-python", "-c", LAUNCHER]
            words += [(killed_after or {}).get(node, 0), *arguments, "--user-dir", plugin_folder()]
            with log.open("wb") as stream:
                nodes.torchruns.append(
                    subprocess.Popen(list(map(str, words)), env=environment, stdout=stream, stderr=subprocess.STDOUT)
                )
        started.extend(nodes.torchruns)
        return nodes

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
