"""A folder of shards: the same rows as in one file, and what becomes of killed jobs and of bad rows."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from bulk_jobs import job, joined, kill_half_way

from narvl_plugin.api.files import predict_files
from narvl_plugin.api.model import Decoding
from narvl_plugin.bulk.answers import contents
from narvl_plugin.bulk.commands import distill_shards, predict_shards
from narvl_plugin.bulk.engines import Runner
from narvl_plugin.bulk.folder import PROGRESS, SUCCESS
from narvl_plugin.cli.app import app
from narvl_plugin.data.resumable import StalePart
from narvl_plugin.errors import BadRow, InputError
from narvl_plugin.inference.distillation import Distillation, distill

pytestmark = pytest.mark.integration


def test_shards_hold_what_one_file_holds(folder: Path, tsv: Path, tmp_path: Path) -> None:
    predict_files([folder], out=tmp_path / "one.tsv", device="cpu", batch_size=4)
    one = (tmp_path / "one.tsv").read_text()
    for workers, given in ((0, folder), (2, folder), (1, tsv)):
        out = tmp_path / f"{workers}"
        totals, _ = predict_shards([str(given)], out, job(workers=workers), Runner(), rows_of_shard=4)
        assert joined(out) == one
        assert totals[:3] == (10, 0, 10)
        assert len(list(out.glob("*.tsv"))) == 3
        assert json.loads((out / SUCCESS).read_text()) == {"rows": 10, "skipped": 0, "shards": 3}


def test_rows_bring_their_own_texts(
    pictures: Mapping[str, bytes], write_tar: Callable[..., Path], tmp_path: Path
) -> None:
    members: dict[str, bytes] = {}
    for number, (name, data) in enumerate(pictures.items()):
        members |= {name: data, name.replace("png", "txt"): f"what is number {number}?".encode()}
    archive = write_tar("a.tar", members | {"100.png": b"", "100.txt": b"an empty image", "101.png": data})
    out = tmp_path / "out"
    with pytest.raises(BadRow, match=r"a.tar:100: .* fix the row, or allow more bad rows by --skip-bad-rows \(now 0\)"):
        predict_shards([str(archive)], out, job(verb="answer", suffix=".jsonl"), Runner())
    assert not (out / SUCCESS).exists() and not joined(out, ".jsonl")
    asked = job(verb="answer", suffix=".jsonl", skip_bad_rows=2)
    totals, _ = predict_shards([str(archive)], out, asked, Runner())
    assert totals[:2] == (10, 2)  # 101 has no question
    records = [json.loads(line) for line in joined(out, ".jsonl").splitlines()]
    assert [record["prompt"] for record in records] == [f"what is number {number}?" for number in range(10)]


def test_bad_rows_of_an_earlier_run_are_counted(folder: Path, tmp_path: Path) -> None:
    for name in ("001.png", "007.png"):
        (folder / name).write_bytes(b"no picture, but a text that is long enough")
    out, one = tmp_path / "out", job(skip_bad_rows=1)
    with pytest.raises(BadRow, match="007.png: .*now 1"):
        predict_shards([str(folder)], out, one, Runner(), rows_of_shard=4)
    assert [file.name for file in sorted(out.glob("*.tsv"))] == ["000000-images.tsv"]
    with pytest.raises(BadRow, match="007.png: .*now 1"):
        predict_shards([str(folder)], out, one, Runner(), rows_of_shard=4)
    totals, _ = predict_shards([str(folder)], out, job(skip_bad_rows=2), Runner(), rows_of_shard=4)
    assert totals[:3] == (8, 2, 6)
    assert [line.split("\t")[0] for line in joined(out).splitlines()] == [
        name for name in (f"{number:03}.png" for number in range(10)) if name not in ("001.png", "007.png")
    ]


def test_a_finished_folder_stays_and_others_are_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict_shards([str(folder)], out, job(), Runner(), rows_of_shard=4)
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.tsv")}
    totals, _ = predict_shards([str(folder)], out, job(), Runner(), rows_of_shard=4)
    assert totals[:3] == (10, 0, 0)
    assert {file.name: file.stat().st_mtime_ns for file in out.glob("*.tsv")} == before
    (out / "000001-images.tsv").unlink()
    assert predict_shards([str(folder)], out, job(), Runner(), rows_of_shard=4)[0][:3] == (10, 0, 4)
    with pytest.raises(StalePart, match="was begun with batch_size=4, now batch_size=5"):
        predict_shards([str(folder)], out, job(batch_size=5), Runner(), rows_of_shard=4)
    with pytest.raises(StalePart, match="was begun with beam=None, now beam=2"):
        predict_shards([str(folder)], out, job(decoding=Decoding(beam=2)), Runner(), rows_of_shard=4)
    (folder / "000.png").unlink()
    with pytest.raises(StalePart, match="was begun with inputs="):
        predict_shards([str(folder)], out, job(), Runner(), rows_of_shard=4)
    with pytest.raises(InputError, match="holds 001.png, which is no output"):
        predict_shards([str(folder)], folder, job(), Runner())


def test_a_killed_job_goes_on(folder: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    predict_shards([str(folder)], whole, job(), Runner(), rows_of_shard=1)
    kill_half_way(folder, out, "local", 3)
    with open(out / PROGRESS, "a", encoding="utf-8") as file:
        file.write('{"shard": "0000')  # as if it had been killed there
    (out / "000009-images.tsv.0a1b2c3d.part").write_text("half")
    totals, _ = predict_shards([str(folder)], out, job(), Runner(), rows_of_shard=1)
    assert totals.rows == 10 and 0 < totals.new <= 8
    assert joined(out) == joined(whole)
    assert sorted(file.name for file in out.iterdir()) == sorted(file.name for file in whole.iterdir())


def test_parquet_shards_have_one_schema(folder: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pip install 'narvl[parquet]'")
    lines = tmp_path / "lines"
    for out, suffix in ((lines, ".jsonl"), (tmp_path / "table", ".parquet")):
        predict_shards([str(folder)], out, job(suffix=suffix), Runner(), rows_of_shard=4)
    records = [json.loads(line) for line in joined(lines, ".jsonl").splitlines()]
    assert parquet.read_table([*sorted((tmp_path / "table").glob("*.parquet"))]).to_pylist() == records
    (tmp_path / "none.parquet").write_bytes(contents([], ".parquet"))
    assert parquet.read_schema(tmp_path / "none.parquet") == parquet.read_schema(
        next((tmp_path / "table").glob("*.parquet"))
    )


def test_distilled_shards_hold_what_one_file_holds(
    write_checkpoint: Callable[..., Path], vocabulary: Path, tsv: Path, tmp_path: Path
) -> None:
    teacher = write_checkpoint("teacher.pt", "ofa", "caption", bpe_dir=str(vocabulary), patch_image_size=32)
    lines = tsv.read_text().splitlines()
    tsv.write_text("\n".join([*lines[:4], "bad", *lines[4:]]))
    options = {"data": tsv, "beam": 2, "batch_size": 2, "max_len_b": 4, "skip_bad_rows": 9, "device": "cpu"}
    distill(teacher=teacher, out=tmp_path / "one.tsv", **options)
    out = tmp_path / "out"
    totals = distill_shards(Distillation(teachers=(teacher,), **options), out, Runner(), rows_of_shard=3)
    assert joined(out) == (tmp_path / "one.tsv").read_text()
    assert [file.name for file in sorted(out.glob("*.tsv"))] == [f"{number:06}-rows.tsv" for number in range(3)]
    assert totals.skipped >= 1 and totals.rows + totals.skipped == 11


def test_the_program_writes_a_folder_where_a_name_ends_in_a_slash(
    folder: Path, write_tar: Callable[..., Path], pictures: Mapping[str, bytes], tmp_path: Path, capsys: Any
) -> None:
    def narvl(*words: object) -> None:
        app([*map(str, words), "--device", "cpu"], standalone_mode=False)

    narvl("caption", folder, "--out", f"{tmp_path}/a/")
    assert "10 captions, 0 left out, " in capsys.readouterr().err
    narvl("caption", folder, "--out", f"{tmp_path}/a.jsonl/")
    assert len(joined(tmp_path / "a.jsonl", ".jsonl").splitlines()) == 10
    narvl("answer", folder, "what is it?", "--out", f"{tmp_path}/b/")
    archive = write_tar("a.tar", {"x.png": pictures["000.png"], "x.txt": b"what is it?"})
    narvl("answer", archive, "--out", f"{tmp_path}/c/")
    assert (
        joined(tmp_path / "b").splitlines()[0].partition("\t")[2] == joined(tmp_path / "c").strip().partition("\t")[2]
    )
    for words, message in (
        (["caption", folder, "--engine", "ray"], "need a folder of shards, --out NAME/"),
        (["caption", folder, "--actors", 2, "--out", f"{tmp_path}/d/"], "are for --engine ray"),
        (["caption", folder, "--engine", "spark", "--out", f"{tmp_path}/d/"], "choose local or ray"),
        (["caption", folder, "--out", f"{tmp_path}/d.json/"], "a folder of shards is NAME/, or NAME.tsv/"),
        (["caption", folder, "--out", f"{tmp_path}/d/", "--show", "x.html"], "is for one file"),
        (["answer", folder, "--out", f"{tmp_path}/d"], "the question is missing"),
    ):
        with pytest.raises(InputError, match=message):
            narvl(*words)


def test_a_missing_ray_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"^--engine ray: needs Ray Data; pip install 'narvl\[ray\]'$"):
        Runner("ray")


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, pictures: Mapping[str, bytes]) -> None:
    peaks = []
    for number in (100, 1000):
        images = tmp_path / f"{number}"
        images.mkdir()
        for place in range(number):
            (images / f"{place:04}.png").write_bytes(pictures[f"{place % 10:03}.png"])
        predict_shards([str(images)], tmp_path / f"out{number}", job(), Runner(), rows_of_shard=20)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    assert peaks[1] < peaks[0] + 20, f"MiB: {peaks}"
