"""What is kept between passes never changes an output: threads, autocast, writes of any kind, inference mode."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from narvl_plugin.models import build, inference
from narvl_plugin.models.inference import PackedLinear
from narvl_plugin.models.memo import Memo
from narvl_plugin.models.ofa import OfaModel

BOTH = pytest.mark.parametrize("arch", ["ofa_tiny", "narvl_tiny"])
OPTIMISED = pytest.mark.parametrize("optimised", [False, True], ids=["plain", "optimised"])
SHAPES = ((6, 4, 4), (9, 4, 4), (6, 2, 3), (7, 3, 5))
"""Tokens of the text, and rows and columns of the image's features."""


def make(arch: str = "narvl_tiny") -> OfaModel:
    """A small model with large weights; its images are features, so that passes take milliseconds."""
    torch.manual_seed(1)
    sizes = {"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 16, "encoder_layers": 1, "decoder_layers": 2}
    options = {"encoder_attention_heads": 2, "vision_trunk": "test_resnet", "vision_pretrained": False}
    model = build(arch, vocab_size=50, **sizes, **options)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batch(model: OfaModel, shape: tuple[int, int, int] = SHAPES[0]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    length, rows, columns = shape
    return {
        "src_tokens": torch.randint(4, 49, (2, length), generator=generator),
        "prev_output_tokens": torch.randint(4, 49, (2, 5), generator=generator),
        "patch_images": torch.randn(2, model.encoder.embed_images.out_channels, rows, columns, generator=generator),
    }


@pytest.fixture
def switching() -> Iterator[None]:
    """Let Python change threads as often as it can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_threads(run: Callable[[int], list[str]]) -> list[str]:
    """Return what four threads find wrong, each with its own number; an error that one raises is wrong, too."""
    wrong: list[str] = []

    def note(number: int) -> None:
        try:
            with torch.no_grad():
                wrong.extend(run(number))
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=note, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


@pytest.mark.integration
@BOTH
@OPTIMISED
def test_threads_share_a_model(arch: str, optimised: bool, switching: None) -> None:
    model = make(arch)
    if optimised:
        model.optimize_for_inference()
    inputs = [batch(model, shape) for shape in SHAPES]
    with torch.no_grad():
        expected = [copy.deepcopy(model)(**of_shape)[0] for of_shape in inputs]  # a copy keeps nothing

    def run(number: int) -> list[str]:
        shapes = [(turn // 2 + number) % len(SHAPES) for turn in range(40)]
        return [f"{shape}" for shape in shapes if not torch.equal(model(**inputs[shape])[0], expected[shape])]

    assert in_threads(run) == []


@pytest.mark.integration
@pytest.mark.parametrize("exact", [False, True])
def test_threads_share_a_kept_value(exact: bool, switching: None) -> None:
    kept: Memo[int] = Memo(exact=exact)
    weights = [torch.ones(1) for _ in range(20)]  # whose comparison may be interrupted

    def run(number: int) -> list[str]:
        found = [(key, kept.get(key, weights, lambda key=key: key)) for key in [number, number, number, 9] * 1000]
        return [f"{value} for {key}" for key, value in found if key != value]

    assert in_threads(run) == []


def test_a_value_of_another_key_in_between_is_not_returned() -> None:
    """As another thread may, the comparison of the keys lets a value of another key be kept."""
    kept: Memo[str] = Memo()
    interruptions = iter(range(2))

    class Key:
        def __eq__(self, other: object) -> bool:
            if next(interruptions, None) is not None:
                kept.get("b", [], lambda: "value of b")
            return isinstance(other, Key)

        def __hash__(self) -> int:
            return 0

    with torch.no_grad():
        for _ in range(4):
            assert kept.get(Key(), [], lambda: "value of a") == "value of a"
    assert next(interruptions, None) is None


@BOTH
@OPTIMISED
def test_autocast_changes_its_own_passes_alone(arch: str, optimised: bool) -> None:
    model = make(arch)
    if optimised:
        model.optimize_for_inference()
    inputs = batch(model)

    def run(answering: OfaModel, dtype: torch.dtype | None) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
            return answering(**inputs)[0]

    types = (None, torch.bfloat16, torch.float16)
    expected = {dtype: run(copy.deepcopy(model), dtype) for dtype in types}
    assert not torch.equal(expected[None], expected[torch.bfloat16].float())
    for dtype in (None, torch.bfloat16, None, torch.float16, torch.bfloat16, torch.float16, None):
        torch.testing.assert_close(run(model, dtype), expected[dtype], rtol=0, atol=0)


def write_data(weight: Tensor) -> None:
    weight.data.mul_(1.5)


def write_array(weight: Tensor) -> None:
    weight.detach().numpy()[:] *= 1.5


def replace_data(weight: Tensor) -> None:
    weight.data = weight.data * 1.5


@BOTH
@pytest.mark.parametrize("write", [write_data, write_array, replace_data])
def test_uncounted_writes_are_seen(arch: str, write: Callable[[Tensor], None]) -> None:
    """Weights are written where torch does not count it, one by one, and then a pass is that of a fresh copy."""
    model = make(arch)
    inputs = batch(model)
    encoder, decoder = model.encoder, model.decoder
    weights = [encoder.pos_q_linear.weight, encoder.image_pos_ln.weight, encoder.token_rel_pos_table_list[0].weight]
    weights += [encoder.embed_image_positions.weight, decoder.embed_positions.weight, decoder.cross_pos_k_linear.weight]
    if arch == "narvl_tiny":
        weights += [decoder.query_embed.weight, decoder.layers[0].self_attn.v_proj.weight]
    with torch.no_grad():
        before, _ = model(**inputs)
        for number, weight in enumerate(weights):
            write(weight)
            after, _ = model(**inputs)
            torch.testing.assert_close(after, copy.deepcopy(model)(**inputs)[0], rtol=0, atol=0)
            assert not torch.equal(after, before), number
            before = after


@BOTH
@OPTIMISED
def test_models_made_in_inference_mode(arch: str, optimised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "LARGE", 0)  # packs all linear layers
    with torch.inference_mode():
        model = make(arch)
        if optimised:
            model.optimize_for_inference()
        inputs = batch(model)
        model(**inputs)
        for weight in (model.encoder.pos_q_linear.weight, model.decoder.layers[0].fc1.weight):
            before, _ = model(**inputs)
            weight.mul_(3)
            after, _ = model(**inputs)
            torch.testing.assert_close(after, copy.deepcopy(model)(**inputs)[0], rtol=0, atol=0)
            assert not torch.equal(after, before)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], after, rtol=0, atol=0)


@BOTH
def test_pruned_weights_are_seen(arch: str) -> None:
    model = make(arch)
    inputs = batch(model)
    with torch.no_grad():
        before, _ = model(**inputs)
        prune.l1_unstructured(model.encoder.pos_q_linear, "weight", amount=0.5)
        after, _ = model(**inputs)
        torch.testing.assert_close(after, copy.deepcopy(model)(**inputs)[0], rtol=0, atol=0)
    assert not torch.equal(after, before)


def test_dropout_alone_in_training_is_drawn_for_each_pass_and_sample() -> None:
    """As uncertainty is estimated: evaluation mode, but dropout."""
    model = make()
    inputs = {name: values[:1].repeat_interleave(2, 0) for name, values in batch(model).items()}
    layer = model.decoder.layers[0]
    with torch.no_grad():
        model(**inputs)
        for dropout in (model.decoder.dropout, layer.dropout):
            dropout.p = 0.5
            dropout.train()
            first, second = (model(**inputs)[0] for _ in range(2))
            assert not torch.equal(first, second)
            dropout.eval()
    assert not torch.equal(first[0], first[1])  # the layer's


def test_a_rounded_model_is_safe_for_threads_and_copies() -> None:
    """Each call has its own autocast, and a copy runs its own weights."""
    model = make()
    model.multiply_in_bfloat16()
    inputs = batch(model)
    with torch.no_grad():
        before, _ = model(**inputs)
        other = copy.deepcopy(model)
        for weight in other.parameters():
            weight.mul_(1.5)
        torch.testing.assert_close(model(**inputs)[0], before, rtol=0, atol=0)
        assert not torch.equal(other(**inputs)[0], before)
    assert not torch.is_autocast_enabled("cpu")


def test_counted_writes_to_an_optimised_model_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "LARGE", 0)  # packs all linear layers
    model = make()
    model.optimize_for_inference()
    inputs = batch(model)
    assert isinstance(model.decoder.output_projection, PackedLinear)
    with torch.no_grad():
        before, _ = model(**inputs)
        for weight in (model.encoder.pos_q_linear.weight, model.encoder.embed_tokens.weight):
            weight.mul_(1.5)
            after, _ = model(**inputs)
            torch.testing.assert_close(after, copy.deepcopy(model)(**inputs)[0], rtol=0, atol=0)
            assert not torch.equal(after, before)
            before = after
