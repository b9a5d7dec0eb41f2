"""Faster inference: packed layers, folded norms, products in bfloat16.

Legend: B batch, C channels, K channels of an output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from narvl_plugin.importing import without_compiler

from .memo import Value, WeightMemo

with without_compiler():
    from timm.layers import BatchNormAct2d, Conv2dSame
    from timm.models import EfficientNet

LARGE = 2**19
"""Smallest number of elements at which packing a weight saves more time than the call of a packed layer adds."""
SMALL = 2**22
"""Multiplications up to which a matrix product is faster than a convolution of oneDNN with a 1 x 1 kernel.

The call of such a convolution takes 0.04 ms longer.
"""
POSITIONS = 256
"""Number of the positions with which a layer's time is measured."""


@cache
def multiplies_in_bfloat16() -> bool:
    """Return whether oneDNN multiplies in bfloat16 on this processor."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed_type(input: Tensor, weight: Tensor) -> torch.dtype | None:
    """Return the type of a product that uses a packed copy of its weight; None if the product must use the weight.

    A copy is used in inference on a CPU. Its type is float32, or bfloat16 under autocast.
    """
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not (input.is_cpu and weight.is_cpu)
        or weight.dtype != torch.float32
        or not torch.backends.mkldnn.is_available()
        or weight.is_inference()  # torch does not count writes to it
    ):
        return None
    if not torch.is_autocast_enabled("cpu"):
        return torch.float32 if input.dtype == torch.float32 else None
    dtype = torch.get_autocast_dtype("cpu")
    known = dtype == torch.bfloat16 and input.dtype in (torch.float32, torch.bfloat16)
    return dtype if known and multiplies_in_bfloat16() else None


class PackedLinear(nn.Linear):
    """Linear layer with a second copy of its weight, in the layout of oneDNN and in the type of the product.

    A plain layer converts its weight in each product. For few rows this takes longer than the product itself. This
    layer acts as a plain one where `packed_type` is None. The copy is renewed after each write that torch counts, and
    when the type changes (see `WeightMemo`).
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Take over the parameters of a layer."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._memo: WeightMemo[Tensor] = WeightMemo()

    def forward(self, input: Tensor) -> Tensor:
        """Return the output of a linear layer, (..., out_features)."""
        weight = self.weight
        dtype = packed_type(input, weight)
        if dtype is None:
            return F.linear(input, weight, self.bias)
        reorder = torch.ops.mkldnn._reorder_linear_weight
        packed = self._memo.of_weight(dtype, weight, lambda: reorder(weight.to(dtype)))
        bias = None if self.bias is None else self.bias.to(dtype)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input.to(dtype), packed, bias, "none", [], "")
        return product


class PackedConv2d(nn.Conv2d):
    """Convolution with a second copy of its weight in the layout of oneDNN, as in `PackedLinear`.

    oneDNN's best layout depends on the shape of the input, so the copy is renewed when that changes. An activation that
    oneDNN knows is computed in the same call. A small convolution with a 1 x 1 kernel is a matrix product instead, in
    float32.
    """

    ACTIVATIONS: ClassVar[dict[type[nn.Module], tuple[str, list[float]]]] = {
        nn.Identity: ("none", []),
        nn.ReLU: ("relu", []),
        nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    }
    """The names of activations in oneDNN, and their bounds."""

    def __init__(self, conv: nn.Conv2d, activation: nn.Module, *, mirrored: bool = False) -> None:
        """Take over the parameters of a convolution.

        Args:
            conv: the convolution.
            activation: the activation that follows it, one of `ACTIVATIONS`.
            mirrored: whether its images will be mirrored; see `can_be_mirrored`.
        """
        shape = (conv.in_channels, conv.out_channels, (conv.kernel_size[0], conv.kernel_size[1]))
        options = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
        super().__init__(*shape, **options, bias=False, device="meta")
        self.weight, self.bias = conv.weight, conv.bias
        if mirrored:
            self.weight = nn.Parameter(conv.weight.detach().flip(2, 3), requires_grad=False)
            self.padding = (shape[2][0] // 2, shape[2][1] // 2)
        self.activation = activation
        self._fused = self.ACTIVATIONS[type(activation)]
        plain = self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1
        self._most = SMALL // self.weight.numel() if plain else 0  # positions of which it is a matrix product
        self._memo: WeightMemo[Tensor] = WeightMemo()

    def forward(self, input: Tensor) -> Tensor:
        """Return the activation of the convolution: (B, C, height, width) -> (B, K, rows, columns)."""
        weight = self.weight
        dtype = packed_type(input, weight)
        if dtype is None:
            return cast(Tensor, self.activation(super().forward(input)))
        shape = input.shape
        if dtype == torch.float32 and shape[0] * shape[2] * shape[3] <= self._most:
            product = F.linear(input.permute(0, 2, 3, 1), weight.flatten(1), self.bias)
            return cast(Tensor, self.activation(product).permute(0, 3, 1, 2))
        form = (self.padding, self.stride, self.dilation, self.groups)
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        packed = self._memo.of_weight((dtype, shape), weight, lambda: reorder(weight.to(dtype), *form, shape))
        bias = None if self.bias is None else self.bias.to(dtype)
        input = input.to(dtype, memory_format=torch.channels_last)
        output: Tensor = torch.ops.mkldnn._convolution_pointwise(input, packed, bias, *form, *self._fused, "")
        return output


def pack_linear_layers(module: nn.Module) -> None:
    """Replace each large linear layer in a module by a packed one, in place. This doubles the memory of the weights."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.weight.numel() >= LARGE:
                setattr(parent, name, PackedLinear(child))


def layer_time(layer: nn.Module, width: int, dtype: torch.dtype) -> float:
    """Return the time in which an encoder layer reads `POSITIONS` positions, in seconds: the best of five.

    Args:
        layer: the layer.
        width: D.
        dtype: the type of its products.
    """
    from torch.utils.benchmark import Timer  # the import takes a tenth of a second, and most programs do not need it

    device = next(layer.parameters()).device
    arguments = (torch.zeros(1, POSITIONS, width, device=device), torch.zeros(1, 1, 1, POSITIONS, device=device))
    run = layer if dtype == torch.float32 else partial(multiply_in, dtype, device.type, layer)
    with torch.no_grad():
        names = {"run": run, "arguments": arguments}
        timer = Timer("run(*arguments)", globals=names, num_threads=torch.get_num_threads())
        timer.timeit(2)
        return min(timer.timeit(1).median for _ in range(5))


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


class FoldedNorm(nn.Sequential):
    """What is left of a batch norm after folding: dropout and activation, if it had them."""


def optimise_backbone(backbone: nn.Module) -> None:
    """Fold batch norm into convolutions, pack these, and store channels last, in place.

    The backbone must be in evaluation mode. Its features then change by rounding only.
    """
    fold_batch_norm(backbone)
    backbone.is_mirrored = can_be_mirrored(backbone)  # type: ignore[assignment]
    pack_convolutions(backbone, mirrored=bool(backbone.is_mirrored))
    backbone.to(memory_format=torch.channels_last)


def fold_batch_norm(module: nn.Module) -> None:
    """Fold each batch norm into the convolution directly before it, in place.

    The module must be in evaluation mode. Its outputs then change by rounding only.
    """
    for parent, (conv_name, conv), (norm_name, norm) in _neighbours(module):
        if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
            continue
        if norm.num_features == conv.out_channels:
            setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
            rest = (norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else ()
            setattr(parent, norm_name, FoldedNorm(*(part for part in rest if not isinstance(part, nn.Identity))))


def can_be_mirrored(backbone: nn.Module) -> bool:
    """Return whether a backbone is an EfficientNet that pads as TensorFlow does.

    For a stride of 2, TensorFlow pads an even side at its end, and torch at both. So `Conv2dSame` copies its input,
    which takes a quarter of the backbone's time. In a mirrored image TensorFlow's padding is at the beginning. Torch's
    own padding then gives the same, because the end is not read.
    """
    convolutions = [part for part in backbone.modules() if isinstance(part, nn.Conv2d)]
    return isinstance(backbone, EfficientNet) and all(
        type(part) is (nn.Conv2d if part.stride == (1, 1) else Conv2dSame)
        and part.dilation == (1, 1)
        and all(side % 2 for side in part.kernel_size)
        for part in convolutions
    )


def pack_convolutions(module: nn.Module, *, mirrored: bool = False) -> None:
    """Replace the convolutions in a module by packed ones, in place, with the activations of folded norms.

    This doubles the memory of the weights.

    Args:
        module: the module.
        mirrored: whether its images will be mirrored; see `can_be_mirrored`.
    """
    for parent, (conv_name, conv), (norm_name, norm) in _neighbours(module):
        if not isinstance(conv, nn.Conv2d) or not (type(conv) is nn.Conv2d or mirrored):
            continue
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            continue
        activation: nn.Module = nn.Identity()
        if isinstance(norm, FoldedNorm) and len(norm) == 1 and type(norm[0]) in PackedConv2d.ACTIVATIONS:
            activation = norm[0]
            setattr(parent, norm_name, nn.Identity())
        setattr(parent, conv_name, PackedConv2d(conv, activation, mirrored=mirrored))


def _neighbours(module: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, nn.Module], tuple[str, nn.Module]]]:
    """Yield each part of a module with each of its children and the next one; the last child's is nothing."""
    for parent in list(module.modules()):
        yield from ((parent, *pair) for pair in pairwise([*parent.named_children(), ("", nn.Identity())]))
