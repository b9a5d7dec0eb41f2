"""The console script `narvl`: answers `narvl path` at once and hands everything else to `narvl_plugin.cli.app`.

It stands outside the package because importing anything of `narvl_plugin` imports torch and fairseq, which
takes seconds and, unless told otherwise first, writes to the screen.
"""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import signal
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType

ENDINGS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
"""Signals that ask a program to end, and what it then says."""


def plugin_folder() -> Path:
    """Return the absolute folder of `narvl_plugin`, which fairseq takes as `--user-dir`."""
    package = importlib.util.find_spec("narvl_plugin")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("narvl_plugin is not installed; pip install it where narvl is")
    return Path(package.submodule_search_locations[0]).resolve()


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


def main() -> None:
    """Run the command line."""
    explain_interrupts()
    for number in ENDINGS:
        signal.signal(number, ask_to_end)
    if sys.argv[1:] == ["path"]:
        print(plugin_folder())
        return
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    from narvl_plugin.cli.app import run

    run()


if __name__ == "__main__":
    main()
