"""Names, shapes and options of OFA's models in the layout of the ports."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from port_folders import LABELS, port_name, port_settings
from torch import Tensor

from narvl_plugin.errors import InputError
from narvl_plugin.models import build
from narvl_plugin.models.config import SIZES, OfaConfig
from narvl_plugin.models.interop import EMBEDDING, EMBEDDING_ALIASES, QUERIES, fit_state
from narvl_plugin.models.meta import without_weights
from narvl_plugin.models.ofa import OfaModel
from narvl_plugin.models.ports import (
    RENAMED,
    TABLES,
    VERSIONS,
    config_of_port,
    from_port,
    port_config,
    renamed,
    to_port,
)

SIZE = pytest.mark.parametrize("size", sorted(SIZES.keys() - {"nano"}))
SMALL = {"encoder_embed_dim": 32, "encoder_ffn_embed_dim": 64, "encoder_attention_heads": 2}


def on_meta(arch: str) -> OfaModel:
    """Build a model that has names and shapes, but no values."""
    with without_weights():
        return build(arch, vocab_size=LABELS)


def kinds(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}


@pytest.mark.integration
@SIZE
def test_names_shapes_and_types_of_every_size(size: str) -> None:
    model = on_meta(f"ofa_{size}")
    state = model.state_dict()
    port = to_port(state, model.cfg)
    expected = {port_name(name): kind for name, kind in kinds(state).items() if name not in VERSIONS}
    found = kinds(port)
    for name in TABLES:
        shape, dtype = found.pop(name)
        assert dtype == torch.int64
        assert shape == (
            (1025,) if name == "decoder.image_position_idx" else (1024, 1024) if "token" in name else (1765, 1765)
        )
    assert found == expected
    assert kinds(from_port(port)) == kinds(state)


@pytest.mark.integration
@pytest.mark.parametrize("size", ["tiny", "base"])
def test_names_are_those_that_were_recorded(size: str, shared: Path) -> None:
    file = shared / "parity" / f"ofa_{size}_state_dict.txt"
    if not file.is_file():
        pytest.skip(f"{file} is not at hand")
    recorded = [line.split("\t")[0] for line in file.read_text().splitlines() if not line.startswith("#")]
    model = on_meta(f"ofa_{size}")
    assert set(to_port(model.state_dict(), model.cfg)) == {port_name(name) for name in recorded} - set(VERSIONS)


@pytest.mark.integration
@SIZE
def test_options_of_every_size(size: str) -> None:
    config = OfaConfig(_name="ofa", **SIZES[size])
    written = port_config(config, 59457)
    expected = port_settings(config, 59457)
    assert {name: written[name] for name in expected} == expected
    assert asdict(config_of_port(written)) == asdict(config)
    assert asdict(config_of_port(expected)) == asdict(config)


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.ffn_layer_norm.weight",
        "x.encoder.layers.0.ffn_layer_norm.weight",
        "encoder.layers.0.ffn_layer_norm.weight.x",
        "encoder.layers.0.ffn_layer_norm",
        "encoder.layers.0.ffn_layer_norm.gain",
        "encoder.layers.x.ffn_layer_norm.weight",
        "encoder.layers.0.x.ffn_layer_norm.weight",
        "encoder.layers.0.cross_attn.k_proj.weight",
        "encoder.layers.0.cross_attn_layer_norm.weight",
        "encoder.layers.0.ffn_layer_norm.weight\n",
        "decoder.layers.0.cross_attn.x_proj.weight",
        "decoder.layers.0.cross_attn.c_attn.weight",
        "decoder.layers.0.cross_attn_x_layer_norm.weight",
        "decoderxlayers.0.cross_attn.c_attn",
        "decoder.layers.0.self_attn.q_proj.weight",
        "encoder.layers.0.self_attn_layer_norm.weight",
    ],
)
def test_only_whole_names_are_changed(name: str) -> None:
    assert renamed(name, to_port=False) == name
    assert renamed(name, to_port=True) == name


def test_each_name_has_its_own_in_the_other_layout() -> None:
    for stack, ours, theirs, _ in RENAMED:
        end = "c_attn" if theirs == "cross_attn" else "bias"
        before, after = f"{stack}.layers.11.{theirs}.{end}", f"{stack}.layers.11.{ours}.{end}"
        assert renamed(before, to_port=False) == after
        assert renamed(after, to_port=True) == before
        assert renamed(after, to_port=False) == after


@cache
def small_port() -> tuple[dict[str, Tensor], OfaModel]:
    """Return the weights of a small model as a port has them, and the model."""
    model = build("ofa_tiny", vocab_size=50, **SMALL)
    return to_port(model.state_dict(), model.cfg), model


@pytest.mark.integration
def test_the_embedding_may_have_any_of_its_names() -> None:
    port, model = small_port()
    for kept in (EMBEDDING, *EMBEDDING_ALIASES):
        found = from_port({name: port[name] for name in port if name not in {EMBEDDING, *EMBEDDING_ALIASES} - {kept}})
        fitted, _ = fit_state(found, model.state_dict())
        assert all(torch.equal(fitted[name], model.state_dict()[name]) for name in fitted)


def test_names_of_both_layouts_are_not_mixed_for_one_weight() -> None:
    port, _ = small_port()
    message = r"decoder\.layers\.3\.cross_attn\.c_attn and decoder\.layers\.3\.encoder_attn\.c_attn are one weight"
    with pytest.raises(InputError, match=message):
        from_port(port | {"decoder.layers.3.encoder_attn.c_attn": port["decoder.layers.3.cross_attn.c_attn"]})


def test_what_is_no_teacher_is_refused() -> None:
    port, _ = small_port()
    with pytest.raises(InputError, match="query_embed.weight: belongs to a student"):
        from_port(port | {QUERIES: torch.zeros(2, 32)})
    with pytest.raises(InputError, match="encoder.embed_tokens.weight, a matrix, is not among them"):
        from_port({"bert.embeddings.weight": torch.zeros(2, 2)})
    with pytest.raises(InputError, match="encoder.embed_tokens.weight, a matrix, is not among them"):
        from_port(port | {EMBEDDING: torch.tensor(1.0)})


@pytest.mark.parametrize(
    ("name", "shape", "part"),
    [
        ("encoder.layers.0.weight_self_attn", (1,), "weights of residual connections (use_gamma_feature)"),
        ("decoder.layers.0.weight_cross_attn", (1,), "weights of residual connections (use_gamma_feature)"),
        ("decoder.layers.3.weight_ffn", (32,), "weights of residual connections (use_gamma_feature)"),
        ("mlp_head.0.weight", (2, 2), "a head of its own (mlp_head)"),
        ("temp", (), "a learned temperature (temperature_init_value)"),
        (
            "encoder.embed_images.blocks.0.attn.qkv.weight",
            (2, 2),
            "another image backbone, such as the ViT of use_ofasys",
        ),
        ("encoder.layers.0.w_resid", (32,), "weights of residual connections (scale_resids)"),
        ("encoder.layers.0.attn_adapter.down.weight", (2, 2), "adapters"),
        ("decoder.layers.0.adapter.fc1.weight", (2, 2), "adapters"),
        ("encoder.prompt_encoder.embedding.weight", (2, 2), "a prompt encoder"),
        ("classification_heads.mnli.dense.weight", (2, 2), "a classification head"),
        ("encoder.type_embedding.weight", (1, 32), "a type embedding of one row"),
    ],
)
def test_parts_that_our_models_lack_are_named(name: str, shape: tuple[int, ...], part: str) -> None:
    port, model = small_port()
    with pytest.raises(InputError, match=re.escape(f"{name} belongs to {part}, which our models lack")):
        fit_state(from_port(port | {name: torch.zeros(shape)}), model.state_dict())


def test_one_table_for_all_layers_is_named() -> None:
    port, model = small_port()
    gone = re.compile(r"decoder\.token_rel_pos_table_list\.[1-9]")
    shared = {name: tensor for name, tensor in port.items() if not gone.match(name)}
    with pytest.raises(InputError, match=r"one table of relative positions for all layers \(share_attn_bias\)"):
        fit_state(from_port(shared), model.state_dict())


def test_other_unknown_names_are_refused_without_a_cause() -> None:
    port, model = small_port()
    for name in ("encoder.embed_images.layer3.6.conv1.weight", "encoder.layers.4.fc1.weight", "final_logits_bias"):
        with pytest.raises(InputError, match=rf"unused: {re.escape(name)} 2\); choose the --arch"):
            fit_state(from_port(port | {name: torch.zeros(2)}), model.state_dict())


SETTINGS = port_settings(OfaConfig(**SIZES["tiny"]), 50)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ("model_type", "vocab_size", "normformer")])
def test_sizes_are_read_from_the_file_alone(name: str) -> None:
    left = {other: value for other, value in SETTINGS.items() if other != name}
    if name.endswith("_id"):
        assert config_of_port(left)
        return
    with pytest.raises(InputError, match=f"lacks {name}, so it does not describe a port of OFA"):
        config_of_port(left)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("d_model", 10**12, "d_model: encoder_embed_dim=1000000000000: expected a number from 1"),
        ("d_model", "256", "d_model: .* is a str; expected int"),
        ("d_model", True, "d_model: .* is a bool; expected int"),
        ("d_model", None, "d_model: .* is a NoneType; expected int"),
        ("d_model", [256], "d_model: .* is a list; expected int"),
        ("d_model", 254, "d_model=254: is no multiple of 4 heads"),
        ("encoder_layers", -1, "encoder_layers: "),
        ("decoder_layers", 10**9, "decoder_layers: "),
        ("decoder_ffn_dim", 2048, "decoder_ffn_dim=2048: the encoder has 1024; only equal sizes"),
        ("decoder_attention_heads", 8, "decoder_attention_heads=8: the encoder has 4"),
        ("attn_scale_factor", float("nan"), "attn_scale_factor: "),
        ("max_position_embeddings", 10**9, "max_position_embeddings: "),
        ("resnet_type", "hf-hub:stranger/model", "resnet_type='hf-hub:stranger/model': choose one of resnet50"),
        ("resnet_type", "resnet18", "resnet_type='resnet18': choose one of resnet50"),
        ("resnet_type", {"a": 1}, "resnet_type: .* is a dict; expected str"),
        ("normformer", False, "normformer=False: only True is supported"),
        ("pad_token_id", 0, "pad_token_id=0: only 1 is supported"),
        ("decoder_start_token_id", [0], r"decoder_start_token_id=\[0\]: only 0"),
        ("use_gamma_feature", True, "use_gamma_feature=True: the model has weights of residual connections"),
        ("use_ofasys", True, "use_ofasys=True: the model has a ViT as image backbone"),
        ("share_attn_bias", True, "share_attn_bias=True: the model has one table of relative positions"),
        ("temperature_init_value", 0.07, "temperature_init_value=0.07: the model has a learned temperature"),
        (
            "entangle_position_embedding",
            True,
            "entangle_position_embedding=True: the model has positions that are added",
        ),
    ],
)
def test_options_that_cannot_be_are_named(name: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        config_of_port(SETTINGS | {name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_trunk": "tf_efficientnet_lite0"}, "backbone is tf_efficientnet_lite0"),
        ({"normalise_features": True}, "has no normalise_features"),
        ({"interpolate_position": True}, "has no interpolate_position"),
        ({"max_positions": 16_384}, "max_positions=16384 is too large"),
        ({"image_bucket_size": 100}, "image_bucket_size=100 is too large"),
    ],
)
def test_what_the_layout_cannot_hold_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        port_config(OfaConfig(**changes), 50)
