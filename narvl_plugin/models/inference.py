"""Faster inference: packed layers, folded norms, products in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from narvl_plugin.importing import without_compiler

from .memo import Memo, Value

with without_compiler():
    from timm.layers import BatchNormAct2d

LARGE = 2**19
"""Smallest number of elements at which packing a weight saves more time than the call of a packed layer adds."""
PROBE = 512
"""Side of the square matrices whose product measures the speed of a device."""


class PackedLinear(nn.Linear):
    """Linear layer with a second copy of its weight in the layout of oneDNN, for float32 on a CPU.

    A plain layer converts its weight in each product. For few rows this takes longer than the product itself. This
    layer acts as a plain one while gradients are enabled, for other types and devices, and for weights made under
    `inference_mode`. The copy is renewed after each write that torch counts (see `Memo`).
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Take over the parameters of a layer."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._memo: Memo[Tensor] = Memo()

    def forward(self, input: Tensor) -> Tensor:
        """Return the output of a linear layer, (..., out_features)."""
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
            or not input.device.type == self.weight.device.type == "cpu"
            or not input.dtype == self.weight.dtype == torch.float32
            or not torch.backends.mkldnn.is_available()
            or self.weight.is_inference()  # torch does not count writes to it
        ):
            return F.linear(input, self.weight, self.bias)
        packed = self._memo.get((), [self.weight], lambda: torch.ops.mkldnn._reorder_linear_weight(self.weight))
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input, packed, self.bias, "none", [], "")
        return product


def pack_linear_layers(module: nn.Module) -> None:
    """Replace each large linear layer in a module by a packed one, in place. This doubles the memory of the weights."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.weight.numel() >= LARGE:
                setattr(parent, name, PackedLinear(child))


def product_time(device: torch.device, dtype: torch.dtype) -> float:
    """Return the time in which a device multiplies two matrices of a type, in seconds: the best of three."""
    from torch.utils.benchmark import Timer  # the import takes a tenth of a second, and most programs do not need it

    matrix = torch.ones(PROBE, PROBE, device=device, dtype=dtype)
    timer = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=torch.get_num_threads())
    timer.timeit(1)
    return min(timer.timeit(1).median for _ in range(3))


def multiply_in(dtype: torch.dtype, device: str, run: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
    """Run a function with its matrix products in a type.

    Each call has an autocast of its own.

    Args:
        dtype: the type of the products.
        device: the type of the device, such as `cpu`.
        run: the function.
        *args: its arguments.
        **kwargs: its keyword arguments.

    Returns:
        The result of `run`.
    """
    with torch.autocast(device, dtype):
        return run(*args, **kwargs)


def optimise_backbone(backbone: nn.Module) -> None:
    """Fold batch norm into convolutions and store channels last, in place; see `fold_batch_norm`."""
    fold_batch_norm(backbone)
    backbone.to(memory_format=torch.channels_last)


def fold_batch_norm(module: nn.Module) -> None:
    """Fold each batch norm into the convolution directly before it, in place.

    The module must be in evaluation mode. Its outputs then change by rounding only.
    """
    for parent in list(module.modules()):
        for (conv_name, conv), (norm_name, norm) in pairwise(list(parent.named_children())):
            if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
                continue
            if norm.num_features == conv.out_channels:
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
                setattr(parent, norm_name, rest)
