"""Expected bigrams against enumeration of all paths."""

import itertools
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from narvl_plugin.ctc import bigram_f1
from narvl_plugin.ctc.bigrams import expected_length, silence_between

BLANK = 2
Collapse = Callable[[tuple[int, ...], int], tuple[int, ...]]


def random_logits(queries: int, labels: int) -> Tensor:
    """Logits of one sample, in double precision."""
    return 2 * torch.randn(1, queries, labels, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def expectation(logits: Tensor, collapse_path: Collapse) -> tuple[Counter, float]:
    """The expected count of each bigram, and of tokens, over all paths."""
    probs = logits[0].softmax(1)
    counts: Counter = Counter()
    length = 0.0
    for path in itertools.product(range(probs.size(1)), repeat=len(probs)):
        weight = float(torch.stack([probs[i, label] for i, label in enumerate(path)]).prod())
        tokens = collapse_path(path, BLANK)
        length += weight * len(tokens)
        for pair in itertools.pairwise(tokens):
            counts[pair] += weight
    return counts, length


@pytest.mark.parametrize(
    "target", [(0, 1), (1, 0, 3), (3, 3), (0, 0, 0), (0, 1, 0, 1), (1, 3, 1, 3, 1)], ids=lambda target: str(target)
)
def test_f1_of_expected_counts_by_enumeration(target: tuple[int, ...], collapse_path: Collapse) -> None:
    """Repeated tokens and repeated bigrams included."""
    logits = random_logits(5, 4)
    counts, _ = expectation(logits, collapse_path)
    wanted = Counter(itertools.pairwise(target))
    found = sum(min(counts[pair], times) for pair, times in wanted.items())
    expected = 2 * found / (sum(counts.values()) + sum(wanted.values()))
    f1 = bigram_f1(logits, torch.tensor([[target]]), torch.tensor([[len(target)]]), blank=BLANK)
    assert f1.tolist() == [[pytest.approx(expected, rel=1e-10)]]


def test_expected_length_by_enumeration(collapse_path: Collapse) -> None:
    logits = random_logits(5, 4)
    _, length = expectation(logits, collapse_path)
    assert expected_length(logits.softmax(2), blank=BLANK).item() == pytest.approx(length, rel=1e-10)


def test_a_certain_output_has_the_f1_of_its_bigrams() -> None:
    """The output is 0 1 3: alike, one bigram of two in common, none, too short to have one, and one that is absent."""
    path = torch.tensor([[0, 0, BLANK, 1, 3, BLANK]])
    logits = torch.full((1, 6, 4), -200.0).scatter(2, path[..., None], 200.0)
    targets = torch.tensor([[[0, 1, 3], [0, 1, 0], [3, 1, 0], [1, 9, 9], [9, 9, 9]]])
    f1 = bigram_f1(logits, targets, torch.tensor([[3, 3, 3, 1, -1]]), blank=BLANK)
    torch.testing.assert_close(f1, torch.tensor([[1.0, 0.5, 0.0, 0.0, 0.0]]))


def test_padding_is_no_matter_and_gradients_are_right() -> None:
    logits = random_logits(5, 4).expand(2, -1, -1).clone().requires_grad_()
    lengths = torch.tensor([[3, 2], [1, 4]])
    targets = torch.tensor([[[0, 1, 0, 0], [3, 3, 1, 1]], [[1, 1, 1, 1], [0, 1, 0, 1]]])
    other = targets.clone()
    other[torch.arange(4) >= lengths[..., None]] = -7
    torch.testing.assert_close(
        bigram_f1(logits, targets, lengths, blank=BLANK), bigram_f1(logits, other, lengths, blank=BLANK)
    )
    assert torch.autograd.gradcheck(lambda x: bigram_f1(x, targets, lengths, blank=BLANK), logits)


def test_certainty_overflows_nothing() -> None:
    """Blanks that are certain, and impossible, in single precision."""
    logits = torch.zeros(2, 40, 4)
    logits[0, :, BLANK], logits[1, :, BLANK] = 1e4, -1e4
    logits.requires_grad_()
    f1 = bigram_f1(logits, torch.tensor([[[0, 1]], [[0, 1]]]), torch.tensor([[2], [2]]), blank=BLANK)
    f1.sum().backward()
    assert f1.isfinite().all() and logits.grad.isfinite().all()
    assert silence_between(torch.full((1, 3), -1e30)).isfinite().all()


def test_targets_without_a_bigram() -> None:
    f1 = bigram_f1(torch.zeros(2, 3, 4), torch.zeros(2, 1, 1, dtype=torch.long), torch.ones(2, 1).long(), blank=BLANK)
    assert f1.tolist() == [[0.0], [0.0]]


def test_counts_are_single_precision_under_autocast() -> None:
    logits, targets, lengths = random_logits(5, 4).float(), torch.tensor([[[0, 1, 3]]]), torch.tensor([[3]])
    expected = bigram_f1(logits, targets, lengths, blank=BLANK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bigram_f1(logits, targets, lengths, blank=BLANK), expected)
