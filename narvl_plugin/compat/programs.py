"""Fixes for fairseq's programs: how they begin and end, and how they show errors."""

import contextlib
import functools
import importlib.util
import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from fairseq.data import iterators
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager

from narvl_plugin.compat import distributed
from narvl_plugin.errors import InputError
from narvl_plugin.program import ask_to_end, end_workers_briefly
from narvl_plugin.whole_files import sole_writer

logger = logging.getLogger(__name__)

_takes_signals = False
"""Whether programs react to signals; `end_briefly_on_signals` sets it."""


def namespaces_of(program: str) -> list[dict[str, Any]]:
    """Return the namespaces in which functions of a program of fairseq, such as `fairseq_cli.train`, look up names.

    The first is that of the module with this name, if it is imported. The last is that of `__main__`, if it is the
    program, as with `python -m fairseq_cli.train`. Changes in the first have no effect there. In a process that the
    program spawns, the functions' namespace also differs from that of the module `__main__`.
    """
    found = [vars(sys.modules[program])] if program in sys.modules else []
    started = sys.modules["__main__"]
    if getattr(started.__spec__, "name", None) == program or is_file_of(program, getattr(started, "__file__", None)):
        found.append(started.main.__globals__ if hasattr(started, "main") else vars(started))
    return found


def is_file_of(program: str, file: str | None) -> bool:
    """Return whether a file is that of a module, even if the paths differ."""
    spec = importlib.util.find_spec(program)
    return bool(file and spec and spec.origin and os.path.realpath(file) == os.path.realpath(spec.origin))


def begin_and_end_programs() -> None:
    """Let a program refuse impossible options at its start, and clean up at its end.

    Fixes `distributed_utils.call_main(cfg, main)`; see the functions that are called here.
    """
    run = distributed_utils.call_main

    @functools.wraps(run)
    def call_main(cfg: Any, main: Callable[..., Any], **kwargs: Any) -> None:
        end_when_terminated()
        program = program_of(main)
        ask_for_optimizer_and_size_of_batches(cfg, program)
        distributed.join_launched_processes(cfg, program)
        distributed.use_gloo_on_a_cpu(cfg)
        refuse_empty_spawn(cfg)
        with reading_ended(), sole_training(cfg), distributed.explaining_lost_processes():
            run(cfg, main, **kwargs)

    distributed_utils.call_main = call_main


def program_of(main: Callable[..., Any]) -> str:
    """Return the name of the program of fairseq that a main function is of, also under `python -m`."""
    return Path(getattr(getattr(main, "__code__", None), "co_filename", "")).stem


def ask_for_optimizer_and_size_of_batches(cfg: Any, program: str) -> None:
    """Ask for the optimizer and the size of batches in one line.

    Fixes `fairseq-train` without --optimizer, and `fairseq-train` and `fairseq-validate` without --batch-size and
    --max-tokens. They end in a traceback.
    """
    if program == "train" and cfg.optimizer is None:
        raise InputError("--optimizer is not given; take --optimizer adam, and --lr RATE")
    is_asked = program in ("train", "validate")
    if is_asked and cfg.dataset.max_tokens is None and cfg.dataset.batch_size is None:
        raise InputError("the size of batches is missing; give the number of rows by --batch-size")


def refuse_empty_spawn(cfg: Any) -> None:
    """Refuse to start several processes by fairseq's own spawn if there is no GPU.

    Fixes `fairseq-train --cpu --distributed-world-size 2 --distributed-init-method tcp://…`. It starts one process for
    each GPU. Without a GPU, it starts no process, trains nothing and exits with 0.
    """
    training = cfg.distributed_training
    several = training.distributed_world_size > 1
    if several and not training.distributed_no_spawn and torch.cuda.device_count() == 0 and not cfg.common.tpu:
        raise InputError(
            f"--distributed-world-size {training.distributed_world_size} without a GPU: fairseq would start no process "
            f"and train nothing. Start them by torchrun --nproc-per-node {training.distributed_world_size}, without "
            "options of --distributed; or each yourself, with --distributed-no-spawn --distributed-init-method "
            "tcp://HOST:PORT --distributed-rank RANK"
        )


@contextlib.contextmanager
def sole_training(cfg: Any) -> Iterator[None]:
    """Refuse to train into a folder that another training uses.

    Fixes two `fairseq-train --save-dir out` at the same time. They overwrite each other's checkpoints, and then resume
    from them. In a distributed training, the first process holds the lock, or the process that starts the others. If
    the file system supports no locks, the training runs without one.
    """
    folder = folder_of_checkpoints(cfg)
    with contextlib.ExitStack() as stack:
        if folder is not None:
            try:
                stack.enter_context(sole_writer(os.path.abspath(folder)))
            except InputError as error:
                raise InputError(f"--save-dir {folder}: is in use by another training ({error})") from error
            except OSError as error:
                logger.warning("%s: cannot be locked (%s); start no second training there", folder, error)
        yield


def folder_of_checkpoints(cfg: Any) -> str | None:
    """Return the folder into which this process, or those that it starts, writes checkpoints; None if it does not."""
    checkpoint, evaluation = getattr(cfg, "checkpoint", None), getattr(cfg, "common_eval", None)
    if checkpoint is None or checkpoint.no_save or (evaluation is not None and evaluation.path is not None):
        return None
    launched = cfg.distributed_training.distributed_init_method is None
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID")) if launched else None
    is_first = int(rank or cfg.distributed_training.distributed_rank or 0) == 0
    folder = str(checkpoint.save_dir)
    return folder if is_first and not PathManager.path_requires_pathmanager(folder) else None


@contextlib.contextmanager
def reading_ended() -> Iterator[None]:
    """End the threads that read ahead before the program ends.

    Fixes the end of `fairseq-train --max-update N` within an epoch. A daemon thread may still unpack batches in torch's
    C++ code when Python ends and kills it. Sometimes this ends in "terminate called without an active exception" and a
    failing exit status after a successful training.
    """
    try:
        yield
    finally:
        for reader in threading.enumerate():
            if isinstance(reader, iterators.BackgroundConsumer):
                end_reading(reader)


def end_reading(reader: iterators.BackgroundConsumer) -> None:
    """End a thread that reads ahead, after its current batch."""
    reader._max_len = 0
    while reader.is_alive():
        with contextlib.suppress(queue.Empty):
            reader._queue.get(timeout=0.1)  # it may wait for space in the queue


def show_input_errors_briefly() -> None:
    """Show an InputError that ends the program as one line, without a traceback.

    Fixes the long traceback of `fairseq-train` for a bad TSV file or row.
    """
    previous = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        # fairseq's trainer replaces an error about a checkpoint by its own error.
        hidden = error.__context__ if isinstance(error.__context__, InputError) else None
        if not isinstance(error, InputError) and hidden is None:
            previous(kind, error, traceback)
            return
        # The message of an error from a data worker is its traceback, which ends in "BadRow: message".
        lines = str(error).strip().split("\n")
        message = " ".join(lines[-1:] if lines[0].startswith("Caught ") else map(str.strip, lines))
        message = message.removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")
        print(f"error: {message}" if isinstance(error, InputError) else f"error: {message} {hidden}", file=sys.stderr)

    sys.excepthook = excepthook


def end_briefly_on_signals() -> None:
    """Let a terminated program end with one line, together with the processes that it started.

    The package already sets up the same for Ctrl-C, before all other imports.
    """
    global _takes_signals
    _takes_signals = True
    end_workers_briefly()


def end_when_terminated() -> None:
    """Let SIGTERM end a program. Programs call this when they read the command line and when they begin.

    Nothing changes if the process is not taken over, or if it handles that signal already.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if _takes_signals and in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)


def terminate(number: int, frame: FrameType | None) -> None:
    """End the program, and the processes that it started, after a signal."""
    for process in multiprocessing.active_children():
        if not process.daemon:  # a training process of one of several GPUs; Python would wait for it
            process.terminate()
    ask_to_end(number)
