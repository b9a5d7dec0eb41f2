"""Checkpoints read back as models with their task, whoever trained them."""

from __future__ import annotations

import ast
import logging
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from fairseq import checkpoint_utils
from fairseq.models import BaseFairseqModel
from fairseq.tasks import TASK_DATACLASS_REGISTRY, setup_task
from fairseq.utils import split_paths
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from narvl_plugin.errors import InputError, harmless
from narvl_plugin.models.interop import QUERIES, SINGLE_TASKS
from narvl_plugin.tasks.base import PER_RUN, BaseTask, BaseTaskConfig

logger = logging.getLogger(__name__)

OF_ANY_TASK = frozenset(
    {"bpe_dir", "num_bins", "patch_image_size", "max_image_size", "imagenet_default_mean_and_std", "max_src_length"}
)
"""Options that a checkpoint's other task, such as OFA's pretraining, shares with ours."""
COMPARED_BY_CONTENT = frozenset({"bpe_dir", "num_bins"})
"""Options about whose difference nothing is said, since the vocabulary's checksum or size is compared."""


class Loaded(NamedTuple):
    """What a checkpoint holds: models in evaluation mode, their task, the configuration of their training."""

    models: list[BaseFairseqModel]
    task: BaseTask
    cfg: DictConfig


def load(
    paths: str | Path | Sequence[str | Path],
    *,
    task_name: str = "caption",
    task_overrides: Mapping[str, Any] | None = None,
    role: Literal["teacher", "student"] | None = None,
    device: str | torch.device = "cpu",
) -> Loaded:
    """Load one checkpoint, or several as an ensemble that shares the task of the first.

    The task's options are those of the training, see `options_of_all`, so that a published checkpoint needs `bpe_dir`
    and `data` only.

    Args:
        paths: files of fairseq-train or published ones.
        task_name: the task of a checkpoint that was trained on none of ours.
        task_overrides: task options that differ from the checkpoint's, such as `{"data": "test.tsv"}`; those
            that are None count as not given.
        role: which kind of model the caller needs; None takes either.
        device: where the models go.

    Raises:
        MissingInput: a checkpoint or the folder of its vocabulary does not exist.
        InputError: a file is no checkpoint, it does not say which vocabulary it was trained with, its vocabulary is
            another one than the task's, or its model has another role.
    """
    files = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    given = {name: value for name, value in (task_overrides or {}).items() if value is not None}
    states = [_read(file, bool(given.get("ema_eval"))) for file in files]
    for file, state in zip(files, states, strict=True):
        found = "student" if QUERIES in state["model"] else "teacher"
        if role not in (None, found):
            raise InputError(f"{file}: is a {found}; give a {role}")
    member = str(given.get("member") or task_name)
    trained = {file: trained_options(file, state, member) for file, state in zip(files, states, strict=True)}
    name = trained[files[0]].get("_name")
    task = setup_task(options_of_all(trained, name if is_ours(str(name)) else task_name, given))
    models = []
    for file, state in zip(files, states, strict=True):
        try:
            (model,), cfg, _ = checkpoint_utils.load_model_ensemble_and_task([str(file)], task=task, state=state)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
        models.append(model.eval().to(device))
    return Loaded(models, task, cfg)


def require_one_task(teacher: Path, asked: BaseTask, student: Path, parallel: BaseTask) -> None:
    """Raise InputError, which names both checkpoints, unless teacher and student were trained for one task."""
    if type(asked) is not type(parallel):
        raise InputError(
            f"{teacher} was trained for {asked.cfg._name}, {student} for {parallel.cfg._name}; give checkpoints of one "
            "task"
        )


def is_ours(task_name: str) -> bool:
    """Say whether a task is one of our single tasks."""
    known = TASK_DATACLASS_REGISTRY.get(task_name)
    return known is not None and issubclass(known, BaseTaskConfig)


def option_names(task_name: str) -> set[str]:
    """Return the names of the options of one of our tasks."""
    return {field.name for field in fields(TASK_DATACLASS_REGISTRY[task_name])} - {"_name"}


def task_for(file: str, task_name: str, given: Mapping[str, Any]) -> BaseTask | None:
    """Return the task that a command names, with the options of a checkpoint's training; None if it is none of ours.

    `given` are the options that the command line gives. Raises as `task_options` does.
    """
    if not is_ours(task_name):
        return None
    trained = trained_options(Path(file), _read(Path(file), averaged=False), str(given.get("member") or task_name))
    own = {name: given[name] for name in option_names(task_name) & given.keys()}
    return setup_task(task_options(Path(file), trained, task_name, own))


def take_up_options(args: Namespace, given: Collection[str]) -> None:
    """Give the arguments of fairseq-generate, in place, the task's options of the training of the model in --path.

    Args:
        args: what was parsed, of one of our tasks.
        given: names of the arguments that the command line itself gave; these stay, as those in --model-overrides do,
            and a difference is warned of.

    Raises:
        MissingInput, InputError: a checkpoint cannot be read, or its options cannot be used.
    """
    names = option_names(args.task)
    own = {name: value for name, value in _model_overrides(args).items() if name in names}
    own |= {name: getattr(args, name) for name in names & set(given)}
    files, member = map(Path, split_paths(args.path)), str(own.get("member") or args.task)
    trained = {file: trained_options(file, _read(file, averaged=False), member) for file in files}
    options = options_of_all(trained, args.task, own)
    for name in names - PER_RUN | own.keys():
        value = options[name]
        setattr(args, name, str(value) if isinstance(value, Enum) else value)


def _model_overrides(args: Namespace) -> dict[str, Any]:
    """Return what fairseq-generate's --model-overrides says, which fairseq applies to the model alone."""
    try:
        return dict(ast.literal_eval(args.model_overrides))
    except (ValueError, TypeError, SyntaxError, RecursionError) as error:
        raise InputError(f"--model-overrides {args.model_overrides:.80}: is no dict of Python ({error})") from error


def options_of_all(trained: Mapping[Path, Mapping[str, Any]], task_name: str, given: Mapping[str, Any]) -> DictConfig:
    """Return the options with which the models of an ensemble are used: those of the first one's training.

    Args:
        trained: the options of the training of each checkpoint; with these of others, a difference is warned of.
        task_name: one of our tasks.
        given: the caller's options, which count before all others.

    Raises:
        InputError: as `task_options` does.
    """
    (first, own), *others = trained.items()
    options = task_options(first, own, task_name, given)
    shared = {name: options[name] for name in option_names(task_name) - PER_RUN}
    for file, own in others:
        task_options(file, own, task_name, shared)
    return options


def trained_options(file: Path, state: Mapping[str, Any], member: str) -> Mapping[str, Any]:
    """Return the options of the task that a checkpoint was trained on; of a mixture's, those of one member.

    Raises InputError, which names the file, if the mixture has no such member.
    """
    members = (state.get("task_state") or {}).get("members")
    if isinstance(members, dict) and members:
        if not isinstance(members.get(member), dict):
            raise InputError(
                f"{file}: was trained on {', '.join(map(str, members)):.200}, not on {member!r:.40}; choose by "
                "--member, or make a student of one of them: narvl convert CHECKPOINT OUT --member NAME"
            )
        return members[member]
    options = state["cfg"].get("task") or {}
    options = dict(vars(options)) if isinstance(options, Namespace) else options
    if options.get("_name") == "multitask":
        logger.warning("%s: does not say the options of its members; those that are not given have defaults", file)
    return options


def task_options(file: Path, trained: Mapping[str, Any], task_name: str, given: Mapping[str, Any]) -> DictConfig:
    """Return the options of a task with which a checkpoint's model is to be used.

    They are those of its training, where the caller gives no other; a difference is warned of. What one command is to
    do (`PER_RUN`) is never taken from a checkpoint. Of a checkpoint of another task only `OF_ANY_TASK` are taken.

    Args:
        file: the checkpoint, for messages.
        trained: the options of its task.
        task_name: one of our tasks.
        given: the caller's options.

    Raises:
        InputError: the task has no such option, an option has another type, the vocabulary is not known, or the
            checkpoint was trained for another one of our tasks.
    """
    trained_for = trained.get("_name")
    if trained_for in SINGLE_TASKS and trained_for != task_name:
        raise InputError(
            f"{file}: was trained for {trained_for}, not for {task_name}; take --task {trained_for}, or another "
            "checkpoint"
        )
    names, known = option_names(task_name), TASK_DATACLASS_REGISTRY[task_name]
    unknown = given.keys() - names
    if unknown:
        raise InputError(f"the task {task_name} has no option {', '.join(sorted(unknown))}")
    kept = {
        name: trained[name]
        for name in sorted(names - PER_RUN)
        if trained.get(name) is not None and (trained.get("_name") == task_name or name in OF_ANY_TASK)
    }
    values = {"data": "none", **kept, **given}
    if values.get("bpe_dir") in (None, "", "???"):
        raise InputError(
            f"{file}: does not say which vocabulary it was trained with; give --bpe-dir, the folder with it"
        )
    try:
        defaults = OmegaConf.structured(known(_name=task_name))
        options, before = OmegaConf.merge(defaults, values), OmegaConf.merge(defaults, kept)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{file}: the options of its task cannot be used ({reason})") from error
    for name in sorted(kept.keys() & given.keys() - COMPARED_BY_CONTENT):
        if _differ(options[name], before[name]):
            option, trained_with = name.replace("_", "-"), harmless(str(before[name]))
            logger.warning("%s: was trained with --%s %s, now --%s %s", file, option, trained_with, option, given[name])
    return options


def _differ(value: Any, other: Any) -> bool:
    """Say whether two values of an option differ. Two paths of one file do not."""
    return value != other and not (isinstance(value, str) and Path(value).resolve() == Path(other).resolve())


def _read(file: Path, averaged: bool) -> dict[str, Any]:
    """Read a checkpoint's tensors, its averaged ones or those last trained, and its configuration to the CPU."""
    state: dict[str, Any] = checkpoint_utils.load_checkpoint_to_cpu(str(file), {"ema_eval": averaged})
    if state.get("cfg") is None:
        raise InputError(f"{file}: holds no configuration (cfg), so it cannot be told which model it is")
    return state
