"""The commands answer, locate, graph and entail, and the formats of their output; a killed run goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import narvl
from narvl_plugin.api.files import predict_files
from narvl_plugin.api.trained import TrainedEngine
from narvl_plugin.cli.app import app
from narvl_plugin.errors import InputError, MissingInput

pytestmark = pytest.mark.integration


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    draw = np.random.default_rng(1)
    for name in ("a.png", "b.png", "c.jpg", "d.png", "e.png"):
        Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(folder / name)
    return folder


def narvl_command(*words: object) -> None:
    app([*map(str, words)], standalone_mode=False)


@pytest.mark.parametrize(
    ("command", "verb", "text"),
    [("answer", "answer", "what color?"), ("locate", "locate", "the cat"), ("entail", "entails", "a cat sits")],
)
def test_each_command_answers_as_the_api(
    several_tasks: Path, folder: Path, capsys: Any, command: str, verb: str, text: str
) -> None:
    narvl_command(command, folder, text, "--checkpoint", several_tasks, "--workers", 0, "--device", "cpu")
    said = capsys.readouterr()
    expected = narvl.load(several_tasks, device="cpu").predict(verb, sorted(folder.iterdir()), text)
    lines = [line.split("\t") for line in said.out.splitlines()]
    assert [line[:2] for line in lines] == [
        [file.name, one.text] for file, one in zip(sorted(folder.iterdir()), expected, strict=True)
    ]
    assert [float(line[2]) for line in lines] == pytest.approx([one.confidence for one in expected], abs=1e-3)
    assert "5 " in said.err and "images/s" in said.err and "in the box" not in said.err


def test_all_boxes_of_a_phrase_are_found_by_all(
    write_regions: Callable[[str], Path], folder: Path, tmp_path: Path, capsys: Any
) -> None:
    checkpoint, page = write_regions("narvl"), tmp_path / "found.html"
    options = ("--checkpoint", checkpoint, "--workers", 0, "--device", "cpu")
    narvl_command("locate", folder, "every cat", "--all", *options, "--show", page)
    said = capsys.readouterr()
    model = narvl.load(checkpoint, device="cpu")
    expected = model.locate(sorted(folder.iterdir()), "every cat", all=True)
    rows = [line.split("\t") for line in said.out.splitlines()]
    assert [row[:2] for row in rows] == [
        [file.name, one.text] for file, one in zip(sorted(folder.iterdir()), expected, strict=True)
    ]
    assert "5 sets of boxes" in said.err
    number = sum(len(one.boxes) for one in expected)
    html = page.read_text()
    assert number > 5 and html.count("<rect ") == 2 * number and html.count("<text ") == number
    assert f'<div class="text">{len(expected[0].boxes)} regions</div>' in html
    narvl_command("locate", folder / "a.png", "every cat", *options, "--json")
    record = json.loads(capsys.readouterr().out)
    assert (record["box"], record["boxes"]) == (pytest.approx(list(expected[0].boxes[0].box)), [])


def test_graphs_are_written_and_drawn(
    write_graphs: Callable[[str], Path], folder: Path, tmp_path: Path, capsys: Any
) -> None:
    checkpoint, page, out = write_graphs("narvl"), tmp_path / "graphs.html", tmp_path / "graphs.jsonl"
    options = ("--checkpoint", checkpoint, "--workers", 0, "--device", "cpu")
    narvl_command("graph", folder, *options, "--out", out, "--show", page)
    assert "5 graphs" in capsys.readouterr().err
    found = narvl.load(checkpoint, device="cpu").graph(sorted(folder.iterdir()))
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(one["triplets"]) for one in records] == [len(one.triplets) for one in found]
    html = page.read_text()
    assert html.count('<div class="graph"><svg') == sum(bool(one.triplets) for one in found) > 0
    assert all(f"<td>{triplet.probability:.3f}</td>" in html for one in found for triplet in one.triplets)
    assert "http://" not in html.replace("http://www.w3.org/", "") and "https://" not in html
    narvl_command("graph", folder / "a.png", *options)
    assert capsys.readouterr().out.split("\t")[1] == found[0].text


def test_answers_are_of_a_list(several_tasks: Path, folder: Path, capsys: Any) -> None:
    narvl_command("answer", folder, "color?", "--answers", "red, blue", "--checkpoint", several_tasks, "--json")
    for line in capsys.readouterr().out.splitlines():
        record = json.loads(line)
        assert {one["text"] for one in record["alternatives"]} == {"red", "blue"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{folder}"], "the question is missing; give image files and folders, and the question last"),
        (["{folder}/a.png", "{folder}/b.png"], "b.png, is a file; the question must come last"),
        (["{folder}", "  "], "the question is empty"),
        (["{folder}/*.gif", "what?"], r"\*.gif: no file matches this pattern"),
        (["{folder}/none.png", "what?"], "none.png: no such image or folder"),
        (["{folder}", "what?", "--out", "{folder}/a.png"], "is one of the images, which it would replace"),
        (["{folder}", "what?", "--show", "{folder}/a.png"], "--show .*a.png: is one of the images"),
    ],
)
def test_wrong_arguments_are_named(several_tasks: Path, folder: Path, words: list[str], message: str) -> None:
    with pytest.raises((InputError, MissingInput), match=message):
        narvl_command("answer", *(word.format(folder=folder) for word in words), "--checkpoint", several_tasks)


def test_a_pattern_names_files(several_tasks: Path, folder: Path, capsys: Any) -> None:
    narvl_command("answer", folder / "*.png", "what?", "--checkpoint", several_tasks, "--workers", 0)
    assert [Path(line.split("\t")[0]).name for line in capsys.readouterr().out.splitlines()] == [
        *("a.png", "b.png", "d.png", "e.png")
    ]


def test_all_formats_hold_the_same(several_tasks: Path, folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"verb": "locate", "text": "the cat", "checkpoint": several_tasks, "workers": 0}
    for suffix in ("jsonl", "json", "parquet", "tsv"):
        predict_files([folder], out=tmp_path / f"out.{suffix}", **options)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert json.loads((tmp_path / "out.json").read_text()) == lines
    rows = [line.split("\t") for line in (tmp_path / "out.tsv").read_text().splitlines()]
    assert [row[:2] for row in rows] == [[line["image"], line["text"]] for line in lines]
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["image"] for row in table] == ["a.png", "b.png", "c.jpg", "d.png", "e.png"]
    assert [row["box"] for row in table] == [line["box"] for line in lines]
    assert not list(tmp_path.glob("*.part*"))


def test_a_killed_run_goes_on_where_it_stopped(
    several_tasks: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"verb": "answer", "text": "what?", "checkpoint": several_tasks, "workers": 0}
    (folder / "b.png").write_bytes(b"no image")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert predict_files([folder], out=whole, batch_size=2, skip_bad_rows=1, **options)[:2] == (4, 1)
    predict, read = TrainedEngine.predict, []

    def killed(engine: Any, prepared: Any, decoding: Any) -> Any:
        if len(read) == 1:
            raise KeyboardInterrupt
        read.append(len(prepared))
        return predict(engine, prepared, decoding)

    monkeypatch.setattr(TrainedEngine, "predict", killed)
    with pytest.raises(KeyboardInterrupt):
        predict_files([folder], out=out, batch_size=2, skip_bad_rows=1, **options)
    assert read == [1] and not out.exists()
    monkeypatch.setattr(TrainedEngine, "predict", lambda *given: read.append(len(given[1])) or predict(*given))
    with pytest.raises(InputError, match="was begun with text='what.', now text='who.'"):
        predict_files([folder], out=out, batch_size=2, skip_bad_rows=1, **options | {"text": "who?"})
    (folder / "d.png").rename(folder / "z.png")  # as many images as before
    with pytest.raises(InputError, match=r"was begun with inputs='a.png … e.png \(\w+\)', now inputs='a.png … z.png "):
        predict_files([folder], out=out, batch_size=2, skip_bad_rows=1, **options)
    (folder / "z.png").rename(folder / "d.png")
    content = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(content + b"more")
    with pytest.raises(InputError, match="part: was begun with inputs="):
        predict_files([folder], out=out, batch_size=2, skip_bad_rows=1, **options)
    (folder / "a.png").write_bytes(content)
    assert predict_files([folder], out=out, batch_size=2, skip_bad_rows=1, **options)[:2] == (4, 1)
    assert read == [1, 2, 1]
    assert out.read_bytes() == whole.read_bytes()


def test_a_page_shows_what_was_predicted(several_tasks: Path, folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    predict_files([folder], verb="locate", text="<b>the cat", checkpoint=several_tasks, show=page, workers=0)
    html = page.read_text()
    assert html.count("<h2>") == 5 and html.count("<rect ") == 10  # a white rim and the box
    assert "&lt;b&gt;the cat" in html and "<b>the" not in html
    assert "where the model looked" in html
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "") and "https://" not in html


def test_without_a_checkpoint_it_says_who_answers(
    several_tasks: Path, folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("narvl_plugin.api.files.load", lambda checkpoint, **given: narvl.load(several_tasks, **given))
    narvl_command("caption", folder, "--workers", 0)
    said = capsys.readouterr()
    assert "the model in the box answers" in said.err
    assert len(said.out.splitlines()) == 5


def test_an_error_is_one_line_and_code_1(several_tasks: Path, folder: Path, programs: Path) -> None:
    (folder / "a.png").write_bytes(b"no image")
    command = [str(programs / "narvl"), "answer", str(folder), "what?", "--checkpoint", str(several_tasks)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("narvl: ") and "a.png: the image is not readable" in ended.stderr


def test_help_imports_no_torch(programs: Path) -> None:
    code = (
        "import sys; sys.argv = ['narvl', 'answer', '--help']\nimport narvl\ntry:\n narvl.main()\n"
        "except SystemExit:\n pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
