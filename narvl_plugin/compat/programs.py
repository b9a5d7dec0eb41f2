"""fairseq's programs: how they begin, how they end, and what they show."""

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

from narvl_plugin.errors import InputError
from narvl_plugin.program import ask_to_end, end_workers_briefly
from narvl_plugin.whole_files import sole_writer

logger = logging.getLogger(__name__)

_takes_signals = False
"""Whether a program that begins answers to signals, which `end_briefly_on_signals` decides."""


def namespaces_of(program: str) -> list[dict[str, Any]]:
    """Return the namespaces in which functions of a program of fairseq's, such as `fairseq_cli.train`, look up names.

    One is that of the module of this name, if it is imported. The other, the last, is that of `__main__`, if this is
    the program, as with `python -m fairseq_cli.train`: what is put into the first has no effect there. In a process
    that the program spawns, its functions have yet another namespace than the module `__main__`.
    """
    found = [vars(sys.modules[program])] if program in sys.modules else []
    started = sys.modules["__main__"]
    if getattr(started.__spec__, "name", None) == program or is_file_of(program, getattr(started, "__file__", None)):
        found.append(started.main.__globals__ if hasattr(started, "main") else vars(started))
    return found


def is_file_of(program: str, file: str | None) -> bool:
    """Say whether a file is that of a module, whatever path leads to it."""
    spec = importlib.util.find_spec(program)
    return bool(file and spec and spec.origin and os.path.realpath(file) == os.path.realpath(spec.origin))


def begin_and_end_programs() -> None:
    """Have a program refuse what it cannot do, before it does anything, and leave nothing behind when it ends.

    Fixes `distributed_utils.call_main(cfg, main)`; what of it, the functions say that are called here.
    """
    run = distributed_utils.call_main

    @functools.wraps(run)
    def call_main(cfg: Any, main: Callable[..., Any], **kwargs: Any) -> None:
        end_when_terminated()
        ask_for_optimizer_and_size_of_batches(cfg, main)
        refuse_empty_spawn(cfg)
        with reading_ended(), sole_training(cfg):
            run(cfg, main, **kwargs)

    distributed_utils.call_main = call_main


def ask_for_optimizer_and_size_of_batches(cfg: Any, main: Callable[..., Any]) -> None:
    """Ask for the optimizer and the size of batches in a line.

    Fixes `fairseq-train` without --optimizer, and it and `fairseq-validate` without --batch-size and --max-tokens,
    which end in a traceback.
    """
    program = Path(getattr(getattr(main, "__code__", None), "co_filename", "")).stem  # also of python -m
    if program == "train" and cfg.optimizer is None:
        raise InputError("--optimizer is not given; take --optimizer adam, and --lr RATE")
    is_asked = program in ("train", "validate")
    if is_asked and cfg.dataset.max_tokens is None and cfg.dataset.batch_size is None:
        raise InputError("the size of batches is missing; give the number of rows by --batch-size")


def refuse_empty_spawn(cfg: Any) -> None:
    """Refuse to start several processes by fairseq's own spawn where there is no GPU.

    Fixes `fairseq-train --cpu --distributed-world-size 2 --distributed-init-method tcp://…`, which starts one
    process for each GPU, so none, and exits 0 having trained nothing. (Under torchrun it divides by zero.)
    """
    training = cfg.distributed_training
    under_torchrun = "RANK" in os.environ and training.distributed_init_method is None
    several = training.distributed_world_size > 1 or under_torchrun
    if several and not training.distributed_no_spawn and torch.cuda.device_count() == 0 and not cfg.common.tpu:
        raise InputError(
            f"--distributed-world-size {training.distributed_world_size} without a GPU: fairseq would "
            "start no process and train nothing. Start each process yourself, with --cpu "
            "--distributed-no-spawn --distributed-backend gloo --ddp-backend legacy_ddp "
            "--distributed-init-method tcp://HOST:PORT --distributed-rank RANK"
        )


@contextlib.contextmanager
def sole_training(cfg: Any) -> Iterator[None]:
    """Refuse to train into a folder into which another program trains.

    Fixes two `fairseq-train --save-dir out` at a time, which write each other's checkpoints over, and then resume
    from the other's. Of the processes of a distributed training the first one holds the lock, or the one that starts
    them all. Where there is no lock to be had, training goes on without.
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
    """Return the folder into which this process, or those that it starts, write checkpoints; None if they do not."""
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
    """Let the threads that read ahead end before the program does.

    Fixes the end of `fairseq-train --max-update N` amid an epoch: a daemon thread is then still unpacking batches in
    torch's C++, where Python's end kills it, now and then with "terminate called without an active exception" and a
    failing exit status after all went well.
    """
    try:
        yield
    finally:
        for reader in threading.enumerate():
            if isinstance(reader, iterators.BackgroundConsumer):
                end_reading(reader)


def end_reading(reader: iterators.BackgroundConsumer) -> None:
    """End a thread that reads ahead, after the batch at which it is."""
    reader._max_len = 0
    while reader.is_alive():
        with contextlib.suppress(queue.Empty):
            reader._queue.get(timeout=0.1)  # it may be waiting for room


def show_input_errors_briefly() -> None:
    """Show an InputError that ends the program as one line, without the way it took through fairseq.

    Fixes the screenful of traceback that ends `fairseq-train` when a TSV file or a row of it is at fault.
    """
    previous = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        # fairseq's trainer hides what is wrong with a checkpoint behind an error of its own.
        hidden = error.__context__ if isinstance(error.__context__, InputError) else None
        if not isinstance(error, InputError) and hidden is None:
            previous(kind, error, traceback)
            return
        # An error from a data worker arrives as the text of its traceback, which ends in "BadRow: message".
        lines = str(error).strip().split("\n")
        message = " ".join(lines[-1:] if lines[0].startswith("Caught ") else map(str.strip, lines))
        message = message.removeprefix(f"{kind.__module__}.{kind.__qualname__}: ")
        print(f"error: {message}" if isinstance(error, InputError) else f"error: {message} {hidden}", file=sys.stderr)

    sys.excepthook = excepthook


def end_briefly_on_signals() -> None:
    """Let a program that is terminated end in one line, and take its processes along.

    That the program itself ends in one line after Ctrl-C, the package sees to before all other imports.
    """
    global _takes_signals
    _takes_signals = True
    end_workers_briefly()


def end_when_terminated() -> None:
    """Have SIGTERM end a program that begins: one that reads its command line, or calls its main function.

    Nothing changes where the process is not taken over, or has an answer to that signal.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if _takes_signals and in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)


def terminate(number: int, frame: FrameType | None) -> None:
    """End the program after a signal, and the processes that it started."""
    for process in multiprocessing.active_children():
        if not process.daemon:  # one of several that train, on a GPU each, for which Python would wait
            process.terminate()
    ask_to_end(number)
