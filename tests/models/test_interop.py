"""Published checkpoints: flags become a configuration, recomputed tables are left out."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from narvl_plugin.models import build
from narvl_plugin.models.config import OfaConfig
from narvl_plugin.models.interop import config_from_flags
from narvl_plugin.models.ofa import OfaModel

FLAGS = Namespace(
    arch="ofa_tiny",
    encoder_embed_dim=32,
    encoder_ffn_embed_dim=64,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    resnet_type="resnet18",
    dropout=None,
    scale_attn=True,
    scale_resids=False,
    criterion="adjust_label_smoothed_cross_entropy",
)
DICTIONARY = SimpleNamespace(target_dictionary=range(50))


def test_flags_become_a_configuration():
    config = config_from_flags(FLAGS, OfaConfig)
    assert (config.encoder_embed_dim, config.vision_trunk, config.dropout) == (32, "resnet18", 0.1)
    assert not hasattr(config, "criterion")


def test_other_fixed_flags_are_refused():
    with pytest.raises(ValueError, match="scale_resids=True"):
        config_from_flags(Namespace(scale_resids=True), OfaConfig)


def test_a_state_with_tables_loads():
    teacher = OfaModel.build_model(FLAGS, DICTIONARY)
    state = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    for part in ("encoder", "decoder"):
        state[f"{part}.token_rp_bucket"] = torch.zeros(1024, 1024, dtype=torch.long)
        state[f"{part}.image_rp_bucket"] = torch.zeros(1765, 1765, dtype=torch.long)
    state["decoder.image_position_idx"] = torch.zeros(1026, dtype=torch.long)
    other = OfaModel.build_model(FLAGS, DICTIONARY)
    other.load_state_dict(dict(state), strict=True)
    assert torch.equal(other.encoder.image_proj.weight, teacher.encoder.image_proj.weight)
    sizes = {name: getattr(FLAGS, name) for name in ("encoder_embed_dim", "encoder_layers", "decoder_layers")}
    student = build(
        "narvl_tiny",
        vocab_size=51,
        encoder_ffn_embed_dim=64,
        encoder_attention_heads=2,
        vision_trunk="resnet18",
        **sizes,
    )
    student.load_state_dict(dict(state), strict=True)
    assert torch.equal(student.encoder.image_proj.weight, teacher.encoder.image_proj.weight)
