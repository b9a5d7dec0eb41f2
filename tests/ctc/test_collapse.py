"""Collapse and greedy decoding."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from narvl_plugin.ctc import collapse, greedy
from narvl_plugin.ctc.lattice import min_queries

BLANK = 0
batches = st.integers(0, 12).flatmap(
    lambda queries: st.lists(st.lists(st.integers(0, 3), min_size=queries, max_size=queries), min_size=1, max_size=5)
)


def tokens_of(labels: list[list[int]]) -> list[list[int]]:
    """Collapse, and cut the padding off."""
    found = collapse(torch.tensor(labels, dtype=torch.long).view(len(labels), -1), blank=BLANK)
    return [row[:length] for row, length in zip(found.tokens.tolist(), found.lengths.tolist(), strict=True)]


@given(batches, st.integers(0, 3))
def test_collapse_equals_its_definition(labels: list[list[int]], blank: int) -> None:
    found = collapse(torch.tensor(labels, dtype=torch.long).view(len(labels), -1), blank=blank)
    for row, tokens, length in zip(labels, found.tokens.tolist(), found.lengths.tolist(), strict=True):
        assert tokens[:length] == [label for label, _ in itertools.groupby(row) if label != blank]
        assert all(label == blank for label in tokens[length:])


@given(batches)
def test_tokens_hold_no_blank_and_repeat_only_across_a_blank(labels: list[list[int]]) -> None:
    found = collapse(torch.tensor(labels, dtype=torch.long).view(len(labels), -1), blank=BLANK)
    for row, tokens, queries, length in zip(labels, *map(Tensor.tolist, found), strict=True):
        tokens, queries = tokens[:length], queries[:length]
        assert BLANK not in tokens
        for first, second, start, end in zip(tokens, tokens[1:], queries, queries[1:], strict=False):
            assert first != second or BLANK in row[start:end]


@given(batches)
def test_each_token_comes_from_the_first_query_of_its_run(labels: list[list[int]]) -> None:
    found = collapse(torch.tensor(labels, dtype=torch.long).view(len(labels), -1), blank=BLANK)
    for row, tokens, queries, length in zip(labels, *map(Tensor.tolist, found), strict=True):
        assert all(query == -1 for query in queries[length:])
        assert queries[:length] == sorted(set(queries[:length]))
        for token, query in zip(tokens[:length], queries[:length], strict=True):
            assert row[query] == token
            assert query == 0 or row[query - 1] != token


@given(batches)
def test_collapse_of_a_sequence_without_repeats_or_blanks_is_itself(labels: list[list[int]]) -> None:
    for tokens in tokens_of(labels):
        free = [token for place, token in enumerate(tokens) if place == 0 or tokens[place - 1] != token]
        assert tokens_of([free]) == [free]


@given(batches)
def test_collapsed_tokens_fit_the_queries_they_came_from(labels: list[list[int]]) -> None:
    found = collapse(torch.tensor(labels, dtype=torch.long).view(len(labels), -1), blank=BLANK)
    assert (min_queries(found.tokens, found.lengths) <= len(labels[0])).all()


def test_collapse_of_an_empty_batch() -> None:
    found = collapse(torch.empty(0, 4, dtype=torch.long), blank=BLANK)
    assert found.tokens.shape == found.queries.shape == (0, 0)


@pytest.mark.parametrize("normalised", [False, True])
def test_greedy_scores_by_hand(normalised: bool) -> None:
    """Labels 1 1 0 1 2: tokens 1 1 2 from queries 0 3 4, each with the probability that query gave it."""
    probabilities = torch.tensor(
        [
            [[0.1, 0.8, 0.1], [0.3, 0.6, 0.1], [0.9, 0.05, 0.05], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]],
            [[0.8, 0.1, 0.1]] * 5,
        ]
    )
    logits = probabilities.log() + (0 if normalised else 3.5)
    spoken, silent = greedy(logits, blank=BLANK)
    assert spoken.tokens.tolist() == [1, 1, 2]
    assert spoken.alignment.tolist() == [0, 3, 4]
    assert spoken.positional_scores.exp().tolist() == pytest.approx([0.8, 0.5, 0.7], abs=1e-6)
    assert spoken.score.exp().item() == pytest.approx(0.8 * 0.6 * 0.9 * 0.5 * 0.7, abs=1e-6)
    assert silent.tokens.tolist() == silent.alignment.tolist() == silent.positional_scores.tolist() == []
    assert silent.score.exp().item() == pytest.approx(0.8**5, abs=1e-6)


def test_greedy_path_is_the_most_probable_of_all(spellings: Callable, collapse_path: Callable) -> None:
    """No path of any target scores higher, and the tokens are the collapse of that path."""
    log_probs = torch.randn(4, 3, generator=torch.Generator().manual_seed(2)).log_softmax(1)
    queries = torch.arange(4)
    best = max(itertools.product(range(3), repeat=4), key=lambda p: float(log_probs[queries, torch.tensor(p)].sum()))
    (found,) = greedy(log_probs[None], blank=BLANK)
    assert found.score.item() == pytest.approx(float(log_probs[queries, torch.tensor(best)].sum()), abs=1e-6)
    assert tuple(found.tokens.tolist()) == collapse_path(best, BLANK)


def test_greedy_takes_half_precision() -> None:
    logits = torch.randn(2, 6, 50, generator=torch.Generator().manual_seed(4)).bfloat16()
    for narrow, wide in zip(greedy(logits, blank=7), greedy(logits.float(), blank=7), strict=True):
        assert narrow.tokens.tolist() == wide.tokens.tolist()
        assert narrow.score.dtype == torch.float32
        torch.testing.assert_close(narrow.score, wide.score)
