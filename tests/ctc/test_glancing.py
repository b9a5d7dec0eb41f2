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
    best = scores[:, :2].argmax(1)
    assert set(best.tolist()) == {0, 1}

    aligned = viterbi(logits.log_softmax(2), targets[rows, best], lengths[rows, best], blank=BLANK).labels
    is_revealed = found != BLANK
    assert torch.equal(found[is_revealed], aligned[is_revealed])
    distance = (logits.argmax(2) != aligned).sum(1)
    drawn = torch.stack([glance(logits, targets, lengths, ratio=ratio, blank=BLANK) != BLANK for _ in range(400)])
    numbers = torch.arange(60.0)
    chances = torch.distributions.Poisson((ratio * distance).clamp(min=1e-9)[:, None]).log_prob(numbers).exp()
    expected = (chances * torch.minimum(numbers, (aligned != BLANK).sum(1)[:, None])).sum(1)
    torch.testing.assert_close(drawn.float().sum(2).mean(0), expected, atol=0.35, rtol=0)
    assert expected.sum() > 0


def test_queries_are_drawn_at_random() -> None:
    """Each of three queries is revealed as often as the others."""
    logits = torch.zeros(3000, 3, 7)
    logits[..., 5] = 1.0  # which is wrong everywhere
    targets = torch.tensor([[[1, 2, 3]]]).expand(3000, -1, -1)
    found = glance(logits, targets, torch.full((3000, 1), 3), ratio=1 / 3, blank=BLANK)
    shares = (found != BLANK).float().mean(0)
    torch.testing.assert_close(shares, shares.mean().expand(3), atol=0.04, rtol=0)
    assert 0.2 < shares.mean() < 0.4


def test_nothing_is_revealed_where_all_is_right_or_no_target_counts() -> None:
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, BLANK]] * 2), 7).float() * 9
    targets = torch.tensor([[[1, 2]], [[4, 5]]])
    found = glance(logits, targets, torch.tensor([[2], [-1]]), ratio=1.0, blank=BLANK)
    assert found.tolist() == [[BLANK] * 3] * 2
