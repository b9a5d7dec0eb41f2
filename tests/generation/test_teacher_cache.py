"""The teacher decodes the same with kept keys and values as when it reads the whole prefix at each step."""

from __future__ import annotations

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.sequence_generator import SequenceGenerator
from torch import Tensor, nn

from narvl_plugin.models.ofa import OfaModel
from narvl_plugin.models.registered import build


@pytest.fixture(scope="module")
def dictionary() -> Dictionary:
    """Thirty labels."""
    dictionary = Dictionary()
    for number in range(26):
        dictionary.add_symbol(f"w{number}")
    return dictionary


@pytest.fixture(scope="module")
def teacher(dictionary: Dictionary) -> OfaModel:
    """A small random teacher in double precision, without dropout, that says varied things.

    An untrained teacher repeats its input, since its output rows are its embeddings: these are its own.
    """
    torch.manual_seed(2)
    sizes = {"encoder_embed_dim": 64, "encoder_ffn_embed_dim": 128, "encoder_layers": 2, "decoder_layers": 2}
    model = build("ofa_nano", vocab_size=len(dictionary), vision_pretrained=False, **sizes).eval().double()
    with torch.no_grad():
        model.decoder.output_projection.weight = nn.Parameter(torch.zeros(len(dictionary), 64).double())
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed_images" not in name:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def net_input() -> dict[str, Tensor]:
    """Four samples, sources of different lengths, one without its image."""
    generator = torch.Generator().manual_seed(1)
    src_tokens = torch.tensor([[0, 5, 6, 7, 2], [0, 8, 2, 1, 1], [0, 9, 10, 2, 1], [0, 11, 2, 1, 1]])
    return {
        "src_tokens": src_tokens,
        "src_lengths": src_tokens.ne(1).sum(1),
        "patch_images": torch.randn(4, 3, 64, 64, generator=generator).double(),
        "patch_masks": torch.tensor([True, True, False, True]),
    }


def test_steps_with_a_cache_give_the_logits_of_one_pass(teacher: OfaModel, net_input: dict[str, Tensor]) -> None:
    tokens = torch.randint(4, 30, (4, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = teacher(**net_input, prev_output_tokens=tokens)[0]
        encoder_out = teacher.encoder(**net_input)
        state: dict = {}
        for step in range(tokens.shape[1]):
            logits = teacher.decoder(tokens[:, : step + 1], encoder_out, incremental_state=state)[0]
            torch.testing.assert_close(logits[:, -1], whole[:, step])


@pytest.mark.parametrize("beam", [1, 4])
def test_beam_search_with_a_cache_finds_what_it_finds_without(
    teacher: OfaModel, dictionary: Dictionary, net_input: dict[str, Tensor], beam: int
) -> None:
    found = []
    for cached in (True, False):
        generator = SequenceGenerator([teacher], dictionary, beam_size=beam, max_len_b=12)
        generator.model.has_incremental = cached
        sample = {"net_input": {**net_input, "prev_output_tokens": torch.zeros(4, 1, dtype=torch.long)}}
        found.append(generator.generate([teacher], sample, bos_token=dictionary.bos()))
    lengths = {len(hypotheses[0]["tokens"]) for hypotheses in found[0]}
    assert len(lengths) > 1, "sentences that end at different steps make the search drop rows of its cache"
    for with_cache, without in zip(*found, strict=True):
        assert len(with_cache) == len(without)
        for one, other in zip(with_cache, without, strict=True):
            assert one["tokens"].tolist() == other["tokens"].tolist()
            torch.testing.assert_close(one["positional_scores"], other["positional_scores"])


def test_rows_that_read_one_sample_share_its_keys_and_values(teacher: OfaModel, net_input: dict[str, Tensor]) -> None:
    tokens = torch.randint(4, 30, (12, 5), generator=torch.Generator().manual_seed(2))
    everyone = torch.arange(4).repeat_interleave(3)
    with torch.no_grad():
        read = teacher.encoder(**net_input)
        shared = teacher.encoder.reorder_encoder_out(read, everyone)
        assert len(shared.features) == 4 and shared.copies == 3
        padding_mask = read.padding_mask
        assert padding_mask is not None
        apart = read._replace(features=read.features[everyone], padding_mask=padding_mask[everyone])
        whole = teacher.decoder(tokens, apart)[0]
        torch.testing.assert_close(teacher.decoder(tokens, shared)[0], whole)

        two = torch.tensor([3, 5, 4, 9, 11, 9])  # rows of samples 1 and 3
        fewer = teacher.encoder.reorder_encoder_out(shared, two)
        assert len(fewer.features) == 2 and fewer.copies == 3
        torch.testing.assert_close(
            teacher.decoder(tokens[:6], fewer)[0][0],
            teacher.decoder(
                tokens[:6], apart._replace(features=apart.features[two], padding_mask=apart.padding_mask[two])
            )[0][0],
        )
        uneven = teacher.encoder.reorder_encoder_out(shared, torch.tensor([0, 4, 5]))
        assert torch.equal(uneven.features, read.features[[0, 1, 1]]) and uneven.copies == 1
