"""The most probable path against enumeration."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch

from narvl_plugin.ctc import TargetsDoNotFit, query_ctc_loss, score_targets, token_posteriors, viterbi

Spellings = Callable[[int, int, int, tuple[int, ...]], Iterator[tuple[int, ...]]]


@pytest.mark.parametrize("blank", [0, 1, 2])
@pytest.mark.parametrize("num_queries", [1, 2, 3, 4])
def test_best_path_equals_enumeration(num_queries: int, blank: int, spellings: Spellings) -> None:
    random = torch.Generator().manual_seed(num_queries)
    log_probs = torch.randn(num_queries, 3, dtype=torch.float64, generator=random).log_softmax(1)
    queries = torch.arange(num_queries)
    tokens = [label for label in range(3) if label != blank]
    for length in range(num_queries + 1):
        for target in itertools.product(tokens, repeat=length):
            paths = list(spellings(num_queries, 3, blank, target))
            if not paths:
                continue
            scores = [float(log_probs[queries, torch.tensor(path)].sum()) for path in paths]
            found = viterbi(
                log_probs[None], torch.tensor([target], dtype=torch.long), torch.tensor([length]), blank=blank
            )
            assert tuple(found.labels[0].tolist()) == paths[scores.index(max(scores))]
            assert found.scores.item() == pytest.approx(max(scores), abs=1e-12)


def test_positions_name_the_token_that_each_query_says() -> None:
    """Two samples of different length in one batch; -1 is the blank, and a token may span several queries."""
    labels = torch.tensor([[9, 4, 4, 9, 4, 6], [9, 9, 8, 9, 9, 9]])
    log_probs = torch.nn.functional.one_hot(labels, 10).mul(10.0).log_softmax(2)
    targets = torch.tensor([[4, 4, 6], [8, -1, -1]])
    found = viterbi(log_probs, targets, torch.tensor([3, 1]), blank=9)
    assert found.labels.tolist() == labels.tolist()
    assert found.positions.tolist() == [[-1, 0, 0, -1, 1, 2], [-1, -1, 0, -1, -1, -1]]


def test_path_spells_the_target_however_improbable() -> None:
    """Positions run through the target without a gap, labels agree with them, for random batches."""
    random = torch.Generator().manual_seed(3)
    log_probs = torch.randn(30, 12, 5, generator=random).log_softmax(2)
    targets = torch.randint(1, 5, (30, 6), generator=random)
    lengths = torch.randint(0, 7, (30,), generator=random)
    found = viterbi(log_probs, targets, lengths, blank=0)
    for sample, length in enumerate(lengths.tolist()):
        said = found.positions[sample][found.positions[sample] >= 0]
        assert said.unique_consecutive().tolist() == list(range(length))
        assert found.labels[sample][found.positions[sample] >= 0].tolist() == targets[sample][said].tolist()
        assert (found.labels[sample] == 0).tolist() == (found.positions[sample] == -1).tolist()


def test_empty_batch_and_no_queries() -> None:
    nothing = torch.empty(0, 3, dtype=torch.long)
    assert viterbi(torch.zeros(0, 4, 5), nothing, torch.zeros(0, dtype=torch.long), blank=0).labels.shape == (
        0,
        4,
    )
    none = viterbi(torch.zeros(1, 0, 5), torch.tensor([[1]]), torch.tensor([0]), blank=0)
    assert none.labels.shape == (1, 0)
    assert none.scores.tolist() == [0.0]


def test_targets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TargetsDoNotFit, match="target 0 needs 3 queries but has 2"):
        viterbi(torch.zeros(1, 2, 5), torch.tensor([[1, 1]]), torch.tensor([2]), blank=0)


@pytest.mark.parametrize("seed", range(4))
def test_posteriors_of_tokens_are_shares_of_the_paths(seed: int, spellings: Spellings) -> None:
    generator = torch.Generator().manual_seed(seed)
    log_probs = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64).log_softmax(2)
    targets, lengths = torch.tensor([[1, 1, 2], [3, 2, 9]]), torch.tensor([3, 2])
    found = token_posteriors(log_probs, targets, lengths, blank=0)
    scores = score_targets(log_probs, targets[:, None], lengths[:, None], blank=0)
    for sample, length in enumerate(lengths.tolist()):
        target = tuple(targets[sample, :length].tolist())
        expected, total = torch.zeros(3, 5, dtype=torch.float64), 0.0
        for path in spellings(5, 4, 0, target):
            weight = float(log_probs[sample, range(5), path].sum().exp())
            total += weight
            place = -1
            for query, label in enumerate(path):
                if label and (query == 0 or path[query - 1] != label):
                    place += 1
                if label:
                    expected[place, query] += weight
        torch.testing.assert_close(found[sample], expected / total)
        assert float(scores[sample, 0].exp()) == pytest.approx(total)


def test_several_targets_of_a_sample_are_scored_as_the_loss_scores_them() -> None:
    generator = torch.Generator().manual_seed(1)
    log_probs = torch.randn(3, 6, 8, generator=generator).log_softmax(2)
    targets, lengths = torch.randint(1, 8, (3, 4, 5), generator=generator), torch.randint(0, 4, (3, 4))
    scores = score_targets(log_probs, targets, lengths, blank=0)
    for k in range(4):
        losses = query_ctc_loss(log_probs, targets[:, k], lengths[:, k], blank=0, reduction="none")
        torch.testing.assert_close(scores[:, k], -losses)
    assert score_targets(log_probs[:0], targets[:0], lengths[:0], blank=0).shape == (0, 4)
    assert float(score_targets(log_probs[:, :1], targets[:, :, :2], torch.full((3, 4), 2), blank=0).max()) == -torch.inf
