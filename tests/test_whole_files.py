"""Files written in one step, and by one process at a time."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from narvl_plugin.data.resumable import ResumableWriter
from narvl_plugin.errors import InputError
from narvl_plugin.whole_files import naming, sole_writer, whole_file, whole_folder, write_whole

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


@pytest.mark.integration
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


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "of a killed program").touch()
    with whole_folder(tmp_path / "out") as part:
        (part / "a").write_text("a")
        assert not (tmp_path / "out").exists()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a"]
    with pytest.raises(ValueError), whole_folder(tmp_path / "other") as part:
        (part / "a").write_text("a")
        raise ValueError
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


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


@contextmanager
def full_disk() -> Iterator[None]:
    """Let no file of this process grow beyond 2,000 bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_small(path: Path) -> None:
    """Write a small file."""
    write_whole(path, 5_000 * "a")


def write_large(path: Path) -> None:
    """Write a large file line by line."""
    with whole_file(path) as part, part.open("w") as stream:
        stream.writelines(5_000 * ["a\n"])


def write_with_torch(path: Path) -> None:
    """Write tensors, in a way in which torch does not say what went wrong."""
    with whole_file(path) as part:
        torch.save(torch.zeros(9_000), part)


def write_safetensors(path: Path) -> None:
    """Write tensors with a library in another language."""
    with whole_file(path) as part:
        safetensors.torch.save_file({"a": torch.zeros(9_000)}, part)


def save_checkpoint(path: Path) -> None:
    """Write a checkpoint as fairseq's trainer does."""
    checkpoint_utils.torch_persistent_save({"a": torch.zeros(9_000)}, str(path))


def copy_checkpoint(path: Path) -> None:
    """Copy a checkpoint as fairseq's trainer does."""
    PathManager.copy(str(path.with_name("large")), str(path), overwrite=True)


def write_in_batches(path: Path) -> None:
    """Write a file that can be gone on with."""
    with ResumableWriter(path.with_name("rows.tsv"), {}) as writer:
        writer.append(["short"], 1)
        writer.append([5_000 * "a"], 1)


WRITERS = (
    *(write_small, write_large, write_with_torch, write_safetensors, save_checkpoint, copy_checkpoint),
    write_in_batches,
)


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_told_of_with_the_files_name_and_leaves_the_old_file(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    path = tmp_path / "file"
    (tmp_path / "large").write_bytes(bytes(5_000))
    path.write_text("old")
    with full_disk(), pytest.raises(InputError) as failed:
        write(path)
    name = "rows.tsv" if write is write_in_batches else "file"
    reason = "is not whole, as where no space is left" if write is write_with_torch else "File too large"
    assert str(failed.value) == f"{tmp_path / name}: {reason}; make room, and start the same command again"
    assert path.read_text() == "old"
    left = {"rows.tsv.part", "rows.tsv.part.json"} if write is write_in_batches else set()
    assert {entry.name for entry in tmp_path.iterdir()} == {"file", "large"} | left


def test_what_a_full_disk_cut_off_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    with full_disk(), pytest.raises(InputError, match=r"rows\.tsv: File too large"):
        write_in_batches(path)
    with ResumableWriter(path, {}) as writer:
        assert writer.rows_done == 1
        writer.append(["second"], 1)
        writer.finish()
    assert path.read_text() == "short\nsecond\n"


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "Permission denied"), ValueError("x"), InputError("a.tsv: No space left on device")]
)
def test_other_errors_are_left_as_they_are(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, naming(tmp_path / "file"):
        raise error
    assert raised.value is error


class Stream(io.RawIOBase):
    """A file that takes some bytes and then fails."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.writes = error, 0

    def write(self, content: object) -> int:
        """Take the first bytes alone."""
        self.writes += 1
        if self.writes > 2:
            raise self.error
        return len(memoryview(content))  # type: ignore[call-overload]


def save_to(error: BaseException) -> None:
    """Save tensors to a file that fails; torch then raises an error of its own, whatever the file's was."""
    torch.save({name: torch.zeros(90_000) for name in "ab"}, Stream(error))


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), ValueError("write to closed file")])
def test_what_else_fails_while_torch_saves_is_no_full_disk(error: Exception) -> None:
    with pytest.raises(RuntimeError, match="unexpected pos"), naming("file"):
        save_to(error)


def test_a_full_disk_is_told_of_by_what_torch_hides() -> None:
    with pytest.raises(InputError, match="^file: No space left on device; make room"), naming("file"):
        save_to(OSError(errno.ENOSPC, "x"))


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupt_while_torch_saves_is_an_interrupt(interrupt: BaseException) -> None:
    with pytest.raises(type(interrupt)) as raised, naming("file"):
        save_to(interrupt)
    assert raised.value is interrupt


@pytest.mark.parametrize(
    "message",
    [
        "unable to write to file </torch_12_34_0>: No space left on device (28)",
        "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)",
        "[enforce fail at inline_container.cc:747] . open file failed with strerror: Is a directory",
    ],
)
def test_neither_shared_memory_nor_a_folder_is_a_full_disk(message: str) -> None:
    with pytest.raises(RuntimeError), naming("file"):
        raise RuntimeError(message)


def test_the_disks_own_words_are_kept(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"/file: No space left on device; make room"), naming(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_results_of_generation_for_which_there_is_no_space_are_named(
    write_checkpoint: Callable[..., Path],
    write_tsv: Callable[..., Path],
    caption_rows: list[list[str]],
    vocabulary: Path,
    run_generate: Callable[..., None],
    tmp_path: Path,
) -> None:
    options = {"bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 32}
    student = write_checkpoint("student.pt", "narvl", "caption", **options)
    command = (write_tsv("test.tsv", 5 * caption_rows), "--task", "caption", "--path", student, "--cpu")
    with full_disk(), pytest.raises(InputError, match=r"out/generate-test\.txt: File too large; make room"):
        run_generate(*command, "--batch-size", 9, "--num-workers", 0, "--results-path", tmp_path / "out")
