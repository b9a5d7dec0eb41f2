"""Repairs of trainings in several processes, each against the call that fails without it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq import models
from fairseq.dataclass.configs import CommonConfig, DistributedTrainingConfig
from fairseq.distributed import utils as distributed_utils
from fairseq_cli import generate, train

from narvl_plugin.compat.distributed import join_launched_processes
from narvl_plugin.errors import InputError

LAUNCHED = {"WORLD_SIZE": "6", "RANK": "5", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def config(cpu: bool = False, **training: object) -> SimpleNamespace:
    """Return a configuration whose defaults are those of a machine with one GPU, or none."""
    values = {"distributed_world_size": 1, "tpu": False, "device_id": 0} | training
    return SimpleNamespace(
        distributed_training=DistributedTrainingConfig(**values),
        common=CommonConfig(cpu=cpu),
        optimizer="adam",
        dataset=SimpleNamespace(max_tokens=None, batch_size=1),
    )


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the environment of a process that torchrun has started."""
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)


class TestProcessesOfTorchrun:
    @pytest.mark.parametrize(("gpus", "device"), [(0, 0), (1, 0), (2, 1), (8, 1)])
    def test_are_those_of_the_training(
        self, launched: None, monkeypatch: pytest.MonkeyPatch, gpus: int, device: int
    ) -> None:
        """The GPU is that of the number on the machine: of rank 5, the second process of its machine, the second."""
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        cfg = config(distributed_world_size=max(gpus, 1))
        join_launched_processes(cfg, "train")
        training = cfg.distributed_training
        found = (training.distributed_world_size, training.distributed_rank, training.distributed_init_method)
        assert found == (6, 5, "env://")
        assert (training.device_id, training.distributed_no_spawn) == (device, True)

    def test_a_single_one_trains_alone(self, launched: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "1")
        called: list[object] = []
        distributed_utils.call_main(config(), called.append)
        assert len(called) == 1

    def test_a_process_that_would_train_alone_is_refused(self, launched: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("RANK")
        monkeypatch.delenv("MASTER_PORT")
        with pytest.raises(InputError, match="WORLD_SIZE=6 .*, without RANK and MASTER_PORT: .* would train alone"):
            distributed_utils.call_main(config(), train.main)

    @pytest.mark.parametrize("given", [{}, {"distributed_world_size": 6, "distributed_rank": 5}])
    def test_an_address_of_other_processes_is_refused(self, launched: None, given: dict[str, object]) -> None:
        cfg = config(distributed_init_method="tcp://localhost:1", **given)
        with pytest.raises(InputError, match="--distributed-init-method tcp://localhost:1 and .* other processes"):
            distributed_utils.call_main(cfg, train.main)

    def test_an_address_of_the_same_processes_stays(self, launched: None) -> None:
        given = {"distributed_world_size": 6, "distributed_rank": 5, "distributed_no_spawn": True}
        cfg = config(distributed_init_method="tcp://localhost:1", **given)
        join_launched_processes(cfg, "train")
        assert cfg.distributed_training.distributed_init_method == "tcp://localhost:1"

    @pytest.mark.parametrize("machines", [1, 3])
    def test_restarts_that_may_wait_for_each_other_are_refused(
        self, launched: None, monkeypatch: pytest.MonkeyPatch, machines: int
    ) -> None:
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
        monkeypatch.setenv("GROUP_WORLD_SIZE", str(machines))
        refused = pytest.raises(InputError, match="torchrun --max-restarts 2: .* leave it at 0")
        with refused if machines > 1 else contextlib.nullcontext():
            join_launched_processes(config(), "train")

    def test_generation_is_refused(self, launched: None) -> None:
        """Each process would write its own share of the outputs into the same file."""
        with pytest.raises(InputError, match="WORLD_SIZE=6 .*: only trainings and validations"):
            distributed_utils.call_main(config(), generate.main)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Be the only process of a distributed program."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # torch replaces it
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("backend", ["pytorch_ddp", "legacy_ddp"])
def test_models_train_on_cpus_with_each_backend(alone: None, backend: str) -> None:
    training = DistributedTrainingConfig(ddp_backend=backend, distributed_world_size=1, device_id=0)
    group = torch.distributed.group.WORLD
    model = models.DistributedFairseqModel(training, torch.nn.Linear(2, 1), group, torch.device("cpu"))
    model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad.tolist() == [[1, 1]]


@pytest.mark.parametrize("cpu", [True, False])
def test_the_backend_on_cpus_is_gloo(cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = config(cpu)
    distributed_utils.call_main(cfg, lambda cfg: None)
    assert cfg.distributed_training.distributed_backend == ("gloo" if cpu else "nccl")


LOST = [
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:7"),
    torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error\nmore"),
]


@pytest.mark.parametrize("error", LOST, ids=["gloo", "nccl"])
def test_the_end_of_another_process_is_explained(error: RuntimeError) -> None:
    def fail(cfg: object) -> None:
        raise error

    with pytest.raises(InputError, match=r"another process of this training has ended.*(peer|error)\S*\)?.* goes on"):
        distributed_utils.call_main(config(), fail)


@pytest.mark.parametrize(
    "error", [RuntimeError("connection closed"), torch.distributed.DistBackendError("Duplicate GPU detected")]
)
def test_other_errors_stay(error: RuntimeError) -> None:
    def fail(cfg: object) -> None:
        raise error

    with pytest.raises(RuntimeError) as raised:
        distributed_utils.call_main(config(), fail)
    assert raised.value is error
