"""The loss on a GPU in three kernels of Triton: the same sums and the same gradient as those of `loss.py`.

Each of the recursion's 2 N steps is a few operations on some hundred numbers. Started one by one by torch, they take
most of the loss's time on a GPU. Here one program runs the whole recursion of a target. The kernels keep no tensor of
the size of the logits but the gradient, and read no number back to the program. torch's own `ctc_loss` takes lengths
from the CPU and copies them to the GPU, and each of these copies waits for the GPU.

Legend: B batch, N queries, V labels, K targets of a sample, S padded target length, L = 2 S + 1 lattice states.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from narvl_plugin.ctc.lattice import IMPOSSIBLE, accumulation_dtype

GATHERS = hasattr(tl, "gather")
"""Whether Triton can move numbers from lane to lane."""
BLOCK = 2048
"""Labels of a row that are read at a time."""
MOST_LANES = 64
"""States that a warp holds."""


@triton.jit
def _log_add(one, other):  # type: ignore[no-untyped-def]  # Triton reads types at run time, here and below
    larger = tl.maximum(one, other)
    return larger + tl.log(1.0 + tl.exp(tl.minimum(one, other) - larger))


@triton.jit
def _emission(row, label, normaliser, valid, impossible):  # type: ignore[no-untyped-def]
    """Return the log-probability of labels at a query, and `impossible` where a label is not valid."""
    score = tl.load(row + label, mask=valid, other=0.0).to(normaliser.dtype) - normaliser
    return tl.where(valid, tl.maximum(score, impossible), impossible)


# A size of another divisibility would be compiled anew.
SIZES = ("row_stride", "query_stride", "num_targets", "num_queries", "num_states", "longest", "num_labels", "blank")


@triton.jit(do_not_specialize=SIZES)
def _normalise(  # type: ignore[no-untyped-def]
    logits, normalisers, row_stride, query_stride, num_queries, num_labels, block: tl.constexpr
):
    """Write the log-sum-exp of a row, in one pass."""
    program = tl.program_id(0).to(tl.int64)
    row = logits + (program // num_queries) * row_stride + (program % num_queries) * query_stride
    largest = tl.zeros([block], normalisers.dtype.element_ty) - float("inf")
    total = tl.zeros([block], normalisers.dtype.element_ty)
    for start in range(0, num_labels, block):
        label = start + tl.arange(0, block)
        score = tl.load(row + label, mask=label < num_labels, other=float("-inf")).to(total.dtype)
        larger = tl.maximum(largest, score)
        unit = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - unit) + tl.exp(score - unit)
        largest = larger
    unit = tl.max(largest, 0)
    tl.store(normalisers + program, unit + tl.log(tl.sum(total * tl.exp(largest - unit), 0)))


@triton.jit(do_not_specialize=SIZES)
def _sum_paths(  # type: ignore[no-untyped-def]
    logits,
    normalisers,
    targets,
    target_lengths,
    query_lengths,
    marginals,
    labels,
    forward,
    states,
    row_stride,
    query_stride,
    num_targets,
    num_queries,
    longest,
    num_labels,
    blank,
    impossible: tl.constexpr,
    lanes: tl.constexpr,
    with_query_lengths: tl.constexpr,
    with_posteriors: tl.constexpr,
):
    """Write the marginal of a target, the labels of its states and their posteriors.

    Lane k holds two states: 2 k, the blank before token k, and 2 k + 1, token k.
    """
    target = tl.program_id(0).to(tl.int64)
    sample = target // num_targets
    lane = tl.arange(0, lanes)
    num_states = 2 * longest + 1
    length = tl.load(target_lengths + target)
    limit = num_queries
    if with_query_lengths:
        limit = tl.load(query_lengths + sample).to(tl.int32)

    label = tl.load(targets + target * longest + lane, mask=lane < length, other=blank)
    valid = (lane < length) & (label >= 0) & (label < num_labels)
    label = tl.where(valid, label, blank)
    before = tl.gather(label, tl.maximum(lane - 1, 0), 0)
    after = tl.minimum(lane + 1, lanes - 1)
    is_first, is_last = lane == 0, lane == lanes - 1
    may_skip = valid & (lane > 0) & (label != before)
    may_skip_next = tl.gather(may_skip.to(tl.int32), after, 0) * (1 - is_last.to(tl.int32)) > 0
    within = lane <= length
    tl.store(labels + target * num_states + 2 * lane, tl.zeros_like(label) + blank, mask=lane <= longest)
    tl.store(labels + target * num_states + 2 * lane + 1, label, mask=lane < longest)

    nothing = tl.zeros([lanes], normalisers.dtype.element_ty) + impossible
    blanks = tl.where(is_first, 0.0, nothing)
    tokens = nothing
    for query in range(num_queries):
        normaliser = tl.load(normalisers + sample * num_queries + query)
        row = logits + sample * row_stride + query * query_stride
        of_blank = _emission(row, blank + lane * 0, normaliser, within, impossible)
        of_token = _emission(row, label, normaliser, valid, impossible)
        step = tl.where(is_first, impossible, tl.gather(tokens, tl.maximum(lane - 1, 0), 0))
        skip = tl.where(may_skip, step, impossible)
        moved_blanks = _log_add(blanks, step) + of_blank
        moved_tokens = _log_add(_log_add(tokens, blanks), skip) + of_token
        blanks = tl.where(query < limit, moved_blanks, blanks)
        tokens = tl.where(query < limit, moved_tokens, tokens)
        if with_posteriors:
            place = forward + (target * num_queries + query) * 2 * lanes + lane
            tl.store(place, blanks)
            tl.store(place + lanes, tokens)

    is_final_blank, is_final_token = lane == length, lane == length - 1
    final_blanks = tl.where(is_final_blank, blanks, impossible)
    final_tokens = tl.where(is_final_token, tokens, impossible)
    largest = tl.maximum(tl.max(final_blanks, 0), tl.max(final_tokens, 0))
    total = tl.sum(tl.exp(final_blanks - largest), 0) + tl.sum(tl.exp(final_tokens - largest), 0)
    marginal = largest + tl.log(total)
    tl.store(marginals + target, tl.where(marginal < impossible / 2, float("-inf"), marginal))

    if with_posteriors:
        tl.debug_barrier()  # a thread may read what another one has written
        blanks = tl.where(is_final_blank, 0.0, nothing)
        tokens = tl.where(is_final_token, 0.0, nothing)
        for turn in range(num_queries):
            query = num_queries - 1 - turn
            place = forward + (target * num_queries + query) * 2 * lanes + lane
            through_blanks = tl.load(place) + blanks
            through_tokens = tl.load(place + lanes) + tokens
            largest = tl.maximum(tl.max(through_blanks, 0), tl.max(through_tokens, 0))
            of_blanks = tl.where(lane <= longest, tl.exp(through_blanks - largest), 0.0)
            of_tokens = tl.where(lane < longest, tl.exp(through_tokens - largest), 0.0)
            share = 1.0 / (tl.sum(of_blanks, 0) + tl.sum(of_tokens, 0))
            # (B, N, K, L)
            place = states + ((sample * num_queries + query) * num_targets + target % num_targets) * num_states
            tl.store(place + 2 * lane, of_blanks * share, mask=lane <= longest)
            tl.store(place + 2 * lane + 1, of_tokens * share, mask=lane < longest)

            normaliser = tl.load(normalisers + sample * num_queries + query)
            row = logits + sample * row_stride + query * query_stride
            of_blank = _emission(row, blank + lane * 0, normaliser, within, impossible)
            of_token = _emission(row, label, normaliser, valid, impossible)
            ahead_blanks = of_blank + blanks
            ahead_tokens = of_token + tokens
            step = tl.where(is_last, impossible, tl.gather(ahead_blanks, after, 0))
            skip = tl.where(may_skip_next, tl.gather(ahead_tokens, after, 0), impossible)
            moved_blanks = _log_add(ahead_blanks, ahead_tokens)
            moved_tokens = _log_add(_log_add(ahead_tokens, step), skip)
            blanks = tl.where(query < limit, moved_blanks, blanks)
            tokens = tl.where(query < limit, moved_tokens, tokens)


@triton.jit(do_not_specialize=SIZES)
def _differentiate(  # type: ignore[no-untyped-def]
    logits,
    normalisers,
    query_lengths,
    marginals,
    labels,
    states,
    upstream,
    gradient,
    row_stride,
    query_stride,
    num_targets,
    num_queries,
    num_states,
    num_labels,
    block: tl.constexpr,
    entries: tl.constexpr,
    with_query_lengths: tl.constexpr,
):
    """Write the gradient of a row: its softmax minus the posterior of each label.

    States that share a label write the same number, which needs no atomic addition.
    """
    program = tl.program_id(0).to(tl.int64)
    sample, query = program // num_queries, program % num_queries
    row = logits + sample * row_stride + query * query_stride
    normaliser = tl.load(normalisers + program)
    is_used = query >= 0
    if with_query_lengths:
        is_used = query < tl.load(query_lengths + sample)

    scale = tl.zeros_like(normaliser)
    for target in range(num_targets):
        place = sample * num_targets + target
        # An impossible target has no gradient.
        possible = tl.load(marginals + place) > float("-inf")
        scale += tl.where(possible, tl.load(upstream + place), 0.0)
    for start in range(0, num_labels, block):
        label = start + tl.arange(0, block)
        within = label < num_labels
        score = tl.load(row + label, mask=within, other=0.0).to(normaliser.dtype)
        value = tl.where(is_used, tl.exp(score - normaliser) * scale, 0.0)
        tl.store(gradient + program * num_labels + label, value, mask=within)

    tl.debug_barrier()  # what follows is written over what other threads wrote
    entry = tl.arange(0, entries)
    is_state = entry < num_targets * num_states
    label = tl.load(labels + sample * num_targets * num_states + entry, mask=is_state, other=0)
    posterior = tl.zeros([entries], normaliser.dtype)
    for target in range(num_targets):
        place = sample * num_targets + target
        possible = tl.load(marginals + place) > float("-inf")
        factor = tl.where(possible, tl.load(upstream + place), 0.0)
        for state in range(num_states):
            share = tl.load(states + (program * num_targets + target) * num_states + state)
            posterior += tl.where(label == tl.load(labels + place * num_states + state), share * factor, 0.0)
    score = tl.load(row + label, mask=is_state, other=0.0).to(normaliser.dtype)
    value = tl.where(is_used, tl.exp(score - normaliser) * scale - posterior, 0.0)
    tl.store(gradient + program * num_labels + label, value, mask=is_state)


class _QueryCtcInKernels(torch.autograd.Function):
    """Negative log marginals and their gradient. Inputs and output are those of the function on the CPU.

    The inputs are logits (B, N, V), targets (B, K, S), target_lengths (B, K), query_lengths (B,) or None for all N, and
    the blank. No size is 0. The output is (B, K). A label outside [0, V) has no path.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, target_lengths: Tensor, query_lengths: Tensor | None, blank: int
    ) -> Tensor:
        logits = logits if logits.stride(2) == 1 else logits.contiguous()
        batch, num_queries, num_labels = logits.shape
        num_targets, longest = targets.shape[1:]
        num_states = 2 * longest + 1
        lanes = max(2, triton.next_power_of_2(longest + 1))
        with_posteriors = ctx.needs_input_grad[0]
        number: dict[str, Any] = {"dtype": accumulation_dtype(logits.dtype), "device": logits.device}
        normalisers = torch.empty(batch, num_queries, **number)
        _normalise[(batch * num_queries,)](
            logits, normalisers, *logits.stride()[:2], num_queries, num_labels, block=BLOCK, num_warps=8
        )
        marginals = torch.empty(batch, num_targets, **number)
        labels = torch.empty(batch, num_targets, num_states, dtype=torch.int64, device=logits.device)
        history = (batch, num_targets, num_queries, 2, lanes) if with_posteriors else (0,)
        forward = torch.empty(history, **number)
        states = torch.empty((batch, num_queries, num_targets, num_states) if with_posteriors else (0,), **number)
        _sum_paths[(batch * num_targets,)](
            logits,
            normalisers,
            targets.contiguous(),
            target_lengths.contiguous(),
            target_lengths if query_lengths is None else query_lengths.contiguous(),
            marginals,
            labels,
            forward,
            states,
            *logits.stride()[:2],
            num_targets,
            num_queries,
            longest,
            num_labels,
            blank,
            impossible=IMPOSSIBLE,
            lanes=lanes,
            with_query_lengths=query_lengths is not None,
            with_posteriors=with_posteriors,
            num_warps=max(1, min(8, lanes // MOST_LANES)),
        )
        if with_posteriors:
            ctx.save_for_backward(logits, normalisers, query_lengths, marginals, labels, states)
        return -marginals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, normalisers, query_lengths, marginals, labels, states = ctx.saved_tensors
        batch, num_queries, num_labels = logits.shape
        num_targets, num_states = labels.shape[1:]
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        _differentiate[(batch * num_queries,)](
            logits,
            normalisers,
            marginals if query_lengths is None else query_lengths.contiguous(),
            marginals,
            labels,
            states,
            upstream.contiguous(),
            gradient,
            *logits.stride()[:2],
            num_targets,
            num_queries,
            num_states,
            num_labels,
            block=BLOCK,
            entries=max(2, triton.next_power_of_2(num_targets * num_states)),
            with_query_lengths=query_lengths is not None,
            num_warps=8,
        )
        return gradient, None, None, None, None
