"""A checkpoint as this project sees it: weights, configuration, members."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.errors import InputError
from narvl_plugin.models.config import SIZES, of_size
from narvl_plugin.models.factory import FAMILIES
from narvl_plugin.models.interop import (
    FAMILY_NAMES,
    QUERIES,
    Use,
    adopt,
    averaged_weights,
    mark_origin,
    own_options,
)
from narvl_plugin.models.ofa import OfaModel


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        file: where it was read.
        weights: by name, mapped from the file; of one of our models, with their origin.
        cfg: the parts of fairseq's configuration by name, such as `model` and `task`.
        task_state: what the task added; of a mixture of tasks, the options of its `members`.
    """

    file: Path
    weights: dict[str, Tensor]
    cfg: dict[str, Any]
    task_state: dict[str, Any]

    @classmethod
    def read(cls, file: str | Path, *, averaged: bool = False) -> Checkpoint:
        """Read a checkpoint, ours or a foreign one.

        Args:
            file: the checkpoint.
            averaged: take the averaged weights that it holds beside its own.

        Raises:
            MissingInput: the file does not exist.
            InputError: it is no checkpoint, or lacks what is asked for.
        """
        state = read_state(file, averaged=averaged)
        cfg = state.get("cfg") or _configuration_of_flags(state.get("args"))
        if cfg is None:
            raise InputError(f"{file}: holds no configuration (cfg), so it cannot be told which model it is")
        return cls(Path(file), state["model"], cfg, state.get("task_state") or {})

    @property
    def is_student(self) -> bool:
        """Whether the model is a student, which has queries."""
        return QUERIES in self.weights

    @property
    def members(self) -> Mapping[str, Any]:
        """The options of the tasks that a mixture was trained on, by member; empty for a model of one task."""
        members = self.task_state.get("members")
        return members if isinstance(members, dict) else {}

    @property
    def task(self) -> Mapping[str, Any]:
        """The options of the task of the training, by name."""
        options = self.cfg.get("task") or {}
        return dict(vars(options)) if isinstance(options, Namespace) else options

    def require(self, role: Literal["teacher", "student"] | None) -> None:
        """Raise InputError unless the model has a role; None takes either."""
        found = "student" if self.is_student else "teacher"
        if role not in (None, found):
            raise InputError(f"{self.file}: is a {found}; give a {role}")

    def build_model(self, use: Use, labels: int) -> OfaModel:
        """Build the model and give it the weights, which it shares with the checkpoint.

        Args:
            use: what the model is for.
            labels: of the task's vocabulary, without the blank.

        Raises:
            InputError: the checkpoint is none of our families', or not for this use.
        """
        options = self.cfg.get("model")
        values = vars(options) if isinstance(options, Namespace) else options
        name = (values.get("_name") or values.get("arch")) if isinstance(values, dict) else None
        if not isinstance(name, str) or not FAMILY_NAMES.fullmatch(name):
            raise InputError(f"{self.file}: the model {name!r:.80} is none of ours (ofa_SIZE, narvl_SIZE)")
        family, _, size = name.partition("_")
        config_class, model_class = FAMILIES[family]
        try:
            config = (of_size(config_class, size) if size in SIZES else config_class).of(values)
            config.allow_mismatch = ""  # a file does not say how strictly it is checked
            with torch.device("meta"):
                model = model_class(config, labels + model_class.extra_labels)
            model.use = use
            model.load_state_dict(self.weights)
        except InputError as error:
            raise InputError(f"{self.file}: {error}") from error
        except Exception as error:  # a checkpoint may ask for anything
            raise InputError(
                f"{self.file}: the checkpoint's model cannot be built ({type(error).__name__}: {error})"
            ) from error
        return model.eval()


def read_state(file: str | Path, *, averaged: bool = False) -> dict[str, Any]:
    """Return the parts of a checkpoint by fairseq's names: a foreign one's configuration as ours, weights with origin.

    Args:
        file: the checkpoint.
        averaged: put the averaged weights in place of the others.

    Raises:
        MissingInput: the file does not exist.
        InputError: it is no checkpoint, or has no averaged weights.
    """
    state = read_checkpoint(file)
    if state.get("model") is None:
        raise InputError(f"{file}: is no checkpoint of fairseq: it holds no weights under 'model'")
    if "cfg" not in state and "args" not in state:
        raise InputError(f"{file}: is no checkpoint of fairseq: it holds no options of its training under 'cfg'")
    if averaged:
        state["model"] = averaged_weights(state, file)
    adopt(state, str(file))
    if (options := own_options(state)) is not None:
        options["allow_mismatch"] = ""  # a file does not say how strictly it is checked
        mark_origin(state)
    return state


def _configuration_of_flags(flags: Any) -> dict[str, Any] | None:
    """Return the configuration that the flags of an older checkpoint stand for."""
    if not isinstance(flags, Namespace):
        return None
    values = vars(flags)
    return {"model": flags, "task": {**values, "_name": values.get("task")}}
