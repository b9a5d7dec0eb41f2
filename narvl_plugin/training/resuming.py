"""Checks whether a training can resume from a checkpoint. The optimizer's state must fit the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from narvl_plugin.errors import InputError
from narvl_plugin.models.interop import own_options

SHAPING = (
    *("encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_layers", "decoder_layers", "encoder_attention_heads"),
    *("vision_trunk", "normalise_features", "max_positions", "token_bucket_size", "image_bucket_size"),
    *("freeze_resnet", "freeze_embedding", "num_queries"),
)
"""Model options that determine the trained weights and their shapes."""


def check_resumed(file: str, state: Mapping[str, Any], cfg: Mapping[str, Any], reset_lr_scheduler: bool) -> None:
    """Check that a training resumes with the model, criterion, optimizer and schedule that it began with.

    Args:
        file: the checkpoint, for the message.
        state: its content. A checkpoint without an optimizer's state is not checked: a new training starts from it.
        cfg: the whole configuration of the training that resumes.
        reset_lr_scheduler: whether the schedule starts again.

    Raises:
        InputError: if one of them differs; the message has both values.
    """
    if not state.get("model") or state.get("last_optimizer_state") is None:
        return
    trained, wanted = own_options(dict(state)), cfg["model"]
    if trained is None:
        return
    before, now = str(trained["_name"]), str(wanted["_name"])
    differences = []
    if before.partition("_")[0] != now.partition("_")[0]:
        differences.append(f"--arch {before}, now {now}")
    elif trained.get("member_queries", "") != wanted.get("member_queries", ""):
        members = [str(options.get("member_queries", "") or "of one task") for options in (trained, wanted)]
        differences.append(f"queries {members[0]}, now {members[1]}")
    else:
        differences += [
            f"--{name.replace('_', '-')} {trained[name]}, now {wanted[name]}"
            for name in SHAPING
            if name in trained and name in wanted and trained[name] != wanted[name]
        ]
    vocabularies = [str(options.get("vocabulary") or "") for options in (trained, wanted)]
    if all(vocabularies) and vocabularies[0] != vocabularies[1]:
        differences.append("another --bpe-dir or --num-bins (checksums {}, now {})".format(*vocabularies))
    for part in ("criterion", "optimizer", "lr_scheduler"):
        names = [_name(parts.get(part)) for parts in (state["cfg"], cfg)]
        if None not in names and names[0] != names[1] and not (part == "lr_scheduler" and reset_lr_scheduler):
            differences.append(f"--{part.replace('_', '-')} {names[0]}, now {names[1]}")
    if differences:
        is_schedule = len(differences) == 1 and differences[0].startswith("--lr-scheduler")
        reset = (
            "--reset-lr-scheduler to start the schedule again"
            if is_schedule
            else "--reset-optimizer to use only its weights"
        )
        archs = f" (--arch {before}, now {now})" if before != now and "--arch" not in differences[0] else ""
        raise InputError(
            f"{file}: its training began with {'; '.join(differences)}{archs}; give the same options, another "
            f"--save-dir, or {reset}"
        )


def _name(part: object) -> str | None:
    """Return the name by which fairseq builds a part of a training; None if it is unknown."""
    return str(part["_name"]) if isinstance(part, Mapping) and part.get("_name") else None
