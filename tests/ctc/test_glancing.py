"""Which labels are revealed: of the most probable target, as many as the distance says, and never a blank."""

import pytest
import torch
from torch import Tensor

from narvl_plugin.ctc import glance, score_targets, viterbi

BLANK = 6


def random_case(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, N, V), targets (B, K, T) and their lengths; the last target of each sample does not count."""
    torch.manual_seed(seed)
    targets = torch.randint(6, (40, 3, 12))
    lengths = torch.randint(6, (40, 3))
    lengths[:, 2] = -1
    return torch.randn(40, 10, 7) * 3, targets, lengths


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_number_and_labels_are_those_of_the_alignment(ratio: float) -> None:
    logits, targets, lengths = random_case(1)
    found = glance(logits, targets, lengths, ratio=ratio, blank=BLANK)
    rows = torch.arange(40)
    scores = score_targets(logits.log_softmax(2), targets, lengths.clamp(min=0), blank=BLANK)
    assert torch.equal(found.target, scores[:, :2].argmax(1))
    assert set(found.target.tolist()) == {0, 1}

    aligned = viterbi(
        logits.log_softmax(2), targets[rows, found.target], lengths[rows, found.target], blank=BLANK
    ).labels
    is_revealed = found.labels != BLANK
    assert torch.equal(found.labels[is_revealed], aligned[is_revealed])
    distance = (logits.argmax(2) != aligned).sum(1)
    number = torch.minimum((ratio * distance).round().long(), (aligned != BLANK).sum(1))
    assert is_revealed.sum(1).tolist() == number.tolist()
    assert number.sum() > 0


def test_queries_are_drawn_at_random() -> None:
    """One of three queries is revealed, each of them in a third of the draws."""
    logits = torch.zeros(3000, 3, 7)
    logits[..., 5] = 1.0  # which is wrong everywhere
    targets = torch.tensor([[[1, 2, 3]]]).expand(3000, -1, -1)
    found = glance(logits, targets, torch.full((3000, 1), 3), ratio=1 / 3, blank=BLANK)
    revealed = (found.labels != BLANK).float()
    assert (revealed.sum(1) == 1).all()
    torch.testing.assert_close(revealed.mean(0), torch.full((3,), 1 / 3), atol=0.05, rtol=0)


def test_nothing_is_revealed_where_all_is_right_or_no_target_counts() -> None:
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, BLANK]] * 2), 7).float() * 9
    targets = torch.tensor([[[1, 2]], [[4, 5]]])
    found = glance(logits, targets, torch.tensor([[2], [-1]]), ratio=1.0, blank=BLANK)
    assert found.labels.tolist() == [[BLANK] * 3] * 2
