"""What makes a trained model fast: what only follows from its weights is computed once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from narvl_plugin.importing import without_compiler

with without_compiler():
    from timm.layers import BatchNormAct2d

LARGE = 2**19
"""Numbers in a weight from which on packing it saves more time than a packed layer's call adds, a tenth of a ms."""
PROBE = 512
"""Side of the square matrices whose product says how fast a device is."""
Value = TypeVar("Value")


class Doubts:
    """Kept values that were taken before it was known whether they still hold.

    flags: a bool of each on its device, which says so. To read them asks the device to finish all that it has to do.
    """

    def __init__(self) -> None:
        self._kept: list[Kept[Any]] = []
        self.flags: list[Tensor] = []

    def add(self, kept: Kept[Any], flag: Tensor) -> None:
        """Remember a value that was taken."""
        self._kept.append(kept)
        self.flags.append(flag)

    def settled(self, flags: Sequence[Tensor]) -> bool:
        """Tell, by the flags as read, whether all values hold; those that do not are forgotten."""
        stale = [kept for kept, flag in zip(self._kept, flags, strict=True) if not bool(flag)]
        for kept in stale:
            kept.forget()
        return not stale


_doubts: ContextVar[Doubts | None] = ContextVar("doubts", default=None)


@contextmanager
def believing() -> Iterator[Doubts]:
    """Take kept values on trust in the block, which a GPU need not be waited for; then `Doubts.settled` must be asked.

    Where it says no, what was computed in the block is wrong and must be computed again.
    """
    doubts = Doubts()
    token = _doubts.set(doubts)
    try:
        yield doubts
    finally:
        _doubts.reset(token)


def on_kept_values(run: Callable[[], Value]) -> Value:
    """Return what a pass does, for whose kept values a GPU is asked once, at its end; on a CPU there is no doubt."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _doubts.get() is not None:
        return run()
    with believing() as doubts:
        result = run()
    if doubts.flags and not doubts.settled(list(torch.stack(doubts.flags).cpu())):
        return run()
    return result


class Kept(Generic[Value]):
    """A value that follows from some tensors and a key, kept as long as these stay what they are.

    It is kept only where no gradient is asked for, and forgotten where one is. Threads may share it.

    Args:
        exact: compare the tensors' numbers with copies of them. Otherwise torch's counts of writes tell whether a
            tensor has changed. That is faster, but torch counts no write through `.data`, none through an array that
            shares a tensor's memory, and none to a tensor made under `inference_mode`.
    """

    def __init__(self, exact: bool = False) -> None:
        self._exact = exact
        # What the value follows from, and the value. Threads read and write this one reference, never a part of it.
        self._slot: tuple[Hashable, list[_Copy] | list[_State], Value] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, (self._exact,)

    def get(self, key: Hashable, tensors: Iterable[Tensor], compute: Callable[[], Value]) -> Value:
        """Return what `compute` does, or what it did for the same key and tensors under the same autocast."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self.forget()
            return compute()
        tensors = list(tensors)
        key = (key, *map(_autocast_type, sorted({tensor.device.type for tensor in tensors})))
        slot = self._slot
        if slot is not None and slot[0] == key and self._holds(slot[1], tensors):
            return slot[2]
        slot = None
        self.forget()  # frees the old value before there is a new one
        sources = [_Copy(tensor) for tensor in tensors] if self._exact else [_State(tensor) for tensor in tensors]
        value = compute()
        self._slot = (key, sources, value)
        return value

    def _holds(self, sources: list[_Copy] | list[_State], tensors: list[Tensor]) -> bool:
        """Tell whether the tensors are as they were; on a device all numbers are compared at once (see `believing`)."""
        copies = [source.copy for source in sources if isinstance(source, _Copy)]
        devices = {copy.device for copy in copies}
        if len(devices) != 1 or devices == {torch.device("cpu")}:
            return sources == tensors
        if [_kind(copy) for copy in copies] != [_kind(tensor) for tensor in tensors]:
            return False
        flag = torch.stack([(copy == tensor).all() for copy, tensor in zip(copies, tensors, strict=True)]).all()
        doubts = _doubts.get()
        if doubts is None:
            return bool(flag)
        doubts.add(self, flag)
        return True

    def forget(self) -> None:
        """Keep nothing any more."""
        self._slot = None

    def count_writes(self) -> None:
        """Go by torch's counts of writes from now on; see `exact`."""
        self._exact = False
        self.forget()


class Fixed(Kept[Value]):
    """A value that never changes, for a static graph."""

    def __init__(self, value: Value) -> None:
        super().__init__()
        self._fixed = value

    def get(self, key: Hashable, tensors: Iterable[Tensor], compute: Callable[[], Value]) -> Value:
        """Return it."""
        return self._fixed


def kept_values(module: nn.Module) -> Iterator[Kept[Any]]:
    """Yield what a module and those in it keep."""
    for part in module.modules():
        yield from (value for value in vars(part).values() if isinstance(value, Kept))


def weights_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Return all parameters and buffers of some modules; a third of the time that their own iterators take."""
    parts = [part for module in modules for part in module.modules()]
    tensors = [tensor for part in parts for tensor in (*part._parameters.values(), *part._buffers.values())]
    return [tensor for tensor in tensors if tensor is not None]


def _autocast_type(device: str) -> torch.dtype | None:
    """Return the type of a device's products under autocast, None without."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    """Return what tensors of equal numbers must have in common."""
    return tensor.dtype, tensor.device, tensor.shape


class _Copy:
    """The numbers of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.copy = tensor.detach().clone()

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Tensor)
            and (self.copy.dtype, self.copy.device) == (other.dtype, other.device)
            and torch.equal(self.copy, other)
        )

    __hash__ = None  # type: ignore[assignment]


class _State:
    """A tensor and all that changes with its values: its place in memory, its type, how often it was written."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor  # while it is held, no other tensor takes its place
        self.state = self._of(tensor)

    def __eq__(self, other: object) -> bool:
        return self.tensor is other and self.state == self._of(self.tensor)

    @staticmethod
    def _of(tensor: Tensor) -> tuple[int, torch.dtype, torch.device, int]:
        version = 0 if tensor.is_inference() else tensor._version
        return tensor.data_ptr(), tensor.dtype, tensor.device, version

    __hash__ = None  # type: ignore[assignment]


class PackedLinear(nn.Linear):
    """A linear layer that keeps its weight as oneDNN lays it out, too, for float32 on a CPU.

    A plain layer lays its weight out anew in each product, which for few rows takes longer than the product. Where a
    gradient is asked for, for other types and devices, and for weights made under `inference_mode`, this is a plain
    layer. The second copy follows the writes that torch counts (see `Kept`).
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Take a layer's place, with its own parameters."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._kept: Kept[Tensor] = Kept()

    def forward(self, input: Tensor) -> Tensor:
        """Return what a linear layer does, (..., out_features)."""
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled("cpu")
            or not input.device.type == self.weight.device.type == "cpu"
            or not input.dtype == self.weight.dtype == torch.float32
            or not torch.backends.mkldnn.is_available()
            or self.weight.is_inference()  # whose writes are not counted
        ):
            return F.linear(input, self.weight, self.bias)
        packed = self._kept.get((), [self.weight], lambda: torch.ops.mkldnn._reorder_linear_weight(self.weight))
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input, packed, self.bias, "none", [], "")
        return product


def pack_linear_layers(module: nn.Module) -> None:
    """Let each large linear layer in a module keep its packed weight, in place; this takes as much memory again."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.weight.numel() >= LARGE:
                setattr(parent, name, PackedLinear(child))


def product_time(device: torch.device, dtype: torch.dtype) -> float:
    """Measure what a device takes for a product of two matrices of a type, in seconds: the best of three times."""
    from torch.utils.benchmark import Timer  # which takes a tenth of a second, and most programs do without

    matrix = torch.ones(PROBE, PROBE, device=device, dtype=dtype)
    timer = Timer("matrix @ matrix", globals={"matrix": matrix}, num_threads=torch.get_num_threads())
    timer.timeit(1)
    return min(timer.timeit(1).median for _ in range(3))


def multiply_in(dtype: torch.dtype, device: str, run: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
    """Return what `run` does, with its products of matrices in a type; each call has an autocast of its own."""
    with torch.autocast(device, dtype):
        return run(*args, **kwargs)


def optimise_trunk(trunk: nn.Module) -> None:
    """Fold batch norm into convolutions and lay pixels' channels out last, in place; see `fold_batch_norm`."""
    fold_batch_norm(trunk)
    trunk.to(memory_format=torch.channels_last)


def fold_batch_norm(module: nn.Module) -> None:
    """Fold each batch norm into the convolution that stands right before it, in place.

    The module must be in evaluation mode, and its outputs then change by rounding only.
    """
    for parent in list(module.modules()):
        for (conv_name, conv), (norm_name, norm) in pairwise(list(parent.named_children())):
            if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
                continue
            if norm.num_features == conv.out_channels:
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
                setattr(parent, norm_name, rest)
