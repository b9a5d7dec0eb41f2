"""What is computed once: batch norm in convolutions, and biases as long as weights and shapes stay what they are."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fairseq.dataclass.configs import CommonConfig, FairseqConfig
from timm.layers import DropPath
from torch import Tensor, nn
from torch._dynamo.utils import counters

from narvl_plugin.models import encoder, inference, registered
from narvl_plugin.models.inference import (
    PackedConv2d,
    PackedLinear,
    can_be_mirrored,
    fold_batch_norm,
    layer_time,
    multiplies_in_bfloat16,
    optimise_backbone,
    pack_linear_layers,
)
from narvl_plugin.models.layers import DecoderLayer
from narvl_plugin.models.memo import Memo, WeightMemo
from narvl_plugin.models.ofa import OfaModel
from narvl_plugin.models.registered import build
from narvl_plugin.models.vision import backbone_features, build_backbone

BOTH = pytest.mark.parametrize("arch", ["ofa_tiny", "narvl_tiny"])


def make(arch: str, backbone: str = "resnet18") -> OfaModel:
    """A model with large weights and with batch norms that have seen something."""
    torch.manual_seed(1)
    sizes = {"encoder_embed_dim": 32, "encoder_ffn_embed_dim": 64, "encoder_layers": 2, "decoder_layers": 2}
    model = build(
        arch, vocab_size=50, encoder_attention_heads=2, vision_trunk=backbone, vision_pretrained=False, **sizes
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 1, 100)
    return model.eval()


def batch(text_length: int = 6, width: int = 96) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "src_tokens": torch.randint(4, 49, (2, text_length)),
        "prev_output_tokens": torch.randint(4, 49, (2, 5)),
        "patch_images": torch.randn(2, 3, 64, width),
    }


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Note how many positions an encoder has whenever it computes its biases."""
    lengths: list[int] = []
    original = encoder.OfaEncoder._biases

    def noted(self: encoder.OfaEncoder, positions: Tensor, *rest: Any) -> list[Tensor]:
        lengths.append(len(positions))
        return original(self, positions, *rest)

    monkeypatch.setattr(encoder.OfaEncoder, "_biases", noted)
    yield lengths


@BOTH
@pytest.mark.parametrize("backbone", ["resnet18", "tf_efficientnet_lite0"])
def test_optimised_models_say_the_same(arch: str, backbone: str) -> None:
    model = make(arch, backbone)
    with torch.no_grad():
        before, _ = model(**batch())
        model.optimize_for_inference()
        after, _ = model(**batch())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert before.std() > 0.1
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.encoder.embed_images.modules())


@pytest.mark.integration
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_models_say_the_same() -> None:
    model = make("narvl_tiny")
    with torch.no_grad():
        before, _ = model(**batch())
        model.optimize_for_inference()
        model.compile_for_inference()
        torch.compiler.reset()
        counters.clear()
        after, _ = model(**batch())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] > 2  # of the trunk's stages, layers of the encoder and of the decoder


@BOTH
@pytest.mark.parametrize("amp", [False, True])
def test_amp_multiplies_in_bfloat16(arch: str, amp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registered, "layer_time", lambda layer, width, dtype: 1.0 if dtype == torch.bfloat16 else 2.0)
    model = make(arch)
    with torch.no_grad():
        exact, _ = model(**batch())
        model.prepare_for_inference_(FairseqConfig(common=CommonConfig(amp=amp)))
        logits, _ = model(**batch())
        again, _ = model(**batch())
    assert logits.dtype == (torch.bfloat16 if amp else torch.float32)
    torch.testing.assert_close(again, logits, rtol=0, atol=0)
    difference = float((logits.float() - exact).std() / exact.std())
    assert (1e-3 < difference < 0.1) if amp else difference < 1e-5


def test_amp_keeps_to_float32_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registered, "layer_time", lambda layer, width, dtype: 3.0 if dtype == torch.bfloat16 else 2.0)
    model = make("narvl_tiny")
    model.prepare_for_inference_(FairseqConfig(common=CommonConfig(amp=True)))
    with torch.no_grad():
        assert model(**batch())[0].dtype == torch.float32
    assert "--amp: cpu is 1.5 times as fast in float32, which is used" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_takes_time(dtype: torch.dtype) -> None:
    assert 0 < layer_time(make("ofa_tiny").encoder.layers[0], 32, dtype) < 10


def test_what_follows_a_batch_norm_stays() -> None:
    torch.manual_seed(1)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)
    ).eval()
    layers[1].running_mean.uniform_()
    pixels = torch.randn(1, 3, 8, 8)
    expected = layers(pixels)
    fold_batch_norm(layers)
    torch.testing.assert_close(layers(pixels), expected)
    assert [isinstance(layer, nn.BatchNorm2d) for layer in layers] == [False, False, False, True, False]


@pytest.mark.parametrize("sides", [(96, 80), (90, 75), (33, 64)])
def test_images_are_mirrored_for_tensorflows_padding(sides: tuple[int, int]) -> None:
    torch.manual_seed(1)
    backbone = build_backbone("tf_efficientnet_lite0").eval()
    images = torch.randn(2, 3, *sides)
    with torch.no_grad():
        expected = backbone_features(backbone, images)
        optimise_backbone(backbone)
        assert backbone.is_mirrored
        assert {type(part) for part in backbone.modules() if isinstance(part, nn.Conv2d)} == {PackedConv2d}
        torch.testing.assert_close(backbone_features(backbone, images), expected, rtol=1e-4, atol=1e-4)


def test_other_backbones_are_not_mirrored() -> None:
    backbone = build_backbone("tf_efficientnet_lite0")
    backbone.conv_stem.kernel_size = (4, 4)
    assert not can_be_mirrored(backbone)
    assert not can_be_mirrored(build_backbone("efficientnet_lite0"))
    assert not can_be_mirrored(build_backbone("resnet18"))


@BOTH
def test_biases_are_computed_once_for_a_shape(arch: str, computed: list[int]) -> None:
    model = make(arch)
    with torch.inference_mode():
        first, _ = model(**batch())
    with torch.no_grad():
        torch.testing.assert_close(model(**batch())[0], first, rtol=0, atol=0)
        assert computed == [30]
        model(**batch(text_length=9))
        model(**batch(width=64))
        torch.testing.assert_close(model(**batch())[0], first, rtol=0, atol=0)
    assert computed == [30, 33, 22, 30]


@pytest.mark.integration
@BOTH
@pytest.mark.parametrize("change", ["step", "load", "double", "assign"])
def test_biases_follow_the_weights(arch: str, change: str) -> None:
    model, other = make(arch), make(arch)
    inputs = batch()
    with torch.no_grad():
        before, _ = model(**inputs)
    if change == "step":
        model(**inputs)[0].square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=1e-4).step()
    elif change == "double":
        model.double()
        inputs["patch_images"] = inputs["patch_images"].double()
    else:
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        nn.Module.load_state_dict(model, other.state_dict(), assign=change == "assign")
    with torch.no_grad():
        after, expected = model(**inputs)[0], copy.deepcopy(model)(**inputs)[0]  # a copy keeps nothing
    torch.testing.assert_close(after, expected, rtol=0, atol=0)
    assert change == "double" or (after - before).abs().max() > 1e-3
    assert after.dtype == (torch.double if change == "double" else torch.float)


def test_what_comes_before_the_source_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two layers, the first attends among the queries once; in training it does so for each sample."""
    model = make("narvl_tiny")
    shapes: list[tuple[int, ...]] = []
    original = DecoderLayer.attend_to_outputs

    def noted(self: DecoderLayer, x: Tensor, *rest: Any) -> Tensor:
        shapes.append(tuple(x.shape))
        return original(self, x, *rest)

    monkeypatch.setattr(DecoderLayer, "attend_to_outputs", noted)
    queries = model.num_queries
    with torch.no_grad():
        first, _ = model(**batch())
        torch.testing.assert_close(model(**batch())[0], first, rtol=0, atol=0)
        assert shapes == [(1, queries, 32), (2, queries, 32), (2, queries, 32)]
        read = model.encoder(batch()["src_tokens"], patch_images=batch()["patch_images"])
        model.decoder(None, read, slice(2, 5))
        assert shapes[3:] == [(1, 3, 32), (2, 3, 32)]
        other, _ = model.decoder(None, read, slice(5, 8))
        torch.testing.assert_close(copy.deepcopy(model).decoder(None, read, slice(5, 8))[0], other, rtol=0, atol=0)
        torch.testing.assert_close(model.decoder(None, read)[0], first, rtol=0, atol=0)
        model.decoder.query_embed.weight.neg_()  # on which no bias depends
        first, _ = copy.deepcopy(model).decoder(None, read)
        torch.testing.assert_close(model.decoder(None, read)[0], first, rtol=0, atol=0)
    for module in model.modules():
        if isinstance(module, nn.Dropout | DropPath):
            module.p = module.drop_prob = 0.0
    model.decoder.train()
    in_training, _ = model.decoder(None, read)
    assert shapes[-2:] == [(2, queries, 32)] * 2
    torch.testing.assert_close(in_training, first)


@BOTH
def test_training_computes_biases_anew_and_they_learn(arch: str, computed: list[int]) -> None:
    model = make(arch)
    with torch.no_grad():
        model(**batch())
    for _ in range(2):
        model.zero_grad()
        model(**batch())[0].square().sum().backward()
        assert float(model.encoder.pos_q_linear.weight.grad.abs().sum()) > 0
    assert computed == [30] * 3


def test_copies_keep_nothing() -> None:
    kept: Memo[int] = Memo()
    with torch.no_grad():
        assert kept.get("a", [], lambda: 1) == 1
        assert kept.get("a", [], lambda: 2) == 1
        assert copy.deepcopy(kept).get("a", [], lambda: 2) == 2
        assert pickle.loads(pickle.dumps(kept)).get("a", [], lambda: 2) == 2
        weight = torch.ones(2)
        assert kept.get("a", [weight], lambda: 3) == 3
        weight.add_(1)
        assert kept.get("a", [weight], lambda: 4) == 4
        assert kept.get("a", [weight.clone()], lambda: 5) == 5


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Note what is kept whenever a value is computed to be kept."""
    values: list[Tensor] = []
    original = WeightMemo.of_weight

    def noted(self: WeightMemo[Any], key: Any, weight: Tensor, compute: Any) -> Any:
        return original(self, key, weight, lambda: values.append(compute()) or values[-1])

    monkeypatch.setattr(WeightMemo, "of_weight", noted)
    yield values


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
class TestPackedConv2d:
    """Weights of convolutions laid out once, with the activation in the same call."""

    @pytest.mark.parametrize("activation", [nn.Identity(), nn.ReLU(), nn.ReLU6()])
    @pytest.mark.parametrize("groups", [1, 2, 8])
    def test_says_what_a_convolution_does(self, activation: nn.Module, groups: int, packings: list[Tensor]) -> None:
        torch.manual_seed(1)
        plain = nn.Conv2d(8, 16, (3, 5), stride=2, padding=(1, 2), groups=groups)
        packed = PackedConv2d(plain, activation)
        with torch.no_grad():
            for shape in [(1, 8, 9, 12), (3, 8, 9, 12)]:
                x = 9 * torch.randn(shape)
                for pixels in (x, x, x.contiguous(memory_format=torch.channels_last)):
                    torch.testing.assert_close(packed(pixels), activation(plain(pixels)))
        with torch.inference_mode():
            torch.testing.assert_close(packed(x), activation(plain(x)))
        assert [value.layout for value in packings] == [torch._mkldnn] * 2  # one for each shape

    def test_follows_its_weight(self) -> None:
        layer = PackedConv2d(nn.Conv2d(4, 4, 3, bias=False), nn.Identity())
        x = torch.randn(2, 4, 8, 8)
        with torch.no_grad():
            before = layer(x)
            layer.weight.mul_(2)
            torch.testing.assert_close(layer(x), 2 * before)
            torch.testing.assert_close(copy.deepcopy(layer)(x), 2 * before)
            torch.testing.assert_close(layer.double()(x.double()).float(), 2 * before)

    @pytest.mark.parametrize(("side", "is_packed"), [(8, False), (256, True)])
    def test_a_small_one_of_single_pixels_is_a_matrix_product(
        self, side: int, is_packed: bool, packings: list[Tensor]
    ) -> None:
        plain = nn.Conv2d(8, 16, 1)
        layer = PackedConv2d(plain, nn.ReLU6())
        with torch.no_grad():
            x = 9 * torch.randn(2, 8, side, side).to(memory_format=torch.channels_last)
            output = layer(x)
            torch.testing.assert_close(output, plain(x).clamp(0, 6))
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert len(packings) == is_packed

    @pytest.mark.skipif(not multiplies_in_bfloat16(), reason="the processor does not multiply in bfloat16")
    def test_multiplies_in_bfloat16(self, packings: list[Tensor]) -> None:
        torch.manual_seed(1)
        plain = nn.Conv2d(8, 8, 3)
        layer = PackedConv2d(plain, nn.ReLU6())
        x = torch.randn(2, 8, 9, 9)
        with torch.no_grad():
            exact = layer(x)
            with torch.autocast("cpu", torch.bfloat16):
                rounded, expected = layer(x), plain(x).clamp(0, 6)
                torch.testing.assert_close(layer(x.bfloat16()), rounded)
        assert exact.dtype == torch.float32
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(rounded, expected)
        assert len(packings) == 2  # one for each type

    def test_is_a_plain_layer_elsewhere(self, packings: list[Tensor]) -> None:
        layer = PackedConv2d(nn.Conv2d(4, 4, 3), nn.ReLU())
        x = torch.randn(2, 4, 8, 8)
        output = layer(x)
        output.sum().backward()
        assert layer.weight.grad is not None
        assert float(output.detach().min()) == 0
        with torch.no_grad():
            with torch.autocast("cpu", torch.float16):
                assert layer(x).dtype == torch.float16
            exported = torch.export.export(layer, (x,))
        assert not packings
        assert "mkldnn" not in str(exported.graph)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
class TestPackedLinear:
    """Weights laid out once."""

    @pytest.mark.parametrize("bias", [True, False])
    def test_says_what_a_linear_layer_does(self, bias: bool, packings: list[Tensor]) -> None:
        torch.manual_seed(1)
        plain = nn.Linear(48, 31, bias=bias)
        packed = PackedLinear(plain)
        with torch.no_grad():
            for shape in [(48,), (1, 48), (3, 5, 48), (0, 48)]:
                x = torch.randn(shape)
                torch.testing.assert_close(packed(x), plain(x))
            transposed = torch.randn(48, 7).t()
            torch.testing.assert_close(packed(transposed), plain(transposed))
        with torch.inference_mode():
            torch.testing.assert_close(packed(x), plain(x))
        assert [value.layout for value in packings] == [torch._mkldnn]

    def test_follows_its_weight(self) -> None:
        layer = PackedLinear(nn.Linear(8, 8, bias=False))
        x = torch.randn(2, 8)
        with torch.no_grad():
            before = layer(x)
            layer.weight.mul_(2)
            torch.testing.assert_close(layer(x), 2 * before)
            torch.testing.assert_close(copy.deepcopy(layer)(x), 2 * before)
            torch.testing.assert_close(layer.double()(x.double()), 2 * before.double())

    @pytest.mark.skipif(not multiplies_in_bfloat16(), reason="the processor does not multiply in bfloat16")
    def test_multiplies_in_bfloat16(self, packings: list[Tensor]) -> None:
        torch.manual_seed(1)
        plain = nn.Linear(48, 31)
        layer = PackedLinear(plain)
        x = torch.randn(3, 5, 48)
        with torch.no_grad():
            exact = layer(x)
            with torch.autocast("cpu", torch.bfloat16):
                rounded, expected = layer(x), plain(x)
                torch.testing.assert_close(layer(x.bfloat16()), rounded)
        assert exact.dtype == torch.float32
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(rounded, expected)
        assert len(packings) == 2  # one for each type

    def test_is_a_plain_layer_elsewhere(self, packings: list[Tensor]) -> None:
        layer = PackedLinear(nn.Linear(8, 8))
        x = torch.randn(2, 8)
        layer(x).sum().backward()
        assert layer.weight.grad is not None
        with torch.no_grad():
            with torch.autocast("cpu", torch.float16):
                assert layer(x).dtype == torch.float16
            exported = torch.export.export(layer, (x,))
        assert not packings
        assert "mkldnn" not in str(exported.graph)

    def test_all_large_layers_of_a_model_are_packed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = make("narvl_tiny")
        weights = dict(model.named_parameters())
        monkeypatch.setattr(inference, "LARGE", 64 * 32)
        pack_linear_layers(model)
        layer = model.decoder.layers[0]
        assert [type(linear) for linear in (layer.fc1, layer.fc2, layer.self_attn.q_proj)] == [
            *(PackedLinear, PackedLinear, nn.Linear)
        ]
        assert dict(model.named_parameters()).keys() == weights.keys()
        assert all(weight is weights[name] for name, weight in model.named_parameters())

    def test_optimised_models_say_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = make("narvl_tiny")
        monkeypatch.setattr(inference, "LARGE", 0)
        with torch.no_grad():
            before, _ = model(**batch())
            model.optimize_for_inference()
            after, _ = model(**batch())
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
        assert isinstance(model.decoder.output_projection, PackedLinear)
        assert model.decoder.output_projection.weight is model.encoder.embed_tokens.weight
