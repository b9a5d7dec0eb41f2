"""Imports of libraries without their unwanted side effects."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

COMPILER = "torch._dynamo.utils"
"""Module of torch whose import takes long."""


@contextmanager
def leaving_logging_alone() -> Iterator[None]:
    """Import fairseq in the block without changing the configuration of logging.

    A module of fairseq calls `logging.basicConfig(level=logging.DEBUG)` on import. The call has no effect if the root
    logger has a handler. If it has none, it gets logging's own handler of last resort, which prints the same messages.
    """
    stand_in = logging.lastResort or logging.NullHandler()
    if not logging.root.handlers:
        logging.root.addHandler(stand_in)
    try:
        yield
    finally:
        logging.root.removeHandler(stand_in)


@contextmanager
def without_compiler() -> Iterator[None]:
    """Import torchvision and timm in the block without torch's compiler, which takes longer to import than both.

    torchvision imports a function that checks whether the compiler supports a device. In this block the import is
    delayed until the call. timm disables the compiler for a function. In this block the function only receives the mark
    that the compiler reads.
    """
    if COMPILER in sys.modules:
        yield
        return

    def is_compile_supported(device_type: str) -> Any:
        from torch._dynamo.utils import is_compile_supported

        return is_compile_supported(device_type)

    def disable(function: Any, *_: Any, **__: Any) -> Any:
        function._torchdynamo_disable = True
        return function

    stand_in, real = ModuleType(COMPILER), torch.compiler.disable
    stand_in.__dict__["is_compile_supported"] = is_compile_supported
    sys.modules[COMPILER] = stand_in
    torch.compiler.disable = disable  # type: ignore[assignment]  # timm always gives the function
    try:
        yield
    finally:
        del sys.modules[COMPILER]
        torch.compiler.disable = real
