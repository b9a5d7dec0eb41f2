"""The resumable writer: stopping anywhere changes no byte of the finished file."""

from __future__ import annotations

import multiprocessing
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from narvl_plugin.data.resumable import ResumableWriter, StalePart, fingerprint
from narvl_plugin.errors import InputError

FORK = multiprocessing.get_context("fork")

BATCHES = [["a\t1", "a\t2"], ["b\té", "b\t4"], ["c\t5"]]
WHOLE = "a\t1\na\t2\nb\té\nb\t4\nc\t5\n".encode()


def write_from(writer: ResumableWriter, stop_after: int | None = None) -> None:
    """Append the batches not yet written; stop as a killed program does, without finish()."""
    with writer:
        for rows in writer.batches(5, 2, "test"):
            if rows.start // 2 == stop_after:
                return
            assert rows.stop == min(rows.start + 2, 5)
            writer.append(BATCHES[rows.start // 2], rows=len(rows))
        writer.finish()


@pytest.mark.parametrize("stop", [0, 1, 2])
@pytest.mark.parametrize("torn", [b"", b"half a li", b"a whole line that was never recorded\n"])
def test_a_stopped_file_ends_as_an_unbroken_one(tmp_path: Path, stop: int, torn: bytes) -> None:
    out = tmp_path / "deep" / "out.tsv"
    write_from(ResumableWriter(out, {"beam": 5}), stop_after=stop)
    assert not out.exists()
    with open(tmp_path / "deep" / "out.tsv.part", "ab") as part:
        part.write(torn)
    write_from(ResumableWriter(out, {"beam": 5}))
    assert out.read_bytes() == WHOLE
    assert [path.name for path in out.parent.iterdir()] == ["out.tsv"]


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "out.tsv"
    write_from(ResumableWriter(out, {"beam": 5, "data": "x"}), stop_after=1)
    with pytest.raises(StalePart, match="beam=5, now beam=3"), ResumableWriter(out, {"beam": 3, "data": "x"}):
        pass


def test_a_part_that_lost_bytes_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.tsv"
    write_from(ResumableWriter(out, {}), stop_after=1)
    (tmp_path / "out.tsv.part").write_bytes(b"a")
    with pytest.raises(StalePart, match="holds 1 bytes"), ResumableWriter(out, {}):
        pass


@pytest.mark.parametrize(
    "record",
    [
        "{",
        "[]",
        "[" * 100_000,
        '{"rows": 1}',
        '{"rows": "x", "bytes": 0, "settings": {}}',
        '{"rows": 1, "bytes": -5, "settings": {}}',
        '{"rows": 1, "bytes": 0, "settings": {}, "counts": {"dropped": []}}',
        '{"rows": 1, "bytes": 0, "settings": {}, "counts": {"dropped": -1}}',
    ],
)
def test_a_damaged_record_is_named(record: str, tmp_path: Path) -> None:
    out = tmp_path / "out.tsv"
    write_from(ResumableWriter(out, {}), stop_after=1)
    (tmp_path / "out.tsv.part.json").write_text(record)
    with pytest.raises(StalePart, match=r"out.tsv.part.json: is damaged .*; delete it"), ResumableWriter(out, {}):
        pass


def test_counts_go_on_where_they_stopped(tmp_path: Path) -> None:
    out = tmp_path / "out.tsv"
    with ResumableWriter(out, {}) as writer:
        writer.append(["a"], rows=2, counts={"dropped": 1})
    with ResumableWriter(out, {}) as writer:
        writer.append(["b"], rows=2, counts={"dropped": 1, "cleaned": 1})
        writer.append(["c"], rows=1)
        assert writer.counts == {"dropped": 2, "cleaned": 1}


def test_a_discarded_file_begins_anew(tmp_path: Path) -> None:
    with ResumableWriter(tmp_path / "out.tsv", {}) as writer:
        writer.append(["a"], rows=1)
        writer.discard()
    assert not list(tmp_path.iterdir())


def test_fingerprint_sees_a_change_at_either_end_and_in_size(tmp_path: Path) -> None:
    middle = b"x" * 300_000
    contents = [b"a" + middle + b"a", b"b" + middle + b"a", b"a" + middle + b"b", b"a" + middle + b"xa"]
    prints = set()
    for content in contents:
        (tmp_path / "file").write_bytes(content)
        prints.add(fingerprint(tmp_path / "file"))
    assert len(prints) == len(contents)


def write_all(out: Path, start: Any, results: Any) -> None:
    """Write the file slowly once told to, unless it is finished; say how that went."""
    start.wait()
    try:
        with ResumableWriter(out, {}) as writer:
            if writer.finished:
                results.put("finished")
                return
            for rows in writer.batches(5, 2, "test"):
                time.sleep(0.05)
                writer.append(BATCHES[rows.start // 2], rows=len(rows))
            writer.finish()
        results.put("written")
    except InputError as error:
        results.put(str(error))


def test_of_processes_that_start_together_one_writes(tmp_path: Path) -> None:
    out, start, results = tmp_path / "out.tsv", FORK.Event(), FORK.Queue()
    processes = [FORK.Process(target=write_all, args=(out, start, results)) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    said = sorted(results.get(timeout=30) for _ in processes)
    for process in processes:
        process.join()
    assert said.count("written") == 1
    # The others come while it writes, perhaps before its lock names it, or, on a busy machine, when it has finished.
    assert all(re.search(r"out\.tsv: (another )?process|^finished$", result) for result in said if result != "written")
    assert out.read_bytes() == WHOLE
    assert [path.name for path in tmp_path.iterdir()] == ["out.tsv"]
    write_all(out, start, results)
    assert results.get(timeout=30) == "finished"


def write_and_wait(out: Path, ready: Any) -> None:
    """Write one batch and some bytes of the next, and wait."""
    with ResumableWriter(out, {}) as writer:
        writer.append(BATCHES[0], rows=2)
        with open(writer.part, "ab") as part:
            part.write(b"half a li")
        ready.set()
        signal.pause()


def test_what_a_killed_process_was_writing_is_gone_on_with_at_once(tmp_path: Path) -> None:
    out, ready = tmp_path / "out.tsv", FORK.Event()
    process = FORK.Process(target=write_and_wait, args=(out, ready))
    process.start()
    assert ready.wait(30)
    with pytest.raises(InputError, match=rf"out.tsv: process {process.pid} on .* is writing it"):
        write_from(ResumableWriter(out, {}))
    process.kill()
    process.join()
    write_from(ResumableWriter(out, {}))
    assert out.read_bytes() == WHOLE
    assert [path.name for path in tmp_path.iterdir()] == ["out.tsv"]


def test_a_process_that_comes_just_too_late_sees_the_finished_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has looked before the other gave the file its name, and gets the lock after that."""
    out = tmp_path / "out.tsv"
    write_from(ResumableWriter(out, {}))
    looks = iter([False])
    monkeypatch.setattr(ResumableWriter, "finished", property(lambda self: next(looks, True)))
    with ResumableWriter(out, {}) as writer:
        assert writer.finished
    assert [path.name for path in tmp_path.iterdir()] == ["out.tsv"]
    assert out.read_bytes() == WHOLE


def test_a_run_that_fails_before_its_first_batch_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ResumableWriter(tmp_path / "out.tsv", {}):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_file_without_rows_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="no row is left to write; all 2 rows were skipped"),
        ResumableWriter(tmp_path / "out.tsv", {}) as writer,
    ):
        writer.append([], rows=2)
        writer.finish()
    assert not list(tmp_path.iterdir())


def test_bytes_that_are_no_utf8_come_back(tmp_path: Path) -> None:
    with ResumableWriter(tmp_path / "out.tsv", {}) as writer:
        writer.append([b"caf\xe9\t\xff".decode("utf-8", "surrogateescape")], rows=1)
        writer.finish()
    assert (tmp_path / "out.tsv").read_bytes() == b"caf\xe9\t\xff\n"
