"""The label lattice: its layout, the queries a target needs, and its sums in log space."""

import math

import pytest
import torch
from torch import Tensor

from narvl_plugin.ctc.lattice import (
    IMPOSSIBLE,
    backward_scores,
    build_lattice,
    forward_scores,
    gather_labels,
    log_marginals,
    min_queries,
    posteriors,
)

TARGETS = torch.tensor([[5, 5, 7], [5, 7, -1], [5, 5, 5], [7, 7, 7], [2, 9, 9]])
LENGTHS = torch.tensor([3, 2, 3, 0, 1])


def random_lattice(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Emissions of TARGETS over 6 queries and 10 labels, with blank 0."""
    lattice = build_lattice(TARGETS, LENGTHS, blank=0)
    log_probs = torch.randn(5, 6, 10, dtype=dtype, generator=torch.Generator().manual_seed(1)).log_softmax(2)
    return gather_labels(log_probs, lattice.labels), lattice, torch.tensor([6, 4, 5, 3, 1])


def test_layout_of_states() -> None:
    lattice = build_lattice(TARGETS, LENGTHS, blank=0)
    assert lattice.labels.tolist() == [
        [0, 5, 0, 5, 0, 7, 0],
        [0, 5, 0, 7, 0, 0, 0],
        [0, 5, 0, 5, 0, 5, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 2, 0, 0, 0, 0, 0],
    ]
    assert [row.nonzero().flatten().tolist() for row in lattice.skip] == [[5], [3], [], [], []]
    assert [row.nonzero().flatten().tolist() for row in lattice.final] == [
        [5, 6],
        [3, 4],
        [5, 6],
        [0],
        [1, 2],
    ]


def test_queries_needed_counts_tokens_and_adjacent_repeats() -> None:
    assert min_queries(TARGETS, LENGTHS).tolist() == [4, 2, 5, 0, 1]
    assert min_queries(torch.empty(2, 0, dtype=torch.long), torch.zeros(2, dtype=torch.long)).tolist() == [
        0,
        0,
    ]
    assert min_queries(torch.empty(0, 3, dtype=torch.long), torch.zeros(0, dtype=torch.long)).tolist() == []


def test_forward_and_backward_agree_at_every_query() -> None:
    """The sum over states of alpha * beta is the marginal wherever the paths are cut."""
    emissions, lattice, query_lengths = random_lattice()
    forward = forward_scores(emissions, lattice, query_lengths)
    backward = backward_scores(emissions, lattice, query_lengths)
    marginal = log_marginals(forward, lattice)
    cuts = (forward + backward).logsumexp(2)
    torch.testing.assert_close(cuts, marginal[:, None].expand_as(cuts))


def test_posteriors_are_the_gradient_of_the_marginal() -> None:
    """d log p / d emission is the posterior of the state; also shows that autograd meets no NaN in the sums."""
    emissions, lattice, query_lengths = random_lattice()
    emissions = emissions.requires_grad_()
    forward = forward_scores(emissions, lattice, query_lengths)
    log_marginals(forward, lattice).sum().backward()
    expected = posteriors(forward, backward_scores(emissions, lattice, query_lengths))
    for sample, length in enumerate(query_lengths.tolist()):
        torch.testing.assert_close(emissions.grad[sample, :length], expected[sample, :length].detach())
        assert emissions.grad[sample, length:].abs().sum() == 0


def test_labels_of_probability_zero_leave_no_nan() -> None:
    """With the second token ruled out everywhere nothing spells the target; the others are as before."""
    emissions, lattice, query_lengths = random_lattice(torch.float32)
    emissions[1, :, 3] = -math.inf
    emissions = emissions.requires_grad_()
    marginal = log_marginals(forward_scores(emissions, lattice, query_lengths), lattice)
    assert marginal[1] == -math.inf
    assert marginal[[0, 2, 3, 4]].isfinite().all()
    marginal[[0, 2, 3, 4]].sum().backward()
    assert emissions.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_states_are_scored_in_float32_or_double(dtype: torch.dtype) -> None:
    lattice = build_lattice(TARGETS, LENGTHS, blank=0)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert gather_labels(torch.zeros(5, 6, 10, dtype=dtype), lattice.labels).dtype == expected


def test_impossible_survives_adding_up_in_float32() -> None:
    assert torch.tensor(IMPOSSIBLE, dtype=torch.float32).mul(10_000).isfinite()
