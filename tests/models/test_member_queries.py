"""A student of several tasks is, for each, the student that has its queries alone."""

from typing import Any

import pytest
import torch

from narvl_plugin.errors import InputError
from narvl_plugin.models import build
from narvl_plugin.models.interop import mark_origin
from narvl_plugin.models.narvl import NarvlModel

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
ROWS = {"caption": slice(0, 8), "vqa": slice(8, 11), "boxes": slice(11, 16)}
LAYOUT = "caption:8,vqa:3,boxes:5"


def make(num_queries: int, **options: Any) -> NarvlModel:
    model = build("narvl_tiny", vocab_size=50, num_queries=num_queries, **SMALL, **options).eval()
    for parameter in model.parameters():  # larger weights than at the start, so that every path counts
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def student() -> NarvlModel:
    """Give a student of three tasks."""
    torch.manual_seed(1)
    return make(16, member_queries=LAYOUT)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Give what an encoder reads of two samples."""
    torch.manual_seed(0)
    return {
        "src_tokens": torch.randint(4, 49, (2, 6)),
        "src_lengths": torch.full((2,), 6),
        "patch_images": torch.randn(2, 3, 32, 32),
        "patch_masks": torch.ones(2, dtype=torch.bool),
    }


@pytest.mark.parametrize("member", ROWS)
def test_logits_are_those_of_a_student_with_these_queries_alone(
    student: NarvlModel, batch: dict[str, torch.Tensor], member: str
) -> None:
    rows = ROWS[member]
    alone = make(rows.stop - rows.start)
    state = student.state_dict()
    state["decoder.query_embed.weight"] = state["decoder.query_embed.weight"][rows]
    alone.load_state_dict(state)
    expected, _ = alone(**batch)
    logits, _ = student(**batch, queries=member)
    assert torch.equal(logits, expected)
    student.answer_as(member)
    assert torch.equal(student(**batch)[0], expected)
    assert student.num_queries == alone.num_queries


def test_other_members_queries_play_no_part(student: NarvlModel, batch: dict[str, torch.Tensor]) -> None:
    before, _ = student(**batch, queries="vqa")
    with torch.no_grad():
        student.decoder.query_embed.weight[:8] = 5.0
        student.decoder.query_embed.weight[11:] = -5.0
    after, _ = student(**batch, queries="vqa")
    assert torch.equal(after, before)


def test_gradients_of_a_batch_are_of_its_members_queries(student: NarvlModel, batch: dict[str, torch.Tensor]) -> None:
    student(**batch, queries="vqa")[0].logsumexp(2).sum().backward()
    gradients = student.decoder.query_embed.weight.grad
    assert gradients is not None  # of all rows, as data-parallel processes with batches of other members have
    moved = gradients.abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == [8, 9, 10]


def test_whose_queries_answer_must_be_said(student: NarvlModel, batch: dict[str, torch.Tensor]) -> None:
    assert student.num_queries == 16
    with pytest.raises(InputError, match="trained on caption, vqa, boxes, and has no queries of None"):
        student(**batch)
    with pytest.raises(InputError, match="no queries of 'gqa'; choose by --member"):
        student.answer_as("gqa")
    with pytest.raises(InputError, match="--member vqa: the student was trained on one task alone"):
        make(5).answer_as("vqa")


def test_members_queries_sum_up_to_all() -> None:
    with pytest.raises(
        InputError, match="--member-queries caption:8,vqa:3,boxes:5: do not sum up to the 20 of --num-queries"
    ):
        make(20, member_queries=LAYOUT)


def test_members_of_a_checkpoint_keep_their_queries_by_name(student: NarvlModel) -> None:
    checkpoint = {"cfg": {"model": {"_name": "narvl", "member_queries": LAYOUT}}, "model": student.state_dict()}
    mark_origin(checkpoint)
    before = student.decoder.query_embed.weight.detach().clone()
    other = make(18, member_queries="boxes:4,entailment:3,vqa:3,caption:8")
    fresh = other.decoder.query_embed.weight.detach().clone()
    other.load_state_dict(checkpoint["model"])
    expected = torch.cat([before[11:15], fresh[4:7], before[8:11], before[:8]])
    assert torch.equal(other.decoder.query_embed.weight, expected)
    student.load_state_dict(checkpoint["model"])
    assert torch.equal(student.decoder.query_embed.weight, before)
    with pytest.raises(InputError, match=r"for several tasks \(caption:8,.*convert CHECKPOINT OUT --member NAME"):
        make(8).load_state_dict(checkpoint["model"])
