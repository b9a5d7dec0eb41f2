"""Query-CTC: the exact negative log-likelihood of a target, summed over all query paths that collapse to it.

Legend: B batch, N queries, V labels, S padded target length, L = 2 S + 1 lattice states.
"""

import logging
import os
import shutil
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from narvl_plugin.ctc.lattice import (
    TargetsDoNotFit,
    accumulation_dtype,
    backward_scores,
    build_lattice,
    check_targets,
    forward_scores,
    gather_labels,
    length_mask,
    log_marginals,
    posteriors,
    state_emissions,
)

__all__ = ["TargetsDoNotFit", "log_sum_exp", "query_ctc_any_loss", "query_ctc_loss"]

logger = logging.getLogger(__name__)

# Elements of a (B, N, V) tensor that are processed at a time. On a CPU, one piece fits into a core's cache. On other
# devices, it keeps the device busy and is small compared with the logits.
CPU_PIECE = 2**19
DEVICE_PIECE = 2**22
OLDEST_GPU = (7, 0)


def row_pieces(rows: Tensor) -> Iterator[slice]:
    """Split (R, V) rows into slices that are processed one after the other."""
    size = CPU_PIECE * torch.get_num_threads() if rows.device.type == "cpu" else DEVICE_PIECE
    step = max(1, size // max(1, rows.size(1)))
    for start in range(0, rows.size(0), step):
        yield slice(start, start + step)


def log_sum_exp(logits: Tensor) -> Tensor:
    """Return the log of the summed exponentials over the labels, with no temporary of the size of the logits.

    Args:
        logits: (B, N, V).

    Returns:
        (B, N), in float32 (float64 stays), without a gradient.
    """
    rows = logits.detach().flatten(0, 1)
    normalisers = rows.new_empty(rows.size(0), dtype=accumulation_dtype(rows.dtype))
    for piece in row_pieces(rows):
        # The greatest probability is exp(greatest logit - log-sum-exp). It is at least 1 / V, so its log is accurate.
        # torch's softmax is one fused pass; its logsumexp takes four.
        greatest = rows[piece].amax(1).to(normalisers.dtype)
        probability = rows[piece].softmax(1, dtype=normalisers.dtype).amax(1)
        normalisers[piece] = greatest - probability.log()
    return normalisers.view(logits.shape[:2])


class _QueryCtc(torch.autograd.Function):
    """Negative log marginals with the gradient: softmax minus the posterior of each label.

    The inputs are logits (B, N, V), targets (B, K, S), target_lengths (B, K), and query_lengths (B,) or None for all N.
    The K targets of a sample share one pass over its logits. The output is (B, K).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, target_lengths: Tensor, query_lengths: Tensor | None, blank: int
    ) -> Tensor:
        ctx.in_use = None if query_lengths is None else length_mask(query_lengths, logits.size(1))
        if query_lengths is None:
            query_lengths = target_lengths.new_full((logits.size(0),), logits.size(1))
        shape = target_lengths.shape
        lattice = build_lattice(targets.flatten(0, 1), target_lengths.flatten(), blank=blank)
        labels = lattice.labels.unflatten(0, shape).flatten(1)  # (B, K L): the states of all targets side by side
        normalisers = log_sum_exp(logits)
        emissions = state_emissions(logits, lattice) - normalisers.repeat_interleave(shape[1], 0)[..., None]
        lengths = query_lengths.repeat_interleave(shape[1])
        forward = forward_scores(emissions, lattice, lengths)
        marginals = log_marginals(forward, lattice).view(shape)
        if ctx.needs_input_grad[0]:
            states = posteriors(forward, backward_scores(emissions, lattice, lengths))
            states = states.unflatten(0, shape).transpose(1, 2)  # (B, N, K, L)
            ctx.save_for_backward(logits, normalisers, labels, states, marginals)
        return -marginals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, normalisers, labels, states, marginals = ctx.saved_tensors
        # An impossible target has an infinite loss and no gradient.
        upstream = upstream.masked_fill(marginals.isneginf(), 0.0)
        scale = upstream.sum(1, keepdim=True).expand(logits.shape[:2])
        scale = (scale if ctx.in_use is None else ctx.in_use * scale)[..., None]

        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        rows, row_scales, row_gradients = logits.flatten(0, 1), scale.flatten(0, 1), gradient.flatten(0, 1)
        for piece in row_pieces(rows):
            softmax = rows[piece].softmax(1, dtype=scale.dtype)
            torch.mul(softmax, row_scales[piece], out=row_gradients[piece])

        # The gradients of labels on the lattice are written, not added: states that share a label write the same
        # number. This needs no atomic addition and keeps small differences that a half-precision sum would lose.
        same_label = (labels[:, :, None] == labels[:, None, :]).to(states.dtype)
        weighted = (states * upstream[:, None, :, None]).flatten(2)  # (B, N, K L)
        with torch.autocast(logits.device.type, enabled=False):
            label_posteriors = weighted @ same_label
        probabilities = (gather_labels(logits, labels) - normalisers[..., None]).exp()
        values = probabilities * scale - label_posteriors
        gradient.scatter_(2, labels[:, None].expand_as(values), values.to(gradient.dtype))
        if ctx.in_use is not None:  # an unused query has a zero gradient even if its logits are not finite
            gradient.masked_fill_(~ctx.in_use[..., None], 0.0)
        return gradient, None, None, None, None


@cache
def _function_in_kernels() -> type[torch.autograd.Function] | None:
    """Return the GPU's form of `_QueryCtc`; None, with a warning, where Triton cannot compile it."""
    try:
        from narvl_plugin.ctc.kernel import GATHERS, _QueryCtcInKernels
    except ImportError as error:
        reason = f"Triton cannot be imported ({error})"
    else:
        if not GATHERS:
            reason = "this version of Triton has no tl.gather"
        elif torch.cuda.is_available() and torch.cuda.get_device_capability() < OLDEST_GPU:
            reason = "Triton needs a GPU of compute capability 7.0 or above"
        elif not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            reason = "Triton needs a C compiler (gcc or clang)"
        elif not Path(sysconfig.get_config_var("INCLUDEPY"), "Python.h").exists():
            reason = "Triton needs the header files of Python (python3-dev)"
        else:
            return _QueryCtcInKernels
    logger.warning("The Query-CTC loss runs without its GPU kernel, which takes longer: %s.", reason)
    return None


def _losses(
    logits: Tensor, targets: Tensor, target_lengths: Tensor, query_lengths: Tensor | None, blank: int
) -> Tensor:
    """Return negative log marginals: (B, N, V), (B, K, S), (B, K), (B,) or None -> (B, K)."""
    # The rest, of excluded targets, would take memory and time.
    targets = targets[:, :, : logits.size(1)]
    function: Any = _QueryCtc
    if logits.device.type == "cuda" and logits.numel() and targets.numel():
        function = _function_in_kernels() or _QueryCtc
    with torch.cuda.device_of(logits):  # on which Triton starts its kernels
        losses: Tensor = function.apply(logits, targets, target_lengths, query_lengths, blank)
    return losses


def _check(
    logits: Tensor, targets: Tensor, target_lengths: Tensor, query_lengths: Tensor | None, *, blank: int
) -> None:
    """Raise the errors of `query_ctc_loss` for targets (M, S) and lengths (M,)."""
    num_queries, num_labels = logits.shape[1:]
    if not 0 <= blank < num_labels:
        raise ValueError(f"the blank {blank} is not one of the {num_labels} labels")
    if query_lengths is None:
        query_lengths = torch.full_like(target_lengths, num_queries)
    check_targets(targets, target_lengths, query_lengths, blank=blank, num_queries=num_queries, num_labels=num_labels)


def query_ctc_loss(
    logits: Tensor,
    targets: Tensor,
    target_lengths: Tensor,
    *,
    blank: int,
    query_lengths: Tensor | None = None,
    reduction: Literal["none", "sum", "mean"] = "mean",
    weights: Tensor | None = None,
    checked: bool = False,
) -> Tensor:
    """Return the negative log of the summed probability of all query paths that collapse to the target.

    The sums are in float32 (float64 stays). The gradient is exact and has the type of the logits. A target that the
    logits rule out (all of its paths meet -inf) has an infinite loss and no gradient.

    Source: NARVL (arXiv 2403.02249), section 3.2; Graves et al., ICML 2006, equations 7, 8 and 15.

    Args:
        logits: (B, N, V), of any float type, unnormalised.
        targets: (B, S) labels, padded with any label.
        target_lengths: (B,), zero allowed.
        blank: the label of the blank.
        query_lengths: (B,), uses only the first queries of each sample; all N by default.
        reduction: "none" for the losses, "sum" for their sum, "mean" for their mean over the batch.
        weights: (B,), factors of the samples' losses.
        checked: whether the caller knows that targets and lengths are valid. They are not checked again then, which
            would wait for a GPU. A target that does not fit has an infinite loss then.

    Returns:
        (B,) for "none", else a scalar (0 for an empty batch); in nats.

    Raises:
        TargetsDoNotFit: for targets that need more queries than they have.
        ValueError: for labels outside [0, V) or equal to the blank, and for lengths that exceed their tensors.
    """
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}; it must be 'none', 'sum' or 'mean'")
    if not checked:
        _check(logits, targets, target_lengths, query_lengths, blank=blank)
    losses = _losses(logits, targets[:, None], target_lengths[:, None], query_lengths, blank)[:, 0]
    if weights is not None:
        losses = losses * weights.to(losses.dtype)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / max(1, logits.size(0))


def query_ctc_any_loss(
    logits: Tensor, targets: Tensor, target_lengths: Tensor, *, blank: int, checked: bool = False
) -> Tensor:
    """Return the negative log of the summed probability of all paths that collapse to any of several targets.

    Queries that do not see each other's choices mix the wordings of their targets. With this loss, they can settle on
    one wording that they are able to predict. All targets of a sample share one pass over its logits.

    Args:
        logits: (B, N, V), as in `query_ctc_loss`.
        targets: (B, K, S) labels, padded with any label; equal targets count as often as they occur.
        target_lengths: (B, K); -1 excludes a target.
        blank: the label of the blank.
        checked: as in `query_ctc_loss`.

    Returns:
        (B,), in nats; inf if no target counts.

    Raises:
        TargetsDoNotFit: as `query_ctc_loss`; its indices count the B K targets in a row.
        ValueError: as `query_ctc_loss`.
    """
    lengths = target_lengths.clamp(min=0)
    if not checked:
        _check(logits, targets.flatten(0, 1), lengths.flatten(), None, blank=blank)
    losses = _losses(logits, targets, lengths, None, blank)
    return -(-losses.masked_fill(target_lengths < 0, float("inf"))).logsumexp(1)
