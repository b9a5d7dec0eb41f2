"""Activation checkpointing: less is kept for the backward pass, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from narvl_plugin.bench.training import kept_bytes
from narvl_plugin.models import build
from narvl_plugin.models.ofa import OfaModel

SMALL = {
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "vision_trunk": "resnet18",
}
ARCHS = pytest.mark.parametrize("arch", ["ofa_tiny", "narvl_tiny"])


def make(arch: str, *, checkpoint: bool, **options: Any) -> OfaModel:
    torch.manual_seed(1)
    return build(arch, vocab_size=50, checkpoint_activations=checkpoint, **{**SMALL, **options}).train()


def batch() -> dict[str, Tensor]:
    """Return two samples with images, one with a shorter text."""
    torch.manual_seed(0)
    tokens = torch.randint(4, 49, (2, 6))
    tokens[1, 4:] = 1
    return {
        "src_tokens": tokens,
        "prev_output_tokens": torch.randint(4, 49, (2, 5)),
        "patch_images": torch.randn(2, 3, 64, 64),
        "patch_masks": torch.ones(2, dtype=torch.bool),
    }


def step(model: OfaModel) -> tuple[Tensor, dict[str, Tensor], int]:
    """Run a step: logits, gradients by name, and the bytes that the forward pass keeps beside the weights."""
    torch.manual_seed(2)
    results = []
    kept = kept_bytes(model, lambda: results.append(model(**batch())[0]))
    (logits,) = results
    logits.square().sum().backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return logits.detach(), found, kept


@pytest.mark.integration
@ARCHS
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("frozen", [False, True])
def test_only_memory_changes(arch: str, dropout: float, frozen: bool) -> None:
    options = {
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), dropout),
        **dict.fromkeys(("encoder_drop_path_rate", "decoder_drop_path_rate", "resnet_drop_path_rate"), dropout),
        "freeze_resnet": frozen,
    }
    plain, checkpointed = (make(arch, checkpoint=value, **options) for value in (False, True))
    logits, gradients, kept = step(plain)
    found_logits, found, found_kept = step(checkpointed)
    torch.testing.assert_close(found_logits, logits)
    torch.testing.assert_close(found, gradients)
    assert found_kept < 0.6 * kept
    state = plain.state_dict()
    assert list(checkpointed.state_dict()) == list(state)
    for name, tensor in checkpointed.state_dict().items():  # statistics of batch norms, too
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(tensor, state[name])


@ARCHS
def test_inference_is_the_same(arch: str) -> None:
    plain, checkpointed = (make(arch, checkpoint=value).eval() for value in (False, True))
    assert torch.equal(checkpointed(**batch())[0], plain(**batch())[0])


def test_decoding_with_a_cache_is_the_same() -> None:
    teacher = make("ofa_tiny", checkpoint=True, dropout=0.0)
    inputs = batch()
    tokens = inputs.pop("prev_output_tokens")
    read = teacher.encoder(**inputs)
    state: dict[str, Any] = {}
    steps = [teacher.decoder(tokens[:, :end], read, incremental_state=state)[0] for end in range(1, 6)]
    torch.testing.assert_close(torch.cat(steps, 1), teacher.decoder(tokens, read)[0], rtol=1e-4, atol=1e-5)
