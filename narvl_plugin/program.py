"""What all programs of the plugin do when they start and end: signals, interrupts, the terminal."""

from __future__ import annotations

import atexit
import functools
import io
import os
import signal
import sys
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

ENDINGS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
"""Signals that ask a program to end, and what it then says."""


class AskedToEnd(SystemExit):
    """The end of a program that a signal asks for; the exit status is that which shells give to it: 130 or 143."""

    code: int


def ask_to_end(number: int, frame: FrameType | None = None) -> None:
    """End the program after a signal, in one line.

    What is open is closed on the way, and worker processes end. A run script says the line itself, for all programs
    that it has started.
    """
    atexit.unregister(_say)
    if "NARVL_RUN" not in os.environ:
        atexit.register(_say, f"{ENDINGS[signal.Signals(number)]}; start the same command again to go on")
    raise AskedToEnd(128 + number)


def _say(message: str) -> None:
    with suppress(OSError):  # whoever reads it may have ended before
        print(message, file=sys.stderr)


def explain_interrupts() -> None:
    """Have an interrupt (Ctrl-C) that nothing else handles end the program as `ask_to_end` does.

    Python passes over an exception in what it calls while it starts a process: there the signal comes once more.
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
        signal.setitimer(signal.ITIMER_REAL, 0.1)  # after what Python is calling now

    sys.excepthook, sys.unraisablehook = excepthook, unraisablehook


def end_on_signals() -> None:
    """Have the signals that ask a program to end do so in one line."""
    explain_interrupts()
    for number in ENDINGS:
        signal.signal(number, ask_to_end)


@functools.cache
def end_workers_briefly() -> None:
    """Have torch's data workers leave Ctrl-C, which a terminal sends to them, too, to their program, which ends them.

    Without it each shows a traceback, and they outlive a terminated program by seconds.
    """
    from torch.utils.data._utils import worker
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    work, close = worker._worker_loop, _MultiProcessingDataLoaderIter.__del__

    @functools.wraps(work)
    def ignore_interrupts_and_work(*args: Any, **kwargs: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        work(*args, **kwargs)

    @functools.wraps(close)
    def close_what_was_opened(self: _MultiProcessingDataLoaderIter) -> None:
        if hasattr(self, "_workers_status"):  # and was not interrupted while it started its workers
            close(self)

    worker._worker_loop, _MultiProcessingDataLoaderIter.__del__ = ignore_interrupts_and_work, close_what_was_opened


def write_to_any_terminal() -> None:
    """Have standard output write what its encoding lacks as escapes, as standard error does already."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not a notebook's, nor a test's
        sys.stdout.reconfigure(errors="backslashreplace")
