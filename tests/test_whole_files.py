"""Files written in one step, and by one process at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from narvl_plugin.errors import InputError
from narvl_plugin.whole_files import sole_writer, whole_file, write_whole

FORK = multiprocessing.get_context("fork")


def hold(path: Path, ready: object, orphan: bool) -> None:
    """Hold a file's lock until killed; if told to, with a child that outlives this process."""
    with sole_writer(path):
        if orphan and os.fork() == 0:
            signal.alarm(60)
            ready.send(os.getpid())
            signal.pause()
        if not orphan:
            ready.send(0)
        signal.pause()


@pytest.mark.parametrize("orphan", [False, True])
def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path, orphan: bool) -> None:
    """A worker that a killed process leaves behind, as data loaders fork them, does not hold its lock."""
    out = tmp_path / "new" / "out.tsv"
    ready, ours = FORK.Pipe(duplex=False)
    holder = FORK.Process(target=hold, args=(out, ours, orphan))
    holder.start()
    worker = ready.recv()
    with pytest.raises(InputError, match=rf"out.tsv: process {holder.pid} on .* is writing it"), sole_writer(out):
        pass
    holder.kill()
    holder.join()
    with sole_writer(out):
        assert "out.tsv.lock" in os.listdir(out.parent)
    assert os.listdir(out.parent) == []
    if worker:
        os.kill(worker, signal.SIGKILL)


def test_an_error_gives_the_lock_back(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), sole_writer(tmp_path / "out"):
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_one_path_spelled_in_two_ways_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    with sole_writer(Path("out")):
        for other in (tmp_path / "out", tmp_path / "link" / "out"):
            with pytest.raises(InputError, match="is writing it"), sole_writer(other):
                pass


def take_turns(path: Path, rounds: int) -> None:
    """Add 1 to a number in a file, as often as the lock is had."""
    while rounds:
        try:
            with sole_writer(path):
                number = int(path.read_text())
                path.write_text(str(number + 1))
            rounds -= 1
        except InputError:
            continue


def test_locks_that_come_and_go_let_one_in_at_a_time(tmp_path: Path) -> None:
    """A process that opens the lock's file just before another deletes it holds nothing by it."""
    count = tmp_path / "count"
    count.write_text("0")
    processes = [FORK.Process(target=take_turns, args=(count, 100)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert count.read_text() == "300"


def test_writers_of_a_small_file_do_not_mix(tmp_path: Path) -> None:
    """All of them write at once, each long contents of its own."""
    out = tmp_path / "out.json"
    contents = [letter * 300_000 for letter in "abcd"]
    with ThreadPoolExecutor(len(contents)) as pool:
        for written in [pool.submit(write_whole, out, text) for text in contents * 20]:
            written.result()
    assert out.read_text() in contents
    assert os.listdir(tmp_path) == ["out.json"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_file_may_be_read_by_whom_any_new_file_may(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "small", "a")
        with whole_file(tmp_path / "large") as part:
            part.write_text("b")
    finally:
        os.umask(before)
    for name in ("small", "large"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def fail_small(path: Path) -> None:
    """Fail at the second character."""
    write_whole(path, "a\ud800")


def fail_large(path: Path) -> None:
    """Fail after some bytes."""
    with whole_file(path) as part:
        part.write_text("half")
        raise ValueError


@pytest.mark.parametrize("fail", [fail_small, fail_large])
def test_what_fails_leaves_the_file_as_it_was(tmp_path: Path, fail: Callable[[Path], None]) -> None:
    (tmp_path / "out").write_text("before")
    with pytest.raises(ValueError):
        fail(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "before"
