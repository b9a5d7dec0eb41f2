"""Properties of teacher and student that hold for any weights."""

import pytest
import torch

from narvl_plugin.errors import InputError
from narvl_plugin.models import build
from narvl_plugin.models.attention import Attention

SMALL = {
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "vision_trunk": "resnet18",
    "vision_pretrained": False,
    "freeze_resnet": False,
}


def make(arch, seed=1, **options):
    torch.manual_seed(seed)
    model = build(arch, vocab_size=50, **{**SMALL, **options})
    for parameter in model.parameters():  # larger weights than at the start, so that every path counts
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def batch(size=2, target_length=5):
    torch.manual_seed(0)
    source = torch.randint(4, 49, (size, 6))
    return {
        "src_tokens": source,
        "src_lengths": torch.full((size,), 6),
        "prev_output_tokens": torch.randint(4, 49, (size, target_length)),
        "patch_images": torch.randn(size, 3, 64, 96),
        "patch_masks": torch.ones(size, dtype=torch.bool),
    }


def test_shapes():
    logits, extra = make("ofa_tiny")(**batch())
    assert logits.shape == (2, 5, 50)
    assert extra["encoder_out"].shape == (4 * 6 + 6, 2, 32)
    logits, extra = make("narvl_tiny", num_queries=7)(**batch())
    assert logits.shape == (2, 7, 50)
    assert extra["encoder_out"].shape == (4 * 6 + 6, 2, 32)


def uniform(features, number):
    """Return evenly spread rows of (S, D)."""
    return torch.stack([features[int((query + 0.5) / number * len(features))] for query in range(number)])


@pytest.mark.parametrize("padded", [False, True])
def test_the_input_may_be_a_copy_of_the_source(padded):
    """Of patches and text, without padding: here the image of the first sample and the end of the second text."""
    model, inputs = make("narvl_tiny", num_queries=7, query_input="source"), batch()
    if padded:
        inputs["patch_masks"] = torch.tensor([False, True])
        inputs["src_tokens"][1, 4:] = 1
    seen = []
    model.decoder.layernorm_embedding.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        _, extra = model(**inputs)
    features = extra["encoder_out"].transpose(0, 1)
    kept = [features[0][24:], features[1][:28]] if padded else list(features)
    torch.testing.assert_close(seen[0], torch.stack([uniform(states, 7) for states in kept]))


def test_the_input_may_be_the_positions_alone():
    model, inputs = make("narvl_tiny", num_queries=7, query_input="positions"), batch()
    learned = make("narvl_tiny", num_queries=7)
    with torch.no_grad():
        before = model(**inputs)[0]
        model.decoder.query_embed.weight.normal_()
        torch.testing.assert_close(model(**inputs)[0], before, rtol=0, atol=0)
        learned.decoder.query_embed.weight.copy_(model.decoder.embed_positions.weight[:7])
        torch.testing.assert_close(learned(**inputs)[0], before)
        model.decoder.embed_positions.weight[:7] += 1
        assert not torch.equal(model(**inputs)[0], before)


@pytest.mark.parametrize("query_input", ["positions", "source"])
def test_queries_that_nothing_reads_are_not_trained(query_input):
    model = make("narvl_tiny", num_queries=7, query_input=query_input).train()
    model(**batch())[0].sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.requires_grad is False}
    assert without == {"decoder.query_embed.weight"}
    assert all(model.decoder.layers[0].self_attn.q_proj.weight.grad.abs().sum(0) > 0)


@pytest.mark.integration
@pytest.mark.parametrize("arch", ["ofa_tiny", "narvl_tiny"])
def test_a_text_longer_than_the_positions_is_refused_before_it_takes_memory(arch):
    model, inputs = make(arch, max_positions=20, token_bucket_size=10), batch()
    model(**inputs | {"src_tokens": torch.full((2, 20), 5), "src_lengths": torch.full((2,), 20)})
    for length in (21, 2_000_000):  # of which the biases of one head alone would take 16 terabytes
        with pytest.raises(InputError, match=f"a text of {length:,} tokens is longer than the model's 20 positions"):
            model(**inputs | {"src_tokens": torch.full((2, length), 5), "src_lengths": torch.full((2,), length)})


def test_the_teacher_is_causal():
    model, inputs = make("ofa_tiny"), batch()
    before, _ = model(**inputs)
    inputs["prev_output_tokens"][:, 3] = 7
    after, _ = model(**inputs)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert (after[:, 3] - before[:, 3]).abs().max() > 1e-3


def test_a_later_query_reaches_an_earlier_one():
    model, inputs = make("narvl_tiny", num_queries=7), batch()
    before, _ = model(**inputs)
    with torch.no_grad():
        model.decoder.query_embed.weight[6].normal_(std=2.0)
    after, _ = model(**inputs)
    assert (after[:, 0] - before[:, 0]).abs().max() > 1e-3


def test_previous_tokens_do_not_matter_to_the_student():
    model, inputs = make("narvl_tiny", num_queries=7), batch()
    before, _ = model(**inputs)
    inputs["prev_output_tokens"] = None
    after, _ = model(**inputs)
    assert torch.equal(after, before)


@pytest.mark.parametrize("arch", ["ofa_tiny", "narvl_tiny"])
def test_padding_and_company_do_not_matter(arch):
    """A sample alone and the same sample padded beside a longer one give the same logits."""
    model, inputs = make(arch), batch(1)
    alone, _ = model(**inputs)
    longer = torch.randint(4, 49, (1, 9))
    both = batch(2)
    both["src_tokens"] = torch.cat([torch.nn.functional.pad(inputs["src_tokens"], (0, 3), value=1), longer])
    both["prev_output_tokens"][0] = inputs["prev_output_tokens"][0]
    both["patch_images"][0] = inputs["patch_images"][0]
    together, _ = model(**both)
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ["ofa_tiny", "narvl_tiny"])
def test_an_ignored_image_does_not_matter(arch):
    model, inputs = make(arch), batch()
    inputs["patch_masks"] = torch.tensor([True, False])
    before, _ = model(**inputs)
    inputs["patch_images"][1].normal_()
    after, _ = model(**inputs)
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("arch", ["ofa_tiny", "narvl_tiny"])
def test_an_ignored_patch_does_not_matter(arch):
    """Of 24 patches of features, some are ignored, which differ between the samples."""
    model, inputs = make(arch), batch()
    inputs["patch_images"] = torch.randn(2, model.encoder.embed_images.out_channels, 4, 6)
    inputs["patch_masks"] = torch.rand(2, 24) > 0.4
    before, _ = model(**inputs)
    ignored = ~inputs["patch_masks"].view(2, 1, 4, 6)
    assert ignored.flatten(1).any(1).all()
    inputs["patch_images"] = torch.where(ignored, torch.randn(2, 1, 4, 6), inputs["patch_images"])
    after, _ = model(**inputs)
    torch.testing.assert_close(after, before)
    inputs["patch_masks"] = torch.ones(2, dtype=torch.bool)
    assert not torch.allclose(model(**inputs)[0], before)


def test_positions_of_a_larger_grid_are_interpolated():
    options = {"interpolate_position": True, "orig_patch_image_size": 32}  # a grid of 2 x 2
    encoder = make("ofa_tiny", **options).encoder
    corners = encoder.embed_image_positions.weight[torch.tensor([[1, 2], [43, 44]])]
    # Bilinear, by the centres of the patches: those of four in a row lie at -1/4, 1/4, 3/4 and 5/4 of two.
    weights = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    expected = torch.einsum("yi,xj,ijd->yxd", weights, weights, corners)
    torch.testing.assert_close(encoder._image_positions(4, 4), expected.flatten(0, 1))
    torch.testing.assert_close(encoder._image_positions(2, 2), corners.flatten(0, 1))
    plain = make("ofa_tiny").encoder
    torch.testing.assert_close(plain._image_positions(4, 4)[6], plain.embed_image_positions.weight[42 + 2 + 1])


@torch.no_grad()
def test_images_of_512_pixels():
    inputs = batch(1)
    inputs["patch_images"] = torch.randn(1, 3, 512, 512)
    _, extra = make("ofa_tiny")(**inputs)
    assert extra["encoder_out"].shape == (32 * 32 + 6, 1, 32)
    inputs["patch_images"] = torch.randn(1, 3, 16, 688)
    with pytest.raises(ValueError, match="1 x 43 patches does not fit"):
        make("ofa_tiny")(**inputs)


def test_precomputed_features_replace_pixels():
    from narvl_plugin.models.vision import backbone_features

    model, inputs = make("narvl_tiny"), batch()
    expected, _ = model(**inputs)
    inputs["patch_images"] = backbone_features(model.encoder.embed_images, inputs["patch_images"])
    actual, _ = model(**inputs)
    torch.testing.assert_close(actual, expected)


def test_the_student_takes_all_of_the_teachers_weights():
    teacher = make("ofa_tiny")
    student = make("narvl_tiny", seed=2)
    student = build("narvl_tiny", vocab_size=51, **SMALL).eval()
    student.load_state_dict(teacher.state_dict(), strict=True)
    assert student.blank == 50
    loaded = student.state_dict()
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(loaded[name][: len(tensor)] if tensor.dim() else loaded[name], tensor), name


def test_a_frozen_trunk_keeps_its_statistics():
    model = make("ofa_tiny", freeze_resnet=True).train()
    before = model.encoder.embed_images.bn1.running_mean.clone()
    logits, _ = model(**batch())
    logits.sum().backward()
    assert torch.equal(model.encoder.embed_images.bn1.running_mean, before)
    assert all(p.grad is None for p in model.encoder.embed_images.parameters())


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("ofa_gigantic", {}, "unknown arch 'ofa_gigantic'"),
        ("bert_base", {}, "unknown arch"),
        ("ofa_tiny", {"num_queries": 5}, "no option num_queries"),
        ("ofa_tiny", {"vision_trunk": "resnet1"}, "no model named 'resnet1'"),
        ("ofa_tiny", {"vision_trunk": "vit_tiny_patch16_224"}, None),
        ("ofa_tiny", {"encoder_attention_heads": 3}, "not divisible"),
        ("ofa_tiny", {"vision_trunk": "resnet18", "vision_pretrained": True}, "no installed package"),
        ("narvl_tiny", {"query_input": "zeros"}, "query_input='zeros': choose one of learned, positions, source"),
    ],
)
def test_what_cannot_be_built_is_refused(arch, options, message):
    if message is None:
        assert build(arch, vocab_size=50, **options)
        return
    with pytest.raises((ValueError, InputError), match=message):
        build(arch, vocab_size=50, **options)


@pytest.mark.parametrize(
    ("arch", "parameters"),
    [
        ("ofa_tiny", 33_488_336),
        ("ofa_medium", 92_892_000),
        ("ofa_base", 182_238_536),
        ("ofa_large", 472_977_152),
        ("ofa_huge", 929_486_848),
    ],
)
def test_published_sizes(arch, parameters):
    with torch.device("meta"):
        model = build(arch, vocab_size=59457)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("queries", [2, 8, 9])
def test_few_queries_attend_without_keys_and_values(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    attention = Attention(64, 4, scale_factor=2.0, dropout=0.0).double()
    for bias in (attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias):
        torch.nn.init.normal_(bias)
    torch.nn.init.uniform_(attention.c_attn)
    x, memory = torch.randn(3, queries, 64).double(), torch.randn(3, 20, 64).double()
    bias = torch.randn(3, 4, queries, 20).double()
    bias[1, :, :, 15:] = -torch.inf
    expected = attention.attend(x, *attention.project_keys(memory), bias)
    projected = []
    monkeypatch.setattr(
        attention, "project_keys", lambda read: projected.append(1) or Attention.project_keys(attention, read)
    )
    torch.testing.assert_close(attention(x, memory, bias), expected)
    assert bool(projected) == (queries > 8)
