"""The task options for a checkpoint's model: those of its training, replaced by those that the caller gives."""

from __future__ import annotations

import ast
import logging
import os
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from narvl_plugin.checkpoints.record import Checkpoint
from narvl_plugin.errors import InputError, harmless
from narvl_plugin.tasks.registry import TASKS

logger = logging.getLogger(__name__)

PER_RUN = frozenset(
    {
        "data",
        "skip_bad_rows",
        "allow_transfer",
        "matmul_precision",
        "ema_eval",
        "rescore_with",
        "rescore_weight",
        "abstain_below",
        "member",
        "mbr",
        "mbr_frequencies",
        "ngram_automaton",
        "ngram_weight",
    }
)
"""Options of a single command. They are never taken from a checkpoint, unlike the other options of its training."""

OF_ANY_TASK = frozenset(
    {
        *("bpe_dir", "num_bins", "patch_image_size", "max_image_size", "imagenet_default_mean_and_std"),
        *("max_src_length", "prompt_type"),
    }
)
"""Options that ours share with other tasks of checkpoints, such as OFA's pretraining, and with ports of OFA."""
COMPARED_BY_CONTENT = frozenset({"bpe_dir", "num_bins"})
"""Options whose differences cause no warning, because the vocabulary's checksum or size is compared instead."""

Kind = type[Any]
"""The dataclass of a task's options; its field `_name` is fairseq's name of the task."""


def option_names(kind: Kind) -> set[str]:
    """Return the names of a task's options."""
    return {field.name for field in fields(kind)} - {"_name"}


def take_up_options(args: Namespace, given: Collection[str], kind: Kind) -> None:
    """Set the arguments of fairseq-generate, in place, to the training's task options of the model in --path.

    Args:
        args: the parsed arguments, for one of our tasks.
        given: names of the arguments on the command line. They stay, like those in --model-overrides; a warning is
            logged if they differ from the training.
        kind: the dataclass of the task's options.

    Raises:
        MissingInput, InputError: if a checkpoint cannot be read, or its options cannot be used.
    """
    names = option_names(kind)
    own = {name: value for name, value in _model_overrides(args).items() if name in names}
    own |= {name: getattr(args, name) for name in names & set(given)}
    checkpoints = [Checkpoint.read(file) for file in args.path.split(os.pathsep)]
    options = options_of_all(checkpoints, args.task, kind, own)
    for name in names - PER_RUN | own.keys():
        value = options[name]
        setattr(args, name, str(value) if isinstance(value, Enum) else value)


def _model_overrides(args: Namespace) -> dict[str, Any]:
    """Return the options in fairseq-generate's --model-overrides, which fairseq applies only to the model."""
    try:
        return dict(ast.literal_eval(args.model_overrides))
    except (ValueError, TypeError, SyntaxError, RecursionError) as error:
        raise InputError(f"--model-overrides {args.model_overrides:.80}: is not a Python dict ({error})") from error


def options_of_all(
    checkpoints: Sequence[Checkpoint], task_name: str, kind: Kind, given: Mapping[str, Any]
) -> DictConfig:
    """Return the task options of an ensemble: those of the first model's training, replaced by the caller's.

    The vocabulary is that of the first model, see `Checkpoint.vocabulary`.

    Args:
        checkpoints: the models' checkpoints. A warning is logged if the options of later ones differ.
        task_name: one of our tasks.
        kind: the dataclass of its options.
        given: the caller's options, which override all others.

    Raises:
        InputError: as `task_options`.
    """
    member = str(given.get("member") or task_name)
    trained = [(one.file, trained_options(one, member)) for one in checkpoints]
    (first, own), *others = trained
    vocabulary = checkpoints[0].vocabulary
    known = {} if vocabulary is None else {"bpe_dir": str(vocabulary)}
    options = task_options(first, own, task_name, kind, known | dict(given))
    shared = {name: options[name] for name in option_names(kind) - PER_RUN}
    for file, own in others:
        task_options(file, own, task_name, kind, shared)
    return options


def trained_options(checkpoint: Checkpoint, member: str) -> Mapping[str, Any]:
    """Return the options of the task that a checkpoint was trained on; for a mixture, those of one member.

    Raises:
        InputError: if the mixture has no such member.
    """
    members = checkpoint.members
    if members:
        if not isinstance(members.get(member), dict):
            raise InputError(
                f"{checkpoint.file}: was trained on {', '.join(map(str, members)):.200}, not on {member!r:.40}; choose "
                "by --member, or make a student of one of them: narvl convert CHECKPOINT OUT --member NAME"
            )
        return dict(members[member])
    options = checkpoint.task
    if options.get("_name") == "multitask":
        logger.warning(
            "%s: lacks the options of its members; options that are not given have their defaults", checkpoint.file
        )
    return options


def task_options(
    file: Path, trained: Mapping[str, Any], task_name: str, kind: Kind, given: Mapping[str, Any]
) -> DictConfig:
    """Return the task options for a checkpoint's model.

    They are the options of its training, replaced by those of the caller. A warning is logged for each difference.
    Options of a single command (`PER_RUN`) are never taken from a checkpoint. From a checkpoint of a task that is not
    ours, only `OF_ANY_TASK` are taken.

    Args:
        file: the checkpoint, for messages.
        trained: the options of its task.
        task_name: one of our tasks.
        kind: the dataclass of its options.
        given: the caller's options.

    Raises:
        InputError: if the task has no such option, an option has a wrong type, the vocabulary is unknown, or the
            checkpoint was trained for another one of our tasks.
    """
    trained_for = trained.get("_name")
    if isinstance(trained_for, str) and trained_for in TASKS and trained_for != task_name:
        raise InputError(
            f"{file}: was trained for {trained_for}, not for {task_name}; take --task {trained_for}, or another "
            "checkpoint"
        )
    names = option_names(kind)
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
        defaults = OmegaConf.structured(kind(_name=task_name))
        options = cast(DictConfig, OmegaConf.merge(defaults, values))
        before = cast(DictConfig, OmegaConf.merge(defaults, kept))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{file}: the options of its task cannot be used ({reason})") from error
    for name in sorted(kept.keys() & given.keys() - COMPARED_BY_CONTENT):
        if _differ(options[name], before[name]):
            option, trained_with = name.replace("_", "-"), harmless(str(before[name]))
            logger.warning("%s: was trained with --%s %s, now --%s %s", file, option, trained_with, option, given[name])
    return options


def _differ(value: Any, other: Any) -> bool:
    """Return whether two values of an option differ. Two paths of the same file are equal."""
    return value != other and not (isinstance(value, str) and Path(value).resolve() == Path(other).resolve())
