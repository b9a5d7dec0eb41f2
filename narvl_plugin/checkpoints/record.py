"""A checkpoint as one record: it is read, fitted to an architecture and written."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor

from narvl_plugin.checkpoints.reading import SAFETENSORS_SUFFIX, read_checkpoint, whole_checkpoint
from narvl_plugin.errors import InputError
from narvl_plugin.models.config import SIZES, OfaConfig, of_size
from narvl_plugin.models.factory import FAMILIES
from narvl_plugin.models.interop import (
    EMBEDDING,
    EMBEDDING_ALIASES,
    FAMILY_NAMES,
    QUERIES,
    Use,
    adopt,
    averaged_weights,
    fit_state,
    flags_of,
    mark_origin,
    tables_of,
)
from narvl_plugin.models.meta import without_weights
from narvl_plugin.models.narvl import query_rows
from narvl_plugin.models.ofa import OfaModel
from narvl_plugin.whole_files import whole_file, write_whole


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        file: where it was read.
        weights: by name, mapped from the file.
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
        cfg = state.get("cfg")
        if cfg is None:
            cfg = _configuration_of_flags(state.get("args"))
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

    @property
    def family(self) -> str:
        """The family of architectures, by the weights: `narvl` of students, `ofa` of teachers."""
        return "narvl" if self.is_student else "ofa"

    def of_member(self, member: str) -> Checkpoint:
        """Return the checkpoint with the queries and the task of one member of a mixture alone.

        Raises:
            InputError: it is no student of a mixture, or the mixture has no such member.
        """
        model = self._model_options()
        rows = query_rows(model.get("member_queries", "")) if self.is_student else {}
        if member not in rows:
            raise InputError(
                f"{self.file}: --member {member}: "
                + (f"its members are {', '.join(rows)}" if rows else "is no student of a mixture of tasks")
            )
        queries = self.weights[QUERIES][rows[member]]
        own = {**model, "member_queries": "", "num_queries": len(queries)}
        cfg = {**self.cfg, "model": own, "task": self.members.get(member, self.cfg.get("task"))}
        return replace(self, weights={**self.weights, QUERIES: queries}, cfg=cfg, task_state={})

    def fit(
        self, *, arch: str | None = None, num_queries: int | None = None, allow: Sequence[str] = ()
    ) -> tuple[Checkpoint, list[str]]:
        """Fit the weights to an architecture; see `fit_state`.

        Args:
            arch: such as `narvl_base`; by default the checkpoint's own.
            num_queries: a student's N; by default the checkpoint's own.
            allow: names, or shell patterns of names, of tensors that may be missing, left over or of another shape.

        Returns:
            The fitted checkpoint, and a line on each tensor that is new, unused or reshaped.

        Raises:
            InputError: there is no such architecture, or the checkpoint holds another model.
        """
        if EMBEDDING not in self.weights:
            raise InputError(f"{self.file}: is no checkpoint of OFA or of this project (no cfg, or no {EMBEDDING})")
        family, _, size = (arch or self.family).partition("_")
        if family not in FAMILIES or (size and size not in SIZES):
            raise InputError(f"unknown --arch {arch}; give ofa_SIZE or narvl_SIZE, SIZE one of {', '.join(SIZES)}")
        config_class, model_class = FAMILIES[family]
        values = self._model_options() | {"_name": family}
        if size:
            values |= {name: getattr(config_class(**SIZES[size]), name) for name in SIZES["tiny"]}
        if num_queries is not None:
            if family != "narvl":
                raise InputError(f"--num-queries {num_queries}: a teacher has no queries; give --arch narvl_SIZE, too")
            values["num_queries"] = num_queries
        config = config_class.of(values)
        labels = len(self.weights[EMBEDDING]) - self.is_student + model_class.extra_labels
        # What may be missing takes the values that a model starts with; without that, names and shapes will do.
        with nullcontext() if allow else without_weights():
            own = model_class(config, labels).state_dict()
        try:
            fitted, notes = fit_state(self.weights, own, allow=allow)
        except InputError as error:
            raise InputError(f"{self.file}: {error}") from error
        return replace(self, weights=fitted, cfg={**self.cfg, "model": asdict(config)}), notes

    def write(self, out: Path, *, to_ofa: bool = False) -> None:
        """Write the checkpoint, without the state of its training; the file appears all at once.

        Args:
            out: the file; NAME.safetensors puts the configuration into NAME.json.
            to_ofa: write a teacher in OFA's layout.

        Raises:
            InputError: OFA has no such model, or the file cannot be written.
        """
        weights, cfg, task_state = self.weights, self.cfg, self.task_state
        if to_ofa:
            config = OfaConfig.of(cfg["model"])
            cfg, task_state = {**cfg, "model": flags_of(config)}, {}
            weights = weights | tables_of(config)
        with whole_file(out) as part:
            if out.suffix != SAFETENSORS_SUFFIX:
                with open(part, "wb") as stream:  # to a path, torch would not say why it cannot write
                    torch.save(whole_checkpoint(weights, cfg) | {"task_state": task_state}, stream)
                return
            own_names = {name: tensor.contiguous() for name, tensor in weights.items() if name not in EMBEDDING_ALIASES}
            safetensors.torch.save_file(own_names, part)
            description = out.with_suffix(".json")
            write_whole(description, json.dumps({"cfg": cfg, "task_state": task_state}, indent=2) + "\n")
            shutil.copymode(description, part)  # safetensors lets none but the owner read

    def _model_options(self) -> dict[str, Any]:
        """Return the options of the model; raises InputError where they are none of ours."""
        values = self.cfg.get("model")
        if not isinstance(values, dict):
            raise InputError(f"{self.file}: was trained with a model that is none of ours ({type(values).__name__})")
        return dict(values)

    def build_model(self, use: Use, labels: int) -> OfaModel:
        """Build the model and give it the weights, which it shares with the checkpoint.

        Args:
            use: what the model is for.
            labels: of the task's vocabulary, without the blank.

        Raises:
            InputError: the checkpoint is none of our families', or not for this use.
        """
        options = self.cfg.get("model")
        given = vars(options) if isinstance(options, Namespace) else options
        values: dict[str, Any] = given if isinstance(given, dict) else {}
        name = values.get("_name") or values.get("arch")
        if not isinstance(name, str) or not FAMILY_NAMES.fullmatch(name):
            raise InputError(f"{self.file}: the model {name!r:.80} is none of ours (ofa_SIZE, narvl_SIZE)")
        family, _, size = name.partition("_")
        config_class, model_class = FAMILIES[family]
        try:
            config = (of_size(config_class, size) if size in SIZES else config_class).of(values)
            config.allow_mismatch = ""  # a file does not say how strictly it is checked
            with without_weights():
                model = model_class(config, labels + model_class.extra_labels)
            model.use = use
            marked = {"model": dict(self.weights), "cfg": self.cfg, "task_state": self.task_state}
            mark_origin(marked)
            model.load_state_dict(marked["model"])
        except InputError as error:
            raise InputError(f"{self.file}: {error}") from error
        except Exception as error:  # a checkpoint may ask for anything
            raise InputError(
                f"{self.file}: the checkpoint's model cannot be built ({type(error).__name__}: {error})"
            ) from error
        return model.eval()


def read_state(file: str | Path, *, averaged: bool = False) -> dict[str, Any]:
    """Return the parts of a checkpoint by fairseq's names, with a foreign one's configuration as ours.

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
    return state


def _configuration_of_flags(flags: Any) -> dict[str, Any] | None:
    """Return the configuration that the flags of an older checkpoint stand for."""
    if not isinstance(flags, Namespace):
        return None
    values = vars(flags)
    return {"model": flags, "task": {**values, "_name": values.get("task")}}
