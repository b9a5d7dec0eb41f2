"""Runs the loss's GPU kernels on the CPU: python interpreted_kernel.py CASES.pt RESULTS.pt

Triton decides when it is imported whether kernels are compiled or interpreted, so this is a process of its own.
"""

import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from narvl_plugin.ctc.kernel import _QueryCtcInKernels


def gradient(function: Any, logits: Tensor, upstream: Tensor, *arguments: Any) -> tuple[Tensor, Tensor | None]:
    """Return the losses (B, K), and the gradient of their sum weighted by `upstream`, if logits need one."""
    needs_one = logits.requires_grad
    logits = logits.detach().requires_grad_(needs_one)
    losses = function.apply(logits, *arguments)
    if needs_one:
        losses.backward(upstream.to(losses.dtype))
    return losses.detach(), logits.grad


if __name__ == "__main__":
    cases = torch.load(sys.argv[1])
    torch.save({name: gradient(_QueryCtcInKernels, *case) for name, case in cases.items()}, sys.argv[2])
