"""Checkpoints read back as models with their task, whoever trained them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from narvl_plugin.checkpoints.record import Checkpoint
from narvl_plugin.errors import InputError
from narvl_plugin.models.ofa import OfaModel
from narvl_plugin.tasks.base import BaseTask
from narvl_plugin.tasks.options import trained_options
from narvl_plugin.tasks.registry import TASKS


class Loaded(NamedTuple):
    """What checkpoints hold: models in evaluation mode, their task, the configuration of the last one's training."""

    models: list[OfaModel]
    task: BaseTask
    cfg: dict[str, Any]


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
    checkpoints = [Checkpoint.read(file, averaged=bool(given.get("ema_eval"))) for file in files]
    for checkpoint in checkpoints:
        checkpoint.require(role)
    trained_for = trained_options(checkpoints[0], str(given.get("member") or task_name)).get("_name")
    task_class = TASKS.get(str(trained_for)) or TASKS[task_name]
    task, models = task_class.from_checkpoints(checkpoints, given, device=device)
    return Loaded(models, task, checkpoints[-1].cfg)


def require_one_task(teacher: Path, asked: BaseTask, student: Path, parallel: BaseTask) -> None:
    """Raise InputError, which names both checkpoints, unless teacher and student were trained for one task."""
    if asked.name != parallel.name:
        raise InputError(
            f"{teacher} was trained for {asked.cfg._name}, {student} for {parallel.cfg._name}; give checkpoints of one "
            "task"
        )
