"""Stages of a run: each is skipped if its output is there, and its time is kept. One run works in a folder."""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from narvl_plugin.errors import InputError
from narvl_plugin.pipeline.programs import end_if_asked
from narvl_plugin.whole_files import NO_LOCKS, naming

Work = Iterator[None]
"""Work in small steps: a generator that yields while it waits for its programs."""

PAUSE = 0.05
"""Seconds between two looks at the programs."""

WAIT_FOR_LOCK = 8.0
"""Seconds that what a killed run has started has to end: data workers see after five that their program is gone."""


@contextmanager
def sole_run(folder: Path) -> Iterator[int]:
    """Refuse a second run in a folder.

    The lock is a file that the run and all its programs hold open. It lasts until the last of them has ended, in
    whatever way.

    Yields:
        The number of the open file.

    Raises:
        InputError: if there is another run.
    """
    file = folder / ".lock"
    with naming(file):
        folder.mkdir(parents=True, exist_ok=True)
        number = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        _lock(number, folder, file)
        yield number
    finally:
        os.close(number)


def _lock(number: int, folder: Path, file: Path) -> None:
    deadline = time.monotonic() + WAIT_FOR_LOCK
    while True:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise InputError(
                    f"OUT={folder}: another run, or a program that a killed run left behind, is writing there. Wait "
                    f"until it ends, or choose another OUT (fuser {file} shows its process)"
                ) from None
            end_if_asked()
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"warning: {file} cannot be locked here; start no second run in this folder", file=sys.stderr)
            return


class Reporter:
    """Prints what a run does: lines to standard output and the log, and bars to a terminal.

    Attributes:
        log: the file of --log-file, opened to append, or None.
        on_terminal: whether bars are shown.
    """

    def __init__(self, log_file: Path | None) -> None:
        self.log: IO[bytes] | None = None
        if log_file:
            with naming(log_file):
                log_file.absolute().parent.mkdir(parents=True, exist_ok=True)
                self.log = open(log_file, "ab", buffering=0)  # noqa: SIM115 - the programs write to it until the end
        self.on_terminal = sys.stderr.isatty()

    def say(self, line: str) -> None:
        """Print a line."""
        with tqdm.external_write_mode(file=sys.stdout):
            print(line, flush=True)
        if self.log is not None:
            with naming(str(self.log.name)):
                self.log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n".encode())

    def detail(self, line: str) -> None:
        """Print a line of a training, if no bar shows the same."""
        if not (self.on_terminal and sys.stdout.isatty()):
            self.say(line)

    def bar(self, title: str, total: float, unit: str, shown: bool = True) -> Any:
        """Return a progress bar with the time left, which is shown on a terminal."""
        tqdm.monitor_interval = 0  # without a thread: a run starts programs as copies of itself
        form = "{desc}: {percentage:3.0f}%|{bar}| {n:.6g}/{total:.6g} [{elapsed}<{remaining}{postfix}]"
        hidden = not (self.on_terminal and shown)
        return tqdm(total=total, desc=title, unit=unit, disable=hidden, leave=False, bar_format=form)


class Stages:
    """The stages of a run in its folder.

    Its file stages.tsv has a line for each: the name, the time in seconds, and the moment of the end in UTC.
    """

    def __init__(self, out: Path, reporter: Reporter) -> None:
        self.out = out
        self.reporter = reporter

    def stage(self, name: str, output: Path, work: Callable[[], Work]) -> Work:
        """Do a stage unless its output exists.

        Args:
            name: its name.
            output: what it makes, in one step at its end.
            work: begins the work.

        Raises:
            InputError: if the work ends without the output.
        """
        if output.exists():
            self.reporter.say(f"[{name}] is done: {output}")
            return
        self.reporter.say(f"[{name}] ...")
        start = time.monotonic()
        with naming(output):
            output.parent.mkdir(parents=True, exist_ok=True)
        yield from work()
        if not output.exists():
            raise InputError(f"stage {name} ended without making {output}")
        seconds = f"{max(time.monotonic() - start, 0.1):.1f}"
        times = self.out / "stages.tsv"
        with naming(times), open(times, "a", encoding="utf-8") as file:
            file.write(f"{name}\t{seconds}\t{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}\n")
        self.reporter.say(f"[{name}] took {seconds} s")


def together(*works: Work) -> None:
    """Do several works at the same time, until all are done.

    Raises:
        Stopped: if a signal asks the run to end.
    """
    waiting = list(works)
    while waiting:
        end_if_asked()
        for work in list(waiting):
            try:
                next(work)
            except StopIteration:
                waiting.remove(work)
        if waiting:
            time.sleep(PAUSE)
