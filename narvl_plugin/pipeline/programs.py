"""Programs that a run starts. They end with the run, in whatever way it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

from narvl_plugin.errors import InputError

ENDINGS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "the terminal was closed",
}
"""Signals that end a run, and its message."""

PATIENCE = 2.0
"""Seconds that a program has to end itself."""

_PR_SET_PDEATHSIG = 1
"""Linux: the signal that a process gets when its parent has ended (see prctl(2))."""
_LIBRARY = ctypes.CDLL(None) if sys.platform == "linux" else None


class Stopped(BaseException):
    """A signal has asked the run to end.

    Attributes:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class ProgramFailed(InputError):
    """A program has ended with an error.

    Attributes:
        status: its exit status, as shells count it: 128 and the number of the signal that has ended it.
    """

    def __init__(self, message: str, returncode: int) -> None:
        super().__init__(message)
        self.status = returncode if returncode > 0 else 128 - returncode


_asked: list[int] = []
"""The signals that have asked the run to end."""


@contextmanager
def noting_signals() -> Iterator[None]:
    """Note each signal in `ENDINGS` that comes in the block, but those that are ignored, as under nohup.

    `end_if_asked` raises `Stopped`, so that no signal interrupts the start of a program, or the writing of a file.
    """

    def note(number: int, frame: FrameType | None) -> None:
        _asked.append(number)

    before = {number: signal.getsignal(number) for number in ENDINGS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, note)
    _asked.clear()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_if_asked() -> None:
    """End the run if a signal has come.

    Raises:
        Stopped: if one has.
    """
    if _asked:
        raise Stopped(_asked[0])


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a run's programs.

    Args:
        threads: number of torch's threads per process.
    """
    found = {
        **os.environ,
        # The C library keeps freed memory instead of asking the system again for every large tensor. This saves a fifth
        # of the time of a training step, and half of the time of a pass over many images.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
        # Waiting threads sleep. If they spin on a busy machine, two threads are many times slower than one.
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "HYDRA_FULL_ERROR": "1",  # an error's last line is its reason
        "NARVL_RUN": "1",  # only the run, not its programs, then prints that it was interrupted
    }
    found.setdefault("GLOO_SOCKET_IFNAME", "lo")
    found["PATH"] = os.pathsep.join([found.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    return found


class Programs:
    """The programs that a run has started. Each is the first of a process group, with all that it starts.

    Args:
        held: number of an open file that all programs hold open, too: the run's lock.
    """

    def __init__(self, held: int) -> None:
        self._held = held
        self._running: list[subprocess.Popen[bytes]] = []

    def start(
        self,
        words: Sequence[str],
        env: Mapping[str, str],
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a program.

        Args:
            words: the program, which is looked up in the environment's PATH, and its arguments.
            env: its environment.
            stdout: where its output goes, as in `subprocess.Popen`.
            stderr: where its errors go.

        Raises:
            InputError: if the program is not installed.
        """
        parent = os.getpid()
        try:
            program = subprocess.Popen(
                words,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[self._held],
                process_group=0,  # a signal of the terminal reaches the run, which ends its programs
                preexec_fn=None if _LIBRARY is None else lambda: _end_with(parent),
            )
        except FileNotFoundError:
            raise InputError(f"{words[0]} is not installed; run: make setup") from None
        self._running.append(program)
        return program

    def finished(self, program: subprocess.Popen[bytes]) -> bool:
        """Return whether a program has ended."""
        if program.poll() is None:
            return False
        with suppress(ValueError):
            self._running.remove(program)
        return True

    def end(self, patience: float = PATIENCE) -> None:
        """End all programs, and kill what is left of them and of all that they have started after some seconds."""
        for program in self._running:
            if program.poll() is None:
                program.terminate()
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and any([program.poll() is None for program in self._running]):
            time.sleep(0.02)
        self._signal(signal.SIGKILL)
        for program in self._running:
            program.wait()
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline and self._signal(0):
            time.sleep(0.02)
        self._running.clear()

    def pause(self, number: int = signal.SIGSTOP) -> None:
        """Stop all programs and this one, as Ctrl-Z does, until this one is continued."""
        self._signal(number)
        os.kill(os.getpid(), signal.SIGSTOP)
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> bool:
        """Send a signal to all programs and all that they have started. Return whether there are any."""
        found = False
        for program in self._running:
            with suppress(OSError):
                os.killpg(program.pid, number)
                found = True
        return found


def _end_with(parent: int) -> None:
    """Let this process, which is about to become a program, be killed when its parent ends.

    Parts of a training wait for each other in C++. They would note a milder signal only after a long time.
    """
    assert _LIBRARY is not None
    _LIBRARY.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def last_lines(files: Iterable[Path]) -> str:
    """Return the last line of each program's log, which names the reason of its end."""
    named = list(files)
    found = []
    for file in named:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.exists() else []
        found += [line.removeprefix("error: ") for line in lines if line.strip()][-1:]
    return f"{' '.join(found)} (full log: {' '.join(map(str, named))})"
