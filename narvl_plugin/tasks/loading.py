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
from narvl_plugin.tasks.options import option_names, trained_options
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
    task_class = _task_class(checkpoints[0], given.get("member"), task_name)
    task, models = task_class.from_checkpoints(checkpoints, given, device=device)
    return Loaded(models, task, checkpoints[-1].cfg)


def _task_class(checkpoint: Checkpoint, member: Any, task_name: str) -> type[BaseTask]:
    """Return the task that a checkpoint, or a member of its mixture, was trained on; else the one with this name."""
    trained_for = trained_options(checkpoint, str(member or task_name)).get("_name")
    return TASKS.get(str(trained_for)) or TASKS[task_name]


def load_members(
    checkpoint: Checkpoint,
    *,
    task_name: str = "caption",
    member: str | None = None,
    task_overrides: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
) -> tuple[OfaModel, dict[str, BaseTask]]:
    """Build the model of a checkpoint, for all tasks that it was trained on.

    Args:
        checkpoint: the checkpoint.
        task_name: the task of a checkpoint that was trained on none of ours.
        member: of a mixture, the one member to load; None loads all.
        task_overrides: as `load` takes them. Those that a member's task does not have are left out for it.
        device: where the model goes.

    Returns:
        The model, and its tasks by the member's name, or by the task's for a model of one task.

    Raises:
        MissingInput, InputError: as `load` does.
    """
    given = dict(task_overrides or {})
    names: Sequence[str | None] = [member] if member or not checkpoint.members else list(checkpoint.members)
    tasks: dict[str, BaseTask] = {}
    for name in names:
        kind = _task_class(checkpoint, name, task_name)
        own = {option: value for option, value in given.items() if option in option_names(kind.config_class)}
        # A vocabulary takes longer to read than all other options.
        shared = {"codec": next(iter(tasks.values())).codec} if tasks else {}
        tasks[name or kind.name] = kind.with_options_of([checkpoint], own | {"member": name}, **shared)
    first, *others = tasks.values()
    model = first.model_of(checkpoint).to(device)
    for task in others:
        task.check_model(model)
    return model, tasks


def require_one_task(teacher: Path, asked: BaseTask, student: Path, parallel: BaseTask) -> None:
    """Raise InputError, with the names of both checkpoints, unless teacher and student have the same task."""
    if asked.name != parallel.name:
        raise InputError(
            f"{teacher} was trained for {asked.cfg._name}, {student} for {parallel.cfg._name}; give checkpoints of one "
            "task"
        )
