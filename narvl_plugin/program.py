"""Start and end of all programs of the plugin: signals, interrupts, the terminal."""

from __future__ import annotations

import atexit
import functools
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

ENDINGS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
"""Signals that ask a program to end, and its message."""


class AskedToEnd(SystemExit):
    """The end of a program after a signal. The exit status is that of shells: 130 or 143."""

    code: int


def ask_to_end(number: int, frame: FrameType | None = None) -> None:
    """End the program after a signal, with a message of one line.

    Open files are closed, and worker processes end. A run script prints the message itself, for all its programs.

    Args:
        number: the signal.
        frame: not used.

    Raises:
        AskedToEnd: always.
    """
    atexit.unregister(_say)
    if "NARVL_RUN" not in os.environ:
        atexit.register(_say, f"{ENDINGS[signal.Signals(number)]}; start the same command again to go on")
    raise AskedToEnd(128 + number)


def _say(message: str) -> None:
    with suppress(OSError):  # the reader may have ended before
        print(message, file=sys.stderr)


def explain_interrupts() -> None:
    """Let an unhandled interrupt (Ctrl-C) end the program as `ask_to_end` does.

    Python ignores exceptions in callbacks while it starts a process. The signal is then sent again.
    """
    show, show_unraisable = sys.excepthook, sys.unraisablehook

    def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt) or hasattr(sys, "ps1"):  # ps1: at Python's own prompt
            show(kind, error, traceback)
            return
        ask_to_end(signal.SIGINT)

    def unraisablehook(ignored: sys.UnraisableHookArgs) -> None:
        error = ignored.exc_value
        if not isinstance(error, KeyboardInterrupt | AskedToEnd):
            show_unraisable(ignored)
            return
        number = error.code - 128 if isinstance(error, AskedToEnd) else signal.SIGINT
        signal.signal(signal.SIGALRM, lambda *_: ask_to_end(number))
        signal.setitimer(signal.ITIMER_REAL, 0.1)  # after the current callback
        atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)  # its handler is gone before the program is

    sys.excepthook, sys.unraisablehook = excepthook, unraisablehook


def end_on_signals() -> None:
    """Let the signals in `ENDINGS` end the program with a message of one line."""
    explain_interrupts()
    for number in ENDINGS:
        signal.signal(number, ask_to_end)


@contextmanager
def signals_wait() -> Iterator[None]:
    """Handle the signals in `ENDINGS` at the end of the block. Those that come within it are not lost.

    Python handles signals in the main thread. In other threads nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in ENDINGS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for one in came:
            signal.raise_signal(one)


@functools.cache
def end_workers_briefly() -> None:
    """Let torch's data workers ignore Ctrl-C, which a terminal also sends to them. Their program ends them.

    Otherwise each worker prints a traceback, and workers outlive a terminated program by seconds. Signals wait until
    all workers have started: what is half made for them cannot be closed.
    """
    from torch.utils.data._utils import worker
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    work, start = worker._worker_loop, _MultiProcessingDataLoaderIter.__init__

    @functools.wraps(work)
    def ignore_interrupts_and_work(*args: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        work(*args, **kwargs)

    @functools.wraps(start)
    def start_whole(self: _MultiProcessingDataLoaderIter, *args: Any, **kwargs: Any) -> None:
        with signals_wait():
            start(self, *args, **kwargs)

    worker._worker_loop = ignore_interrupts_and_work
    # The method is replaced for all loaders: fairseq makes them itself.
    _MultiProcessingDataLoaderIter.__init__ = start_whole  # type: ignore[method-assign]


def write_to_any_terminal() -> None:
    """Let standard output escape characters that its encoding lacks, as standard error already does."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # which it is not in notebooks and tests
        sys.stdout.reconfigure(errors="backslashreplace")
