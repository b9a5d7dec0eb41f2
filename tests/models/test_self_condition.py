"""A self-conditioned student: its middle layer predicts labels, and the next layer reads their embeddings."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from narvl_plugin.checkpoints.reading import whole_checkpoint
from narvl_plugin.checkpoints.record import Checkpoint
from narvl_plugin.errors import InputError
from narvl_plugin.models import build, inference
from narvl_plugin.models.inference import PackedLinear
from narvl_plugin.models.interop import CONDITION, EMBEDDING, Use
from narvl_plugin.models.narvl import NarvlModel
from narvl_plugin.models.ofa import OfaModel

SMALL = {
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 16,
    "encoder_layers": 1,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "vision_trunk": "test_resnet",
}
BOTH = pytest.mark.parametrize("kind", ["argmax", "softmax"])


def make(kind: str = "", arch: str = "narvl_tiny", **options: Any) -> Any:
    torch.manual_seed(1)
    queries = {"num_queries": 6} if arch.startswith("narvl") else {}
    return build(arch, vocab_size=50, **queries, **{**SMALL, **options}, **({"self_condition": kind} if kind else {}))


def conditioned(kind: str, **options: Any) -> NarvlModel:
    """A student with larger weights than at the start, so that every path counts."""
    model: NarvlModel = make(kind, **options).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch(model: OfaModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "src_tokens": torch.randint(4, 49, (2, 6), generator=generator),
        "patch_images": torch.randn(2, model.encoder.embed_images.out_channels, 3, 3, generator=generator),
    }


def test_without_the_option_there_is_no_such_connection() -> None:
    model = make().eval()
    assert not any("condition" in name for name in model.state_dict())
    assert "middle_logits" not in model(**batch(model))[1]


@BOTH
def test_at_first_outputs_are_those_without_the_connection(kind: str) -> None:
    """The other weights are drawn as without it, so that trainings with and without it start from the same student."""
    plain, model = make().eval(), make(kind).eval()
    found = model.state_dict()
    assert found.keys() - plain.state_dict().keys() == set(CONDITION)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(found[name], tensor), name
    logits, extra = model(**batch(model))
    assert torch.equal(logits, plain(**batch(plain))[0])
    assert extra["middle_logits"].shape == logits.shape
    assert torch.equal(
        extra["middle_logits"],
        model.decoder.project(model.decoder.layer_norm(extra["inner_states"][0].transpose(0, 1))),
    )


@BOTH
@pytest.mark.parametrize("freeze_embedding", [False, True])
def test_the_next_layer_reads_what_the_middle_predicts(kind: str, freeze_embedding: bool) -> None:
    model = conditioned(kind, freeze_embedding=freeze_embedding)
    decoder = model.decoder
    if freeze_embedding:  # the blank's row is a parameter of its own, and is the only one that is predicted here
        with torch.no_grad():
            decoder.blank_row.mul_(100)
    seen: list[Tensor] = []
    decoder.layers[1].register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    with torch.no_grad():
        _, extra = model(**batch(model))
        table = model.state_dict()[EMBEDDING]
        probabilities = extra["middle_logits"].softmax(2)
        if kind == "argmax":
            labels = probabilities.argmax(2)
            assert not freeze_embedding or model.blank in labels
            probabilities = torch.nn.functional.one_hot(labels, 50).float()
        feedback = decoder.condition(decoder.condition_norm(probabilities @ table))
    assert feedback.std() > 0.1
    torch.testing.assert_close(seen[0], extra["inner_states"][0].transpose(0, 1) + feedback)


@BOTH
def test_the_connection_learns_from_the_output_and_the_middle_from_its_own_prediction(kind: str) -> None:
    model = make(kind).train()
    logits, extra = model(**batch(model))
    first, second = model.decoder.layers[0].fc1.weight, model.decoder.layers[1].fc1.weight
    extra["middle_logits"].logsumexp(2).sum().backward(retain_graph=True)
    assert first.grad is not None and first.grad.abs().sum() > 0
    assert second.grad is None and model.decoder.condition.weight.grad is None
    logits.square().sum().backward()
    assert second.grad is not None and second.grad.abs().sum() > 0
    assert model.decoder.condition.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("kind", "flows"), [("argmax", False), ("softmax", True)])
def test_only_probabilities_let_the_gradient_through(kind: str, flows: bool) -> None:
    model = conditioned(kind)
    _, extra = model(**batch(model))
    feedback = model.decoder._condition(extra["middle_logits"])
    (gradient,) = torch.autograd.grad(feedback.square().sum(), extra["middle_logits"], allow_unused=True)
    assert (gradient is not None and bool(gradient.abs().sum() > 0)) == flows


def test_weights_of_a_teacher_or_of_another_student_start_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for other in (build("ofa_tiny", vocab_size=49, **SMALL), make()):
        model = conditioned("argmax")
        model.load_state_dict({name: tensor.clone() for name, tensor in other.state_dict().items()})
        assert "new: decoder.condition, the connection from the middle prediction" in caplog.text
        caplog.clear()
        assert torch.equal(model.decoder.layers[0].fc1.weight, other.decoder.layers[0].fc1.weight)
        plain = make().eval()
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in CONDITION}
        plain.load_state_dict(state)
        assert torch.equal(model(**batch(model))[0], plain(**batch(plain))[0])


def test_a_connection_is_not_dropped_silently_nor_half_of_it_made_up() -> None:
    state = {name: tensor.clone() for name, tensor in conditioned("softmax").state_dict().items()}
    with pytest.raises(InputError, match="unused: decoder.condition.weight"):
        make().load_state_dict(state)
    del state["decoder.condition.weight"]
    with pytest.raises(InputError, match="new: decoder.condition.weight"):
        make("softmax").load_state_dict(state)


@BOTH
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_comes_back(kind: str, suffix: str, tmp_path: Path) -> None:
    model = conditioned(kind)
    cfg = {"model": {**vars(model.cfg), "_name": "narvl"}, "task": {"_name": "caption"}}
    torch.save(whole_checkpoint(model.state_dict(), cfg), tmp_path / "trained.pt")
    fitted, notes = Checkpoint.read(tmp_path / "trained.pt").fit()
    assert notes == []
    fitted.write(tmp_path / f"written{suffix}")
    read = Checkpoint.read(tmp_path / f"written{suffix}")
    loaded = read.build_model(Use(("caption",), "", training=False), labels=49)
    assert loaded.cfg.self_condition == kind
    assert torch.equal(loaded(**batch(loaded))[0], model(**batch(model))[0])


@BOTH
def test_what_is_kept_between_passes_changes_no_output(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "LARGE", 0)  # packs all linear layers
    model = conditioned(kind)
    inputs = batch(model)
    with torch.no_grad():
        expected = model(**inputs)[0]
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=0, atol=0)
        for weight in (model.decoder.condition.weight, model.encoder.embed_tokens.weight):
            weight.mul_(1.5)
            torch.testing.assert_close(model(**inputs)[0], copy.deepcopy(model)(**inputs)[0], rtol=0, atol=0)
            assert not torch.equal(model(**inputs)[0], expected)
            expected = model(**inputs)[0]
        model.optimize_for_inference()
        assert isinstance(model.decoder.condition, PackedLinear)
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-4, atol=1e-4)
        inputs["patch_images"] = torch.randn(2, 3, 32, 32)
        expected = model(**inputs)[0]
        model.fix_shapes(side=32, length=6, padded=False)
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-4, atol=1e-4)


@BOTH
def test_revealed_labels_replace_predicted_ones(kind: str) -> None:
    model = conditioned(kind)
    decoder = model.decoder
    labels = torch.full((2, 6), -1)
    labels[0, 2], labels[1, 5], labels[1, 0] = 7, model.blank, 0
    with torch.no_grad():
        _, extra = model(**batch(model), reveal=lambda logits: labels)
        own = decoder._condition(extra["middle_logits"])
        expected = decoder.condition(decoder.condition_norm(decoder.embed_tokens.weight[labels.clamp(min=0)]))
        found = decoder._condition(extra["middle_logits"], lambda logits: labels)
        torch.testing.assert_close(found, torch.where(labels[..., None] >= 0, expected, own))
        assert not torch.equal(model(**batch(model))[0], model(**batch(model), reveal=lambda logits: labels)[0])


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(InputError, match="self_condition='mean': choose one of argmax, softmax"):
        make("mean")
    with pytest.raises(InputError, match="self_condition=argmax: needs two decoder layers or more; .* is 1"):
        make("argmax", decoder_layers=1)
