"""Sampled paths against all paths there are."""

import itertools

import pytest
import torch

from narvl_plugin.ctc import expected_score, sample_paths


def test_estimate_and_gradient_are_right_on_average() -> None:
    torch.manual_seed(1)
    logits = torch.randn(2, 3, 4, dtype=torch.double, requires_grad=True)
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    score_of_each = torch.rand(2, len(every), dtype=torch.double)
    log_probs = logits.log_softmax(2)
    exact = (sum(log_probs[:, query, every[:, query]] for query in range(3)).exp() * score_of_each).sum(1)
    (exact_gradient,) = torch.autograd.grad(exact.sum(), logits)

    paths = sample_paths(logits, 100_000)
    assert paths.shape == (2, 100_000, 3)
    scores = score_of_each.gather(1, (paths * torch.tensor([16, 4, 1])).sum(2))
    estimate = expected_score(logits, paths, scores)
    (gradient,) = torch.autograd.grad(estimate.sum(), logits)
    torch.testing.assert_close(estimate, exact, rtol=0.01, atol=0)
    torch.testing.assert_close(gradient, exact_gradient, rtol=0, atol=0.003)
    assert float(exact_gradient.abs().max()) > 0.03


def test_few_paths_are_not_biased() -> None:
    """The mean of the other paths is no part of a path's own score, so even two paths are right on average."""
    torch.manual_seed(1)
    logits = torch.tensor([[[0.0, 1.0]]]).repeat(50_000, 1, 1).requires_grad_()
    paths = sample_paths(logits, 2)
    (gradient,) = torch.autograd.grad(expected_score(logits, paths, paths[..., 0].float()).sum(), logits)
    right = torch.sigmoid(torch.tensor(1.0))
    assert float(gradient[..., 1].mean()) == pytest.approx(float(right * (1 - right)), rel=0.03)


def test_half_precision_logits() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.bfloat16, requires_grad=True)
    paths = sample_paths(logits, 4)
    expected_score(logits, paths, torch.rand(2, 4)).sum().backward()
    assert logits.grad.dtype == torch.bfloat16
    assert bool(logits.grad.isfinite().all())
