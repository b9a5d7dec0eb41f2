"""CUDA graphs: a pass of a model on a GPU that is started at once, and not kernel by kernel.

For a single image, a GPU is done with a kernel sooner than the program starts the next one. A student's pass has the
same kernels for all inputs of one shape, so they are recorded once, and then started together. So do the teacher's
encoder and each step of its decoder: the third step of a search has the shapes of the third step of any other.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .config import PADDING_INDEX
from .memo import memos_of

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Buffers = dict[Hashable, Tensor]
"""The memory of inputs, by their place, mode, shape and type."""
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], object], Any]]
"""Maps a function to one that runs it again, and to the result, whose tensors each run fills anew."""

MOST_GRAPHS = 64
"""Number of graphs of one model; inputs of further shapes run without one."""
LARGEST_BATCH = 8
"""Number of samples from which on a GPU computes for longer than it takes to start the kernels."""
BUCKET = 8
"""Padded texts are padded to a multiple of this number of tokens."""


class CudaCapture:
    """Records what a function does on a GPU. All graphs share their temporary memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        """Record a function without arguments, see `Capture`."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # libraries choose their kernels, and caches are filled
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result


class Graphs:
    """The graphs of one model, by what runs and by the shapes of its inputs.

    The first inputs of a shape run plainly, and the second ones are recorded. A graph reads the model's weights where
    they are in memory, and what was cached from them. If weights move or change, `clear` must be called.

    Args:
        device: type of the device on which functions are recorded; on others they run plainly.
        capture: records a function; None for `CudaCapture`. Tests put something else in its place.
    """

    def __init__(self, device: str = "cuda", capture: Capture | None = None) -> None:
        self._options = (device, capture)
        self._device, self._capture = device, capture or CudaCapture()
        self._lock = threading.Lock()
        self._graphs: dict[Hashable, _Graph] = {}
        self._buffers: Buffers = {}
        self._seen: deque[Hashable] = deque(maxlen=MOST_GRAPHS)
        self._works = True

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, self._options  # a copy of a model has no graphs yet

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Forget all graphs."""
        with self._lock:
            self._graphs.clear()
            self._buffers.clear()
            self._seen.clear()

    def run(self, model: nn.Module, key: Hashable, function: Callable[..., Result], inputs: dict[str, Any]) -> Result:
        """Return the result of a function, from a graph if one can be used.

        Args:
            model: the model that the function runs, in evaluation mode.
            key: determines the function beside the model's weights.
            function: neither reads a tensor's numbers nor copies tensors from the CPU.
            inputs: its arguments: tensors and other values, in lists, tuples and dictionaries. The first tensor has a
                row for each sample.

        Returns:
            The function's result: tensors, in lists, tuples and dictionaries. They are the caller's own, except for
            those that the function returned as it got them, and those that the model's memos hold.
        """
        first = next((value for value in inputs.values() if isinstance(value, Tensor)), None)
        if first is None or not self._can_capture(model, first):
            return function(**inputs)
        leaves = tree_leaves(inputs)
        if any(isinstance(value, Tensor) and value.device.type != self._device for value in leaves):
            return function(**inputs)
        shape = (key, torch.is_inference_mode_enabled(), *map(_shape_of, leaves))
        with self._lock:
            graph = self._graphs.get(shape)
            if graph is None and shape in self._seen and len(self._graphs) < MOST_GRAPHS:
                graph = self._captured(model, function, inputs)
                if graph is not None:
                    self._graphs[shape] = graph
            if graph is not None:
                result: Result = graph(leaves)
                return result
            self._seen.append(shape)
        return function(**inputs)

    def _can_capture(self, model: nn.Module, rows: Tensor) -> bool:
        return (
            self._works
            and rows.device.type == self._device
            and len(rows) <= LARGEST_BATCH
            and not model.training
            and not torch.is_grad_enabled()
        )

    def _captured(self, model: nn.Module, function: Callable[..., Any], inputs: dict[str, Any]) -> _Graph | None:
        try:
            return _Graph(model, function, inputs, self._capture, self._buffers)
        except RuntimeError as error:  # of CUDA, which names an operation that cannot be recorded
            self._works = False
            logger.warning("The model runs without CUDA graphs, which takes longer: %s", error)
            return None


class _Graph:
    """A recorded function, with the memory that its inputs are read from and its result is written to.

    Graphs that do not run at the same time share the memory of inputs that have the same place among the inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        function: Callable[..., Any],
        inputs: dict[str, Any],
        capture: Capture,
        buffers: Buffers,
    ) -> None:
        places = count()

        def own(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            # Outside of inference mode, no tensor can be written that was made in it.
            place = (next(places), torch.is_inference_mode_enabled(), _shape_of(value))
            return buffers.setdefault(place, torch.empty_like(value)).copy_(value)

        given = tree_map(own, inputs)
        self._inputs: list[Tensor] = [value for value in tree_leaves(given) if isinstance(value, Tensor)]
        self._device = self._inputs[0].device
        with self._on_device():
            self._replay, self._result = capture(lambda: function(**given))
        self._alive = [memo.held for memo in memos_of(model)]  # the graph reads these tensors where they are
        self._lasting = {id(value) for value in tree_leaves(self._alive)}

    def __call__(self, inputs: list[Any]) -> Any:
        given = [value for value in inputs if isinstance(value, Tensor)]
        torch._foreach_copy_(self._inputs, given, non_blocking=True)
        with self._on_device():
            self._replay()
        returned = {id(own): value for own, value in zip(self._inputs, given, strict=True)}

        def mine(value: Any) -> Any:
            if not isinstance(value, Tensor) or id(value) in self._lasting:
                return value
            return returned[id(value)] if id(value) in returned else value.clone()

        return tree_map(mine, self._result)

    def _on_device(self) -> AbstractContextManager[object]:
        """Return a block in which CUDA's streams are those of the inputs' device."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()


def _shape_of(value: Any) -> Hashable:
    """Return what a graph depends on of an input: shape and type of a tensor, and any other value as it is."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, np.ndarray):
        return value.shape, value.tobytes()
    hashable: Hashable = value
    return hashable


def in_bucket(net_input: dict[str, Any]) -> dict[str, Any]:
    """Pad the texts of a batch that holds padding to a multiple of `BUCKET` tokens, so that fewer shapes occur.

    Args:
        net_input: the model's inputs, with `padded` on the CPU; see `OfaEncoder.forward`.

    Returns:
        The inputs, in which all samples then count as padded. A batch without padding stays as it is, so that its pass
        needs no mask.
    """
    padded, tokens = net_input.get("padded"), net_input["src_tokens"]
    if padded is None or not padded.any():
        return net_input
    longer = F.pad(tokens, (0, -tokens.size(1) % BUCKET), value=PADDING_INDEX)
    return net_input | {"src_tokens": longer, "padded": np.ones_like(padded)}
