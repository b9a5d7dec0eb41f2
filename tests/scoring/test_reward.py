"""The reward for captions against CIDEr-D of the COCO tools, and on cases worked out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narvl_plugin.errors import InputError
from narvl_plugin.scoring.reward import CaptionReward
from narvl_plugin.scoring.sentences import BatchwiseCider

END = 9
TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=8)
ROWS = st.lists(st.lists(TOKENS, min_size=1, max_size=3), min_size=2, max_size=5)


def batch(captions: list[list[list[int]]], padding: int = 7) -> tuple[Tensor, Tensor]:
    """Return captions as padded tokens (B, M, T) and lengths (B, M), -1 for captions that a sample lacks."""
    most = max(map(len, captions))
    longest = max(len(caption) for row in captions for caption in row)
    tokens = torch.full((len(captions), most, longest), padding)
    lengths = torch.full((len(captions), most), -1)
    for place, row in enumerate(captions):
        for number, caption in enumerate(row):
            tokens[place, number, : len(caption)] = torch.tensor(caption, dtype=torch.int64)
            lengths[place, number] = len(caption)
    return tokens, lengths


def words(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


@settings(deadline=None)
@given(ROWS, st.lists(st.lists(st.integers(0, 4), max_size=8), min_size=1, max_size=3))
def test_cider_is_that_of_the_coco_tools(rows: list[list[list[int]]], said: list[list[int]]) -> None:
    texts = [[words(reference) for reference in row] for row in rows]
    try:
        reward = CaptionReward(rows, end=END)
    except InputError:
        assert BatchwiseCider(texts)([row[0] for row in texts], texts) == [0] * len(rows)
        return
    judge = BatchwiseCider(texts)
    expected = [[judge([words(caption)], [row])[0] for caption in said] for row in texts]
    found = reward.cider(*batch([said] * len(rows), 8), *batch(rows))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_a_caption_of_known_runs_gets_half_of_the_reward_for_them() -> None:
    rows = [[[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 6]], [[7, 8]]]
    reward = CaptionReward(rows, end=END)
    assert reward.perfect == pytest.approx((10 + 10 + 5) / 3, abs=1e-4)  # two tokens have no trigram
    said = {
        (1, 2, 3, 4, 5): True,
        (1, 2, 3, 4, 5, END): True,  # </s> is no word
        (1, 2, 3, 4): False,  # ends too early
        (2, 3, 4, 5): False,  # starts too late
        (1, 2, 3, 4, 5, 6): False,
        (7, 8): True,
        (7,): False,
        (): False,
        (7, 8, 9): True,
    }
    outputs, lengths = batch([[list(caption) for caption in said]])
    targets = batch([[[1, 2, 3, 4, 5]]])
    found = reward(outputs, lengths, *targets)
    without_end = lengths - torch.tensor([[caption[-1:] == (END,) for caption in said]]).long()
    cider = reward.cider(outputs, without_end, *targets)
    expected = 0.5 * cider / reward.perfect + 0.5 * torch.tensor([list(said.values())])
    torch.testing.assert_close(found, expected)
    assert float(cider[0, 0]) == pytest.approx(10, abs=1e-4)
    assert (cider[0, 5:] == 0).all()


def test_excluded_references_do_not_count() -> None:
    reward = CaptionReward([[[1, 2, 3]], [[4, 5, 6]]], end=END)
    said = batch([[[1, 2, 3]]])
    several, lengths = batch([[[1, 2, 3], [4, 5, 6]]])
    torch.testing.assert_close(reward(*said, several, torch.tensor([[3, -1]])), reward(*said, *batch([[[1, 2, 3]]])))
    assert reward(*said, several, lengths) < reward(*said, several, torch.tensor([[3, -1]]))
    assert float(reward(*said, several, torch.tensor([[-1, -1]]))) == 0.5


def test_a_perfect_caption_has_a_reward_of_one() -> None:
    """Of several references the best one is perfect on average, though it differs from the others."""
    rows = [[[1, 2, 3, 4], [1, 2, 3, 5]], [[6, 7, 8, 9], [6, 7, 8, 4]]]
    together, apart = CaptionReward(rows, end=0), CaptionReward(rows, end=0, one_each=True)
    assert apart.perfect == pytest.approx(10, abs=1e-4) and together.perfect < 9
    said = batch([[row[0]] for row in rows])
    torch.testing.assert_close(together(*said, *batch(rows)), torch.ones(2, 1))
    torch.testing.assert_close(apart(*said, *said), torch.ones(2, 1))


@pytest.mark.parametrize("rows", [[], [[]], [[[1, 2]]], [[[1, 2]], [[1, 2]]]])
def test_references_that_cannot_be_told_apart_are_an_error(rows: list[list[list[int]]]) -> None:
    with pytest.raises(InputError, match=r"the \d training rows with references hold the same n-grams"):
        CaptionReward(rows, end=END)
