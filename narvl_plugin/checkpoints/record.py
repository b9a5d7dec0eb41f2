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

from narvl_plugin.checkpoints.finding import CONFIG_FILE, existing
from narvl_plugin.checkpoints.ports import is_bare, write_port
from narvl_plugin.checkpoints.reading import read_checkpoint, whole_checkpoint
from narvl_plugin.checkpoints.weight_files import SAFETENSORS_SUFFIX
from narvl_plugin.data.vocabulary import holds_vocabulary
from narvl_plugin.errors import InputError
from narvl_plugin.models.config import SIZES, OfaConfig, of_size
from narvl_plugin.models.factory import FAMILIES
from narvl_plugin.models.interop import (
    BACKBONE,
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
    with_frozen_backbone,
)
from narvl_plugin.models.meta import without_weights
from narvl_plugin.models.narvl import calibrations, query_rows
from narvl_plugin.models.ofa import OfaModel
from narvl_plugin.whole_files import whole_file, write_whole

LAYOUTS = ("narvl", "ofa", "huggingface")
"""Layouts of checkpoints: ours, that of OFA's files, and that of its Hugging Face and ModelScope ports."""
PATHS = frozenset({"data", "bpe_dir", "ans2label_file", "rescore_with", "mbr_frequencies", "ngram_automaton"})
"""Options of tasks that name files and folders."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        file: the file that it was read from.
        weights: the weights by name, mapped from the file.
        cfg: the parts of fairseq's configuration by name, such as `model` and `task`.
        task_state: values that the task added; for a mixture of tasks, the options of its `members`.
    """

    file: Path
    weights: dict[str, Tensor]
    cfg: dict[str, Any]
    task_state: dict[str, Any]

    @classmethod
    def read(cls, file: str | Path, *, averaged: bool = False) -> Checkpoint:
        """Read a checkpoint of this or another project.

        Args:
            file: the checkpoint, see `existing`.
            averaged: whether to use its averaged weights.

        Raises:
            MissingInput: if the file does not exist.
            InputError: if it is not a checkpoint, or has no configuration or no averaged weights.
        """
        file = existing(file)
        state = read_state(file, averaged=averaged)
        cfg = state.get("cfg")
        if cfg is None:
            cfg = _configuration_of_flags(state.get("args"))
        if cfg is None:
            raise InputError(f"{file}: holds no configuration (cfg), so its model is unknown")
        return cls(file, state["model"], cfg, state.get("task_state") or {})

    @property
    def is_student(self) -> bool:
        """Whether the model is a student, by its queries."""
        return QUERIES in self.weights

    @property
    def members(self) -> Mapping[str, Any]:
        """The task options of a mixture, by member; empty for a model of one task."""
        members = self.task_state.get("members")
        return members if isinstance(members, dict) else {}

    @property
    def task(self) -> Mapping[str, Any]:
        """The options of the training's task, by name."""
        options = self.cfg.get("task") or {}
        return dict(vars(options)) if isinstance(options, Namespace) else options

    @property
    def vocabulary(self) -> Path | None:
        """The folder of the vocabulary: the one that the checkpoint names, or else its own; None if there is none."""
        named = [self.task.get("bpe_dir"), *(one.get("bpe_dir") for one in self.members.values())]
        found = next((Path(folder) for folder in named if isinstance(folder, str) and Path(folder).is_dir()), None)
        return found or (self.file.parent if holds_vocabulary(self.file.parent) else None)

    def require(self, role: Literal["teacher", "student"] | None) -> None:
        """Raise InputError unless the model has this role; None accepts both."""
        found = "student" if self.is_student else "teacher"
        if role not in (None, found):
            raise InputError(f"{self.file}: is a {found}; give a {role}")

    @property
    def family(self) -> str:
        """The family of architectures, by the weights: `narvl` for students, `ofa` for teachers."""
        return "narvl" if self.is_student else "ofa"

    def of_member(self, member: str) -> Checkpoint:
        """Return the checkpoint with only the queries and the task of one member of a mixture.

        Raises:
            InputError: if it is not a student of a mixture, or the mixture has no such member.
        """
        model = self._model_options()
        rows = query_rows(model.get("member_queries", "")) if self.is_student else {}
        if member not in rows:
            raise InputError(
                f"{self.file}: --member {member}: "
                + (f"its members are {', '.join(rows)}" if rows else "is no student of a mixture of tasks")
            )
        queries = self.weights[QUERIES][rows[member]]
        own = {**model, "member_queries": "", "num_queries": len(queries), "member_calibration": ""}
        if found := calibrations(str(model.get("member_calibration", ""))).get(member):
            own |= {"temperature": found.temperature, "confidence_slope": found.slope}
            own["confidence_offset"] = found.offset
        cfg = {**self.cfg, "model": own, "task": self.members.get(member, self.cfg.get("task"))}
        return replace(self, weights={**self.weights, QUERIES: queries}, cfg=cfg, task_state={})

    def fit(
        self, *, arch: str | None = None, num_queries: int | None = None, allow: Sequence[str] = ()
    ) -> tuple[Checkpoint, list[str]]:
        """Fit the weights to an architecture; see `fit_state`.

        Args:
            arch: the architecture, such as `narvl_base`; by default the checkpoint's.
            num_queries: a student's N; by default the checkpoint's.
            allow: names, or shell patterns of names, of tensors that may be missing, left over or of another shape.

        Returns:
            The fitted checkpoint, and a line for each tensor that is new, unused or reshaped.

        Raises:
            InputError: if the architecture is unknown, or the checkpoint holds another model.
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
        # Missing tensors take the initial values of a model. If none may be missing, names and shapes are enough.
        with nullcontext() if allow else without_weights():
            own = model_class(config, labels).state_dict()
        try:
            fitted, notes = fit_state(with_frozen_backbone(self.weights, config), own, allow=allow)
        except InputError as error:
            raise InputError(f"{self.file}: {error}") from error
        return replace(self, weights=fitted, cfg={**self.cfg, "model": asdict(config)}), notes

    def slim(self) -> Checkpoint:
        """Return the checkpoint as one to hand on, for use and not for training on.

        Weights are in 16 bits, which changes outputs by rounding. A frozen backbone with the ImageNet weights of its
        package is left out. So are the options of the training, and paths.

        Raises:
            InputError: the backbone was trained, or is of a kind whose weights no package has.
        """
        config = FAMILIES[self.family][0].of(self._model_options() | {"_name": self.family})
        names = [name for name in self.weights if name.startswith(BACKBONE)]
        if not (config.vision_pretrained and config.freeze_resnet):
            raise InputError(f"{self.file}: its backbone was trained, so it cannot be left out")
        known = with_frozen_backbone({}, config)
        if changed := [name for name in names if not torch.equal(self.weights[name], known[name])]:
            raise InputError(f"{self.file}: {changed[0]} differs from ImageNet's weights, so it cannot be left out")
        kept = {name: tensor for name, tensor in self.weights.items() if name not in names}
        halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in kept.items()}
        if too_large := [name for name, tensor in halves.items() if not bool(tensor.float().isfinite().all())]:
            raise InputError(f"{self.file}: {too_large[0]} has numbers that 16 bits cannot hold")
        members = {name: _without_paths(options) for name, options in self.members.items()}
        cfg = {"model": self.cfg["model"], "task": _without_paths(self.task)}
        return replace(self, weights=halves, cfg=cfg, task_state={"members": members} if members else {})

    def write(self, out: Path, *, to: str = "narvl", vocabulary: Path | None = None) -> None:
        """Write the checkpoint without its training state. The file or folder appears only when it is complete.

        Args:
            out: the file; for NAME.safetensors, the configuration goes into NAME.json. For the layout of the ports, the
                folder.
            to: the layout, one of `LAYOUTS`. All but the first are for teachers.
            vocabulary: for the layout of the ports, the folder of the vocabulary.

        Raises:
            InputError: if the layout has no such model, or the file cannot be written.
        """
        weights, cfg, task_state = self.weights, self.cfg, self.task_state
        if to != "narvl":
            config = OfaConfig.of(cfg["model"])
        if to == "huggingface":
            assert vocabulary is not None
            write_port(out, weights, config, vocabulary)
            return
        if to == "ofa":
            cfg, task_state = {**cfg, "model": flags_of(config)}, {}
            weights = weights | tables_of(config)
        with whole_file(out) as part:
            if out.suffix != SAFETENSORS_SUFFIX:
                with open(part, "wb") as stream:  # for a path, torch's error would lack the reason
                    torch.save(whole_checkpoint(weights, cfg) | {"task_state": task_state}, stream)
                return
            own_names = {name: tensor.contiguous() for name, tensor in weights.items() if name not in EMBEDDING_ALIASES}
            safetensors.torch.save_file(own_names, part)
            description = out.with_suffix(".json")
            write_whole(description, json.dumps({"cfg": cfg, "task_state": task_state}, indent=2) + "\n")
            shutil.copymode(description, part)  # safetensors gives only the owner access

    def _model_options(self) -> dict[str, Any]:
        """Return the options of the model; raise InputError if the model is not one of ours."""
        values = self.cfg.get("model")
        if not isinstance(values, dict):
            raise InputError(f"{self.file}: was trained with a model that is not supported ({type(values).__name__})")
        return dict(values)

    def build_model(self, use: Use, labels: int) -> OfaModel:
        """Build the model. It shares its weights with the checkpoint.

        Args:
            use: the use of the model.
            labels: the size of the task's vocabulary, without the blank.

        Raises:
            InputError: if the model is not of our families, or does not fit this use.
        """
        options = self.cfg.get("model")
        given = vars(options) if isinstance(options, Namespace) else options
        values: dict[str, Any] = given if isinstance(given, dict) else {}
        name = values.get("_name") or values.get("arch")
        if not isinstance(name, str) or not FAMILY_NAMES.fullmatch(name):
            raise InputError(f"{self.file}: the model {name!r:.80} is not supported; it must be ofa_SIZE or narvl_SIZE")
        family, _, size = name.partition("_")
        config_class, model_class = FAMILIES[family]
        try:
            config = (of_size(config_class, size) if size in SIZES else config_class).of(values)
            config.allow_mismatch = ""  # a file must not decide how strictly it is checked
            with without_weights():
                model = model_class(config, labels + model_class.extra_labels)
            model.use = use
            marked = {"model": dict(self.weights), "cfg": self.cfg, "task_state": self.task_state}
            mark_origin(marked)
            model.load_state_dict(marked["model"])
        except InputError as error:
            raise InputError(f"{self.file}: {error}") from error
        except Exception as error:  # a checkpoint may hold any values
            raise InputError(
                f"{self.file}: the checkpoint's model cannot be built ({type(error).__name__}: {error})"
            ) from error
        return model.eval()


def _without_paths(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a task without the files and folders of its training."""
    return {name: value for name, value in options.items() if name not in PATHS}


def read_state(file: str | Path, *, averaged: bool = False) -> dict[str, Any]:
    """Return the parts of a checkpoint by fairseq's names. A foreign checkpoint is converted to our form.

    Args:
        file: the checkpoint.
        averaged: whether to return the averaged weights in place of the others.

    Raises:
        MissingInput: if the file does not exist.
        InputError: if it is not a checkpoint, or has no averaged weights.
    """
    state = read_checkpoint(file)
    if state.get("model") is None:
        hint = f"; it holds weights alone, which are read with {CONFIG_FILE} of a port of OFA beside them"
        raise InputError(
            f"{file}: is no checkpoint of fairseq: it holds no weights under 'model'{hint if is_bare(state) else ''}"
        )
    if "cfg" not in state and "args" not in state:
        raise InputError(f"{file}: is no checkpoint of fairseq: it holds no options of its training under 'cfg'")
    if averaged:
        state["model"] = averaged_weights(state, file)
    adopt(state, str(file))
    return state


def _configuration_of_flags(flags: Any) -> dict[str, Any] | None:
    """Return the flags of an older checkpoint as a configuration; None if there are no flags."""
    if not isinstance(flags, Namespace):
        return None
    values = vars(flags)
    return {"model": flags, "task": {**values, "_name": values.get("task")}}
