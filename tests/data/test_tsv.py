"""Random access to TSV rows: offsets, the stored index and its upkeep, errors, memory."""

import codecs
import logging
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narvl_plugin.data import tsv
from narvl_plugin.data.rewrite import whole_rows
from narvl_plugin.data.tsv import TsvFile, build_index, cached_index_path
from narvl_plugin.errors import BadRow, InputError, MissingInput


def test_rows_and_columns_in_the_order_asked_for(write_tsv: Callable[..., Path]) -> None:
    path = write_tsv("a.tsv", [["0", "zero", "null"], ["1", "eins", "one"], ["2", "zwei", "éü"]])
    file = TsvFile(path, "2,0")
    assert len(file) == 3
    assert [file[row] for row in (2, 0, 1)] == [["éü", "2"], ["null", "0"], ["one", "1"]]


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_the_last_row_needs_no_line_end(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(f"a\tb{ending or chr(10)}c\td{ending}".encode())
    file = TsvFile(path, "0,1")
    assert [file[row] for row in range(len(file))] == [["a", "b"], ["c", "d"]]


@given(st.lists(st.text(alphabet="ab\té", max_size=6), min_size=1, max_size=12), st.integers(1, 9))
def test_offsets_agree_with_splitting_the_whole_file(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], chunk: int
) -> None:
    contents = ("\n".join(lines) + "\n").encode()
    path = tmp_path_factory.mktemp("tsv") / "a.tsv"
    path.write_bytes(contents)
    before, tsv.CHUNK = tsv.CHUNK, chunk  # line ends fall on every place of a chunk
    try:
        offsets = build_index(str(path))
    finally:
        tsv.CHUNK = before
    assert [
        contents[start:end].decode().rstrip("\n") for start, end in zip(offsets[:-1], offsets[1:], strict=True)
    ] == lines


def test_the_index_is_stored_once_and_used(write_tsv: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tsv("a.tsv", [["a"], ["b"]])
    TsvFile(path, "0")
    assert Path(f"{path}.idx.npy").is_file()
    monkeypatch.setattr(tsv, "build_index", lambda path: pytest.fail("indexed again"))
    assert TsvFile(path, "0")[1] == ["b"]


@pytest.mark.parametrize("how", ["longer", "same size", "broken index"])
def test_a_stale_index_is_made_anew(write_tsv: Callable[..., Path], how: str) -> None:
    path = write_tsv("a.tsv", [["aa"], ["b"]])
    TsvFile(path, "0")
    if how == "broken index":
        Path(f"{path}.idx.npy").write_bytes(b"\x93NUMPY")
        expected = [["aa"], ["b"]]
    else:
        expected = [["a"], ["bb"]] if how == "same size" else [["c"], ["d"], ["e"]]
        write_tsv("a.tsv", expected)
        os.utime(path, ns=(time.time_ns(), time.time_ns() + 10**9))
    file = TsvFile(path, "0")
    assert [file[row] for row in range(len(file))] == expected


def test_the_index_goes_to_the_cache_where_the_folder_cannot_be_written(
    write_tsv: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_tsv("a.tsv", [["a"], ["b"]])
    write_index = tsv.write_index

    def refuse_beside(target: Path, contents: np.ndarray) -> None:
        if target.parent == path.parent:
            raise PermissionError("read-only")
        write_index(target, contents)

    monkeypatch.setattr(tsv, "write_index", refuse_beside)
    assert TsvFile(path, "0")[1] == ["b"]
    assert not Path(f"{path}.idx.npy").exists()
    assert cached_index_path(str(path)).is_file()


@pytest.mark.parametrize("is_writable", [True, False])
def test_a_user_without_a_home_reads_a_file(
    is_writable: bool,
    write_tsv: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As in a container whose user has neither HOME nor an entry in passwd: the file's own folder, or memory."""

    def refuse(_: Path, __: np.ndarray) -> None:
        raise PermissionError("read-only")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError("uid not found")))
    with pytest.raises(RuntimeError, match="home"):
        Path.home()
    if not is_writable:
        monkeypatch.setattr(tsv, "write_index", refuse)
    path = write_tsv("a.tsv", [["a"], ["b"]])
    assert [TsvFile(path, "0")[row] for row in range(2)] == [["a"], ["b"]]
    assert Path(f"{path}.idx.npy").is_file() == is_writable
    assert ("could not be stored; it stays in memory" in caplog.text) == (not is_writable)


def test_a_folder_whose_name_is_not_utf_8_is_read(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"x\xff")
    folder.mkdir()
    (folder / "a.tsv").write_text("7\ta\n")
    assert TsvFile(folder / "a.tsv", "0,1")[0] == ["7", "a"]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("7\ta\n\ufeff8\tb\n", encoding="utf-8-sig")
    file = TsvFile(tmp_path / "a.tsv", "0,1")
    assert [file[row] for row in range(len(file))] == [["7", "a"], ["\ufeff8", "b"]]  # it is text elsewhere
    assert pickle.loads(pickle.dumps(file))[0] == ["7", "a"]
    assert list(whole_rows(tmp_path / "a.tsv")[0]) == ["7", "a"]
    (tmp_path / "b.tsv").write_bytes(codecs.BOM_UTF8)
    with pytest.raises(InputError, match=r"b\.tsv: the file is empty"):
        TsvFile(tmp_path / "b.tsv", "0")


@pytest.mark.parametrize("end", [b"", b"\r"])
@pytest.mark.parametrize("rows", [[b"0\ta", b"1\tb", b"2\tc"], [b"a cat", b"a dog"]])
def test_rows_that_end_in_carriage_returns_are_refused(rows: list[bytes], end: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"\r".join(rows) + end)
    for open_file in (lambda path: TsvFile(path, "0"), whole_rows):
        with pytest.raises(InputError, match=r"a\.tsv: its rows end in carriage returns, .* convert it"):
            open_file(tmp_path / "a.tsv")


@pytest.mark.parametrize(
    "content", [b"0\ta\rb\n", b"0\ta\r\n", b"0\ta\rb", b"a cat\r", b"0\ta\r\n1\tb\r\n", b"0\ta\rb\n1\tb\n"]
)
def test_one_carriage_return_is_no_line_end(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(content)
    assert len(TsvFile(tmp_path / "a.tsv", "0")) == max(1, content.count(b"\n"))


def _open_and_read(path: Path) -> list[list[str]]:
    file = TsvFile(path, "0")
    return [file[0], file[len(file) - 1]]


def test_many_processes_may_start_at_once(write_tsv: Callable[..., Path], tmp_path: Path) -> None:
    path = write_tsv("a.tsv", [[str(row)] for row in range(20_000)])
    with ProcessPoolExecutor(8, multiprocessing.get_context("fork")) as pool:  # `Pool` ends by signals, and may hang
        assert list(pool.map(_open_and_read, [path] * 16)) == [[["0"], ["19999"]]] * 16
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tsv", "a.tsv.idx.npy"]


def test_instances_travel_to_workers_as_their_path(write_tsv: Callable[..., Path]) -> None:
    path = write_tsv("a.tsv", [["a", "x" * 100_000], ["b", "y"]])
    sent = pickle.dumps(TsvFile(path, "1,0"))
    assert len(sent) < 1000
    assert pickle.loads(sent)[1] == ["y", "b"]


def test_errors_name_file_row_and_what_disagrees(write_tsv: Callable[..., Path], tmp_path: Path) -> None:
    path = write_tsv("a.tsv", [["0", "1", "2", "3", "4"], ["0", "1", "2"]])
    with pytest.raises(BadRow, match=r"a\.tsv:2: has 3 columns, column 4 of --selected-cols 0,4,2 is missing"):
        TsvFile(path, "0,4,2")[1]
    with pytest.raises(MissingInput, match="nowhere.tsv: no such TSV file"):
        TsvFile(tmp_path / "nowhere.tsv", "0")
    with pytest.raises(InputError, match="--selected-cols 0;4"):
        TsvFile(path, "0;4")
    (tmp_path / "empty.tsv").touch()
    with pytest.raises(InputError, match="empty.tsv: the file is empty"):
        TsvFile(tmp_path / "empty.tsv", "0")
    (tmp_path / "latin.tsv").write_bytes("é\n".encode("latin-1"))
    with pytest.raises(BadRow, match=r"latin\.tsv:1: is not UTF-8"):
        TsvFile(tmp_path / "latin.tsv", "0")[0]
    with pytest.raises(IndexError):
        TsvFile(path, "0")[2]


@pytest.mark.parametrize("offsets", [[0, 4, 2, 8], [0, 4, 4, 8], [0, -4, 4, 8], [0, 4, 1 << 62, 8]])
def test_an_index_of_a_stranger_leads_nowhere(offsets: list[int], write_tsv: Callable[..., Path]) -> None:
    path = write_tsv("a.tsv", [["a"], ["b"], ["c"], ["d"]])
    contents = np.array([*tsv.file_stamp(str(path)), *offsets], dtype=np.int64)
    tsv.write_index(Path(f"{path}.idx.npy"), contents)
    with pytest.raises(InputError, match=r"a.tsv: its index is damaged at row \d; delete .*a.tsv.idx.npy"):
        for row in range(3):
            TsvFile(path, "0")[row]


@pytest.mark.parametrize("replaced", [b"a\nbb\nc\n", b"aa\n\n\nc\n", b"aa\nbcc\n", b"a\tb\nb\nc"])
def test_an_index_of_an_earlier_file_of_equal_size_and_time_is_named(replaced: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b"aa\nb\nc\n"[: len(replaced)])
    TsvFile(path, "0")
    status = os.stat(path)
    path.write_bytes(replaced)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    file = TsvFile(path, "0")
    with pytest.raises(InputError, match=r"a.tsv: its index is damaged at row \d; delete .*, which may be"):
        for row in range(len(file)):
            file[row]


@pytest.mark.parametrize("end", ["\n", "\r\n", "  \n\n", "\t\t\n", "\n \t"])
def test_blank_lines_at_the_end_are_no_rows_and_are_told_of(
    end: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.tsv"
    path.write_text(f"a\tb\nc\td\n{end}", newline="")
    with caplog.at_level(logging.WARNING):
        file = TsvFile(path, "1")
    assert [file[row] for row in range(len(file))] == [["b"], ["d"]]
    assert f"{path}: the file ends in {len(end.splitlines())} blank lines, which are no rows" in caplog.messages
    caplog.clear()
    assert len(pickle.loads(pickle.dumps(file))) == 2
    assert caplog.messages == []


def test_a_folder_in_place_of_a_file_is_called_one(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=rf"^{tmp_path}: is a folder; name the TSV files in it, joined by commas$"):
        TsvFile(tmp_path, "0")


def test_a_file_that_changed_while_it_was_read_is_called_so(write_tsv: Callable[..., Path]) -> None:
    path = write_tsv("a.tsv", [["0", "a"], ["1", "b"]])
    file = TsvFile(path, "0,1")
    with path.open("a") as stream:
        stream.write("2\tc\n")
    assert [file[row] for row in range(2)] == [["0", "a"], ["1", "b"]]  # what is appended does no harm
    path.write_text("0\tother\n1\n")
    with pytest.raises(
        InputError, match=r"a\.tsv: the file changed while it was read; start again when it is complete"
    ):
        file[0]


def test_an_index_that_leaves_out_the_first_row_is_made_anew(write_tsv: Callable[..., Path]) -> None:
    path = write_tsv("a.tsv", [["0", "a"], ["1", "b"]])
    np.save(f"{path}.idx.npy", np.array([*tsv.file_stamp(str(path)), 4, 8]))
    assert len(TsvFile(path, "0")) == 2


def test_a_blank_line_between_rows_is_called_one(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("a\tb\n\t\nc\td\n")
    with pytest.raises(BadRow, match=r"a\.tsv:2: is a blank line; delete it"):
        TsvFile(path, "1")[1]
    path.write_text("\n\n \n")
    with pytest.raises(InputError, match=r"a\.tsv: the file holds blank lines only"):
        TsvFile(path, "1")


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<i8', ((((",
        "-" * 9000 + "1",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (1" + "0" * 30 + ",)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (True,)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (1,), [1]: 2}",
    ],
)
def test_an_index_that_is_no_array_is_made_anew(header: str, write_tsv: Callable[..., Path]) -> None:
    path = write_tsv("a.tsv", [["a"], ["b"]])
    start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
    Path(f"{path}.idx.npy").write_bytes(start + header.encode() + bytes(16))
    assert TsvFile(path, "0")[1] == ["b"]


def test_an_index_that_is_an_archive_or_a_pipe_is_made_anew(write_tsv: Callable[..., Path]) -> None:
    path = write_tsv("a.tsv", [["a"], ["b"]])
    index = Path(f"{path}.idx.npy")
    with index.open("wb") as file:
        np.savez(file, offsets=np.arange(4))
    assert TsvFile(path, "0")[1] == ["b"]
    index.unlink()
    os.mkfifo(index)  # whoever opens it waits for a writer
    assert TsvFile(path, "0")[1] == ["b"]


def test_a_row_without_end_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "zeros.tsv", "wb") as file:
        file.truncate(tsv.MAX_ROW + 1)
    offsets = np.array([*tsv.file_stamp(str(tmp_path / "zeros.tsv")), 0, tsv.MAX_ROW + 1], dtype=np.int64)
    tsv.write_index(tmp_path / "zeros.tsv.idx.npy", offsets)
    with pytest.raises(BadRow, match=r"zeros.tsv:1: has 1,073,741,825 bytes; more than 1,073,741,824 are refused"):
        TsvFile(tmp_path / "zeros.tsv", "0")[0]


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _open_large(path: Path, answer: "multiprocessing.Queue[tuple[float, int, int, list[str]]]") -> None:
    before, start = _resident_bytes(), time.perf_counter()
    file = TsvFile(path, "0")
    row = file[len(file) - 1]
    seconds, opened = time.perf_counter() - start, _resident_bytes() - before
    for other in range(0, len(file), len(file) // 2000):  # 20 MB of rows, all over the file
        file[other]
    answer.put((seconds, opened, _resident_bytes() - before, row))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_ten_gigabytes_with_their_index_take_neither_time_nor_memory(tmp_path: Path) -> None:
    path, row_bytes, rows = tmp_path / "large.tsv", 10_000, 1_000_000
    with open(path, "wb") as file:  # a sparse file: zeros but for the last row, and the ends of those that are read
        file.truncate(row_bytes * rows)
        for row in range(0, rows, rows // 2000):
            file.seek(row_bytes * (row + 1) - 1)
            file.write(b"\n")
        file.seek(row_bytes * rows - 5)
        file.write(b"\nlast")
    starts = np.arange(rows, dtype=np.int64) * row_bytes
    starts[-1] = row_bytes * rows - 4
    index = np.concatenate([tsv.file_stamp(str(path)), starts, [row_bytes * rows]]).astype(np.int64)
    tsv.write_index(Path(f"{path}.idx.npy"), index)
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    process = context.Process(target=_open_large, args=(path, answer))
    process.start()
    seconds, opened, read, last = answer.get(timeout=30)
    process.join()
    assert last == ["last"]
    assert seconds < 1
    assert opened < 4 << 20
    assert read < index.nbytes + (4 << 20)  # the index is mapped, of the rows nothing stays
