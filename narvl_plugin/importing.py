"""How libraries are imported that do more on import than is wanted of them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

COMPILER = "torch._dynamo.utils"


@contextmanager
def leaving_logging_alone() -> Iterator[None]:
    """Import fairseq and leave the logging of others as it is.

    A module of fairseq calls `logging.basicConfig(level=logging.DEBUG)` when it is imported. That sets nothing where
    the root logger has a handler; the one that logging itself takes where there is none prints what it would print
    anyway.
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
    """Import torchvision and timm without torch's compiler, which takes longer than both.

    torchvision imports a function that says whether the compiler supports a device; here it is imported when it is
    called. timm marks a function that the compiler must leave alone; here it gets the mark that the compiler reads.
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
    sys.modules[COMPILER], torch.compiler.disable = stand_in, disable
    try:
        yield
    finally:
        del sys.modules[COMPILER]
        torch.compiler.disable = real
