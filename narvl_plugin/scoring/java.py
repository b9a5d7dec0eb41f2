"""Java programs that score captions, run with a time limit and ended together with their children."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from narvl_plugin.errors import InputError


class JavaError(InputError, RuntimeError):
    """A Java program that cannot be started, fails, or does not answer in time; the message names it and the reason."""


@contextlib.contextmanager
def java(name: str, arguments: Sequence[str | Path], limit: float) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Java program for the duration of the block; its standard input and output are pipes.

    After `limit` seconds, the program and its children are killed, and the block reads end of file.

    Args:
        name: the name of the program in errors.
        arguments: the arguments of ``java``.
        limit: the time limit in seconds.

    Yields:
        The running program.

    Raises:
        JavaError: if the program cannot be started or is killed by the limit. Also if the block raises OSError,
            EOFError or ValueError, as communication with a dead program does.
    """
    expired = threading.Event()
    try:
        # A file: an unread pipe would fill up and block the program.
        complaints = tempfile.TemporaryFile()  # noqa: SIM115 - a `with` here would also catch errors of the block
    except OSError as error:
        raise JavaError(f"{name} cannot be started: {error}; set TMPDIR to a folder with room") from error
    with complaints:
        try:
            process = subprocess.Popen(
                ["java", *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                start_new_session=True,
            )
        except OSError as error:
            raise JavaError(f"{name} cannot be started: {error}; check `java -version`") from error

        def expire() -> None:
            expired.set()
            _kill(process)

        watchdog = threading.Timer(limit, expire)
        watchdog.daemon = True
        watchdog.start()
        try:
            yield process
            if expired.is_set():
                raise EOFError
        except (OSError, EOFError, ValueError) as error:
            has_ended = _ends(process)
            _kill(process)
            ended = _status(process.wait()) if has_ended else ""
            said = f"{error}{ended}{_last_line(complaints)}"
            reason = "it did not end, and was stopped" if expired.is_set() else said
            raise JavaError(f"{name} failed within {limit:.0f} s: {reason}; check `java -version`") from error
        finally:
            watchdog.cancel()
            _kill(process)
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    if pipe:
                        pipe.close()
            process.wait()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a program and its children, which have their own process group."""
    if process.returncode is None:  # otherwise another process group may have its number by now
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _ends(process: subprocess.Popen[bytes]) -> bool:
    """Tell whether a program ends by itself within a second; its process group keeps its number."""
    for _ in range(20):
        if process.returncode is not None or os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return True
        time.sleep(0.05)
    return False


def _status(status: int) -> str:
    """Return how a program ended, for a message."""
    return f", ended by signal {-status} ({signal.strsignal(-status)})" if status < 0 else f", exit status {status}"


def _last_line(complaints: IO[bytes]) -> str:
    """Return ` (LINE)` with the last line of a program's standard error, or an empty string."""
    complaints.seek(0)
    lines = complaints.read().decode(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return f" ({said[-1]})" if said else ""
