"""Time and memory of the Query-CTC loss, compared with torch's ctc_loss, and the time of that of sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from narvl_plugin.bench.timing import in_turns
from narvl_plugin.ctc import language_loss, query_ctc_loss, set_of

MEGABYTE = 2**20

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LossCost:
    """The cost of a forward and backward pass, and the gradient's error against torch's loss in float64.

    Attributes:
        ms: the median time.
        extra_mb: the peak memory beside logits and gradient, in MiB; None if it cannot be measured.
        error: the largest difference of any entry; the gradient's entries are between -1 and 1.
    """

    ms: float
    extra_mb: float | None
    error: float


def loss_costs(
    *,
    batch: int = 16,
    queries: int = 20,
    labels: int = 59_458,
    length: int = 10,
    repeats: int = 15,
    device: str = "cpu",
) -> dict[str, LossCost]:
    """Measure both losses on synthetic logits, in turns.

    Args:
        batch: the number of samples.
        queries: the number of queries N.
        labels: the number of labels V.
        length: the greatest length of a target; the least is half of it.
        repeats: see `in_turns`.
        device: ``cpu`` or ``cuda``.

    Returns:
        The costs of ``query_ctc`` and ``torch``.
    """
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(batch, queries, labels, generator=generator).to(device).requires_grad_()
    lengths = torch.randint(length // 2, length + 1, (batch,), generator=generator).to(device)
    targets = torch.randint(1, labels, (batch, length), generator=generator).to(device)
    steps = {
        "query_ctc": partial(_step, _query_ctc(targets, lengths), logits),
        "torch": partial(_step, _torch_ctc(targets, lengths), logits),
    }
    times = in_turns(steps, repeats=repeats, threads=torch.get_num_threads(), device=device)
    exact = _step(_torch_ctc(targets, lengths), logits.detach().double().requires_grad_())
    return {
        name: LossCost(times[name], _peak_memory(step, device), float((step() - exact).abs().max()))
        for name, step in steps.items()
    }


def structured_costs(
    *,
    batch: int = 32,
    queries: int = 48,
    labels: int = 59_458,
    elements: int = 5,
    length: int = 5,
    repeats: int = 5,
    device: str = "cpu",
) -> dict[str, float]:
    """Measure the loss of a set beside that of its elements in one order, forward and backward, in turns.

    The time of a set includes that of its automaton.

    Args:
        batch: see `loss_costs`.
        queries: see `loss_costs`.
        labels: see `loss_costs`.
        elements: the number of elements of a set.
        length: the number of tokens of an element. The last one is the same in all.
        repeats: see `in_turns`.
        device: see `loss_costs`.

    Returns:
        The median times of ``sequence`` and ``set``, in ms.
    """
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(batch, queries, labels, generator=generator).to(device).requires_grad_()
    tokens = torch.randint(2, labels, (batch, elements, length), generator=generator)
    tokens[:, :, -1] = 1
    targets, lengths = tokens.flatten(1).to(device), torch.full((batch,), elements * length, device=device)

    def set_loss(logits: Tensor) -> Tensor:
        return language_loss(logits, list(map(set_of, tokens.tolist())), blank=0, reduction="sum")

    steps = {
        "sequence": partial(_step, _query_ctc(targets, lengths), logits),
        "set": partial(_step, set_loss, logits),
    }
    return in_turns(steps, repeats=repeats, threads=torch.get_num_threads(), device=device)


def _query_ctc(targets: Tensor, lengths: Tensor) -> Loss:
    return lambda logits: query_ctc_loss(logits, targets, lengths, blank=0, reduction="sum", checked=True)


def _torch_ctc(targets: Tensor, lengths: Tensor) -> Loss:
    def loss(logits: Tensor) -> Tensor:
        log_probs = logits.log_softmax(2).transpose(0, 1)
        every = torch.full_like(lengths, logits.size(1))
        return F.ctc_loss(log_probs, targets, every, lengths, blank=0, reduction="sum")

    return loss


def _step(loss: Loss, logits: Tensor) -> Tensor:
    """Return the gradient."""
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    return gradient


def _peak_memory(step: Callable[[], Tensor], device: str) -> float | None:
    """Return the peak memory of a step beside its result, in MiB."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradient = step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
        if not reset.exists():  # no Linux
            return None
        reset.write_text("5")  # resets the peak
        before = _kilobytes(status, "VmRSS")
        gradient = step()
        peak = 1024 * (_kilobytes(status, "VmHWM") - before)
    return (peak - gradient.numel() * gradient.element_size()) / MEGABYTE


def _kilobytes(status: Path, name: str) -> int:
    """Read a line of a process's status."""
    (line,) = (line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])
