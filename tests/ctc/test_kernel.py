"""The loss's GPU kernels against the loss on the CPU. Without a GPU, Triton's interpreter runs them."""

from __future__ import annotations

import logging
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from narvl_plugin.ctc import loss as on_cpu
from narvl_plugin.ctc import query_ctc_loss

triton = pytest.importorskip("triton")

GPU = ("cuda", 90, 32)
"""The device that kernels are compiled for: backend, compute capability, threads of a warp."""
TYPES = {"double": torch.float64, "single": torch.float32, "half": torch.bfloat16}
BLANK = 2


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return three samples of 4 queries and 6 labels with two targets each.

    There are repeats, an empty target, one that does not fit, nonsense as padding, and a label that logits rule out.
    """
    logits = 3 * torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits[2, 1:, 5] = -math.inf
    nonsense = -(10**9)
    targets = [
        [[1, 1, 3], [4, nonsense, nonsense]],
        [[nonsense] * 3, [0, 0, 0]],
        [[3, 4, 3], [0, 5, nonsense]],
    ]
    lengths = torch.tensor([[3, 1], [0, 3], [3, 2]])
    upstream = torch.tensor([[0.5, 2.0], [1.0, 3.0], [-1.0, 0.25]], dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), upstream, torch.tensor(targets), lengths


def cases() -> dict[str, tuple[Any, ...]]:
    """Return what both forms are given, by name."""
    found: dict[str, tuple[Any, ...]] = {name: (*case(dtype), None, BLANK) for name, dtype in TYPES.items()}
    logits, upstream, targets, lengths = case(torch.float64)
    found["queries"] = (logits, upstream, targets, lengths, torch.tensor([4, 4, 3]), BLANK)
    logits, upstream, targets, lengths = case(torch.float32)
    other_layout = logits.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    found["layout"] = (other_layout, upstream, targets, lengths, None, BLANK)
    found["no gradient"] = (logits.detach(), upstream, targets, lengths, None, BLANK)
    one = logits.detach()[:, :1].requires_grad_()
    found["one query"] = (one, upstream, targets[:, :, :1], lengths.clamp(max=1), None, BLANK)
    unknown = targets.clone()
    unknown[0, 1, 0], unknown[2, 1, 0] = 6, -1
    found["unknown labels"] = (logits, upstream, unknown, lengths, None, BLANK)
    return found


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return the losses and gradients of all cases from the kernels."""
    folder = tmp_path_factory.mktemp("kernel")
    torch.save(cases(), folder / "cases.pt")
    program = str(Path(__file__).with_name("interpreted_kernel.py"))
    subprocess.run([sys.executable, program, "cases.pt", "results.pt"], cwd=folder, check=True)
    return torch.load(folder / "results.pt")


@pytest.mark.integration
@pytest.mark.parametrize("name", [name for name in cases() if name != "unknown labels"])
def test_kernels_give_what_the_cpu_gives(name: str, interpreted: dict[str, tuple[Tensor, Tensor | None]]) -> None:
    logits, upstream, *arguments = cases()[name]
    expected = on_cpu._QueryCtc.apply(logits, *arguments)
    found, gradient = interpreted[name]
    if name != "one query":
        assert found[1, 1] == math.inf  # does not fit: 3 equal tokens need 5 queries
        assert found.isfinite().sum() >= 4
    exact = {torch.float64: (0, 1e-12), torch.float32: (0, 2e-6), torch.bfloat16: (2**-7, 1e-6)}
    relative, absolute = exact[logits.dtype]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=absolute)
    if gradient is None:
        assert name == "no gradient"
        return
    (right,) = torch.autograd.grad(expected, logits, upstream.to(expected.dtype))
    assert gradient.dtype == logits.dtype
    torch.testing.assert_close(gradient, right, rtol=relative, atol=absolute)


@pytest.mark.integration
def test_labels_that_do_not_exist_have_no_path(interpreted: dict[str, tuple[Tensor, Tensor | None]]) -> None:
    """A caller that says `checked` and is wrong reads no foreign memory."""
    losses, gradient = interpreted["unknown labels"]
    assert losses[0, 1] == losses[2, 1] == math.inf
    assert losses[0, 0] == interpreted["single"][0][0, 0]
    assert gradient is not None and gradient.isfinite().all()


@pytest.mark.integration
def test_kernels_compile_for_a_gpu() -> None:
    """By Triton's own assembler, without a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from narvl_plugin.ctc import kernel

    flags = {"with_query_lengths": True, "with_posteriors": True}
    constants = {"block": kernel.BLOCK, "impossible": -1e30, "lanes": 32, "entries": 64} | flags
    integers = {name: "*i64" for name in ("targets", "target_lengths", "query_lengths", "labels")}
    sizes = dict.fromkeys(kernel.SIZES, "i32")
    half = {"logits": "*bf16", "gradient": "*bf16"}
    for function in (kernel._normalise, kernel._sum_paths, kernel._differentiate):
        names = function.arg_names
        types = {name: (integers | half | sizes).get(name, "*fp32") for name in names}
        types |= {name: "constexpr" for name in constants if name in names}
        given = {(names.index(name),): value for name, value in constants.items() if name in names}
        compiled = triton.compile(ASTSource(function, types, given), target=GPUTarget(*GPU))
        assert compiled.asm["cubin"]


def test_what_is_checked_is_not_checked_again() -> None:
    """A target that does not fit has an infinite loss then."""
    logits, _, targets, lengths = case(torch.float32)
    losses = query_ctc_loss(logits, targets[:, 1], lengths[:, 1], blank=BLANK, checked=True, reduction="none")
    assert losses[1] == math.inf
    assert losses[0] == query_ctc_loss(logits[:1], targets[:1, 1], lengths[:1, 1], blank=BLANK)


def test_without_a_compiler_the_loss_says_that_it_is_slower(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    on_cpu._function_in_kernels.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert on_cpu._function_in_kernels() is None
    finally:
        on_cpu._function_in_kernels.cache_clear()
    assert "needs a C compiler" in caplog.text
