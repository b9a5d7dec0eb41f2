"""Loading of checkpoints, ours and published ones, as models with their task."""

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
    """Loaded checkpoints.

    Attributes:
        models: the models, in evaluation mode.
        task: their task.
        cfg: the training configuration of the last checkpoint.
    """

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

    The task's options are those of the training, see `options_of_all`. A published checkpoint needs only `bpe_dir`
    and `data`.

    Args:
        paths: files of fairseq-train or published ones.
        task_name: the task to use if a checkpoint was not trained on one of our tasks.
        task_overrides: task options that replace the checkpoint's, such as `{"data": "test.tsv"}`; None counts as not
            given.
        role: the kind of model that the caller needs; None accepts both.
        device: the device of the models.

    Raises:
        MissingInput: if a checkpoint or the folder of its vocabulary does not exist.
        InputError: if a file is not a checkpoint, does not name its vocabulary, has another vocabulary than the task,
            or holds a model of another role.
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
    """Raise InputError, with the names of both checkpoints, unless teacher and student have the same task."""
    if asked.name != parallel.name:
        raise InputError(
            f"{teacher} was trained for {asked.cfg._name}, {student} for {parallel.cfg._name}; give checkpoints of one "
            "task"
        )
