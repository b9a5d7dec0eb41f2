"""N-grams of captions in the verbs: image files, the demo, and what refuses them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import narvl
from narvl_plugin.api import Decoding
from narvl_plugin.api.exported import ExportedEngine
from narvl_plugin.api.files import predict_files
from narvl_plugin.cli.app import app
from narvl_plugin.data.ngram_files import write_ngrams
from narvl_plugin.data.resumable import ResumableWriter, StalePart
from narvl_plugin.data.text import load_codec
from narvl_plugin.demo.answers import ask
from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.tasks import caption

Write = Callable[[str, str], Path]


@pytest.fixture
def write(write_tsv: Callable[..., Path], answer_vocabulary: Path, tmp_path: Path) -> Write:
    """Write the n-grams of captions, joined by `&&`."""

    def write(name: str, captions: str) -> Path:
        data = write_tsv(f"{name}.tsv", [["1", "1", captions]])
        write_ngrams(data, tmp_path / name, load_codec(answer_vocabulary), order=2, hard=2, column=2)
        return tmp_path / name

    return write


@pytest.fixture
def file(write: Write) -> Path:
    """Give the n-grams of one caption of a single letter: a random student has few queries, and one label each."""
    return write("a.ngrams", "a")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a folder of three images."""
    images = tmp_path / "images"
    images.mkdir()
    for number, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (8, 6), color).save(images / f"{number}.png")
    return images


def test_given_at_load_they_are_for_captions_alone_and_read_once(
    several_tasks: Path, file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, reads = caption.read_ngrams, []
    monkeypatch.setattr(caption, "read_ngrams", lambda *given: reads.append(given) or read(*given))
    model = narvl.load(several_tasks, device="cpu", ngram_automaton=file)
    assert len(reads) == 1, "before the first image"
    image = folder / "0.png"
    plain = narvl.load(several_tasks, device="cpu")
    question = "what color is the cat?"
    assert model.answer(image, question, nbest=2).text == plain.answer(image, question, nbest=2).text
    for least in (0.0, 0.25, 0.5):
        model.caption(image, abstain_below=least)
    file.unlink()
    model.caption(image, abstain_below=0.75)
    assert len(reads) == 1, "another way to decode keeps it"
    assert model.caption(image, ngram_automaton=None, beam=3, nbest=3).text
    with pytest.raises(InputError, match="ngram_automaton: is for caption; answer has its own outputs"):
        model.answer(image, question, ngram_automaton=file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam": 2}, "finds the one best caption; take a beam of 1, and an nbest of 1"),
        ({"nbest": 2}, "finds the one best caption; take a beam of 1, and an nbest of 1"),
        ({"ngram_weight": -1}, "ngram_weight=-1: expected a number from 0"),
        ({"ngram_weight": float("nan")}, "ngram_weight=nan: expected a number from 0"),
        ({"ngram_weight": "a"}, "ngram_weight='a': expected a number from 0"),
        ({"member": "vqa_gen"}, "was not trained for caption; it has answer"),
    ],
)
def test_what_cannot_be_is_refused_at_load(
    several_tasks: Path, file: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        narvl.load(several_tasks, device="cpu", ngram_automaton=file, **options)


def test_wrong_files_and_teachers_are_refused_at_load(
    several_tasks: Path, make_model: Callable[..., Path], file: Path, tmp_path: Path
) -> None:
    with pytest.raises(MissingInput, match="gone: no such file"):
        narvl.load(several_tasks, device="cpu", ngram_automaton=tmp_path / "gone")
    with pytest.raises(InputError, match="ngram_automaton are for students; this model is a teacher"):
        narvl.load(make_model("ofa_tiny", "adjust_label_smoothed_cross_entropy"), device="cpu", ngram_automaton=file)


def test_an_exported_student_says_that_it_cannot() -> None:
    engine = ExportedEngine.__new__(ExportedEngine)
    with pytest.raises(InputError, match="an exported student cannot use n-grams; load its checkpoint"):
        engine.check(Decoding(ngram_automaton="a.ngrams"))
    engine.check(Decoding(beam=1))


def test_a_killed_run_is_not_resumed_with_other_n_grams(
    several_tasks: Path, write: Write, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, other = write("one.ngrams", "a"), write("other.ngrams", "a&&a cat")
    out = tmp_path / "captions.tsv"
    given: dict[str, Any] = {"checkpoint": several_tasks, "out": out, "batch_size": 1, "workers": 0, "device": "cpu"}

    def killed(self: ResumableWriter, *_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ResumableWriter, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            predict_files([folder], ngram_automaton=file, **given)
    with pytest.raises(StalePart, match=r"was begun with ngram_automaton='\w{16}', now ngram_automaton='\w{16}'"):
        predict_files([folder], ngram_automaton=other, **given)
    with pytest.raises(StalePart, match=r"was begun with ngram_automaton='\w{16}', now ngram_automaton=None"):
        predict_files([folder], **given)
    with pytest.raises(StalePart, match=r"was begun with ngram_weight=0.2, now ngram_weight=0.5"):
        predict_files([folder], ngram_automaton=file, ngram_weight=0.5, **given)
    other.write_bytes(file.read_bytes())  # the same n-grams under another name
    assert predict_files([folder], ngram_automaton=other, **given).captions == 3


def test_the_command_takes_them(several_tasks: Path, file: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.tsv"
    words = ["caption", str(folder), "--checkpoint", str(several_tasks), "--out", str(out), "--device", "cpu"]
    words += ["--workers", "0", "--ngram-automaton", str(file), "--ngram-weight", "0.5"]
    app(words, standalone_mode=False)
    model = narvl.load(several_tasks, device="cpu", ngram_automaton=file, ngram_weight=0.5)
    texts = [line.split("\t")[1] for line in out.read_text().splitlines()]
    assert texts == [found.text for found in model.caption(sorted(folder.iterdir()))]
    with pytest.raises(InputError, match="take a beam of 1"):
        app([*words, "--beam", "3"], standalone_mode=False)


def test_the_demo_shows_one_caption_and_several_answers(several_tasks: Path, file: Path, folder: Path) -> None:
    models = {"Model": narvl.load(several_tasks, device="cpu", ngram_automaton=file)}
    image = (folder / "0.png").read_bytes()
    for verb, text, number in (("caption", "", 1), ("answer", "what color is the cat?", 4)):
        found = ask(models, verb, image, "red.png", text, 4).answers["Model"].prediction
        assert found is not None and len(found.alternatives) == number
