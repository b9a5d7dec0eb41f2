"""Memos: values that follow from a model's weights alone, computed once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

Value = TypeVar("Value")


class Doubts:
    """Cached values that were used before it was known whether they are still valid.

    Attributes:
        flags: for each value a bool on its device, True if the value is valid. To read it is to wait for the device.
    """

    def __init__(self) -> None:
        self._memo: list[Memo[Any]] = []
        self.flags: list[Tensor] = []

    def add(self, kept: Memo[Any], flag: Tensor) -> None:
        """Record a value that was used, with its flag."""
        self._memo.append(kept)
        self.flags.append(flag)

    def settled(self, flags: Sequence[Tensor]) -> bool:
        """Return whether all values are valid, given the flags as read. Invalid values are dropped."""
        stale = [kept for kept, flag in zip(self._memo, flags, strict=True) if not bool(flag)]
        for kept in stale:
            kept.forget()
        return not stale


_doubts: ContextVar[Doubts | None] = ContextVar("doubts", default=None)


@contextmanager
def believing() -> Iterator[Doubts]:
    """Use cached values in the block without waiting for a GPU to compare the tensors that they depend on.

    Afterwards the caller must ask `Doubts.settled`. If it returns False, the results of the block are wrong and must
    be computed again.
    """
    doubts = Doubts()
    token = _doubts.set(doubts)
    try:
        yield doubts
    finally:
        _doubts.reset(token)


def run_on_memos(run: Callable[[], Value]) -> Value:
    """Run a forward pass, and run it again if it used cached values that were no longer valid.

    The program waits for a GPU only once, at the end of the pass.

    Args:
        run: the pass.

    Returns:
        The result of `run`.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _doubts.get() is not None:
        return run()
    with believing() as doubts:
        result = run()
    if doubts.flags and not doubts.settled(list(torch.stack(doubts.flags).cpu())):
        return run()
    return result


class Memo(Generic[Value]):
    """Cache of one value that is computed from tensors.

    The value is recomputed when the key or a tensor changes, and never cached while gradients are enabled. Threads may
    share the cache.

    Args:
        exact: compare the tensors with copies of them. Otherwise torch's counts of writes are compared. This is
            faster, but torch does not count writes through `.data`, through an array that shares a tensor's memory, or
            to a tensor made under `inference_mode`.
    """

    def __init__(self, exact: bool = False) -> None:
        self._exact = exact
        # The key, the state of the tensors, and the value. Threads read and write only this one reference.
        self._slot: tuple[Hashable, list[_Copy] | list[_State], Value] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Memo, (self._exact,)

    def get(self, key: Hashable, tensors: Iterable[Tensor], compute: Callable[[], Value]) -> Value:
        """Return the value, from the cache if key, tensors and autocast are the same as before.

        Args:
            key: what the value depends on beside the tensors.
            tensors: the tensors that the value depends on.
            compute: computes the value.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self.forget()
            return compute()
        tensors = list(tensors)
        key = (key, *map(_autocast_type, sorted({tensor.device.type for tensor in tensors})))
        slot = self._slot
        if slot is not None and slot[0] == key and self._holds(slot[1], tensors):
            return slot[2]
        slot = None
        self.forget()  # frees the old value before the new one is computed
        sources = [_Copy(tensor) for tensor in tensors] if self._exact else [_State(tensor) for tensor in tensors]
        value = compute()
        self._slot = (key, sources, value)
        return value

    def _holds(self, sources: list[_Copy] | list[_State], tensors: list[Tensor]) -> bool:
        """Return whether the tensors are unchanged. On a GPU the answer may come later, see `believing`."""
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

    @property
    def held(self) -> object:
        """What the cache holds, to keep its memory from being freed."""
        return self._slot

    def forget(self) -> None:
        """Empty the cache."""
        self._slot = None

    def count_writes(self) -> None:
        """Compare torch's counts of writes from now on; see `exact`."""
        self._exact = False
        self.forget()


class WeightMemo(Memo[Value]):
    """Cache of one value that is computed from one weight, for layers in which the check itself counts.

    It is for inference without autocast's key: the caller's key says all else that the value depends on.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return WeightMemo, ()

    def of_weight(self, key: Hashable, weight: Tensor, compute: Callable[[], Value]) -> Value:
        """Return the value, from the cache if key and weight are the same as before, by torch's count of writes.

        Args:
            key: what the value depends on beside the weight.
            weight: the weight, which was not made under `inference_mode`.
            compute: computes the value.
        """
        slot: Any = self._slot
        state = (key, weight.data_ptr(), weight._version)
        if slot is not None and slot[0] == state and slot[1] is weight:
            value: Value = slot[2]
            return value
        slot = None
        self.forget()  # frees the old value before the new one is computed
        value = compute()
        self._slot = (state, weight, value)  # type: ignore[assignment]  # while `weight` exists, its place is its own
        return value


class FixedMemo(Memo[Value]):
    """Cache with a value that never changes, for a static graph."""

    def __init__(self, value: Value) -> None:
        super().__init__()
        self._fixed = value

    def get(self, key: Hashable, tensors: Iterable[Tensor], compute: Callable[[], Value]) -> Value:
        """Return the value; all arguments are ignored."""
        return self._fixed


def memos_of(module: nn.Module) -> Iterator[Memo[Any]]:
    """Yield the caches of a module and of all modules in it."""
    for part in module.modules():
        yield from (value for value in vars(part).values() if isinstance(value, Memo))


def weights_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Return all parameters and buffers of some modules, in a third of the time that torch's iterators take."""
    parts = [part for module in modules for part in module.modules()]
    tensors = [tensor for part in parts for tensor in (*part._parameters.values(), *part._buffers.values())]
    return [tensor for tensor in tensors if tensor is not None]


def _autocast_type(device: str) -> torch.dtype | None:
    """Return the type of a device's matrix products under autocast, or None without autocast."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    """Return the properties that equal tensors share."""
    return tensor.dtype, tensor.device, tensor.shape


class _Copy:
    """Copy of a tensor, which is equal to a tensor of the same values, type and device."""

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
    """State of a tensor, which changes with its values: its place in memory, its type, its count of writes."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor  # while this reference exists, no other tensor takes its place in memory
        self.state = self._of(tensor)

    def __eq__(self, other: object) -> bool:
        return self.tensor is other and self.state == self._of(self.tensor)

    @staticmethod
    def _of(tensor: Tensor) -> tuple[int, torch.dtype, torch.device, int]:
        version = 0 if tensor.is_inference() else tensor._version
        return tensor.data_ptr(), tensor.dtype, tensor.device, version

    __hash__ = None  # type: ignore[assignment]
