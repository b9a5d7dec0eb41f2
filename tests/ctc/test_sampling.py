"""Sampled paths against all paths there are."""

import itertools

import pytest
import torch

from narvl_plugin.ctc import collapse, expected_score, outputs_of, quasi_random_paths, sample_paths


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


def test_even_paths_are_nearer_to_the_expectation_than_random_ones() -> None:
    torch.manual_seed(1)
    logits = torch.randn(40, 4, 6, dtype=torch.double)
    probabilities = logits.softmax(2)

    def error(paths: torch.Tensor) -> float:
        """The mean error of the probability that the first two queries say the same label."""
        exact = (probabilities[:, 0] * probabilities[:, 1]).sum(1)
        return float(((paths[..., 0] == paths[..., 1]).double().mean(1) - exact).abs().mean())

    paths = quasi_random_paths(logits.log_softmax(2), 256)
    assert paths.shape == (40, 256, 4)
    shares = torch.nn.functional.one_hot(paths, 6).double().mean(1)
    torch.testing.assert_close(shares, probabilities, rtol=0, atol=2 / 256)
    assert error(paths) < 0.6 * error(sample_paths(logits, 256))
    torch.testing.assert_close(quasi_random_paths(logits[5:6].log_softmax(2), 256), paths[5:6])


def test_even_paths_of_a_large_vocabulary_stay_in_it() -> None:
    torch.manual_seed(1)
    paths = quasi_random_paths(torch.randn(1, 2, 60_000).log_softmax(2), 1024)
    assert int(paths.min()) >= 0 and int(paths.max()) < 60_000
    sure = torch.full((1, 2, 60_000), -30.0)
    sure[..., -1] = 0
    assert quasi_random_paths(sure, 64).unique().tolist() == [59_999]


def test_outputs_of_paths_are_their_collapses() -> None:
    torch.manual_seed(1)
    paths = torch.randint(0, 3, (4, 5, 6))
    outputs, lengths = outputs_of(paths, blank=2)
    for sample in range(4):
        alone = collapse(paths[sample], blank=2)
        torch.testing.assert_close(lengths[sample], alone.lengths)
        longest = alone.tokens.size(1)
        torch.testing.assert_close(outputs[sample, :, :longest], alone.tokens)
        assert bool((outputs[sample, :, longest:] == 2).all())
