"""Models without weights, which then take the weights of a checkpoint."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DRAWS = (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_)
"""Functions that initialise a tensor in place."""


class NothingDrawn(TorchFunctionMode):
    """Mode of torch in which tensors are not initialised.

    On the meta device torch would import its compiler to initialise them, which takes longer than all the rest.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, unless it would initialise a tensor."""
        if func in DRAWS or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_weights() -> Iterator[None]:
    """Build models in the block on the meta device, without initialisation."""
    with torch.device("meta"), NothingDrawn():
        yield
