"""Distillation: the teacher's words in the same rows and columns, and a killed run that goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fairseq.tasks import setup_task
from omegaconf import OmegaConf

import narvl_plugin.registered  # noqa: F401 - registers the task
from narvl_plugin.data.resumable import StalePart
from narvl_plugin.data.scenes import write_scenes
from narvl_plugin.data.text import train_sentencepiece
from narvl_plugin.errors import BadRow, InputError, MissingInput
from narvl_plugin.inference import distillation
from narvl_plugin.inference.distillation import distill
from narvl_plugin.inference.predictor import Predictor
from narvl_plugin.models.config import SIZES
from narvl_plugin.models.registered import RegisteredNarvlConfig
from narvl_plugin.models.registered import RegisteredOfaConfig as OfaConfig
from narvl_plugin.tasks.registered import CaptionConfig
from narvl_plugin.whole_files import sole_writer

ROWS, BATCH = 7, 2
SETTINGS = {"beam": 2, "batch_size": BATCH, "max_len_b": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few scenes, a vocabulary and the checkpoint of a random teacher."""
    folder = tmp_path_factory.mktemp("distill")
    write_scenes(folder, train=ROWS, valid=1, test=1, size=32, seed=3, nouns=8, max_objects=1)
    train_sentencepiece(folder / "caption" / "train.tsv", [2], folder / "vocab", 200)
    model_cfg = OmegaConf.structured(OfaConfig(_name="ofa", **(SIZES["nano"] | {"encoder_layers": 1})))
    task_cfg = OmegaConf.structured(
        CaptionConfig(_name="caption", data="gone.tsv", bpe_dir=str(folder / "vocab"), patch_image_size=32)
    )
    torch.manual_seed(5)
    task = setup_task(task_cfg)
    model = task.build_model(model_cfg)
    with torch.no_grad():  # at birth a teacher repeats <s>; with output rows of its own it says varied words
        model.decoder.output_projection.weight.normal_(std=0.3)
        model.decoder.output_projection.weight[:4] = 0
    state = {
        "args": None,
        "cfg": {
            "model": OmegaConf.to_container(model_cfg, enum_to_str=True),
            "task": OmegaConf.to_container(task_cfg, enum_to_str=True),
        },
        "model": model.state_dict(),
        "optimizer_history": [{"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 1}],
        "task_state": {},
        "extra_state": {"epoch": 1, "train_iterator": {"epoch": 1}, "val_loss": 1.0},
    }
    torch.save(state, folder / "teacher.pt")
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> bytes:
    """What a run without a stop writes."""
    out = folder / "whole.tsv"
    assert distill(teacher=folder / "teacher.pt", data=folder / "caption" / "train.tsv", out=out, **SETTINGS)
    return out.read_bytes()


def rows(content: bytes) -> list[list[str]]:
    """Split a TSV file's content."""
    return [line.split("\t") for line in content.decode().splitlines()]


def test_only_the_captions_change(folder: Path, whole: bytes) -> None:
    before, after = rows((folder / "caption" / "train.tsv").read_bytes()), rows(whole)
    assert len(after) == ROWS
    for old, new in zip(before, after, strict=True):
        assert new[:2] + new[3:] == old[:2] + old[3:]
        assert new[2] and new[2] != old[2]
    assert len({new[2] for new in after}) > 1, "different images should get different words here"


def test_references_follow_the_words(folder: Path, whole: bytes) -> None:
    data, out = folder / "caption" / "train.tsv", folder / "both.tsv"
    distill(teacher=folder / "teacher.pt", data=data, out=out, keep_references=True, **SETTINGS)
    both = out.read_bytes().splitlines()
    assert both[0::2] == whole.splitlines()
    assert both[1::2] == data.read_bytes().splitlines()
    assert not distill(teacher=folder / "teacher.pt", data=data, out=out, keep_references=True, **SETTINGS)


def test_several_hypotheses_stand_side_by_side(folder: Path, whole: bytes) -> None:
    out = folder / "nbest.tsv"
    distill(teacher=folder / "teacher.pt", data=folder / "caption" / "train.tsv", out=out, nbest=2, **SETTINGS)
    best = [row[2] for row in rows(whole)]
    several = [row[2].split("&&") for row in rows(out.read_bytes())]
    assert [texts[0] for texts in several] == best
    assert all(len(set(texts)) == len(texts) <= 2 for texts in several)
    assert any(len(texts) == 2 for texts in several)


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_a_stopped_run_goes_on_and_ends_identical(
    folder: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    out, done = tmp_path / "out.tsv", []
    speak = distillation.written_targets

    def stop(teacher: Predictor, rows: range, nbest: int) -> dict[int, str]:
        if len(done) == batches:
            raise KeyboardInterrupt
        done.append(rows)
        return speak(teacher, rows, nbest)

    arguments = {
        "teacher": folder / "teacher.pt",
        "data": folder / "caption" / "train.tsv",
        "out": out,
        **SETTINGS,
    }
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "written_targets", stop)
        with pytest.raises(KeyboardInterrupt):
            distill(**arguments)
    with open(f"{out}.part", "ab") as part:
        part.write(b"torn-row\ttorn")
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "written_targets", lambda *asked: done.append(asked[1]) or speak(*asked))
        assert distill(**arguments)
    assert out.read_bytes() == whole
    assert done == [range(start, min(start + BATCH, ROWS)) for start in range(0, ROWS, BATCH)], "no row twice"


@pytest.mark.integration
def test_a_killed_program_goes_on_and_ends_identical(
    folder: Path, whole: bytes, programs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.tsv"
    command = [sys.executable, "-m", "narvl", "distill", "--teacher", str(folder / "teacher.pt")]
    command += ["--data", str(folder / "caption" / "train.tsv"), "--out", str(out)]
    command += ["--beam", "2", "--batch-size", str(BATCH), "--max-len-b", "6"]
    killed = subprocess.Popen(command, stderr=subprocess.PIPE)
    part = tmp_path / "out.tsv.part"
    deadline = time.monotonic() + 120
    while killed.poll() is None and not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    subprocess.run([programs / "narvl", *command[3:]], check=True, capture_output=True)
    assert out.read_bytes() == whole
    assert sorted(os.listdir(tmp_path)) == ["out.tsv"]


def test_what_was_begun_with_other_settings_is_not_gone_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {
        "teacher": folder / "teacher.pt",
        "data": folder / "caption" / "train.tsv",
        "out": tmp_path / "o.tsv",
    }
    with monkeypatch.context() as patch, pytest.raises(IndexError):
        words = iter([{0: "one batch", 1: "and no more"}])
        patch.setattr(distillation, "written_targets", lambda *asked: next(words, None) or [][0])
        distill(**arguments, **SETTINGS)
    with pytest.raises(StalePart, match="begun with beam=2, now beam=3"):
        distill(**arguments, **SETTINGS | {"beam": 3})


def test_bad_rows_are_named_or_left_out(folder: Path, whole: bytes, tmp_path: Path) -> None:
    lines = (folder / "caption" / "train.tsv").read_bytes().splitlines(keepends=True)
    data = tmp_path / "bad.tsv"
    data.write_bytes(
        b"".join([lines[0], b"\t".join([b"x", b"x", b"words", b"", b"bm90IGFuIGltYWdl"]) + b"\n", *lines[1:]])
    )
    arguments = {"teacher": folder / "teacher.pt", "data": data, **SETTINGS}
    with pytest.raises(BadRow, match=r"bad.tsv:2: .*image"):
        distill(out=tmp_path / "strict.tsv", **arguments)
    distill(out=tmp_path / "lenient.tsv", skip_bad_rows=1, **arguments)
    assert [row[0] for row in rows((tmp_path / "lenient.tsv").read_bytes())] == [row[0] for row in rows(whole)]


def test_missing_files_are_named(folder: Path, tmp_path: Path) -> None:
    data = folder / "caption" / "train.tsv"
    with pytest.raises(MissingInput, match="gone.pt: no such checkpoint"):
        distill(teacher=tmp_path / "gone.pt", data=data, out=tmp_path / "out.tsv")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(InputError, match="text.pt: is damaged or no checkpoint"):
        distill(teacher=tmp_path / "text.pt", data=data, out=tmp_path / "out.tsv")
    with pytest.raises(MissingInput, match="--bpe-dir"):
        distill(teacher=folder / "teacher.pt", data=data, out=tmp_path / "out.tsv", bpe_dir=tmp_path / "gone")


@pytest.fixture(scope="module")
def other(folder: Path) -> Path:
    """The checkpoint of another random teacher."""
    state = torch.load(folder / "teacher.pt", weights_only=False)
    torch.manual_seed(6)
    for name in ("decoder.output_projection.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        state["model"][name][4:].normal_(std=0.3)
    torch.save(state, folder / "other.pt")
    return folder / "other.pt"


def test_an_ensemble_averages_probabilities(folder: Path, whole: bytes, other: Path, tmp_path: Path) -> None:
    """Two equal teachers write the words of one; two that differ write words of their own."""
    data, teacher = folder / "caption" / "train.tsv", folder / "teacher.pt"
    for name, teachers in {"same": [teacher, teacher], "both": [teacher, other], "swapped": [other, teacher]}.items():
        distill(teacher=teachers, data=data, out=tmp_path / name, **SETTINGS)
    distill(teacher=other, data=data, out=tmp_path / "other", **SETTINGS)
    same, both, swapped, alone = ((tmp_path / name).read_bytes() for name in ("same", "both", "swapped", "other"))
    assert same == whole
    assert both == swapped
    assert len({whole, both, alone}) == 3


def test_a_part_of_another_ensemble_is_not_gone_on_with(
    folder: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"data": folder / "caption" / "train.tsv", "out": tmp_path / "o.tsv", **SETTINGS}
    with monkeypatch.context() as patch, pytest.raises(IndexError):
        words = iter([{0: "one batch", 1: "and no more"}])
        patch.setattr(distillation, "written_targets", lambda *_: next(words, None) or [][0])
        distill(teacher=[folder / "teacher.pt", other], **arguments)
    with pytest.raises(StalePart, match="others"):
        distill(teacher=folder / "teacher.pt", **arguments)


def test_a_student_writes_its_most_probable_captions_or_those_that_agree_best(folder: Path, tmp_path: Path) -> None:
    state = torch.load(folder / "teacher.pt", weights_only=False)
    sizes = SIZES["nano"] | {"encoder_layers": 1}
    model_cfg = OmegaConf.structured(RegisteredNarvlConfig(_name="narvl", num_queries=6, **sizes))
    task = setup_task(OmegaConf.create(state["cfg"]["task"]))
    torch.manual_seed(5)
    model = task.build_model(model_cfg)
    with torch.no_grad():
        model.decoder.output_projection.weight.normal_(std=0.3)
    state["cfg"]["model"], state["model"] = OmegaConf.to_container(model_cfg, enum_to_str=True), model.state_dict()
    student, data = tmp_path / "student.pt", folder / "caption" / "train.tsv"
    torch.save(state, student)
    written = {}
    for mbr in (None, "bleu", "cider"):
        settings = SETTINGS | {"beam": 8, "nbest": 3, "mbr": mbr}
        distill(teacher=student, data=data, out=tmp_path / f"{mbr}.tsv", **settings)
        written[mbr] = [row[2].split("&&") for row in rows((tmp_path / f"{mbr}.tsv").read_bytes())]
        assert all(1 <= len(set(texts)) == len(texts) <= 3 for texts in written[mbr])
    loaded = Predictor.load(student, data, generation={"beam": 8, "nbest": 8, "max_len_b": 6}, optimised=False)
    for row, texts in enumerate(written[None]):
        beam = [" ".join(loaded.text([one]).split()) for one in loaded.hypotheses_of([row])[0]]
        assert texts == list(dict.fromkeys(beam[:3]))
        assert set(written["bleu"][row]) <= set(beam)
    assert written["bleu"] != written[None] != written["cider"]
    with pytest.raises(InputError, match="--mbr bleu: is for students, and .*teacher.pt is a teacher"):
        distill(teacher=folder / "teacher.pt", data=data, out=tmp_path / "o.tsv", mbr="bleu", **SETTINGS)
    with pytest.raises(InputError, match="rouge"):
        distill(teacher=student, data=data, out=tmp_path / "o.tsv", mbr="rouge", **SETTINGS)


def test_a_second_process_is_refused(folder: Path, tmp_path: Path) -> None:
    arguments = {"teacher": folder / "teacher.pt", "data": folder / "caption" / "train.tsv", **SETTINGS}
    with sole_writer(tmp_path / "out.tsv"), pytest.raises(InputError, match="out.tsv: process .* is writing it"):
        distill(out=tmp_path / "out.tsv", **arguments)
    assert not list(tmp_path.iterdir())


def test_columns_that_nobody_reads_stay_as_they_are(folder: Path, tmp_path: Path) -> None:
    """Rows have differing numbers of columns, also more than the first; one that lacks a needed column is bad."""
    lines = (folder / "caption" / "train.tsv").read_bytes().splitlines()
    tails = [b"", b"\tmore\t\t", b"\tcaf\xe9\tand\rmore", b"\t", b"\t\xff\xfe", b"", b"\tlast"]
    long = [line + tail for line, tail in zip(lines, tails, strict=True)]
    data = tmp_path / "in.tsv"
    data.write_bytes(b"\r\n".join([b"too\tfew", *long]))
    arguments = {"teacher": folder / "teacher.pt", "data": data, "keep_references": True, **SETTINGS}
    with pytest.raises(BadRow, match="in.tsv:1: has 2 columns"):
        distill(out=tmp_path / "strict.tsv", **arguments)
    distill(out=tmp_path / "out.tsv", skip_bad_rows=1, **arguments)
    written = (tmp_path / "out.tsv").read_bytes().split(b"\n")
    assert written.pop() == b""
    assert written[1::2] == long
    for old, new in zip(long, written[0::2], strict=True):
        old_fields, new_fields = old.split(b"\t"), new.split(b"\t")
        assert new_fields[:2] + new_fields[3:] == old_fields[:2] + old_fields[3:]
        assert new_fields[2] != old_fields[2]


@pytest.mark.integration
def test_the_skip_budget_is_that_of_all_parts_of_a_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped run does not get it anew, and one that spent it goes on with a larger one, to the same bytes."""
    lines = (folder / "caption" / "train.tsv").read_bytes().splitlines()
    bad = b"x\tx\twords\t\tbm90IGFuIGltYWdl"
    data = tmp_path / "in.tsv"
    data.write_bytes(b"\n".join([lines[0], bad, *lines[1:4], bad, *lines[4:]]) + b"\n")
    arguments = {"teacher": folder / "teacher.pt", "data": data, **SETTINGS}
    distill(out=tmp_path / "whole.tsv", skip_bad_rows=2, **arguments)
    speak, out = distillation.written_targets, tmp_path / "out.tsv"

    def stop(teacher: Predictor, rows: range, nbest: int) -> dict[int, str]:
        if rows.start:
            raise KeyboardInterrupt
        return speak(teacher, rows, nbest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distillation, "written_targets", stop)
        distill(out=out, skip_bad_rows=1, **arguments)
    with pytest.raises(BadRow, match=r"in.tsv:6: .*\(now 1\)"):
        distill(out=out, skip_bad_rows=1, **arguments)
    assert distill(out=out, skip_bad_rows=2, **arguments)
    assert out.read_bytes() == (tmp_path / "whole.tsv").read_bytes()
