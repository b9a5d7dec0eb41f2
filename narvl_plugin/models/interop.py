"""Published checkpoints of OFA: their configuration and their state, as our models take them."""

from argparse import Namespace
from dataclasses import fields
from typing import Any

from torch import Tensor

from .config import OfaConfig

RECOMPUTED_TABLES = ("token_rp_bucket", "image_rp_bucket", "image_position_idx")
"""Integer tables that OFA keeps in its state and that follow from the configuration."""

FIXED_FLAGS = {
    "scale_attn": True,
    "scale_fc": True,
    "scale_heads": True,
    "scale_resids": False,
    "entangle_position_embedding": False,
}
"""Flags of OFA that all published checkpoints share, and that are no options here."""


def config_from_flags(flags: Namespace, config_class: type[OfaConfig]) -> OfaConfig:
    """Make a configuration of the flags that a published checkpoint holds; our defaults fill what it lacks.

    Raises ValueError for a model that was trained with other fixed flags than the published ones.
    """
    for name, expected in FIXED_FLAGS.items():
        value = getattr(flags, name, expected)
        if bool(value) != expected:
            raise ValueError(f"the checkpoint was trained with {name}={value}; only {name}={expected} is supported")
    values: dict[str, Any] = {
        field.name: getattr(flags, field.name)
        for field in fields(config_class)
        if getattr(flags, field.name, None) is not None
    }
    if getattr(flags, "resnet_type", None):
        values["vision_trunk"] = flags.resnet_type
    return config_class(**values)


def drop_recomputed_tables(state_dict: dict[str, Tensor]) -> None:
    """Remove the tables that our models compute when they need them, in place."""
    for key in [key for key in state_dict if key.endswith(RECOMPUTED_TABLES)]:
        del state_dict[key]
