"""A pretended device, on which every wait for it is counted: how often a program asks what a GPU has computed.

A GPU computes while the program goes on, until the program asks for a number: then it waits, and the GPU has nothing
to do until it is given the next work. No GPU is needed to count that. A tensor on the pretended device holds its
numbers on the CPU, and each operation that torch would wait for on a GPU is noted:

- numbers that become Python's (`item`, `bool`, `int`, `tolist`, `torch.equal`), copies to the CPU;
- results whose shape depends on numbers (`nonzero`, an index of bools, `unique`, `repeat_interleave` of a tensor);
- copies from the CPU that are not `non_blocking`, such as `torch.tensor([...], device=...)` and an index on the CPU.

Operations on tensors of both devices are errors, as on a GPU.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

DEVICE = torch.device("meta")
"""The device that is pretended. It must be one that torch knows, on which no program computes."""
ROOT = Path(__file__).resolve().parents[1]
OURS = (str(ROOT / "narvl_plugin"), str(ROOT / "criterions"))
TORCH = str(Path(torch.__file__).parent)
FRAMES = 4
"""Places in the code that a wait names."""
COPIES = {torch.ops.aten.copy_.default: 1, torch.ops.aten.copy.default: 1}
"""Operations that write a tensor into another one, which may be on another device; the place of the source."""
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)
Moved = TypeVar("Moved")


class Wait(NamedTuple):
    """An operation that waits for the device, and where it stands: innermost first, torch left out."""

    operation: str
    places: tuple[traceback.FrameSummary, ...]

    @property
    def is_ours(self) -> bool:
        """Whether it is code of this repository that asks, and no library."""
        return self.places[0].filename.startswith(OURS)

    def __str__(self) -> str:
        shown = [f"{Path(place.filename).name}:{place.lineno} {place.name}" for place in self.places[:FRAMES]]
        return f"{self.operation} in {' < '.join(shown)}"


class DeviceWaits:
    """A context in which there is the pretended device; `waits` are those since the last `clear`."""

    def __init__(self) -> None:
        self.waits: list[Wait] = []
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._open.enter_context(_Operations(self))
        self._open.enter_context(_Calls(self))
        for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):  # which know no such device
            self._open.enter_context(mock.patch.object(torch, name, _for_cpu(getattr(torch, name))))
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    @property
    def ours(self) -> list[Wait]:
        """Return the waits of this repository's code."""
        return [wait for wait in self.waits if wait.is_ours]

    def clear(self) -> None:
        """Forget all waits so far."""
        self.waits.clear()

    def note(self, operation: object) -> None:
        """Count a wait, and remember where it is."""
        stack = [frame for frame in traceback.extract_stack()[::-1] if not frame.filename.startswith((TORCH, __file__))]
        self.waits.append(Wait(str(operation), tuple(stack)))

    def move(self, given: Moved) -> Moved:
        """Return a batch's tensors, or a model in place, on the pretended device, without a wait."""
        if isinstance(given, nn.Module):
            return given._apply(lambda tensor: _wrap(tensor, self))
        moved: Moved = tree_map(lambda part: _wrap(part, self) if isinstance(part, Tensor) else part, given)
        return moved


class _OnDevice(Tensor):
    """A tensor on the pretended device, whose numbers are those of `numbers`, on the CPU."""

    numbers: Tensor
    waits: DeviceWaits

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, operation: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = dict(options or {})
        given = list(_tensors((arguments, options)))
        on_device = [part for part in given if isinstance(part, _OnDevice)]
        on_host = [part for part in given if not isinstance(part, _OnDevice)]
        waits = on_device[0].waits
        to_host = "device" in options and options["device"] not in (None, DEVICE)
        if _is_wait(operation, arguments, options, to_host):
            waits.note(operation)
        elif operation in INDEXING:
            pass
        elif any(part.dim() for part in on_host) and operation not in COPIES:
            raise RuntimeError(f"{operation}: expected all tensors to be on the same device")
        if options.get("device") == DEVICE:
            options["device"] = torch.device("cpu")
        # What an operation writes to, it returns: the same tensor, then.
        known = {id(part.numbers): part for part in on_device} | {id(part): part for part in on_host}
        numbers, options = _changed(lambda tensor: getattr(tensor, "numbers", tensor), (arguments, options))
        found = operation(*numbers, **options)
        if to_host:
            return found
        return _changed(lambda tensor: known[id(tensor)] if id(tensor) in known else _wrap(tensor, waits), found)

    def __repr__(self, **_: Any) -> str:
        self.waits.note("repr")
        return f"{self.numbers!r} on the pretended device"


class _Operations(TorchDispatchMode):
    """Makes tensors on the pretended device, and copies tensors of the CPU to it."""

    def __init__(self, waits: DeviceWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = dict(options or {})
        if options.get("device") != DEVICE or any(isinstance(part, _OnDevice) for part in _tensors(arguments)):
            return operation(*arguments, **options)
        if any(True for _ in _tensors(arguments)) and not options.get("non_blocking"):
            self.waits.note(f"{operation} to the device")
        return _wrap(operation(*arguments, **options | {"device": torch.device("cpu")}), self.waits)


class _Calls(TorchFunctionMode):
    """Stands in for what torch does without operations: from and to Python's numbers and numpy's."""

    def __init__(self, waits: DeviceWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = options or {}
        first = arguments[0] if arguments else None
        if function is Tensor.tolist and isinstance(first, _OnDevice):
            self.waits.note("tolist")
            return first.numbers.tolist()
        if function is Tensor.numpy and isinstance(first, _OnDevice):
            raise TypeError("a tensor on the pretended device has no numpy array; copy it to the CPU first")
        if (
            function in (torch.tensor, torch.as_tensor, torch.asarray)
            and torch.device(options.get("device") or "cpu") == DEVICE
        ):
            return function(*arguments, **options | {"device": "cpu"}).to(DEVICE)
        if function is Tensor.new_tensor and isinstance(first, _OnDevice):
            return torch.tensor(*arguments[1:], **{"dtype": first.dtype} | options).to(DEVICE)
        if function == Tensor.data.__set__ and isinstance(first, _OnDevice):
            first.numbers = arguments[1].numbers
        if function in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(first, _OnDevice):
            index = arguments[1] if isinstance(arguments[1], tuple) else (arguments[1],)
            listed = tuple(
                torch.tensor(part, dtype=None if part else torch.int64) if isinstance(part, list) else part
                for part in index
            )
            return function(first, listed, *arguments[2:])
        return function(*arguments, **options)


def _tensors(given: Any) -> Iterator[Tensor]:
    """Return the tensors in nested lists, tuples and dictionaries, as torch's pytree does, but ten times faster."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, dict):
        yield from _tensors(list(given.values()))
    elif isinstance(given, list | tuple):
        for part in given:
            yield from _tensors(part)


def _changed(change: Callable[[Tensor], Any], given: Any) -> Any:
    """Return nested lists, tuples and dictionaries with each tensor changed."""
    if isinstance(given, Tensor):
        return change(given)
    if isinstance(given, dict):
        return {key: _changed(change, part) for key, part in given.items()}
    if isinstance(given, list | tuple):
        return type(given)([_changed(change, part) for part in given])
    return given


def _is_wait(operation: Any, arguments: tuple[Any, ...], options: dict[str, Any], to_host: bool) -> bool:
    """Tell whether torch would wait for a GPU: its tags say whose results depend on numbers, of which some do not."""
    if to_host:
        return True
    if operation in COPIES:
        source, goal = arguments[COPIES[operation]], arguments[0]
        if isinstance(source, _OnDevice) and isinstance(goal, _OnDevice):
            return False
        is_async = options.get("non_blocking", arguments[2] if len(arguments) > 2 else False)
        return isinstance(source, _OnDevice) or not is_async
    if operation in INDEXING:
        indices = [index for index in arguments[1] if index is not None]
        if any(not isinstance(index, _OnDevice) for index in indices):
            return True
        is_mask = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        if operation is torch.ops.aten.index.Tensor:
            return is_mask
        value = arguments[2]  # one number of the CPU is filled in by a mask as it is
        return is_mask and (isinstance(value, _OnDevice) or value.numel() != 1)
    if operation is torch.ops.aten.repeat_interleave.Tensor:
        return options.get("output_size") is None
    tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return any(tag in operation.tags for tag in tags)


def _wrap(found: Any, waits: DeviceWaits) -> Any:
    """Return a tensor of the CPU as one on the pretended device; anything else, and one that is there, as it is."""
    if not isinstance(found, Tensor) or isinstance(found, _OnDevice):
        return found
    numbers = found.detach()
    made = Tensor._make_wrapper_subclass(
        _OnDevice,
        numbers.size(),
        strides=numbers.stride(),
        storage_offset=numbers.storage_offset(),
        dtype=numbers.dtype,
        device=DEVICE,
        requires_grad=found.requires_grad,
    )
    made.numbers, made.waits = numbers, waits
    return made


def _for_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a device's name that answers for the CPU where the name is the pretended device's."""

    def answer(device_type: str, *arguments: Any, **options: Any) -> Any:
        return function("cpu" if device_type == DEVICE.type else device_type, *arguments, **options)

    return answer
