"""Fixes for checkpoints: safe reading, complete writing, sending them to the other processes of a training."""

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

from narvl_plugin.checkpoints.finding import existing, local
from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.checkpoints.record import Checkpoint, read_state
from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.models.interop import averaged_weights, mark_origin, own_options
from narvl_plugin.tasks import TASKS
from narvl_plugin.tasks.options import option_names, options_of_all
from narvl_plugin.whole_files import naming


def read_checkpoints_safely() -> None:
    """Let fairseq read our and published checkpoints with an allow-list of types, mapped from the file.

    Fixes `checkpoint_utils.load_checkpoint_to_cpu(path)`, which calls `torch.load(file)`. Since torch 2.6, that raises
    for published checkpoints (their `cfg["model"]` is a Namespace) and for any run whose best metric was a numpy
    number. An environment variable can turn its safety off. For generation, it also reads the optimizer's state into
    memory, which is twice as large as the model.

    With a task's --ema-eval, the averaged weights of --store-ema are read in place of the others.

    A missing file of --finetune-from-model or --restore-file is reported as a user's error. For the first, fairseq
    raises ValueError. For the second, it would train from random weights. Both may name a port of OFA, see `existing`.
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
            state["cfg"]["criterion"] = {"_name": criterion}  # fairseq-validate would ignore it
        if (model_options := own_options(state)) is not None:
            model_options["allow_mismatch"] = ""  # a file must not decide how strictly it is checked
            mark_origin(state)
        try:
            if state.get("cfg") is not None:
                state["args"] = None  # fairseq would build the model from them instead of cfg
                state["cfg"] = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
                checkpoint_utils.overwrite_args_by_name(state["cfg"], arg_overrides or {})
            elif state.get("args") is not None:
                forget_unknown_parts(state["args"])
            upgraded: dict[str, Any] = checkpoint_utils._upgrade_state_dict(state)
        except Exception as error:  # missing or wrong parts of a file can raise any exception
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
        for option in ("restore_file", "finetune_from_model"):
            given = getattr(cfg, option)
            if given and local(given) != given:
                setattr(cfg, option, str(local(given)))
        start = cfg.restore_file  # checkpoint_last.pt may be missing, at the start of a training
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
    """Remove from an older checkpoint's flags, in place, names of unknown parts of fairseq, such as that of --bpe.

    fairseq passes such a name to hydra. hydra would read it as the path of a YAML file, anywhere on the machine.
    """
    for part, known in REGISTRIES.items():
        name = getattr(flags, part, None)
        if not isinstance(name, str) or name not in known["registry"]:
            vars(flags).pop(part, None)


def task_of_command(file: str, given: dict[str, Any]) -> Any:
    """Return the task of fairseq-validate with the options of the checkpoint's training; None if it is not ours."""
    name = str(given.get("task"))
    if name not in TASKS:
        return None
    kind = TASK_DATACLASS_REGISTRY[name]
    own = {option: given[option] for option in option_names(kind) & given.keys()}
    return setup_task(options_of_all([Checkpoint.read(file)], name, kind, own))


def save_checkpoints_whole() -> None:
    """Report the name of a checkpoint that cannot be written, and remove incomplete files.

    Fixes `torch_persistent_save(state, "checkpoint_last.pt")` on a full disk. It tries three times within five seconds,
    and appends to the incomplete file each time. Then it ends in two tracebacks without the file's name. The incomplete
    `checkpoint_last.pt.tmp` stays, also after Ctrl-C.
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
    """Replace a checkpoint by a copy in one step.

    Fixes `PathManager.copy(checkpoint, "checkpoint_last.pt", overwrite=True)`, which writes into the existing file. A
    run that is killed meanwhile cannot resume. A process that generates with the mapped file reads the new bytes as the
    old model's.
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
    """Let the first process send a checkpoint to the others.

    Fixes `distributed_utils.broadcast_object(state, 0, group)`. It sends all values except tensors by torch.save, and
    since torch 2.6, the receiver's torch.load refuses them. So trainings in several processes could not resume without
    --load-checkpoint-on-all-dp-ranks.
    """

    def broadcast_object_slow(obj: Any, src_rank: int, group: Any, dist_device: torch.device) -> Any:
        box = [obj]
        torch.distributed.broadcast_object_list(box, src=src_rank, group=group, device=dist_device)
        return box[0]

    distributed_utils._broadcast_object_slow = broadcast_object_slow
