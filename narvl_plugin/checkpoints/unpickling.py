"""Unpickling of checkpoints. Own functions build numpy numbers, flags and dense tensors, besides plain values."""

from __future__ import annotations

import io
import math
import pickle
import re
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np
import torch

from narvl_plugin.safe_pickle import CHARACTERS_A_VALUE, PlainUnpickler, Refused, brief

NOT_NEEDED = "which no checkpoint needs"


class Storage(NamedTuple):
    """Numbers of one type. Tensors are views of them."""

    dtype: torch.dtype
    length: int
    data: torch.UntypedStorage


ReadStorage = Callable[[str, int], torch.UntypedStorage]
"""Returns the storage with a name and a size in bytes."""


class CheckpointUnpickler(PlainUnpickler):
    """Reads plain values, numpy numbers, Namespaces and dense tensors on the CPU."""

    def __init__(self, stream: io.BytesIO, size: int, read_storage: ReadStorage) -> None:
        super().__init__(stream, size, CHECKPOINT_FUNCTIONS, NOT_NEEDED)
        self.read_storage = read_storage
        self.storages: dict[str, Storage] = {}

    def persistent_load(self, pid: Any) -> Storage:
        """Return the storage that a pickle names: `("storage", type, name, device, length)`."""
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[5:] not in ((), (None,)):
            raise ValueError("a storage that is not named as torch does")
        kind, dtype, name, _, length = pid[:5]
        if kind != "storage" or type(dtype) is not torch.dtype or type(name) is not str or not is_length(length):
            raise ValueError("a storage that is not named as torch does")
        if name not in self.storages:
            self.storages[name] = Storage(dtype, length, self.read_storage(name, length * dtype.itemsize))
        if self.storages[name][:2] != (dtype, length):
            raise ValueError(f"the storage {name} in two sizes or types")
        return self.storages[name]

    def load_newobj(self) -> None:
        """Build a new object. `CHECKPOINT_FUNCTIONS` has a function in place of each type."""
        self.load_reduce()  # type: ignore[attr-defined]

    def load_build(self) -> None:
        """Set the state of an object from the pickle."""
        state = self.stack.pop()
        built = self.stack[-1]
        if type(built) is Namespace:
            self.budget.spend(len(state))
            if not all(type(name) is str for name in state):
                raise ValueError("a name of a Namespace is no text")
            vars(built).update(state)
        elif type(built) is NumpyDtype:
            built.check(state)
        elif type(built) is np.ndarray:
            self.budget.spend(len(state[4]) // CHARACTERS_A_VALUE)
            _fill_array(built, *state)
        elif type(built) is not OrderedDict:  # its attributes (versions of modules) are not needed
            raise ValueError(f"a state for a {type(built).__name__}")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = PlainUnpickler.dispatch | {
        pickle.BINPERSID[0]: pickle._Unpickler.dispatch[pickle.BINPERSID[0]],
        pickle.NEWOBJ[0]: load_newobj,
        pickle.BUILD[0]: load_build,
    }


class NumpyDtype:
    """A number type of numpy, while a pickle is read.

    `name` is the kind and size in bytes of a bool, an integer or a float, such as `f8`. numpy writes the other
    arguments, too, but they do not affect numbers.
    """

    def __init__(self, name: str, align: Any = False, copy: Any = True) -> None:
        if not re.fullmatch("b1|[iu][1248]|f[248]", name):
            raise Refused(f"asks for numpy values of the type {brief(name)}, and only plain numbers are read")
        self.numpy = np.dtype(name)

    @staticmethod
    def check(state: Any) -> None:
        """Raise Refused unless a state is that of little-endian numbers without fields."""
        expected = [(3, order, None, None, None, -1, -1, 0) for order in "<|"]
        if type(state) is not tuple or state not in expected:
            raise Refused("asks for numpy values of a special type, and only plain numbers are read")


def numpy_scalar(dtype: NumpyDtype, data: bytes) -> np.generic:
    """Return one numpy number; raise ValueError if its bytes or its type are wrong."""
    if type(dtype) is not NumpyDtype or type(data) is not bytes or len(data) != dtype.numpy.itemsize:
        raise ValueError("a numpy number of the wrong type or length")
    number: np.generic = np.frombuffer(data, dtype.numpy)[0]
    return number


def numpy_ndarray(*_: Any) -> NoReturn:
    """Represent the type of arrays; raise Refused if a pickle calls it, since a call may allocate any memory."""
    raise Refused("calls numpy.ndarray, which no saved array needs")


def numpy_array(subtype: Any, shape: Any, typecode: Any) -> np.ndarray[Any, Any]:
    """Return an empty array. Its state sets its numbers later."""
    if subtype is not numpy_ndarray:
        raise ValueError("a numpy array of the wrong type")
    return np.empty(0)


def _fill_array(array: np.ndarray[Any, Any], version: Any, shape: Any, dtype: Any, in_columns: Any, data: Any) -> None:
    """Set the shape and the numbers of an array in place; raise ValueError if they do not agree."""
    if type(dtype) is not NumpyDtype or type(data) is not bytes or not is_shape(shape) or array.size:
        raise ValueError("a numpy array of the wrong type")
    if math.prod(shape) * dtype.numpy.itemsize != len(data):
        raise ValueError(f"a numpy array of {len(data)} bytes, which does not match its shape")
    checked: Any = (1, shape, dtype.numpy, bool(in_columns), data)
    array.__setstate__(checked)


def rebuilt_tensor(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: Any = False,
    hooks: Any = None,
    metadata: Any = None,
) -> torch.Tensor:
    """Return a tensor of a storage, without gradients; raise ValueError if it exceeds the storage."""
    if type(storage) is not Storage or not is_shape(shape) or not is_shape(strides) or len(shape) != len(strides):
        raise ValueError("a tensor that is not dense")
    if not is_length(offset) or metadata:
        raise ValueError("a tensor that is not dense")
    count = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if count > storage.length or (count and last >= storage.length):
        raise ValueError(f"a tensor of shape {shape} in a storage of {storage.length} values")
    if not count:
        return torch.empty(shape, dtype=storage.dtype)
    return torch.empty(0, dtype=storage.dtype).set_(storage.data, offset, shape, strides)


def rebuilt_parameter(tensor: torch.Tensor, requires_grad: Any, hooks: Any) -> torch.Tensor:
    """Return the tensor of a parameter."""
    if type(tensor) is not torch.Tensor:
        raise ValueError("a parameter that is no tensor")
    return tensor


def new_ordered_dict() -> OrderedDict[Any, Any]:
    """Return an ordered dict without items."""
    return OrderedDict()


def new_namespace() -> Namespace:
    """Return a Namespace without names."""
    return Namespace()


CHECKPOINT_FUNCTIONS = {
    "numpy.dtype": NumpyDtype,
    "numpy.ndarray": numpy_ndarray,
    # numpy 1 and 2 write the same functions under different module names.
    "numpy._core.multiarray.scalar": numpy_scalar,
    "numpy.core.multiarray.scalar": numpy_scalar,
    "numpy._core.multiarray._reconstruct": numpy_array,
    "numpy.core.multiarray._reconstruct": numpy_array,
    "argparse.Namespace": new_namespace,
    "collections.OrderedDict": new_ordered_dict,
    "torch._utils._rebuild_tensor": rebuilt_tensor,
    "torch._utils._rebuild_tensor_v2": rebuilt_tensor,
    "torch._utils._rebuild_parameter": rebuilt_parameter,
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
"""All names that a checkpoint may use. Our functions replace the original types and functions."""


def is_shape(value: Any) -> bool:
    """Return whether a value is a tuple of up to 8 lengths whose product fits 64 bits."""
    is_tuple = type(value) is tuple and len(value) <= 8 and all(map(is_length, value))
    return is_tuple and is_length(math.prod(length or 1 for length in value))


def is_length(value: Any) -> bool:
    """Return whether a value is a whole number from 0 that fits 64 bits."""
    return type(value) is int and 0 <= value < 2**63
