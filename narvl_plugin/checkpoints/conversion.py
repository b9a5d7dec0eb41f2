"""Checkpoints from one kind to another: teacher to student, more or fewer queries, OFA's layout, safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from narvl_plugin.checkpoints.reading import SAFETENSORS_SUFFIX, read_checkpoint, whole_checkpoint
from narvl_plugin.errors import InputError
from narvl_plugin.models.config import SIZES, OfaConfig
from narvl_plugin.models.factory import FAMILIES
from narvl_plugin.models.interop import (
    EMBEDDING,
    EMBEDDING_ALIASES,
    QUERIES,
    adopt,
    averaged_weights,
    fit_state,
    flags_of,
    tables_of,
)
from narvl_plugin.models.narvl import query_rows
from narvl_plugin.whole_files import require_writable, whole_file, write_whole


def convert(
    source: Path,
    out: Path,
    *,
    arch: str | None = None,
    num_queries: int | None = None,
    member: str | None = None,
    to_ofa: bool = False,
    ema: bool = False,
    allow: Sequence[str] = (),
) -> list[str]:
    """Write the weights and the configuration of a checkpoint to another one, without the state of its training.

    Args:
        source: a checkpoint of fairseq-train, a published one of OFA or of the authors' parallel model, or
            NAME.safetensors with NAME.json beside it.
        out: the file to write; NAME.safetensors puts the configuration into NAME.json.
        arch: architecture to make, such as `narvl_base` of a teacher; by default the source's.
        num_queries: a student's N; by default the source's, for a teacher's student that of the configuration.
        member: of a student that was trained on a mixture of tasks, the member to make a student of one task for.
        to_ofa: write a teacher in OFA's layout.
        ema: take the averaged weights that the checkpoint holds beside its own.
        allow: names, or shell patterns of names, of tensors that may be missing, left over or of another shape.

    Returns:
        A line on each tensor that is new, unused or reshaped.

    Raises:
        MissingInput, InputError: the source cannot be read, or holds another model than `arch`.
    """
    if out.exists() and out.samefile(source):
        raise InputError(f"{out}: is the source; write to another file")
    require_writable(out)
    if out.suffix == SAFETENSORS_SUFFIX:
        require_writable(out.with_suffix(".json"))
    state = read_checkpoint(source)
    weights = _weights(source, state, ema)
    adopt(state, str(source))
    if member is not None:
        state, weights = _of_one_member(source, state, weights, member)
    family, config = _configuration(source, state, weights, arch, num_queries)
    if to_ofa and family != "ofa":
        raise InputError(f"{source}: is a student; OFA's layout is for teachers")
    if to_ofa and out.suffix == SAFETENSORS_SUFFIX:
        raise InputError(f"{out}: OFA's layout is a checkpoint of torch; name it .pt")
    model_class = FAMILIES[family][1]
    labels = len(weights[EMBEDDING]) - (QUERIES in weights) + model_class.extra_labels
    # What may be missing takes the values that a model starts with; without that, names and shapes will do.
    with torch.device("cpu" if allow else "meta"):
        own = model_class(config, labels).state_dict()
    try:
        fitted, notes = fit_state(weights, own, allow=allow)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error

    cfg = dict(state["cfg"])
    if to_ofa:
        cfg["model"] = flags_of(config)
        fitted |= tables_of(config)
    else:
        cfg["model"] = asdict(config)
    _write(out, fitted, cfg, {} if to_ofa else state.get("task_state") or {})
    return notes


def _weights(source: Path, state: dict[str, Any], ema: bool) -> dict[str, Tensor]:
    """Return the weights that are asked for, by name."""
    weights = averaged_weights(state, source) if ema else state.get("model")
    if not isinstance(weights, dict) or EMBEDDING not in weights or not isinstance(state.get("cfg"), dict):
        raise InputError(f"{source}: is no checkpoint of OFA or of this project (no cfg, or no {EMBEDDING})")
    return weights


def _of_one_member(
    source: Path, state: dict[str, Any], weights: dict[str, Tensor], member: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the checkpoint and the weights with the queries and the task of one member of a mixture alone."""
    cfg = state["cfg"]
    rows = query_rows(cfg["model"].get("member_queries", "")) if QUERIES in weights else {}
    if member not in rows:
        raise InputError(
            f"{source}: --member {member}: "
            + (f"its members are {', '.join(rows)}" if rows else "is no student of a mixture of tasks")
        )
    queries = weights[QUERIES][rows[member]]
    model = {**cfg["model"], "member_queries": "", "num_queries": len(queries)}
    task = (state.get("task_state") or {}).get("members", {}).get(member, cfg.get("task"))
    whole = {**state, "cfg": {**cfg, "model": model, "task": task}, "task_state": {}}
    return whole, {**weights, QUERIES: queries}


def _configuration(
    source: Path, state: dict[str, Any], weights: dict[str, Tensor], arch: str | None, num_queries: int | None
) -> tuple[str, OfaConfig]:
    """Return family and configuration of the model to write: the source's, in the sizes of `arch`."""
    values = state["cfg"].get("model")
    if not isinstance(values, dict):
        raise InputError(f"{source}: was trained with a model that is none of ours ({type(values).__name__})")
    family, _, size = (arch or ("narvl" if QUERIES in weights else "ofa")).partition("_")
    if family not in FAMILIES or (size and size not in SIZES):
        raise InputError(f"unknown --arch {arch}; give ofa_SIZE or narvl_SIZE, SIZE one of {', '.join(SIZES)}")
    config_class = FAMILIES[family][0]
    if size:
        values = values | {name: getattr(config_class(**SIZES[size]), name) for name in SIZES["tiny"]}
    if num_queries is not None:
        if family != "narvl":
            raise InputError(f"--num-queries {num_queries}: a teacher has no queries; give --arch narvl_SIZE, too")
        values = values | {"num_queries": num_queries}
    return family, config_class.of(values | {"_name": family})


def _write(out: Path, weights: dict[str, Tensor], cfg: dict[str, Any], task_state: dict[str, Any]) -> None:
    """Write a checkpoint that appears all at once. `task_state` holds the members of a mixture of tasks."""
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
