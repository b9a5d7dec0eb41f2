"""The rows of inputs of all kinds, and what hostile ones may not do."""

from __future__ import annotations

import base64
import io
import tarfile
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from narvl_plugin.bulk import rows as rows_module
from narvl_plugin.bulk.places import files_at, opened
from narvl_plugin.bulk.rows import Columns, Images, ParquetRows, Row, TarMembers, TsvRows
from narvl_plugin.bulk.shards import plan
from narvl_plugin.errors import BadRow, InputError, MissingInput

CAPTIONS = Columns(None, {"id": 0, "image": 4, "caption": 2})
QUESTIONS = Columns("question", {"id": 0, "image": 4, "question": 2})


def read(place: Path | str, columns: Columns = CAPTIONS, rows_of_shard: int = 4) -> list[Row | BadRow]:
    """Read all rows of an input, shard by shard."""
    return [row for shard in plan([str(place)], rows_of_shard).shards for row in shard.source.rows(columns)]


def contents(found: list[Row | BadRow]) -> dict[str, bytes]:
    """Return the images by name; all rows must be good."""
    assert all(isinstance(row, Row) for row in found), found
    return {row.name: row.image if isinstance(row.image, bytes) else row.image.read_bytes() for row in found}  # type: ignore[union-attr]


# --- All kinds of inputs ---------------------------------------------------------------------------------------------


def test_all_kinds_hold_the_same_images(
    folder: Path, tsv: Path, pictures: Mapping[str, bytes], write_tar: Callable[..., Path], tmp_path: Path
) -> None:
    archive = write_tar("images.tar", pictures)
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'narvl[parquet]'")
    from pyarrow import parquet

    names, data = list(pictures), list(pictures.values())
    table = pyarrow.table({"id": names, "image": data})
    parquet.write_table(table, tmp_path / "plain.parquet", row_group_size=3)
    table = pyarrow.table({"image": [{"bytes": one, "path": None} for one in data]})
    parquet.write_table(table, tmp_path / "hub.parquet")
    for place in (folder, f"{folder}/*.png", tsv, tmp_path / "plain.parquet", tsv.as_uri(), folder.as_uri()):
        found = contents(read(place))
        assert list(found.values()) == data, place
        assert [name.rpartition("/")[2] for name in found] == names
    assert contents(read(archive)) == {name.removesuffix(".png"): one for name, one in pictures.items()}
    assert contents(read(tmp_path / "hub.parquet")) == {str(number): one for number, one in enumerate(data)}


def test_shards_follow_from_the_inputs_alone(folder: Path, tsv: Path, write_tar: Callable[..., Path]) -> None:
    archive = write_tar("b c.tar", {"a.png": b"x"})
    given = [str(archive), str(tsv), str(folder)]
    first = plan(given, 4)
    assert [shard.name for shard in first.shards] == [
        *(f"{number:06}-images" for number in range(3)),
        "000003-b_c",
        *(f"{number:06}-rows" for number in (4, 5, 6)),
    ]
    assert plan(given, 4) == first
    (folder / "000.png").write_bytes(b"other")
    assert plan(given, 4).record != first.record
    assert plan(given, 5).record != first.record


def test_texts_stand_beside_images(
    pictures: Mapping[str, bytes], write_tar: Callable[..., Path], tmp_path: Path
) -> None:
    image = pictures["000.png"]
    archive = write_tar("a.tar", {"x.png": image, "x.txt": b"what is it?", "y.txt": b"first", "y.jpg": image})
    assert [row.text for row in read(archive, QUESTIONS)] == ["what is it?", "first"]  # type: ignore[union-attr]
    line = f"7\timg\twhat?\t\t{base64.b64encode(image).decode()}"
    (tmp_path / "rows.tsv").write_text(line)
    assert read(tmp_path / "rows.tsv", QUESTIONS) == [Row("7", f"{tmp_path}/rows.tsv:1", image, "what?")]
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'narvl[parquet]'")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"image": [image], "question": ["why?"]}), tmp_path / "q.parquet")
    assert [row.text for row in read(tmp_path / "q.parquet", QUESTIONS)] == ["why?"]  # type: ignore[union-attr]
    parquet.write_table(pyarrow.table({"image": [image], "question": [3]}), tmp_path / "n.parquet")
    with pytest.raises(InputError, match="'question' is int64; it must hold texts"):
        read(tmp_path / "n.parquet", QUESTIONS)


def test_what_is_wrong_is_named(folder: Path, tsv: Path, tmp_path: Path) -> None:
    lines = tsv.read_bytes().splitlines(keepends=True)
    tsv.write_bytes(b"".join([lines[0], b"short\trow\n", b"\n", b"\xff\t\t\t\tAAAA\n", *lines[1:2]]))
    found = read(tsv, rows_of_shard=2)
    assert [isinstance(row, Row) for row in found] == [True, False, False, False, True]
    assert str(found[1]).startswith(f"{tsv}:2: has 2 columns, and column 4 with the image is missing")
    assert str(found[3]).startswith(f"{tsv}:4: is not UTF-8 text")
    with pytest.raises(MissingInput, match="gone.tsv: no such"):
        plan([str(tmp_path / "gone.tsv")])
    with pytest.raises(MissingInput, match="no such file"):
        files_at((tmp_path / "gone").as_uri())
    with pytest.raises(InputError, match="is not an address that can be read"):
        plan(["nothing://here/x.tar"])


def test_rows_at_an_address_name_no_files(folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.tsv"
    rows.write_text(f"1\t\ta\t\t{folder}/000.png\n")
    assert len(contents(read(rows))) == 1
    assert "must hold base64" in str(read(rows.as_uri())[0])


# --- Hostile archives ------------------------------------------------------------------------------------------------


def test_nothing_in_a_tar_is_followed_or_unpacked(
    pictures: Mapping[str, bytes], write_tar: Callable[..., Path], tmp_path: Path
) -> None:
    image = pictures["000.png"]
    (tmp_path / "secret.png").write_bytes(image)
    members: dict[str, Any] = {"../out.png": image, "/abs.png": image}
    for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)):
        header = tarfile.TarInfo()
        header.type, header.linkname = kind, str(tmp_path / "secret.png")
        members[f"l{number}.png"] = header
    before = sorted(tmp_path.iterdir())
    found = read(write_tar("a.tar", members))
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "a.tar"])
    assert [isinstance(row, Row) for row in found] == [True, True, False, False, False, False]
    assert all("is a link or a special file, which is not followed" in str(row) for row in found[2:])


def test_members_of_a_tar_are_bounded(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    header = tarfile.TarInfo("a.png")
    header.size = 1 << 40
    with open(tmp_path / "claims.tar", "wb") as file:
        file.write(header.tobuf())
        file.truncate((1 << 40) + 10240)  # takes no space
    (found,) = read(tmp_path / "claims.tar")
    assert isinstance(found, BadRow) and "more than 268,435,456 are refused" in str(found)
    long = tarfile.TarInfo("x")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    (tmp_path / "long.tar").write_bytes(long.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(InputError, match="long.tar: is not a tar archive, or is damaged .*asks for"):
        read(tmp_path / "long.tar")
    archive = write_tar("text.tar", {"a.png": b"x", "a.txt": b"y" * ((1 << 20) + 1)})
    assert "1,048,577 bytes" in str(read(archive)[0])
    (tmp_path / "zip.tar").write_bytes(b"PK\3\4" + bytes(2000))
    with pytest.raises(InputError, match="zip.tar: is not a tar archive"):
        read(tmp_path / "zip.tar")


def test_an_image_too_many_or_none_is_a_bad_row(write_tar: Callable[..., Path]) -> None:
    archive = write_tar("a.tar", {"a.png": b"1", "a.jpg": b"2", "b.txt": b"3", ".hidden.png": b"4", "__x.png": b"5"})
    assert [str(row).rpartition("a.tar:")[2] for row in read(archive)] == [
        "a: has 2 images beside .png, .jpg; expected one",
        "b: has 0 images beside .txt; expected one",
    ]


def test_memory_does_not_grow_with_the_members_of_a_tar(write_tar: Callable[..., Path]) -> None:
    peaks = []
    for number in (200, 2000):
        archive = write_tar(f"{number}.tar", {f"{place:05}.png": b"x" for place in range(number)})
        tracemalloc.start()
        assert sum(1 for _ in TarMembers(str(archive)).rows(CAPTIONS)) == number
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0], peaks


# --- Hostile Parquet files -------------------------------------------------------------------------------------------


def test_types_of_other_programs_are_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'narvl[parquet]'")
    from pyarrow import parquet

    built = []

    class Pickled(pyarrow.ExtensionType):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__(pyarrow.binary(), "other.pickled")

        def __arrow_ext_serialize__(self) -> bytes:
            return b"cos\nsystem\n"

        @classmethod
        def __arrow_ext_deserialize__(cls, storage: Any, serialized: bytes) -> Any:
            built.append(serialized)
            return cls()

    for beside in range(3):  # shifts where the name stands in the base64 of the footer
        place = str(tmp_path / f"{beside}.parquet")
        kind = Pickled()
        data = pyarrow.ExtensionArray.from_storage(kind, pyarrow.array([b"x"], pyarrow.binary()))
        nested = pyarrow.StructArray.from_arrays([data], ["x" * beside])
        for column in (data, nested):
            parquet.write_table(pyarrow.table({"y" * beside: [1], "image": column}), place)
            pyarrow.register_extension_type(kind)
            try:
                built.clear()
                with pytest.raises(InputError, match="types that other programs define"):
                    list(ParquetRows(place, 0, 0).rows(CAPTIONS))
                with pytest.raises(InputError, match="types that other programs define"):
                    plan([place])
                assert not built
                with monkeypatch.context() as patch:  # it would have been
                    patch.setattr(rows_module, "_refuse_extension_types", lambda place, file: None)
                    with pytest.raises(InputError):
                        list(ParquetRows(place, 0, 0).rows(CAPTIONS))
                assert built
            finally:
                pyarrow.unregister_extension_type("other.pickled")


def test_damaged_parquet_files_are_named(tmp_path: Path, pictures: Mapping[str, bytes]) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'narvl[parquet]'")
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"image": list(pictures.values())}), file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(InputError, match="a.parquet: is not a Parquet file, or is cut off"):
        plan([str(file)])
    file.write_bytes(b"PAR1" + bytes(len(whole) - 12) + b"\xff\xff\xff\x7fPAR1")
    with pytest.raises(InputError, match="a.parquet: is not a Parquet file, or is cut off"):
        plan([str(file)])
    file.write_bytes(whole[:4] + bytes(2000) + whole[2004:])
    with pytest.raises(InputError, match="a.parquet: is damaged"):
        list(ParquetRows(str(file), 0, 0).rows(CAPTIONS))
    parquet.write_table(pyarrow.table({"image": [[1, 2]]}), file)
    with pytest.raises(InputError, match="the column 'image' is list<"):
        list(ParquetRows(str(file), 0, 0).rows(CAPTIONS))
    parquet.write_table(pyarrow.table({"picture": [b"1"]}), file)
    with pytest.raises(InputError, match="has no column 'image' with the bytes of image files; it has picture"):
        list(ParquetRows(str(file), 0, 0).rows(CAPTIONS))
    parquet.write_table(pyarrow.table({"image": pyarrow.array([None, b"1"], pyarrow.binary())}), file)
    first, second = ParquetRows(str(file), 0, 5).rows(CAPTIONS)
    assert str(first) == f"{file}:6: the image is missing" and isinstance(second, Row)


def test_equal_images_of_a_parquet_file_are_read_one_at_a_time(tmp_path: Path) -> None:
    """A few bytes may stand for many large images."""
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'narvl[parquet]'")
    from pyarrow import parquet

    file, size = str(tmp_path / "a.parquet"), 4 << 20
    parquet.write_table(pyarrow.table({"image": [bytes(size)] * 64}), file, compression="zstd")
    assert Path(file).stat().st_size < 1 << 20
    pyarrow.default_memory_pool().release_unused()
    before = pyarrow.total_allocated_bytes()
    most = 0
    for _ in ParquetRows(file, 0, 0).rows(CAPTIONS):
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < 16 * size


# --- Addresses -------------------------------------------------------------------------------------------------------


def test_a_file_at_an_address_is_read_as_from_a_path(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pip install 'narvl[ray]'")
    (tmp_path / "a.tsv").write_bytes(b"one\ntwo\n")
    with opened((tmp_path / "a.tsv").as_uri()) as file:
        assert isinstance(file, io.BufferedReader)
        assert file.readline(100) == b"one\n"
        file.seek(1)
        assert file.readline(2) == b"ne"
    assert files_at(f"{tmp_path.as_uri()}/*.tsv") == [(tmp_path / "a.tsv").as_uri()]
    gone = Images((("gone.png", (tmp_path / "gone.png").as_uri()),))
    assert "gone.png: the image cannot be read" in str(*gone.rows(CAPTIONS))
    with pytest.raises(InputError, match="the file changed"):
        list(TsvRows(str(tmp_path / "a.tsv"), 0, 9, 0, 99).rows(CAPTIONS))
