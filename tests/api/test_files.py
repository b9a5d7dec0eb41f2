"""Captions of image files: what they are called, in which order, and what becomes of those that are none."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from narvl_plugin.api.files import model_record, predict_files
from narvl_plugin.cli.app import app
from narvl_plugin.data.caption import CaptionDataset
from narvl_plugin.data.image_files import coco_ids, find_images, search_images
from narvl_plugin.data.images import IMAGE_SUFFIXES
from narvl_plugin.data.table import Table
from narvl_plugin.data.text import TextCodec
from narvl_plugin.errors import BadRow, InputError, MissingInput
from narvl_plugin.inference.predictor import Predictor
from narvl_plugin.tasks.caption import CaptionTask

NAMES = ("b.png", "a.webp", "sub/c.BMP", "d.jpg", "sub/deeper/e.jpeg", "z.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with noise in images of several names, and with a text."""
    draw = random.Random(0)
    for name in NAMES:
        file = tmp_path / "pictures" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.frombytes("RGB", (8, 6), draw.randbytes(8 * 6 * 3)).save(file)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


def pairs(file: Path) -> list[list[str]]:
    """Read names and captions."""
    return [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]


def test_images_are_found_below_a_folder_and_named_from_there(folder: Path) -> None:
    assert list(find_images([folder])) == sorted(NAMES)
    files = [folder / "z.png", folder / "sub"]
    assert list(find_images(files)) == [f"{folder}/z.png", f"{folder}/sub/c.BMP", f"{folder}/sub/deeper/e.jpeg"]


def test_what_is_no_image_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: there is no image in this folder"):
        find_images([tmp_path / "empty"])
    with pytest.raises(MissingInput, match=r"gone: no such image or folder"):
        find_images([tmp_path / "gone"])
    with pytest.raises(InputError, match=r"notes.txt: its name is not that of an image"):
        find_images([folder / "notes.txt"])
    for name, shown in (
        ("a\tb.png", r"'a\\tb.png'"),
        ("a\x1b[2J.png", r"'a\\x1b\[2J.png'"),
        ("a\x85.png", r"'a\\x85.png'"),
    ):
        (folder / name).touch()
        with pytest.raises(InputError, match=rf"{shown}: .* rename it"):
            find_images([folder])
        (folder / name).unlink()


def test_a_folder_is_searched_for_every_format_that_is_read(tmp_path: Path) -> None:
    names = [f"a{suffix}" for suffix in IMAGE_SUFFIXES] + ["B.JFIF", "c.Tiff"]
    others = ["d.heic", "e.SVG", "f.jp2"]
    for name in (*names, *others, "notes.txt", "captions.tsv", "film.mp4", "noname"):
        (tmp_path / name).touch()
    found, left_out = search_images([tmp_path])
    assert list(found) == sorted(names)
    assert left_out == [tmp_path / name for name in sorted(others)]


def test_hidden_files_are_no_part_of_a_folder(folder: Path) -> None:
    for name in ("._a.jpg", ".hidden.png", ".thumbnails/b.png", "sub/._c.BMP", "__MACOSX/._b.png", "._d.heic"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\0\5\x16\7")
    assert list(search_images([folder])[0]) == sorted(NAMES)
    assert search_images([folder])[1] == []
    assert list(find_images([folder / ".hidden.png"])) == [f"{folder}/.hidden.png"], "it was asked for"
    assert list(find_images([folder / ".thumbnails"])) == ["b.png"]


def test_linked_folders_and_files_are_followed_once(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep" / "f.png").touch()
    (folder / "album").symlink_to(elsewhere)
    (folder / "again").symlink_to(elsewhere / "deep")
    (folder / "a-link").symlink_to("sub")  # which has a name of its own
    (folder / "linked.png").symlink_to(folder / "z.png")
    (elsewhere / "back").symlink_to(folder)
    (folder / "sub" / "self").symlink_to(".")
    found = find_images([folder])
    assert [name for name in found if name not in NAMES] == ["again/f.png", "linked.png"]
    assert set(NAMES) < set(found)
    assert list(found) == sorted(found, key=lambda name: Path(name).parts)


def test_many_links_to_one_another_end(tmp_path: Path) -> None:
    for step in range(40):  # 2 ** 40 ways to the bottom
        (tmp_path / f"s{step}").mkdir()
        for name in ("a", "b"):
            (tmp_path / f"s{step}" / name).symlink_to(f"../s{step + 1}")
    (tmp_path / "s40").mkdir()
    (tmp_path / "s40" / "p.png").touch()
    assert list(find_images([tmp_path / "s0"])) == ["/".join("a" * 40) + "/p.png"]


def test_a_folder_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.iterdir

    def forbidden(self: Path) -> Any:
        if self.name == "sub":
            raise PermissionError(13, "Permission denied")
        return read(self)

    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(InputError, match=r"sub: this folder cannot be read \(Permission denied\)"):
        find_images([folder])


def test_image_ids_are_cocos_numbers() -> None:
    names = ["COCO_val2014_000000000042.jpg", "test2015/COCO_test2015_000000000001.jpg", "000000000139.jpg", "7.png"]
    assert list(coco_ids(names).items()) == list(zip(names, [42, 1, 139, 7], strict=True))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["000000000042.jpg", "cat.jpg"],
            r"^cat\.jpg: has no number for an image_id, unlike 000000000042\.jpg; .*\.tsv",
        ),
        (["cat.jpg", "000000000042.jpg"], r"^cat\.jpg: has no number"),
        (["000000000042.jpg", "COCO_val2014_000000000043_crop.jpg"], "_crop.jpg: has no number"),
        (["000000000042.jpg", "\u0664\u0662.jpg"], "has no number"),  # digits of another script
        (
            ["a/42.jpg", "b/COCO_val2014_000000000042.jpg"],
            r"^b/COCO\S+: has the same image_id, 42, as a/42\.jpg; .*tsv",
        ),
        (["42.jpg", "42.png"], r"^42\.png: has the same image_id, 42, as 42\.jpg"),
    ],
)
def test_ids_that_are_not_cocos_are_named(names: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        coco_ids(names)


def test_ids_are_checked_before_the_model_is_loaded(folder: Path, tmp_path: Path) -> None:
    (folder / "000000000042.jpg").touch()
    with pytest.raises(InputError, match="has no number for an image_id"):
        predict_files([folder], checkpoint=tmp_path / "gone.pt", out=tmp_path / "out.json")
    with pytest.raises(MissingInput, match="gone.pt"):
        predict_files([folder], checkpoint=tmp_path / "gone.pt", out=tmp_path / "out.tsv")
    with pytest.raises(InputError, match=r"--out \S+/pictures: is not a file"):
        predict_files([folder], checkpoint=tmp_path / "gone.pt", out=folder)


@pytest.mark.integration
def test_json_is_cocos_results_format(make_model: Callable[..., Path], tmp_path: Path) -> None:
    images = tmp_path / "pictures"
    images.mkdir()
    for number in (42, 9):
        Image.new("RGB", (8, 6)).save(images / f"COCO_val2014_{number:012}.jpg")
    out = tmp_path / "results" / "captions.json"
    options = {"checkpoint": make_model("narvl_tiny", "qctc"), "out": out, "workers": 0, "device": "cpu"}
    predict_files([images], **options)
    records = json.loads(out.read_text())
    assert [record["image_id"] for record in records] == [9, 42]
    assert all(list(record) == ["image_id", "caption"] and isinstance(record["caption"], str) for record in records)


@pytest.mark.integration
def test_an_older_output_stays_until_all_is_captioned(
    make_model: Callable[..., Path], folder: Path, tmp_path: Path
) -> None:
    student = make_model("narvl_tiny", "qctc")
    (folder / "a.webp").write_bytes(b"no picture")  # the first
    for out in (tmp_path / "captions.tsv", tmp_path / "captions.json"):
        out.write_text("older")
        with pytest.raises(BadRow, match=r"a.webp: the image is not readable"):
            predict_files([folder], checkpoint=student, out=out, workers=0, device="cpu")
        assert out.read_text() == "older"
    count = predict_files([folder], checkpoint=student, out=out, workers=0, device="cpu", skip_bad_rows=1)
    assert count[:2] == (5, 1)
    assert len(json.loads(out.read_text())) == 5
    assert not list(tmp_path.glob("captions.json.*"))


def test_an_output_that_is_one_of_the_images_is_refused(folder: Path, tmp_path: Path) -> None:
    image = folder / "a.webp"
    before = image.read_bytes()
    (tmp_path / "link.txt").symlink_to(image)
    for out in (image, tmp_path / "link.txt"):
        with pytest.raises(InputError, match=f"--out {out}: is one of the images"):
            predict_files([folder], checkpoint=tmp_path / "none.pt", out=out)
    assert image.read_bytes() == before


@pytest.mark.integration
def test_images_are_read_as_people_see_them(
    make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(1)
    upright = Image.frombytes("RGB", (8, 6), draw.randbytes(8 * 6 * 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    logo = upright.convert("RGBA")
    logo.putalpha(Image.new("L", (8, 6), 0))
    images = tmp_path / "pictures"
    images.mkdir()
    upright.save(images / "a.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(images / "b.png", exif=exif)
    logo.save(images / "c.png")
    Image.new("RGB", (8, 6), "white").save(images / "d.png")
    seen: list[torch.Tensor] = []
    step = CaptionTask.inference_step

    def remember(self: CaptionTask, generator: Any, models: Any, sample: dict[str, Any]) -> Any:
        seen.extend(sample["net_input"]["patch_images"])
        return step(self, generator, models, sample)

    monkeypatch.setattr(CaptionTask, "inference_step", remember)
    student = make_model("narvl_tiny", "qctc")
    predict_files([images], checkpoint=student, out=tmp_path / "out.tsv", workers=1, device="cpu")
    turned, other, transparent, white = seen
    assert torch.equal(turned, other)
    assert torch.equal(transparent, white)
    assert not torch.equal(turned, white)


@pytest.mark.integration
def test_the_last_line_counts_images_of_other_formats(
    make_model: Callable[..., Path], folder: Path, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("._b.png", "g.heic", "notes.md"):
        (folder / name).touch()
    (folder / "d.jpg").write_bytes(b"no picture")
    words = ["caption", folder, "--checkpoint", make_model("narvl_tiny", "qctc"), "--skip-bad-rows", 1]
    capsys.readouterr()
    app([str(word) for word in (*words, "--out", tmp_path / "out.tsv", "--device", "cpu")], standalone_mode=False)
    assert "5 captions, 2 left out, " in capsys.readouterr().err
    assert "1 file(s) left out, of unsupported image formats: " in caplog.text and "g.heic" in caplog.text


@pytest.mark.integration
def test_captions_hold_no_commands_to_a_terminal(
    write_checkpoint: Callable[..., Path],
    vocabulary: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    student = write_checkpoint("student.pt", "narvl", "caption", bpe_dir=str(vocabulary), patch_image_size=32)
    # as a vocabulary of others, or GPT-2's, may spell
    monkeypatch.setattr(TextCodec, "decode", lambda *_: "a \x1b[2Jcat \x9b31m on\nred")
    predict_files([folder], checkpoint=student, workers=0, device="cpu")
    assert {line.split("\t")[1] for line in capsys.readouterr().out.splitlines()} == {"a [2Jcat 31m on red"}


@pytest.mark.integration
def test_captions_are_those_of_one_image_at_a_time(
    make_model: Callable[..., Path], folder: Path, write_tsv: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    student = make_model("narvl_tiny", "qctc")
    state = torch.load(student, weights_only=False)
    torch.manual_seed(0)
    for weight in state["model"].values():
        if weight.dim() == 2:  # at birth outputs hardly depend on the image
            weight.copy_(torch.randn_like(weight))
    torch.save(state, student)
    names = sorted(NAMES)
    images = [base64.b64encode((folder / name).read_bytes()).decode() for name in names]
    data = write_tsv("rows.tsv", [[name, name, "words", "", image] for name, image in zip(names, images, strict=True)])
    one_by_one = Predictor.load(student, data).with_options({}, beam=2)
    expected = [[name, one_by_one(row)] for row, name in enumerate(names)]
    assert len({caption for _, caption in expected}) > 1, "different images should get different words here"

    options = {"checkpoint": student, "beam": 2, "device": "cpu"}
    for workers in (0, 2):
        out = tmp_path / f"captions{workers}.tsv"
        count = predict_files([folder], out=out, batch_size=4, workers=workers, **options)
        assert pairs(out) == expected
        assert count[:2] == (len(NAMES), 0)
    capsys.readouterr()
    predict_files([folder], workers=0, **options)
    assert [line.split("\t") for line in capsys.readouterr().out.splitlines()] == expected
    predict_files([folder], out=tmp_path / "captions.json", workers=0, **options)
    records = json.loads((tmp_path / "captions.json").read_text())
    assert records == [{"image_id": name, "caption": caption} for name, caption in expected]


@pytest.mark.integration
def test_broken_images_are_named_or_left_out(make_model: Callable[..., Path], folder: Path, tmp_path: Path) -> None:
    student = make_model("narvl_tiny", "qctc")
    for name in ("c.png", "d.jpg"):  # the second batch of two has nothing else
        (folder / name).write_bytes(b"no picture")
    options = {"checkpoint": student, "batch_size": 2, "device": "cpu"}
    with pytest.raises(BadRow, match=r"^\S*pictures/c.png: the image is not readable"):
        predict_files([folder], workers=1, **options)
    out = tmp_path / "captions.tsv"
    count = predict_files([folder], out=out, workers=1, skip_bad_rows=2, **options)
    assert count[:2] == (5, 2)
    assert [name for name, _ in pairs(out)] == sorted(set(NAMES) - {"d.jpg"})
    before = out.read_text()
    with pytest.raises(BadRow, match=r"d.jpg: .*now 1"):
        predict_files([folder], out=out, workers=1, skip_bad_rows=1, **options)
    assert out.read_text() == before
    part = tmp_path / "captions.tsv.part"
    assert [name for name, _ in pairs(part)] == ["a.webp", "b.png"], "what was said before stays"


def test_a_killed_run_is_not_resumed_with_another_exported_folder(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "narvl_student").mkdir(parents=True)
    (folder / "student.json").write_text("{}")
    before = model_record(folder)
    (folder / "student.onnx").write_bytes(b"graph")
    assert len({before, model_record(folder), model_record(folder / "student.onnx")}) == 3
    again = model_record(folder)
    (folder / "narvl_student" / "cache").touch()
    assert model_record(folder) == again, "what Python leaves there counts for nothing"


def test_a_table_of_images_reads_like_a_tsv_file(folder: Path) -> None:
    table = Table(find_images([folder]), {}, CaptionDataset)
    assert len(table) == len(NAMES)
    assert table[1][:2] == ["b.png", str(folder / "b.png")]
    assert table.where(1) == str(folder / "b.png")


def test_a_missing_checkpoint_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="gone.pt: no such checkpoint"):
        predict_files([folder], checkpoint=tmp_path / "gone.pt")
