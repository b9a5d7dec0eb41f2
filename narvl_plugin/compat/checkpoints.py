"""Checkpoints: read safely, written whole, handed to the other processes of a training."""

import contextlib
import functools
import os
from argparse import Namespace
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_DATACLASS_REGISTRY, setup_task
from omegaconf import OmegaConf

from narvl_plugin.checkpoints.reading import existing, read_checkpoint
from narvl_plugin.checkpoints.record import Checkpoint, read_state
from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.models.interop import averaged_weights, mark_origin, own_options
from narvl_plugin.tasks import TASKS
from narvl_plugin.tasks.options import option_names, options_of_all
from narvl_plugin.whole_files import naming


def read_checkpoints_safely() -> None:
    """Let fairseq read checkpoints, ours and published ones, with an allow-list of types and mapped from the file.

    Fixes `checkpoint_utils.load_checkpoint_to_cpu(path)`, which calls `torch.load(file)`. Since torch 2.6 that raises
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
        state = read_state(local_path, averaged=bool((arg_overrides or {}).get("ema_eval")))
        criterion = (arg_overrides or {}).get("criterion")
        if isinstance(criterion, str) and isinstance(state.get("cfg"), dict):
            state["cfg"]["criterion"] = {"_name": criterion}  # which fairseq-validate would pass over
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
    name = str(given.get("task"))
    if name not in TASKS:
        return None
    kind = TASK_DATACLASS_REGISTRY[name]
    own = {option: given[option] for option in option_names(kind) & given.keys()}
    return setup_task(options_of_all([Checkpoint.read(file)], name, kind, own))


def save_checkpoints_whole() -> None:
    """Name a checkpoint for which there is no space, and leave nothing behind that is not whole.

    Fixes `torch_persistent_save(state, "checkpoint_last.pt")` on a full disk: it tries three times, for five seconds,
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

    Fixes `PathManager.copy(checkpoint, "checkpoint_last.pt", overwrite=True)`, which writes into the file that is
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


def share_checkpoints_among_processes() -> None:
    """Let the first process hand a checkpoint to the others.

    Fixes `distributed_utils.broadcast_object(state, 0, group)`, and so every resume of a training in several processes
    without --load-checkpoint-on-all-dp-ranks: what is no tensor is sent as torch.save writes it, and since torch 2.6
    the receiver's torch.load refuses it.
    """

    def broadcast_object_slow(obj: Any, src_rank: int, group: Any, dist_device: torch.device) -> Any:
        box = [obj]
        torch.distributed.broadcast_object_list(box, src=src_rank, group=group, device=dist_device)
        return box[0]

    distributed_utils._broadcast_object_slow = broadcast_object_slow
