"""How often a pass waits for its device: never in training, at most once elsewhere, not at all once optimised."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from device_waits import DeviceWaits
from torch import Tensor, nn

from narvl_plugin.models import build
from narvl_plugin.models.ofa import OfaModel

BOTH = pytest.mark.parametrize("arch", ["ofa_tiny", "narvl_tiny"])


def make(arch: str) -> OfaModel:
    torch.manual_seed(1)
    sizes = {"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 16, "encoder_layers": 1, "decoder_layers": 2}
    options = {"encoder_attention_heads": 2, "vision_trunk": "test_resnet", "vision_pretrained": False}
    model = build(arch, vocab_size=50, **sizes, **options)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batch(padded: bool) -> dict[str, Any]:
    """Three samples, one of which has padding and another one no image, or none."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 49, (3, 6), generator=generator)
    previous = torch.randint(4, 49, (3, 5), generator=generator)
    masks = torch.ones(3, dtype=torch.bool)
    if padded:
        tokens[0, 4:] = previous[1, 3:] = 1
        masks[1] = False
    return {
        "src_tokens": tokens,
        "prev_output_tokens": previous,
        "patch_images": torch.randn(3, 3, 32, 32, generator=generator),
        "patch_masks": masks,
        "padded": np.array([padded, padded, False]),
    }


@BOTH
@pytest.mark.parametrize("padded", [False, True])
def test_training_never_waits(arch: str, padded: bool, device: DeviceWaits) -> None:
    model, inputs = device.move(make(arch).train()), device.move(batch(padded))
    for _ in range(2):
        model(**inputs)[0].sum().backward()
    assert [str(wait) for wait in device.waits] == []


@BOTH
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("optimised", "most"), [(False, 1), (True, 0)])
def test_a_pass_waits_at_most_once(arch: str, padded: bool, optimised: bool, most: int, device: DeviceWaits) -> None:
    model = make(arch)
    if optimised:
        model.optimize_for_inference()
    moved, inputs = device.move(copy.deepcopy(model)), device.move(batch(padded))
    with torch.no_grad():
        for _ in range(2):
            device.clear()
            found = moved(**inputs)[0]
            assert len(device.waits) <= most, [str(wait) for wait in device.waits]
        torch.testing.assert_close(found.cpu(), model(**batch(padded))[0], rtol=1e-4, atol=1e-5)


@BOTH
@pytest.mark.parametrize("padded", [False, True])
def test_what_is_known_of_padding_changes_nothing(arch: str, padded: bool) -> None:
    model, inputs = make(arch), batch(padded)
    with torch.no_grad():
        told = model(**inputs)[0]
        looked = model(**{**inputs, "padded": None})[0]
    torch.testing.assert_close(told, looked, rtol=0, atol=0)


def write_data(weight: Tensor) -> None:
    weight.data.mul_(1.5)


def write_counted(weight: Tensor) -> None:
    weight.mul_(1.5)


def replace_data(weight: Tensor) -> None:
    weight.data = weight.data * 1.5


@pytest.mark.integration
@BOTH
@pytest.mark.parametrize("write", [write_data, write_counted, replace_data])
@pytest.mark.parametrize("whole", [True, False], ids=["one pass", "encoder and decoder"])
def test_a_written_weight_is_seen_on_a_device(
    arch: str, write: Callable[[Tensor], None], whole: bool, device: DeviceWaits
) -> None:
    """Values kept on trust are compared before anyone sees what came of them."""
    moved, inputs = device.move(make(arch)), device.move(batch(True))

    def run(model: OfaModel) -> Tensor:
        if whole:
            return model(**inputs)[0]
        read = model.encoder(**{name: value for name, value in inputs.items() if name != "prev_output_tokens"})
        return model.decoder(inputs["prev_output_tokens"], read)[0]

    weights = [moved.encoder.pos_q_linear.weight, moved.decoder.embed_positions.weight]
    if arch == "narvl_tiny":
        weights.append(moved.decoder.query_embed.weight)
    with torch.no_grad():
        before = run(moved).cpu()
        for weight in weights:
            write(weight)
            after = run(moved).cpu()
            fresh = device.move(make(arch))
            fresh.load_state_dict(moved.state_dict())
            torch.testing.assert_close(after, run(fresh).cpu(), rtol=0, atol=0)
            assert not torch.equal(after, before)
            before = after
