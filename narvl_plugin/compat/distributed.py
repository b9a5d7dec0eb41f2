"""Fixes for trainings in several processes, on one machine or on several: how they begin, and how they end."""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any

import torch
from fairseq.models import distributed_fairseq_model
from torch.nn.parallel import DistributedDataParallel

from narvl_plugin.errors import InputError

LAUNCHED = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
"""The variables by which torchrun, and launchers like it, tell a process of all processes."""

_LOST = re.compile(r"connection (closed|reset)|remote process exited|timed ?out|broken pipe|was aborted", re.IGNORECASE)
"""What gloo, NCCL and torch's store say when another process does not answer."""


def join_launched_processes(cfg: Any, program: str) -> None:
    """Take the processes of a training from the environment, in which torchrun describes them.

    Fixes `torchrun --nnodes 2 --nproc-per-node 1 … fairseq-train …`. On machines with one GPU, or none,
    --distributed-world-size is 1 by default. fairseq then ignores the environment: each process trains alone, without a
    message. With --distributed-world-size 2, and no GPU, it divides by zero (`rank % torch.cuda.device_count()`).

    Args:
        cfg: the configuration, which is changed.
        program: the name of the program, as in fairseq_cli.

    Raises:
        InputError: if the process would train alone although the environment tells of others, or may wait for them.
    """
    processes = int(os.environ.get("WORLD_SIZE") or 1)
    if processes == 1 or cfg.common.tpu:
        return
    launched = f"WORLD_SIZE={processes} in the environment"
    if program not in ("train", "validate"):
        raise InputError(f"{launched}: only trainings and validations run in several processes; start this one alone")
    missing = [name for name in LAUNCHED if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"{launched}, without {' and '.join(missing)}: this process would train alone; start all processes by "
            "torchrun, or unset WORLD_SIZE"
        )
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        # Each torchrun counts its own restarts. Processes with different counts wait half an hour for each other.
        raise InputError(
            f"torchrun --max-restarts {restarts}: processes that are started again on several machines may wait for "
            "each other; leave it at 0, and start the command again instead"
        )
    training, rank = cfg.distributed_training, int(os.environ["RANK"])
    if training.distributed_init_method is not None:
        given = (training.distributed_world_size, training.distributed_rank, training.distributed_no_spawn)
        if given != (processes, rank, True):
            raise InputError(
                f"{launched}, but --distributed-init-method {training.distributed_init_method} and "
                f"--distributed-world-size {training.distributed_world_size} describe other processes; leave out "
                "both under torchrun"
            )
        return
    training.distributed_init_method = "env://"
    training.distributed_world_size, training.distributed_rank = processes, rank
    training.distributed_no_spawn = True
    # A process may see one GPU alone, its own, whatever its number on the machine.
    training.device_id = int(os.environ.get("LOCAL_RANK") or rank) % max(torch.cuda.device_count(), 1)


def use_gloo_on_a_cpu(cfg: Any) -> None:
    """Let processes on CPUs share their gradients by gloo.

    Fixes `fairseq-train --cpu --distributed-world-size 2 --distributed-no-spawn …`. The default backend, nccl, has no
    tensors on a CPU.
    """
    on_cpu = cfg.common.cpu or not torch.cuda.is_available()
    if on_cpu and not cfg.common.tpu and cfg.distributed_training.distributed_backend == "nccl":
        cfg.distributed_training.distributed_backend = "gloo"


def wrap_models_on_cpus() -> None:
    """Let pytorch_ddp, fairseq's default --ddp-backend, train on CPUs.

    Fixes `DistributedDataParallel(module, device_ids=[0], output_device=0)`, which raises ValueError on a CPU.
    """

    def on_any_device(
        module: torch.nn.Module, device_ids: list[int], output_device: int, **options: Any
    ) -> DistributedDataParallel:
        if next(module.parameters()).device.type != "cpu":
            options |= {"device_ids": device_ids, "output_device": output_device}
        return DistributedDataParallel(module, **options)

    distributed_fairseq_model.DistributedDataParallel = on_any_device


@contextlib.contextmanager
def explaining_lost_processes() -> Iterator[None]:
    """Explain in one line that another process of the training has ended.

    Fixes the end of a process whose neighbour was killed: a traceback of gloo or NCCL about a connection, from which
    nobody learns where to look.
    """
    try:
        yield
    except RuntimeError as error:
        is_of_network = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if not is_of_network or not _LOST.search(str(error)):
            raise
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"another process of this training has ended or does not answer ({reason}). Its own log has the cause. "
            "Start the same command again on all machines: the training goes on from its last checkpoint"
        ) from error
