"""Foreign checkpoints: flags become a configuration, states are fitted, what differs is named."""

from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import Tensor

from narvl_plugin.errors import InputError
from narvl_plugin.models import build
from narvl_plugin.models.config import NarvlConfig, OfaConfig
from narvl_plugin.models.interop import EMBEDDING, QUERIES, adopt, config_from_flags, fit_state, flags_of, tables_of
from narvl_plugin.models.ofa import OfaModel

SMALL = {
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "vision_trunk": "resnet18",
}
LABELS = 50


def teacher(labels: int = LABELS, **overrides: Any) -> OfaModel:
    return build("ofa_tiny", vocab_size=labels, **SMALL | overrides)


def student(labels: int = LABELS, **overrides: Any) -> OfaModel:
    """Build a student; `labels` are those of its dictionary, without the blank."""
    return build("narvl_tiny", vocab_size=labels + 1, **SMALL | overrides)


def state_of(model: OfaModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class TestFlags:
    def test_become_a_configuration(self) -> None:
        flags = Namespace(arch="ofa_large", encoder_embed_dim=32, resnet_type="resnet18", dropout=None, criterion="x")
        config = config_from_flags(flags, OfaConfig)
        assert (config.encoder_embed_dim, config.vision_trunk, config.dropout) == (32, "resnet18", 0.1)
        assert config.encoder_layers == 12  # of ofa_large, where the flags do not say
        assert not hasattr(config, "criterion")

    def test_that_no_published_checkpoint_has_are_refused(self) -> None:
        with pytest.raises(InputError, match="scale_resids=True"):
            config_from_flags(Namespace(scale_resids=True), OfaConfig)

    def test_of_the_authors_parallel_model_count_its_queries(self) -> None:
        state = {"cfg": {"model": Namespace(arch="na_ofa_base")}, "model": {QUERIES: torch.zeros(7, 768)}}
        adopt(state, "na.pt")
        assert state["cfg"]["model"]["_name"] == "narvl"
        assert state["cfg"]["model"]["num_queries"] == 7

    def test_of_other_models_are_left_alone(self) -> None:
        flags = Namespace(arch="transformer_iwslt_de_en")
        state = {"cfg": {"model": flags}, "model": {}}
        adopt(state, "iwslt.pt")
        assert state["cfg"]["model"] is flags

    @pytest.mark.parametrize("size", ["tiny", "medium", "base", "large", "huge"])
    def test_come_back(self, size: str) -> None:
        flags = Namespace(arch=f"ofa_{size}", dropout=0.3, interpolate_position=True)
        config = config_from_flags(flags, OfaConfig)
        written = flags_of(config)
        assert written.arch == f"ofa_{size}"
        assert config_from_flags(written, OfaConfig) == config

    def test_of_sizes_that_ofa_has_not_are_not_written(self) -> None:
        with pytest.raises(InputError, match="ofa_tiny to ofa_huge"):
            flags_of(OfaConfig(**SMALL))


class TestState:
    def test_with_tables_loads(self) -> None:
        model, other = teacher(), teacher()
        other.load_state_dict(state_of(model) | tables_of(model.cfg))
        assert torch.equal(other.encoder.image_proj.weight, model.encoder.image_proj.weight)

    def test_of_a_teacher_becomes_a_students(self) -> None:
        torch.manual_seed(1)
        own = student(encoder_embed_dim=128, num_queries=9)
        before = own.decoder.query_embed.weight.clone()
        found = state_of(teacher(encoder_embed_dim=128))
        fitted, notes = fit_state(found, own.state_dict())
        own.load_state_dict(found)
        assert torch.equal(own.encoder.embed_tokens.weight[:LABELS], found[EMBEDDING])
        assert own.decoder.output_projection.weight is own.encoder.embed_tokens.weight
        assert torch.equal(fitted[QUERIES], own.decoder.query_embed.weight)  # every process draws the same
        assert not torch.equal(before, own.decoder.query_embed.weight)
        assert own.decoder.query_embed.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert own.encoder.embed_tokens.weight[LABELS].std().item() == pytest.approx(128**-0.5, rel=0.3)
        assert [note.split(",")[0] for note in notes] == [f"new: {EMBEDDING}[{LABELS}]", f"new: {QUERIES}[0:9]"]

    def test_of_more_labels_keeps_the_blank_last(self) -> None:
        found = state_of(student(num_queries=9))
        fitted, notes = fit_state(found, student(LABELS + 3, num_queries=9).state_dict())
        assert torch.equal(fitted[EMBEDDING][:LABELS], found[EMBEDDING][:LABELS])
        assert torch.equal(fitted[EMBEDDING][-1], found[EMBEDDING][-1])
        assert notes == [f"new: {EMBEDDING}[50:53], labels added to the vocabulary"]

    def test_of_fewer_labels_is_refused(self) -> None:
        with pytest.raises(InputError, match="has 50 labels and the model's dictionary 47; .*--bpe-dir"):
            fit_state(state_of(teacher()), teacher(47).state_dict())

    @pytest.mark.parametrize(("found", "wanted", "word"), [(5, 9, "new"), (9, 5, "reshaped")])
    def test_keeps_the_first_queries(self, found: int, wanted: int, word: str) -> None:
        state = state_of(student(num_queries=found))
        fitted, notes = fit_state(state, student(num_queries=wanted).state_dict())
        assert torch.equal(fitted[QUERIES][:5], state[QUERIES][:5])
        assert fitted[QUERIES].shape == (wanted, 32)
        assert len(notes) == 1 and notes[0].startswith(f"{word}: {QUERIES}")

    def test_of_a_student_is_no_teachers(self) -> None:
        with pytest.raises(InputError, match="is a student's"):
            student_state = state_of(student())
            teacher().load_state_dict(student_state)

    def test_that_differs_is_refused_by_name_unless_allowed(self) -> None:
        found, own = state_of(teacher()), state_of(teacher())
        del found["encoder.layer_norm.bias"]
        found["encoder.extra"] = torch.zeros(3)
        found["encoder.type_embedding.weight"] = torch.zeros(3, 32)
        with pytest.raises(InputError) as caught:
            fit_state(found, own)
        for part in ("new: encoder.layer_norm.bias 32", "unused: encoder.extra 3", "3x32, the model's is 2x32"):
            assert part in str(caught.value)
        with pytest.raises(InputError, match="differ in 1 tensors .unused: encoder.extra 3"):
            fit_state(found, own, allow=["encoder.layer_norm.*", "encoder.type_embedding.weight"])
        fitted, notes = fit_state(found, own, allow=["encoder.*"])
        assert fitted.keys() == own.keys()
        assert len(notes) == 3
        assert torch.equal(fitted["encoder.type_embedding.weight"], own["encoder.type_embedding.weight"])

    def test_with_embeddings_that_differ_is_refused(self) -> None:
        found = state_of(teacher())
        found["decoder.output_projection.weight"] += 1
        with pytest.raises(InputError, match="output_projection.weight differs from encoder.embed_tokens.weight"):
            teacher().load_state_dict(found)

    def test_in_half_precision_keeps_the_models(self) -> None:
        found = {name: t.half() if t.is_floating_point() else t for name, t in state_of(teacher()).items()}
        with torch.device("meta"):
            model = teacher()
        model.load_state_dict(found)
        assert model.encoder.image_proj.weight.dtype == torch.float32

    def test_is_taken_whole_on_the_meta_device(self) -> None:
        found = state_of(student(vision_pretrained=False))
        with torch.device("meta"):
            model = student()
        model.load_state_dict(found)
        assert model.encoder.image_proj.weight.data_ptr() == found["encoder.image_proj.weight"].data_ptr()
        assert model.decoder.output_projection.weight is model.encoder.embed_tokens.weight
        assert not any(tensor.is_meta for tensor in model.state_dict().values())


class TestFrozenEmbedding:
    def test_lets_the_blank_and_the_queries_train(self) -> None:
        torch.manual_seed(0)
        source = state_of(teacher())
        model = student(freeze_embedding=True, num_queries=5, dropout=0.0)
        model.load_state_dict(source)
        blank = model.state_dict()[EMBEDDING][-1].clone()
        queries = model.decoder.query_embed.weight.detach().clone()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
        logits, _ = model(src_tokens=torch.tensor([[0, 7, 2]]))
        logits.logsumexp(2).sum().backward()
        optimizer.step()
        state = model.state_dict()
        assert "decoder.blank_row" not in state
        assert torch.equal(state[EMBEDDING][:-1], source[EMBEDDING])
        assert not torch.allclose(state[EMBEDDING][-1], blank)
        assert not torch.allclose(state[QUERIES], queries)

    def test_computes_and_saves_what_an_unfrozen_one_does(self) -> None:
        frozen, plain = student(freeze_embedding=True).eval(), student().eval()
        tokens = torch.tensor([[0, 7, 2]])
        plain.load_state_dict(state_of(frozen))
        with torch.no_grad():
            assert torch.allclose(frozen(src_tokens=tokens)[0], plain(src_tokens=tokens)[0], atol=1e-6)
            plain.encoder.embed_tokens.weight.add_(0.1)
            frozen.load_state_dict(state_of(plain))
            assert torch.allclose(frozen(src_tokens=tokens)[0], plain(src_tokens=tokens)[0], atol=1e-6)

    def test_is_none_of_a_teachers_parameters_that_train(self) -> None:
        assert not teacher(freeze_embedding=True).encoder.embed_tokens.weight.requires_grad


def test_a_students_configuration_adds_queries_and_calibration() -> None:
    names = [{field for field in config.__dataclass_fields__} for config in (OfaConfig, NarvlConfig)]
    calibration = {"temperature", "confidence_slope", "confidence_offset"}
    own = {"num_queries", "query_input", "member_queries", "member_calibration"}
    assert names[1] - names[0] == own | calibration


@pytest.mark.parametrize(
    ("name", "size"), [("image_bucket_size", 65), ("image_bucket_size", 256), ("max_positions", 16_384)]
)
def test_tables_that_take_all_memory_are_refused(name: str, size: int) -> None:
    with pytest.raises(InputError, match=f"{name}={size} is too large"):
        flags_of(OfaConfig(**{name: size}))
