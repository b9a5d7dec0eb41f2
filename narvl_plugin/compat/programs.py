"""The few repairs that stock fairseq 0.12.3 needs, each with the failing call that it mends.

One more lives in the tasks, which force --required-batch-size-multiple 1, and one in data/text.py, whose
GPT-2 codec decodes `<bin_7>`.
"""

import contextlib
import functools
import importlib.util
import io
import json
import logging
import multiprocessing
import os
import queue
import signal
import sys
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from fairseq import checkpoint_utils, options
from fairseq.data import data_utils, iterators
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.ngram_repeat_block import NGramRepeatBlock
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.registry import REGISTRIES
from fairseq_cli import generate
from omegaconf import OmegaConf
from torch.utils.data._utils import worker
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from narvl_command import ask_to_end
from narvl_plugin.checkpoints.reading import existing, read_checkpoint
from narvl_plugin.data.dataset import EqualRows
from narvl_plugin.errors import InputError, MissingInput, check_arguments
from narvl_plugin.models.interop import adopt, averaged_weights, mark_origin, own_options
from narvl_plugin.tasks import command_lines
from narvl_plugin.whole_files import naming, sole_writer

logger = logging.getLogger(__name__)


@functools.cache
def apply() -> None:
    """Make all repairs, once."""
    read_checkpoints_safely()
    check_command_lines()
    write_sizes_of_bins()
    save_checkpoints_whole()
    copy_checkpoints_whole()
    accept_files_as_data()
    refuse_second_training()
    refuse_empty_spawn()
    ask_for_optimizer_and_size_of_batches()
    end_reading_with_training()
    share_checkpoints_among_processes()
    block_repeated_ngrams()
    show_input_errors_briefly()
    end_briefly_on_signals()
    write_to_any_terminal()
    check_place_in_epoch()
    unscale_gradients_once()


def read_checkpoints_safely() -> None:
    """Let fairseq read checkpoints, ours and published ones, with an allow-list of types and mapped from the file.

    Mends `checkpoint_utils.load_checkpoint_to_cpu(path)`, which calls `torch.load(file)`. Since torch 2.6 that raises
    for published checkpoints (their `cfg["model"]` is a Namespace) and for any run whose best metric was a numpy
    number, and a variable of the environment turns its safety off. It also reads the optimizer's state, which is
    twice the model, into memory to generate.

    With a task's --ema-eval, the averaged weights of --store-ema are read in place of the others. A missing file of
    --finetune-from-model, at which fairseq raises ValueError, is an error of the user's, and so is one of
    --restore-file, without which it would train from random weights.
    """

    def load_checkpoint_to_cpu(
        path: str, arg_overrides: dict[str, Any] | None = None, load_on_all_ranks: bool = False
    ) -> dict[str, Any]:
        local_path = PathManager.get_local_path(path)
        if local_path != path and PathManager.path_requires_pathmanager(path):
            raise InputError(f"{path}: copy the checkpoint to a local disk first")
        state = read_checkpoint(local_path)
        if state.get("model") is None:
            raise InputError(f"{path}: is no checkpoint of fairseq: it holds no weights under 'model'")
        if "cfg" not in state and "args" not in state:
            raise InputError(f"{path}: is no checkpoint of fairseq: it holds no options of its training under 'cfg'")
        criterion = (arg_overrides or {}).get("criterion")
        if isinstance(criterion, str) and isinstance(state.get("cfg"), dict):
            state["cfg"]["criterion"] = {"_name": criterion}  # which fairseq-validate would pass over
        if (arg_overrides or {}).get("ema_eval"):
            state["model"] = averaged_weights(state, path)
        adopt(state, path)
        if (model_options := own_options(state)) is not None:
            model_options["allow_mismatch"] = ""  # a file does not say how strictly it is checked
            mark_origin(state)
        try:
            if state.get("cfg") is not None:
                state["args"] = None  # of older files, which have no cfg; fairseq would build the model by these
                state["cfg"] = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
                checkpoint_utils.overwrite_args_by_name(state["cfg"], arg_overrides or {})
            elif state.get("args") is not None:
                forget_unknown_parts(state["args"])
            upgraded: dict[str, Any] = checkpoint_utils._upgrade_state_dict(state)
        except Exception as error:  # what is missing or of another form in a stranger's file raises nearly anything
            raise InputError(f"{path}: is no checkpoint of fairseq ({type(error).__name__}: {error})") from error
        return upgraded

    def load_ema_from_checkpoint(path: str) -> dict[str, Any]:
        state = read_checkpoint(path)
        return state | {"model": averaged_weights(state, path)}

    load_models = checkpoint_utils.load_model_ensemble_and_task

    @functools.wraps(load_models)
    def load_model_ensemble_and_task(
        filenames: list[str], arg_overrides: dict[str, Any] | None = None, task: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        for file in filenames:
            existing(file)
        if task is None:
            task = task_of_command(filenames[0], arg_overrides or {})
        if getattr(getattr(task, "cfg", None), "ema_eval", False):
            arg_overrides = {**(arg_overrides or {}), "ema_eval": True}
        return load_models(filenames, arg_overrides, task, *args, **kwargs)

    load_into_training = checkpoint_utils.load_checkpoint

    @functools.wraps(load_into_training)
    def load_checkpoint(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        start = cfg.restore_file  # checkpoint_last.pt may be missing: a training that has written none begins
        if os.path.basename(start) != "checkpoint_last.pt" and not PathManager.exists(start):
            existing(start)
        try:
            return load_into_training(cfg, *args, **kwargs)
        except ValueError as error:
            if "--finetune-from-model" not in str(error):
                raise
            if "does not exist" in str(error):
                raise MissingInput(f"{error}; give the checkpoint that this training starts from") from error
            raise InputError(f"{str(error).removesuffix(f': {cfg}')}; leave one of them out") from error

    checkpoint_utils.load_checkpoint = load_checkpoint
    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu
    checkpoint_utils.load_ema_from_checkpoint = load_ema_from_checkpoint
    checkpoint_utils.load_model_ensemble_and_task = load_model_ensemble_and_task


def forget_unknown_parts(flags: Namespace) -> None:
    """Take out of an older checkpoint's flags, in place, what is no name of a part of fairseq, such as of --bpe.

    fairseq hands such a name to hydra, which takes it for the path of a YAML file, and may lead to any on the machine.
    """
    for part, known in REGISTRIES.items():
        name = getattr(flags, part, None)
        if not isinstance(name, str) or name not in known["registry"]:
            vars(flags).pop(part, None)


def task_of_command(file: str, given: dict[str, Any]) -> Any:
    """Return the task of fairseq-validate, if it is one of ours, with the options of the checkpoint's training."""
    from narvl_plugin.checkpoints import loading  # which knows all tasks

    return loading.task_for(file, str(given.get("task")), given)


def check_command_lines() -> None:
    """Say what is wrong with a command line in one line, and take a trained model's options from its checkpoint.

    Mends `fairseq-train` without --arch and `fairseq-validate` without --task, which raise RuntimeError() and
    KeyError(None), and `fairseq-interactive --task caption`, which fails after it has loaded the model.

    Mends `fairseq-generate test.tsv --task refcoco --path student.pt`, too, which takes --patch-image-size, --num-bins
    and all other options of the task from their defaults. Without an error the model then reads images and predicts
    bins of other sizes than in its training. Options that the command line gives stay.
    """
    parse = options.parse_args_and_arch

    @functools.wraps(parse)
    def parse_args_and_arch(
        parser: ArgumentParser,
        input_args: list[str] | None = None,
        parse_known: bool = False,
        suppress_defaults: bool = False,
        modify_parser: Any = None,
    ) -> Any:
        check_arguments(sys.argv[1:] if input_args is None else map(str, input_args))
        command_lines.refuse_at_length(parser)
        try:
            parsed = parse(parser, input_args, parse_known, suppress_defaults, modify_parser)
        except (RuntimeError, KeyError) as error:
            command_lines.explain_failure(parser, input_args, error)
            raise
        if suppress_defaults:
            return parsed
        arguments = parsed[0] if parse_known else parsed
        command_lines.check_arguments(arguments, lambda: given_arguments(parser, input_args, arguments))
        if hasattr(arguments, "nbest") and getattr(arguments, "path", None):
            from narvl_plugin.checkpoints import loading  # which knows all tasks

            if loading.is_ours(arguments.task):
                loading.take_up_options(arguments, given_arguments(parser, input_args, arguments))
        return parsed

    options.parse_args_and_arch = parse_args_and_arch


def given_arguments(parser: ArgumentParser, words: list[str] | None, parsed: Namespace) -> set[str]:
    """Return the names of the arguments that a command line itself gives, beside those with their defaults."""
    bare = ArgumentParser(add_help=False, allow_abbrev=False, parents=[parser], conflict_handler="resolve")
    bare.set_defaults(**dict.fromkeys(vars(parsed)))
    return {name for name, value in vars(bare.parse_known_args(words)[0]).items() if value is not None}


def write_sizes_of_bins() -> None:
    """Let the file that fairseq-generate writes say which sizes the <bin_k> in it stand for.

    Mends what `generate-test.txt` of grounding lacks. Its first line is then `O-`, a tab, and the sizes as JSON.
    """
    for names in namespaces_of(generate.__name__):
        names["_main"] = writing_sizes(names["_main"])


def writing_sizes(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return fairseq-generate's function `_main` with that line, and with an error that names the file it writes."""

    @functools.wraps(run)
    def run_and_write(cfg: Any, output_file: Any) -> Any:
        if cfg.task._name == "refcoco" and not cfg.common_eval.quiet:
            sizes = {name: cfg.task[name] for name in ("num_bins", "max_image_size", "patch_image_size")}
            print(f"O-\t{json.dumps(sizes)}", file=output_file)
        logging.raiseExceptions = False  # of a log line for which there is no space, the next result tells
        try:
            with naming(getattr(output_file, "name", "the output")):
                return run(cfg, output_file)
        except InputError:
            if output_file is not sys.stdout:
                with contextlib.suppress(OSError):  # what a full disk did not take is tried again, and fails once more
                    output_file.close()
            raise

    return run_and_write


def namespaces_of(program: str) -> list[dict[str, Any]]:
    """Return the namespaces in which functions of a program of fairseq's, such as `fairseq_cli.train`, look up names.

    One is that of the module of this name, if it is imported. The other is that of `__main__`, if this is the program,
    as with `python -m fairseq_cli.train`: what is put into the first has no effect there. In a process that the program
    spawns, its functions have yet another namespace than the module `__main__`.
    """
    found = [vars(sys.modules[program])] if program in sys.modules else []
    started, code = sys.modules["__main__"], importlib.util.find_spec(program)
    file = getattr(started, "__file__", None)
    if file and code and code.origin and os.path.realpath(file) == os.path.realpath(code.origin):
        found.append(started.main.__globals__)
    return found


def save_checkpoints_whole() -> None:
    """Name a checkpoint for which there is no space, and leave nothing behind that is not whole.

    Mends `torch_persistent_save(state, "checkpoint_last.pt")` on a full disk: it tries three times, for five seconds,
    each time behind what it wrote before, and ends in two tracebacks that do not name the file, which stays as
    `checkpoint_last.pt.tmp`. So does what Ctrl-C interrupts.
    """
    save = checkpoint_utils.torch_persistent_save

    @functools.wraps(save)
    def torch_persistent_save(obj: Any, filename: str, *args: Any, **kwargs: Any) -> None:
        with naming(filename):
            try:
                save(obj, filename, *args, **kwargs)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.remove(f"{filename}.tmp")
                raise

    checkpoint_utils.torch_persistent_save = torch_persistent_save
    checkpoint_utils._torch_persistent_save = torch.save


def copy_checkpoints_whole() -> None:
    """Let a copy of a checkpoint appear all at once.

    Mends `PathManager.copy(checkpoint, "checkpoint_last.pt", overwrite=True)`, which writes into the file that is
    there: a run that is killed meanwhile cannot resume, and a process that generates with it reads the new bytes as
    the old model's.
    """
    copy = PathManager.copy

    @functools.wraps(copy)
    def copy_whole(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        if os.path.exists(dst_path) and not overwrite:
            return bool(copy(src_path, dst_path, overwrite))
        partial = f"{dst_path}.part"
        with naming(dst_path):
            try:
                copied = copy(src_path, partial, overwrite=True)
                os.replace(partial, dst_path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.remove(partial)
                raise
        return bool(copied)

    PathManager.copy = staticmethod(copy_whole)


def accept_files_as_data() -> None:
    """Let the data argument name files.

    Mends `fairseq-train train.tsv,valid.tsv`, which lists the data argument as a folder, to look there for
    validation sets that nobody asked for, and raises FileNotFoundError.
    """
    find_in_folders = data_utils._find_extra_valid_paths

    @functools.wraps(find_in_folders)
    def find_extra_valid_paths(dataset_path: str) -> set[str]:
        return find_in_folders(dataset_path) if os.path.isdir(dataset_path) else set()

    data_utils._find_extra_valid_paths = find_extra_valid_paths


def refuse_second_training() -> None:
    """Refuse to train into a folder into which another program trains.

    Mends two `fairseq-train --save-dir out` at a time, which write each other's checkpoints over, and then resume
    from the other's. Of the processes of a distributed training the first one holds the lock, or the one that starts
    them all. Where there is no lock to be had, training goes on without.
    """
    call_main = distributed_utils.call_main

    @functools.wraps(call_main)
    def call_main_alone(cfg: Any, main: Callable[..., Any], **kwargs: Any) -> None:
        folder = folder_of_checkpoints(cfg)
        with contextlib.ExitStack() as stack:
            if folder is not None:
                try:
                    stack.enter_context(sole_writer(os.path.abspath(folder)))
                except InputError as error:
                    raise InputError(f"--save-dir {folder}: is in use by another training ({error})") from error
                except OSError as error:
                    logger.warning("%s: cannot be locked (%s); start no second training there", folder, error)
            call_main(cfg, main, **kwargs)

    distributed_utils.call_main = call_main_alone


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


def refuse_empty_spawn() -> None:
    """Refuse to start several processes by fairseq's own spawn where there is no GPU.

    Mends `fairseq-train --cpu --distributed-world-size 2 --distributed-init-method tcp://…`, which starts one
    process for each GPU, so none, and exits 0 having trained nothing. (Under torchrun it divides by zero.)
    """
    call_main = distributed_utils.call_main

    @functools.wraps(call_main)
    def checked_call_main(cfg: Any, main: Callable[..., Any], **kwargs: Any) -> None:
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
        call_main(cfg, main, **kwargs)

    distributed_utils.call_main = checked_call_main


def ask_for_optimizer_and_size_of_batches() -> None:
    """Ask for the optimizer and the size of batches in a line.

    Mends `fairseq-train` without --optimizer, and it and `fairseq-validate` without --batch-size and --max-tokens,
    which end in a traceback.
    """
    call_main = distributed_utils.call_main

    @functools.wraps(call_main)
    def checked_call_main(cfg: Any, main: Callable[..., Any], **kwargs: Any) -> None:
        program = Path(getattr(getattr(main, "__code__", None), "co_filename", "")).stem  # also of python -m
        if program == "train" and cfg.optimizer is None:
            raise InputError("--optimizer is not given; take --optimizer adam, and --lr RATE")
        is_asked = program in ("train", "validate")
        if is_asked and cfg.dataset.max_tokens is None and cfg.dataset.batch_size is None:
            raise InputError("the size of batches is missing; give the number of rows by --batch-size")
        call_main(cfg, main, **kwargs)

    distributed_utils.call_main = checked_call_main


def end_reading_with_training() -> None:
    """Let the threads that read ahead end before the program does.

    Mends the end of `fairseq-train --max-update N` amid an epoch: a daemon thread is then still unpacking batches in
    torch's C++, where Python's end kills it, now and then with "terminate called without an active exception" and a
    failing exit status after all went well.
    """
    call_main = distributed_utils.call_main

    @functools.wraps(call_main)
    def call_main_and_end_reading(cfg: Any, main: Callable[..., Any], **kwargs: Any) -> None:
        try:
            call_main(cfg, main, **kwargs)
        finally:
            for reader in threading.enumerate():
                if isinstance(reader, iterators.BackgroundConsumer):
                    end_reading(reader)

    distributed_utils.call_main = call_main_and_end_reading


def end_reading(reader: iterators.BackgroundConsumer) -> None:
    """End a thread that reads ahead, after the batch at which it is."""
    reader._max_len = 0
    while reader.is_alive():
        with contextlib.suppress(queue.Empty):
            reader._queue.get(timeout=0.1)  # it may be waiting for room


def share_checkpoints_among_processes() -> None:
    """Let the first process hand a checkpoint to the others.

    Mends `distributed_utils.broadcast_object(state, 0, group)`, and so every resume of a training in several processes
    without --load-checkpoint-on-all-dp-ranks: what is no tensor is sent as torch.save writes it, and since torch 2.6
    the receiver's torch.load refuses it.
    """

    def broadcast_object_slow(obj: Any, src_rank: int, group: Any, dist_device: torch.device) -> Any:
        box = [obj]
        torch.distributed.broadcast_object_list(box, src=src_rank, group=group, device=dist_device)
        return box[0]

    distributed_utils._broadcast_object_slow = broadcast_object_slow


def block_repeated_ngrams() -> None:
    """Have --no-repeat-ngram-size look at the words said so far.

    Mends `NGramRepeatBlock(3)(tokens, lprobs, …, step)`, which compares the end of the token buffer, still
    padding, with what was said, and so never finds a repetition (fairseq issues 4709 and 5206). Its CUDA
    kernel, where built, goes by the step.
    """
    look_back = NGramRepeatBlock._no_repeat_ngram

    @functools.wraps(look_back)
    def look_back_from_step(
        self: NGramRepeatBlock,
        tokens: torch.Tensor,
        lprobs: torch.Tensor,
        bsz: int,
        beam_size: int,
        step: int,
    ) -> torch.Tensor:
        return look_back(self, tokens[:, : step + 1], lprobs, bsz, beam_size, step)

    NGramRepeatBlock._no_repeat_ngram = look_back_from_step


def show_input_errors_briefly() -> None:
    """Show an InputError that ends the program as one line, without the way it took through fairseq.

    Mends the screenful of traceback that ends `fairseq-train` when a TSV file or a row of it is at fault.
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

    Mends data workers that outlive a terminated program by seconds, and the traceback of each of them after Ctrl-C: a
    terminal interrupts them, too, and they leave it to the program to end them. That this ends in one line itself,
    the package sees to before all other imports.
    """
    work, call_main, parse = worker._worker_loop, distributed_utils.call_main, options.parse_args_and_arch

    def terminate(number: int, frame: FrameType | None) -> None:
        for process in multiprocessing.active_children():
            if not process.daemon:  # one of several that train, on a GPU each, for which Python would wait
                process.terminate()
        ask_to_end(number)

    def end_when_terminated() -> None:
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, terminate)

    @functools.wraps(work)
    def ignore_interrupts_and_work(*args: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        work(*args, **kwargs)

    @functools.wraps(call_main)
    def call_main_until_terminated(*args: Any, **kwargs: Any) -> None:
        end_when_terminated()
        call_main(*args, **kwargs)

    @functools.wraps(parse)
    def parse_until_terminated(*args: Any, **kwargs: Any) -> Any:
        end_when_terminated()
        return parse(*args, **kwargs)

    close = _MultiProcessingDataLoaderIter.__del__

    @functools.wraps(close)
    def close_what_was_opened(self: _MultiProcessingDataLoaderIter) -> None:
        if hasattr(self, "_workers_status"):  # and was not interrupted while it started its workers
            close(self)

    worker._worker_loop, _MultiProcessingDataLoaderIter.__del__ = ignore_interrupts_and_work, close_what_was_opened
    distributed_utils.call_main, options.parse_args_and_arch = call_main_until_terminated, parse_until_terminated


def write_to_any_terminal() -> None:
    """Have standard output write what its encoding lacks as escapes.

    Mends `LC_ALL=C PYTHONUTF8=0 fairseq-generate`, which ends in UnicodeEncodeError at the first letter with an accent,
    after the work is done. Standard error does so already.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # not a notebook's, nor a test's
        sys.stdout.reconfigure(errors="backslashreplace")


def check_place_in_epoch() -> None:
    """Say what a training that goes on amid an epoch reads twice or not at all, and why it cannot go on.

    Mends `EpochBatchIterator.load_state_dict(state)`, which passes over as many batches as were read before, whatever
    rows they have now. With larger batches it may ask to report this to the developers of fairseq; else it reads rows
    again, or leaves them out, without a word.
    """
    get_state, set_state = iterators.EpochBatchIterator.state_dict, iterators.EpochBatchIterator.load_state_dict

    @functools.wraps(get_state)
    def state_dict(self: iterators.EpochBatchIterator) -> dict[str, Any]:
        state: dict[str, Any] = get_state(self)
        if isinstance(self.dataset, EqualRows) and state["iterations_in_epoch"]:
            state |= rows_of(self, state["iterations_in_epoch"])
        return state

    @functools.wraps(set_state)
    def load_state_dict(self: iterators.EpochBatchIterator, state: dict[str, Any]) -> None:
        if isinstance(self.dataset, EqualRows) and state.get("iterations_in_epoch") and state.get("version") == 2:
            compare_places(self, state)
        set_state(self, state)

    iterators.EpochBatchIterator.state_dict = state_dict
    iterators.EpochBatchIterator.load_state_dict = load_state_dict


def rows_of(iterator: iterators.EpochBatchIterator, position: int) -> dict[str, int]:
    """Return what tells the rows of an epoch of which each process has read some batches from those of others."""
    sizes = list(map(len, iterator.frozen_batches))
    rows_read = sum(sizes[: position * iterator.num_shards])
    return {"rows": sum(sizes), "rows_read": rows_read, "batch_size": max(sizes), "processes": iterator.num_shards}


def compare_places(iterator: iterators.EpochBatchIterator, state: dict[str, Any]) -> None:
    """Warn if the batches that a checkpoint's training had read have other rows now; raise InputError if none remain.

    Files that were written before `rows_of` do not tell the rows.
    """
    position = state["iterations_in_epoch"]
    now = rows_of(iterator, position)
    before = {name: state.get(name, value) for name, value in now.items()}
    texts = {"rows": "{} rows, was {}", "batch_size": "batches of {}, was {}", "processes": "{} processes, was {}"}
    changes = [text.format(now[name], before[name]) for name, text in texts.items() if now[name] != before[name]]
    place = f"the checkpoint was written after {position} batches of epoch {state['epoch']}"
    advice = (
        f"({'; '.join(changes) or 'with other batches'}); keep --batch-size or --max-tokens, the number of processes "
        "and the training file as they were, or start at epoch 1 again with --reset-dataloader"
    )
    if position >= len(iterator):
        raise InputError(f"{place}, which now has {len(iterator)} {advice}")
    read_again = before["rows_read"] - now["rows_read"]
    if now["rows"] != before["rows"]:
        logger.warning("%s, which now has other rows: some are read twice in it, others not %s", place, advice)
    elif read_again:
        what = "read again" if read_again > 0 else "left out"
        logger.warning("%s, of which %d rows are now %s %s", place, abs(read_again), what, advice)


def unscale_gradients_once() -> None:
    """Have --amp divide gradients by the loss scale once.

    Mends `AMPOptimizer.clip_grad_norm(1.0)` before `AMPOptimizer.step()`. The first unscales under the name of torch's
    optimizer, the second steps under that of fairseq's, so torch's GradScaler unscales again: Adam receives gradients
    too small by the scale. Without a scaler, as on a CPU, a gradient that is not finite ends in AttributeError;
    here in the error of a training in float32.
    """

    def clip_grad_norm(self: AMPOptimizer, max_norm: float, aggregate_norm_fn: Any = None) -> torch.Tensor:
        self.scaler.unscale_(self.fp32_optimizer)
        grad_norm: torch.Tensor = self.fp32_optimizer.clip_grad_norm(max_norm, aggregate_norm_fn)
        if not torch.isfinite(grad_norm).all():
            if not self.scaler.is_enabled():
                raise FloatingPointError("gradients are Nan/Inf")
            if self.next_loss_scale <= self.min_loss_scale:
                raise FloatingPointError(
                    f"gradients are Nan/Inf, and the minimum loss scale is reached ({self.min_loss_scale}, "
                    "--min-loss-scale): the loss is probably exploding; lower the learning rate"
                )
            logger.info("a gradient overflowed; the loss scale is now %g", self.next_loss_scale)
        return grad_norm

    AMPOptimizer.clip_grad_norm = clip_grad_norm
