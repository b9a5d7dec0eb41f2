"""What could be known at the start is said at the start: no command works for minutes and then cannot write."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from typer.testing import CliRunner

from narvl_plugin.api.files import predict_files
from narvl_plugin.bench import decoding, limit, systems, timing
from narvl_plugin.checkpoints import conversion, record
from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.cli.app import app
from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.evaluation import benchmarks
from narvl_plugin.evaluation.predictions import BinSizes, write_predictions
from narvl_plugin.export import export
from narvl_plugin.inference import calibration, features
from narvl_plugin.inference.calibration import calibrate, keep_calibration
from narvl_plugin.inference.distillation import distill
from narvl_plugin.models.interop import FIXED_FLAGS
from narvl_plugin.report import build_report
from narvl_plugin.tasks import loading
from narvl_plugin.whole_files import require_writable

Command = Callable[[Path, Path], object]
"""What works on a file and writes to another one."""


def invoke(*words: object) -> None:
    """Run `narvl` in this process, and raise what it raises."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None:
        raise result.exception


FILES: dict[str, Command] = {
    "features": lambda file, out: features.write_features(file, out, arch="narvl_nano", patch_image_size=32),
    "distill": lambda file, out: distill(teacher=file, data=file, out=out),
    "caption": lambda file, out: predict_files([file], checkpoint=file, out=out),
    "caption as json": lambda file, out: predict_files([file], checkpoint=file, out=out.with_suffix(".json")),
    "convert": lambda file, out: conversion.convert(file, out),
    "convert to safetensors": lambda file, out: conversion.convert(file, out.with_suffix(".safetensors")),
    "calibrate": lambda file, out: calibrate(file, file, out=out),
    "predictions": lambda file, out: write_predictions(file, out, task="caption", data=file, bins=BinSizes()),
    "evaluate": lambda file, out: invoke("evaluate", file, file, "--task", "caption", "--out", out),
    "bench latency": lambda file, out: timing.latency(out, teacher=file, student=file, data=file),
    "bench models": lambda file, out: systems.compare(out, teacher=file, student=file, data=file),
    "bench decoding": lambda file, out: decoding.decoding(out, student=file, data=file),
}
FOLDERS: dict[str, Command] = {
    "export": lambda file, out: export(file, out, to="torch-export"),
    "report": lambda file, out: build_report(out),
    "vocab": lambda file, out: invoke("vocab", file, "--out", out),
    "bench limit": lambda file, out: invoke("bench", "limit", "--out", out),
    "bench sweep": lambda file, out: invoke("bench", "sweep", "--out", out),
}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a file, and let any work end in an error."""

    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("it has begun to work")

    monkeypatch.setattr(loading, "load", work)
    monkeypatch.setattr(limit, "Pair", work)
    monkeypatch.setattr(benchmarks, "evaluate", work)
    monkeypatch.setattr(features, "build_backbone", work)
    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", work)
    monkeypatch.setattr(record, "read_checkpoint", work)
    monkeypatch.setattr(calibration, "read_checkpoint", work)
    path = tmp_path / "given.png"
    path.write_text("0\timg\ta caption\t\tpicture\n")
    return path


@pytest.mark.parametrize("command", FILES)
def test_a_file_that_is_a_folder(command: str, file: Path, tmp_path: Path) -> None:
    for name in ("out", "out.json", "out.safetensors"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=r"out(\.json|\.safetensors)?: is a folder|is not a file that can be replaced"):
        FILES[command](file, tmp_path / "out")


@pytest.mark.parametrize("command", FOLDERS)
def test_a_folder_that_is_a_file(command: str, file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match="out: is a file|out is no folder"):
        FOLDERS[command](file, tmp_path / "out")


@pytest.mark.parametrize("command", [*FILES, *FOLDERS])
def test_below_a_file(command: str, file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written, because .*given.png is no folder"):
        {**FILES, **FOLDERS}[command](file, file / "below" / "out")


@pytest.mark.parametrize("command", [*FILES, *FOLDERS])
def test_in_a_folder_that_may_not_be_written(
    command: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The superuser may write anywhere, so that permissions are pretended."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match=r"cannot be written, because .* may not be written to"):
        {**FILES, **FOLDERS}[command](file, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_the_plot_of_bench_models_is_a_folder(file: Path, tmp_path: Path) -> None:
    (tmp_path / "out.svg").mkdir()
    with pytest.raises(InputError, match=r"out.svg: is a folder"):
        systems.compare(tmp_path / "out.json", teacher=file, student=file, data=file)


def test_the_description_of_safetensors_is_a_folder(file: Path, tmp_path: Path) -> None:
    (tmp_path / "out.json").mkdir()
    with pytest.raises(InputError, match=r"out.json: is a folder"):
        conversion.convert(file, tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", ["results.json", "table.md", "report.html"])
def test_a_page_of_the_report_is_a_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=rf"{name}: is a folder"):
        build_report(tmp_path)


def test_what_can_be_written_is_let_be(tmp_path: Path) -> None:
    (tmp_path / "old").touch(mode=0o400)
    for path in (tmp_path / "new", tmp_path / "a" / "b" / "new", tmp_path / "old"):
        require_writable(path)
    require_writable(tmp_path, folder=True)
    require_writable(tmp_path / "a" / "b", folder=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


class TestCalibration:
    @pytest.fixture
    def data(self, write_tsv: Callable[..., Path], caption_rows: list[list[str]]) -> Path:
        return write_tsv("valid.tsv", caption_rows)

    @pytest.fixture
    def student(self, write_checkpoint: Callable[..., Path], vocabulary: Path) -> Path:
        options = {"bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 32}
        return write_checkpoint("student.pt", "narvl", "caption", **options)

    @pytest.mark.integration
    def test_of_a_student_in_the_layout_of_others_is_kept(self, student: Path, data: Path) -> None:
        """Its options are flags, in a namespace; nothing else in it changes."""
        state = read_checkpoint(student)
        options = state["cfg"]["model"]
        names = [*(name for name in options if name.startswith(("encoder_", "decoder_"))), "freeze_resnet"]
        flags = {name: options[name] for name in names}
        state["cfg"]["model"] = Namespace(
            arch="narvl_tiny", **flags, resnet_type=options["vision_trunk"], **FIXED_FLAGS, other=1
        )
        student = student.with_name("foreign.pt")  # the tensors are mapped from the other file
        torch.save(state, student)
        result = calibrate(student, data, batch_size=6)
        (model,), *_ = loading.load(student, task_overrides={"data": str(data)}, role="student")
        assert model.temperature == result["temperature"]
        keep_calibration(student, temperature=3.0)
        after = read_checkpoint(student)
        assert vars(after["cfg"]["model"]) == {**vars(state["cfg"]["model"]), **vars(after["cfg"]["model"])}
        assert after["cfg"]["model"].temperature == 3.0
        assert all(torch.equal(tensor, after["model"][name]) for name, tensor in state["model"].items())

    def test_a_checkpoint_that_cannot_keep_it(self, student: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(calibration, "judge", self.answer_nothing)
        monkeypatch.setattr(calibration, "read_checkpoint", lambda file: read_checkpoint(file) | {"cfg": {"task": {}}})
        with pytest.raises(InputError, match=r"student.pt: has no options of its model .* narvl convert"):
            calibrate(student, data)

    def test_a_file_to_measure_on_that_is_missing(
        self, student: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(calibration, "judge", self.answer_nothing)
        with pytest.raises(MissingInput, match="none.tsv"):
            calibrate(student, data, test=tmp_path / "none.tsv")

    def test_a_teacher_in_the_student_s_place(
        self, write_checkpoint: Callable[..., Path], vocabulary: Path, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(calibration, "judge", self.answer_nothing)
        teacher = write_checkpoint("teacher.pt", "ofa", "caption", bpe_dir=str(vocabulary), num_bins=10)
        with pytest.raises(InputError, match=r"teacher.pt: is a teacher; give a student"):
            calibrate(teacher, data)

    def test_a_student_in_a_folder_that_may_not_be_written(
        self, student: Path, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(calibration, "judge", self.answer_nothing)
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != student.parent)
        with pytest.raises(InputError, match=r"student.pt: cannot be written"):
            calibrate(student, data)

    @staticmethod
    def answer_nothing(*_: Any, **__: Any) -> None:
        raise AssertionError("it has begun to work")
