"""The resumable writer: stopping anywhere changes no byte of the finished file."""

from __future__ import annotations

from pathlib import Path

import pytest

from narvl_plugin.data.resumable import ResumableWriter, StalePart, fingerprint

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
