"""Sampled paths against all paths there are."""

import itertools

import pytest
import torch

from narvl_plugin.ctc import (
    collapse,
    expected_output_score,
    expected_score,
    outputs_of,
    quasi_random_paths,
    query_ctc_loss,
    sample_paths,
)


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


BLANK = 3


def every_output(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the probability of each path of a sample (P,), and the outputs of all paths (1, P, T) and lengths."""
    queries, labels = logits.shape[1:]
    every = torch.tensor(list(itertools.product(range(labels), repeat=queries)))
    log_probs = logits.log_softmax(2)
    outputs, lengths = outputs_of(every[None], blank=BLANK)
    return sum(log_probs[0, query, every[:, query]] for query in range(queries)).exp(), outputs, lengths


def score_of(outputs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return a score that depends on the output alone: 1 for (0, 1) and 0.6 for (1,)."""
    is_pair = (lengths == 2) & (outputs[..., 0] == 0) & (outputs[..., 1] == 1)
    return is_pair.double() + 0.6 * ((lengths == 1) & (outputs[..., 0] == 1)).double()


def estimated(logits: torch.Tensor, number: int, *, exact: bool) -> torch.Tensor:
    """Return the gradient (B, N, V) of the expected score, estimated for each sample by paths or by outputs."""
    logits = logits.clone().requires_grad_()
    paths = sample_paths(logits, number)
    outputs, lengths = outputs_of(paths, blank=BLANK)
    scores = score_of(outputs, lengths)
    if exact:
        estimate = expected_output_score(logits, outputs, lengths, scores, blank=BLANK)
        torch.testing.assert_close(estimate, scores.mean(1))
    else:
        estimate = expected_score(logits, paths, scores)
    (gradient,) = torch.autograd.grad(estimate.sum(), logits)
    return gradient


def test_both_gradients_are_unbiased_and_that_of_outputs_varies_less() -> None:
    torch.manual_seed(1)
    logits = torch.randn(1, 4, 4, dtype=torch.double, requires_grad=True)
    probabilities, outputs, lengths = every_output(logits)
    (right,) = torch.autograd.grad((probabilities * score_of(outputs, lengths)[0]).sum(), logits)
    variance = {}
    for exact in (False, True):
        gradients = estimated(logits.detach().repeat(50_000, 1, 1), 4, exact=exact)
        torch.testing.assert_close(gradients.mean(0, keepdim=True), right, rtol=0, atol=0.003)
        variance[exact] = float(gradients.var(0).sum())
    assert float(right.abs().max()) > 0.03
    assert variance[True] < 0.8 * variance[False]


def test_gradient_of_outputs_is_that_of_their_log_probability() -> None:
    torch.manual_seed(1)
    logits = torch.randn(2, 5, 4, requires_grad=True)
    outputs, lengths = outputs_of(sample_paths(logits, 6), blank=BLANK)
    scores = torch.rand(2, 6)
    estimate = expected_output_score(logits, outputs, lengths, scores, blank=BLANK)
    losses = query_ctc_loss(
        logits.repeat_interleave(6, 0), outputs.flatten(0, 1), lengths.flatten(), blank=BLANK, reduction="none"
    )
    others = (scores.sum(1, keepdim=True) - scores) / 5
    expected = (-losses.view(2, 6) * (scores - others)).mean(1).sum()
    torch.testing.assert_close(
        torch.autograd.grad(estimate.sum(), logits), torch.autograd.grad(expected, logits), rtol=0, atol=1e-6
    )


def test_ascent_raises_the_exact_expected_score() -> None:
    torch.manual_seed(1)
    logits = 0.1 * torch.randn(1, 4, 4, dtype=torch.double)

    def exact_score() -> float:
        probabilities, outputs, lengths = every_output(logits)
        return float((probabilities * score_of(outputs, lengths)[0]).sum())

    before = exact_score()
    for _ in range(200):
        logits += estimated(logits, 16, exact=True)
    assert before < 0.3 and exact_score() > 0.9


def test_gradient_of_outputs_in_half_precision() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.bfloat16, requires_grad=True)
    outputs, lengths = outputs_of(sample_paths(logits, 4), blank=4)
    expected_output_score(logits, outputs, lengths, torch.rand(2, 4), blank=4).sum().backward()
    assert logits.grad.dtype == torch.bfloat16
    assert bool(logits.grad.isfinite().all()) and bool(logits.grad.abs().sum() > 0)
