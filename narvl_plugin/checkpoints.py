"""Checkpoints read back as models with their task, whoever trained them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fairseq import checkpoint_utils
from fairseq.models import BaseFairseqModel
from fairseq.tasks import TASK_DATACLASS_REGISTRY, setup_task
from omegaconf import DictConfig, OmegaConf

from narvl_plugin.errors import InputError
from narvl_plugin.tasks.base import BaseTask, BaseTaskConfig


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
    device: str | torch.device = "cpu",
) -> Loaded:
    """Load one checkpoint, or several as an ensemble that shares the task of the first.

    The task's options are those that the checkpoint was trained with, as far as our tasks have them, so that
    a published checkpoint needs `bpe_dir` and `data` only.

    Args:
        paths: files of fairseq-train or published ones.
        task_name: the task of a checkpoint that was trained on none of ours.
        task_overrides: task options that differ from the checkpoint's, such as `{"data": "test.tsv"}`; those
            that are None count as not given.
        device: where the models go.

    Raises:
        MissingInput: a checkpoint or the folder of its vocabulary does not exist.
        InputError: a file is no checkpoint, or it does not say which vocabulary it was trained with.
    """
    files = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    given = {name: value for name, value in (task_overrides or {}).items() if value is not None}
    states = [_read(file, bool(given.get("ema_eval"))) for file in files]
    trained = _trained_task(states[0], given.get("member") or task_name)
    task = setup_task(_task_config(files[0], trained, task_name, given))
    models = []
    for file, state in zip(files, states, strict=True):
        try:
            (model,), cfg, _ = checkpoint_utils.load_model_ensemble_and_task([str(file)], task=task, state=state)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
        models.append(model.eval().to(device))
    return Loaded(models, task, cfg)


def _read(file: Path, averaged: bool) -> dict[str, Any]:
    """Read a checkpoint's tensors, its averaged ones or those last trained, and its configuration to the CPU."""
    state: dict[str, Any] = checkpoint_utils.load_checkpoint_to_cpu(str(file), {"ema_eval": averaged})
    if state.get("cfg") is None:
        raise InputError(f"{file}: holds no configuration (cfg), so it cannot be told which model it is")
    return state


def _trained_task(state: dict[str, Any], member: str) -> DictConfig:
    """Return the options of the task that a checkpoint was trained on; of a mixture's, those of one member."""
    members = (state.get("task_state") or {}).get("members", {})
    return OmegaConf.create(members[member]) if member in members else state["cfg"].task


def _task_config(file: Path, trained: DictConfig, task_name: str, given: Mapping[str, Any]) -> DictConfig:
    """Return the options of our task that the checkpoint has or the caller gives."""
    name = trained.get("_name")
    known = TASK_DATACLASS_REGISTRY.get(name)
    if known is None or not issubclass(known, BaseTaskConfig):
        name, known = task_name, TASK_DATACLASS_REGISTRY[task_name]
    names = {field.name for field in fields(known)} - {"_name"}
    unknown = given.keys() - names
    if unknown:
        raise InputError(f"the task {name} has no option {', '.join(sorted(unknown))}")
    kept = {key: trained[key] for key in names & trained.keys() if trained[key] is not None}
    values = {**kept, **given}
    if not values.get("bpe_dir"):
        raise InputError(
            f"{file}: does not say which vocabulary it was trained with; give --bpe-dir, the folder with it"
        )
    return OmegaConf.structured(known(_name=name, **values))
