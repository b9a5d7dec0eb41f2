"""OFA's models in the layout of the Hugging Face and ModelScope ports: names of weights, and options.

Both ports have one layout. Weights whose names are not listed here are named as in OFA's own layout.

Legend: V labels of the vocabulary, D width.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from narvl_plugin.errors import InputError

from .config import OfaConfig, check_value
from .interop import CODE_POSITIONS, EMBEDDING, EMBEDDING_ALIASES, QUERIES, check_tables, tables_of

_NORM = r"weight|bias"
_ATTENTION = r"[qkv]_proj\.(?:weight|bias)|out_proj\.(?:weight|bias)|c_attn"
RENAMED = (
    ("encoder", "attn_ln", "self_attn_mid_layer_norm", _NORM),
    ("encoder", "ffn_layernorm", "ffn_layer_norm", _NORM),
    ("decoder", "ffn_layernorm", "ffn_layer_norm", _NORM),
    ("decoder", "self_attn_ln", "self_attn_mid_layer_norm", _NORM),
    ("decoder", "cross_attn_ln", "cross_attn_mid_layer_norm", _NORM),
    ("decoder", "encoder_attn", "cross_attn", _ATTENTION),
    ("decoder", "encoder_attn_layer_norm", "cross_attn_layer_norm", _NORM),
)
"""Stack, OFA's name of a part of its layers, the ports' name, and what follows as a pattern. Whole names must match."""

VERSIONS = ("encoder.version", "decoder.version")
"""Weights (1,) that the ports lack. OFA's layout has the number 3 there."""
TABLES = tuple(f"{part}.{table}_rp_bucket" for part in ("encoder", "decoder") for table in ("token", "image")) + (
    CODE_POSITIONS,
)
"""Integer tables that follow from the configuration."""
PORT_CODE_POSITIONS = 1025
"""Length of the table of positions of image codes in the ports. OFA's own has one more today."""

RESNETS = ("resnet50", "resnet101", "resnet152")
"""Backbones that the layout can name."""
OPTIONS = {
    "d_model": "encoder_embed_dim",
    "encoder_ffn_dim": "encoder_ffn_embed_dim",
    "decoder_ffn_dim": "encoder_ffn_embed_dim",
    "encoder_layers": "encoder_layers",
    "decoder_layers": "decoder_layers",
    "encoder_attention_heads": "encoder_attention_heads",
    "decoder_attention_heads": "encoder_attention_heads",
    "resnet_type": "vision_trunk",
    "max_position_embeddings": "max_positions",
    "token_bucket_size": "token_bucket_size",
    "image_bucket_size": "image_bucket_size",
    "code_image_size": "code_image_size",
    "attn_scale_factor": "attn_scale_factor",
}
"""Name of an option in config.json -> ours. All are read from the file, since the ports' defaults fit no model."""
FIXED = {"normformer": True, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
"""Options that all published models share."""
UNSUPPORTED = {
    "use_gamma_feature": "weights of residual connections",
    "temperature_init_value": "a learned temperature",
    "use_ofasys": "a ViT as image backbone",
    "share_attn_bias": "one table of relative positions for all layers",
    "entangle_position_embedding": "positions that are added to the embeddings",
}
"""Options of the ports for parts that our models lack, and these parts. They must be absent, false or null."""


def renamed(name: str, *, to_port: bool) -> str:
    """Return the name of a weight in the other layout."""
    for stack, ours, theirs, rest in RENAMED:
        before, after = (ours, theirs) if to_port else (theirs, ours)
        if found := re.fullmatch(rf"({stack}\.layers\.[0-9]+)\.{before}\.({rest})", name):
            return f"{found[1]}.{after}.{found[2]}"
    return name


def from_port(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a port by OFA's names, without the integer tables.

    Raises:
        InputError: if two names stand for one weight, or the weights are not a teacher's.
    """
    found: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, tensor in weights.items():
        if name in TABLES:
            continue
        ours = renamed(name, to_port=False)
        if ours in found:
            raise InputError(f"{origin[ours]} and {name} are one weight under two names; remove the wrong one")
        found[ours], origin[ours] = tensor, name
    for version in VERSIONS:
        found.setdefault(version, torch.tensor([3.0]))
    if QUERIES in found:
        raise InputError(f"{QUERIES}: belongs to a student, and the ports' layout is for teachers")
    for name in EMBEDDING_ALIASES:  # a file of safetensors keeps one of the names of a tensor
        if name in found:
            found.setdefault(EMBEDDING, found[name])
    if EMBEDDING not in found or found[EMBEDDING].dim() != 2:
        raise InputError(f"no weights of OFA: {EMBEDDING}, a matrix, is not among them")
    return found


def to_port(weights: Mapping[str, Tensor], config: OfaConfig) -> dict[str, Tensor]:
    """Return the weights of a teacher by the ports' names, with the integer tables."""
    found = {renamed(name, to_port=True): tensor for name, tensor in weights.items() if name not in VERSIONS}
    tables = tables_of(config)
    tables[CODE_POSITIONS] = tables[CODE_POSITIONS][:PORT_CODE_POSITIONS].clone()
    return found | tables


def config_of_port(values: Mapping[str, Any]) -> OfaConfig:
    """Return the configuration for the content of a port's config.json.

    Raises:
        InputError: if an option is missing, has another type, is outside its limits, or is not supported.
    """
    given: dict[str, Any] = {}
    kinds = {field.name: field.type for field in fields(OfaConfig)}
    for name, ours in OPTIONS.items():
        if name not in values:
            raise InputError(f"lacks {name}, so it does not describe a port of OFA; take the port's own file")
        value = values[name]
        try:
            check_value(ours, value, kinds[ours])
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        if given.setdefault(ours, value) != value:
            raise InputError(f"{name}={value}: the encoder has {given[ours]}; only equal sizes are supported")
    if given["encoder_embed_dim"] % given["encoder_attention_heads"]:
        raise InputError(f"d_model={values['d_model']}: is no multiple of {values['encoder_attention_heads']} heads")
    if given["vision_trunk"] not in RESNETS:
        raise InputError(f"resnet_type={given['vision_trunk']!r:.40}: choose one of {', '.join(RESNETS)}")
    for name, expected in FIXED.items():
        if values.get(name, expected) != expected:
            raise InputError(f"{name}={values[name]!r:.40}: only {expected} is supported")
    for name, part in UNSUPPORTED.items():
        if values.get(name) not in (None, False):
            raise InputError(f"{name}={values[name]!r:.40}: the model has {part}, which ours lack")
    given["attn_scale_factor"] = float(given["attn_scale_factor"])
    return OfaConfig(_name="ofa", **given)


def port_config(config: OfaConfig, labels: int) -> dict[str, Any]:
    """Return the content of config.json for a teacher.

    Args:
        config: the teacher's configuration.
        labels: V.

    Raises:
        InputError: if the layout cannot describe the teacher.
    """
    if config.vision_trunk not in RESNETS:
        raise InputError(
            f"the ports' layout is for {', '.join(RESNETS)}; this model's backbone is {config.vision_trunk}"
        )
    for name in ("normalise_features", "interpolate_position"):
        if getattr(config, name):
            raise InputError(f"the ports' layout has no {name}, with which this model was trained")
    check_tables(config)
    options = asdict(config)
    described = {name: options[ours] for name, ours in OPTIONS.items()}
    absent = dict.fromkeys(UNSUPPORTED, False) | {"temperature_init_value": None}
    return {"model_type": "ofa", **described, "vocab_size": labels, **FIXED, **absent}
