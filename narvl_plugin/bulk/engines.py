"""The two engines: one process, or actors of Ray on one machine or many. Both call the same function for a shard."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from tqdm import tqdm

from narvl_plugin.bulk.answers import Job, Output
from narvl_plugin.bulk.shards import Shard
from narvl_plugin.errors import InputError

ENGINES = ("local", "ray")
OBJECT_STORE = 256 << 20
"""Shared memory of embedded Ray, in bytes. It holds places of inputs, and finished outputs."""


@dataclass(frozen=True)
class Runner:
    """Where the work is done.

    Attributes:
        engine: one of `ENGINES`.
        address: of a Ray cluster, or `auto`; None runs Ray on this machine.
        actors: processes of Ray with a model each; None takes as many as the GPUs or CPUs allow.
        gpus_per_actor: GPUs of each; a fraction shares one. None is 1 if there are GPUs.
    """

    engine: str = "local"
    address: str | None = None
    actors: int | None = None
    gpus_per_actor: float | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise InputError(f"--engine {self.engine}: choose {' or '.join(ENGINES)}")
        if self.engine == "local" and (self.address, self.actors, self.gpus_per_actor) != (None, None, None):
            raise InputError("--address, --actors and --gpus-per-actor are for --engine ray")
        if self.engine == "ray":
            require_ray()

    def outputs(self, job: Job, shards: Sequence[Shard]) -> Iterator[tuple[str, Output]]:
        """Yield the names of shards with their outputs, as they are done.

        Raises:
            MissingInput, InputError: if the model or an input cannot be used.
            BadRow: if more rows of one process are bad than may be skipped.
        """
        yield from _local(job, shards) if self.engine == "local" else _ray(self, job, shards)


def require_ray() -> None:
    """Raise InputError if Ray Data is not installed."""
    try:
        import pyarrow  # noqa: F401
        import ray  # noqa: F401
    except ImportError:
        raise InputError("--engine ray: needs Ray Data; pip install 'narvl[ray]'") from None


def _local(job: Job, shards: Sequence[Shard]) -> Iterator[tuple[str, Output]]:
    answer = job.start()
    for shard in tqdm(shards, unit="shard", disable=None, mininterval=1):
        yield shard.name, answer(shard)


def _ray(runner: Runner, job: Job, shards: Sequence[Shard]) -> Iterator[tuple[str, Output]]:
    with connected(runner.address):
        import pyarrow
        from ray.data import ActorPoolStrategy, from_arrow

        # Shards are small: the places of inputs. Ray repeats those that were lost with their node.
        blocks = [pyarrow.table({"shard": [pickle.dumps(shard)]}) for shard in shards]
        threads = _threads()
        gpus, actors = _resources(runner, job, threads, len(shards))
        done = from_arrow(blocks).map_batches(
            Actor,
            fn_constructor_args=(job, threads),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=threads,
            num_gpus=gpus,
            compute=ActorPoolStrategy(size=actors),
        )
        for row in done.iter_rows():
            found = pickle.loads(row["output"])  # written by our own actors
            if isinstance(found, InputError):
                raise found
            yield found


class Actor:
    """A process of Ray with a model, which is loaded for the first shard."""

    def __init__(self, job: Job, threads: int) -> None:
        torch.set_num_threads(threads)
        self.job = job

    @cached_property
    def answer(self) -> Callable[[Shard], Output]:
        """The function from shards to outputs."""
        return self.job.start()

    def __call__(self, batch: Any) -> Any:
        """Return a table with the output of a shard, or the error that ends the work."""
        import pyarrow

        shard = pickle.loads(batch["shard"][0].as_py())
        found: Any
        try:
            found = shard.name, self.answer(shard)
        except InputError as error:
            found = error
        return pyarrow.table({"output": pyarrow.array([pickle.dumps(found)], pyarrow.large_binary())})


def _threads() -> int:
    """Return the number of threads of an actor: that of OMP_NUM_THREADS, or 1."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, int(given)) if given.isdecimal() else 1


def _resources(runner: Runner, job: Job, threads: int, shards: int) -> tuple[float, int]:
    """Return the GPUs of an actor, and the number of actors.

    Raises:
        InputError: if not even one actor fits.
    """
    import ray

    there = ray.cluster_resources()
    gpus = runner.gpus_per_actor
    if gpus is None:
        gpus = 1 if there.get("GPU", 0) >= 1 and job.device != "cpu" else 0
    fitting = math.floor(there.get("GPU", 0) / gpus) if gpus else math.floor(there.get("CPU", 0) / threads)
    if not fitting:
        wanted = f"{gpus:g} GPU(s)" if gpus else f"{threads} CPU(s)"
        raise InputError(
            f"--engine ray: an actor takes {wanted}, and Ray has {there.get('GPU', 0):g} GPUs and "
            f"{there.get('CPU', 0):g} CPUs"
        )
    return gpus, min(runner.actors or fitting, shards)


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to Ray for the block. Where the program is connected already, that connection is used.

    Raises:
        InputError: if there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would send them to its makers
    os.environ.setdefault("RAY_agent_register_timeout_ms", "120000")  # on a busy machine Ray would not start
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        if address is None:
            ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE, log_to_driver=False)
        else:
            ray.init(address, log_to_driver=False)
    except Exception as error:  # Ray raises errors of many types where it does not start
        what = "--engine ray: Ray did not start here" if address is None else f"--address {address}: is not reached"
        raise InputError(f"{what} ({' '.join(str(error).split()):.300})") from error
    try:
        yield
    finally:
        ray.shutdown()
