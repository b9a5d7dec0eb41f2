"""With which options, vocabulary and role a checkpoint is used: those of its training."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks import setup_task
from fairseq_cli import generate, validate
from omegaconf import OmegaConf

from narvl_plugin.bench import timing
from narvl_plugin.checkpoints.conversion import convert
from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.checkpoints.record import Checkpoint
from narvl_plugin.compat import generation
from narvl_plugin.data.text import load_codec, train_sentencepiece
from narvl_plugin.errors import InputError
from narvl_plugin.inference.calibration import calibrate
from narvl_plugin.inference.distillation import distill
from narvl_plugin.tasks import loading
from narvl_plugin.tasks import options as task_options
from narvl_plugin.tasks.registered import CaptionConfig
from narvl_plugin.tasks.vqa_gen import VqaGenConfig

Rows = list[list[str]]
Write = Callable[..., Path]
Run = Callable[..., None]


@pytest.fixture
def boxes(write_tsv: Write, refcoco_rows: Rows) -> Path:
    return write_tsv("boxes.tsv", refcoco_rows)


@pytest.fixture
def captions(write_tsv: Write, caption_rows: Rows) -> Path:
    return write_tsv("captions.tsv", caption_rows)


@pytest.fixture
def questions(write_tsv: Write, vqa_rows: Rows) -> Path:
    return write_tsv("questions.tsv", vqa_rows)


@pytest.fixture
def other_vocabulary(tmp_path: Path, vocabulary: Path) -> Path:
    """Give a vocabulary of the same pieces in another order."""
    texts = tmp_path / "other.tsv"
    lines = (vocabulary / "captions.tsv").read_text().splitlines()
    texts.write_text("".join(f"{line}\n" for line in [*reversed(lines), "a cat a cat a cat"]))
    train_sentencepiece(texts, [0], tmp_path / "other", 500)
    return tmp_path / "other"


@pytest.fixture
def student_of_boxes(write_checkpoint: Write, vocabulary: Path) -> Path:
    return write_checkpoint(
        *("boxes.pt", "narvl", "refcoco"),
        **{"bpe_dir": str(vocabulary), "num_bins": 11, "patch_image_size": 64, "max_image_size": 80},
    )


def rewrite(checkpoint: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint anew; its tensors are mapped from the old file, which must stay until it is replaced."""
    torch.save(state, checkpoint.with_suffix(".new"))
    checkpoint.with_suffix(".new").replace(checkpoint)


def lines_of(folder: Path) -> list[str]:
    return (folder / "generate-test.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.integration
def test_generation_uses_the_sizes_of_the_training(
    boxes: Path, student_of_boxes: Path, vocabulary: Path, tmp_path: Path, run_generate: Run
) -> None:
    given = [boxes, "--task", "refcoco", "--path", student_of_boxes, "--cpu", "--results-path"]
    run_generate(*given, tmp_path / "bare")
    sizes = ["--num-bins", 11, "--patch-image-size", 64, "--max-image-size", 80, "--bpe-dir", vocabulary]
    run_generate(*given, tmp_path / "told", *sizes)
    assert lines_of(tmp_path / "bare") == lines_of(tmp_path / "told")
    first, *rest = lines_of(tmp_path / "bare")
    assert json.loads(first.removeprefix("O-\t")) == {"num_bins": 11, "max_image_size": 80, "patch_image_size": 64}
    assert sum(line.startswith("D-") for line in rest) == 3


def test_options_that_differ_from_the_training_are_warned_of(
    boxes: Path, student_of_boxes: Path, tmp_path: Path, run_generate: Run, caplog: pytest.LogCaptureFixture
) -> None:
    given = [boxes, "--task", "refcoco", "--path", student_of_boxes, "--cpu", "--results-path", tmp_path / "out"]
    with caplog.at_level(logging.WARNING, "narvl_plugin.tasks.options"):
        run_generate(*given, "--patch-image-size", 48, "--max-image-size", 80)
    assert [record.getMessage() for record in caplog.records if record.name == "narvl_plugin.tasks.options"] == [
        f"{student_of_boxes}: was trained with --patch-image-size 64, now --patch-image-size 48"
    ]
    assert json.loads(lines_of(tmp_path / "out")[0].removeprefix("O-\t"))["patch_image_size"] == 48


def test_options_in_model_overrides_are_given(
    boxes: Path, student_of_boxes: Path, tmp_path: Path, run_generate: Run, caplog: pytest.LogCaptureFixture
) -> None:
    given = [boxes, "--task", "refcoco", "--path", student_of_boxes, "--cpu", "--results-path", tmp_path / "out"]
    with caplog.at_level(logging.WARNING, "narvl_plugin.tasks.options"):
        run_generate(*given, "--model-overrides", "{'patch_image_size': 48, 'data': 'other.tsv'}")
    assert [record.getMessage() for record in caplog.records if record.name == "narvl_plugin.tasks.options"] == [
        f"{student_of_boxes}: was trained with --patch-image-size 64, now --patch-image-size 48"
    ]
    assert json.loads(lines_of(tmp_path / "out")[0].removeprefix("O-\t"))["patch_image_size"] == 48
    with pytest.raises(InputError, match=r"--model-overrides \[1\]: is not a Python dict"):
        run_generate(*given, "--model-overrides", "[1]")


@pytest.mark.integration
def test_models_of_an_ensemble_with_other_sizes_are_warned_of(
    boxes: Path,
    vocabulary: Path,
    student_of_boxes: Path,
    tmp_path: Path,
    write_checkpoint: Write,
    run_generate: Run,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes = {"num_bins": 11, "patch_image_size": 48, "max_image_size": 80}
    other = write_checkpoint("other.pt", "narvl", "refcoco", bpe_dir=str(vocabulary), **sizes)
    warned = [f"{other}: was trained with --patch-image-size 48, now --patch-image-size 64"]
    paths = f"{student_of_boxes}:{other}"
    for use in (
        lambda: run_generate(boxes, "--task", "refcoco", "--path", paths, "--cpu", "--results-path", tmp_path / "out"),
        lambda: loading.load([student_of_boxes, other]),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "narvl_plugin.tasks.options"):
            use()
        named = [record.getMessage() for record in caplog.records if record.name == "narvl_plugin.tasks.options"]
        assert named == warned
    assert json.loads(lines_of(tmp_path / "out")[0].removeprefix("O-\t"))["patch_image_size"] == 64


def test_sizes_of_bins_are_written_by_the_module_as_a_program_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m fairseq_cli.generate` is a module of its own, beside the one that is imported."""
    started = ModuleType("__main__")
    started.__spec__ = ModuleSpec(generate.__name__, None)
    started._main = lambda cfg, output_file: print("D-0", file=output_file)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "__main__", started)
    imported = generate._main
    generation.write_sizes_of_bins()
    assert generate._main is imported
    task = {"_name": "refcoco", "num_bins": 11, "max_image_size": 80, "patch_image_size": 64}
    written = io.StringIO()
    started._main(OmegaConf.create({"task": task, "common_eval": {"quiet": False}}), written)
    sizes, said = written.getvalue().splitlines()
    assert (json.loads(sizes.removeprefix("O-\t"))["num_bins"], said) == (11, "D-0")


def test_an_option_given_as_its_default_is_given(
    boxes: Path, student_of_boxes: Path, tmp_path: Path, run_generate: Run
) -> None:
    given = [boxes, "--task", "refcoco", "--path", student_of_boxes, "--cpu", "--results-path", tmp_path / "out"]
    run_generate(*given, "--max-image-size", 512)
    assert json.loads(lines_of(tmp_path / "out")[0].removeprefix("O-\t"))["max_image_size"] == 512


def run_validate(*arguments: object) -> Any:
    """Run fairseq-validate in this process, and return the task that it made."""
    words = [str(word) for word in (*arguments, "--cpu", "--valid-subset", "valid", "--batch-size", 4)]
    parsed = options.parse_args_and_arch(options.get_validation_parser(), words)
    given = options.parse_args_and_arch(options.get_validation_parser(), words, suppress_defaults=True)
    validate.main(convert_namespace_to_omegaconf(parsed), given)


@pytest.mark.integration
def test_validation_uses_the_options_of_the_training(
    boxes: Path, student_of_boxes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []  # fairseq-validate takes all handlers from the root logger
    monkeypatch.setattr(task_options.logger, "warning", lambda text, *values: warnings.append(text % values))
    state = read_checkpoint(student_of_boxes)
    state["cfg"]["criterion"] = {"_name": "qctc", "sentence_avg": False}
    state["cfg"]["task"]["eval_acc"] = True
    rewrite(student_of_boxes, state)
    run_validate(boxes, "--task", "refcoco", "--path", student_of_boxes)
    assert not warnings
    run_validate(boxes, "--task", "refcoco", "--path", student_of_boxes, "--patch-image-size", 48)
    assert warnings == [f"{student_of_boxes}: was trained with --patch-image-size 64, now --patch-image-size 48"]
    with pytest.raises(InputError, match="trained for refcoco, not for caption"):
        run_validate(boxes, "--task", "caption", "--path", student_of_boxes)


class TestVocabulary:
    def test_its_checksum_tells_pieces_their_order_and_bins_apart(
        self, vocabulary: Path, other_vocabulary: Path, bpe_dir: Path
    ) -> None:
        codecs = [(vocabulary, 10), (vocabulary, 11), (other_vocabulary, 10), (bpe_dir, 10)]
        checksums = [load_codec(folder, bins).checksum for folder, bins in codecs]
        assert len(set(checksums)) == len(codecs)
        assert load_codec(vocabulary, 10).checksum == checksums[0]

    def test_checkpoints_of_training_keep_it(
        self, captions: Path, vocabulary: Path, tmp_path: Path, make_model: Callable[..., Path]
    ) -> None:
        checkpoint = make_model("narvl_tiny", "qctc")
        checksum = load_codec(vocabulary, 10).checksum
        assert read_checkpoint(checkpoint)["cfg"]["model"]["vocabulary"] == checksum
        convert(checkpoint, tmp_path / "converted.safetensors")
        assert read_checkpoint(tmp_path / "converted.safetensors")["cfg"]["model"]["vocabulary"] == checksum

    @pytest.mark.integration
    def test_another_one_is_an_error_wherever_a_checkpoint_is_used(
        self,
        captions: Path,
        vocabulary: Path,
        other_vocabulary: Path,
        tmp_path: Path,
        write_checkpoint: Write,
        run_generate: Run,
    ) -> None:
        trained = {"bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 32}
        teacher = write_checkpoint("teacher.pt", "ofa", "caption", **trained)
        student = write_checkpoint("student.pt", "narvl", "caption", **trained)
        other = {"bpe_dir": str(other_vocabulary)}
        for use in (
            lambda: run_generate(
                captions, "--task", "caption", "--path", student, "--cpu", "--bpe-dir", other["bpe_dir"]
            ),
            lambda: run_validate(captions, "--task", "caption", "--path", teacher, "--bpe-dir", other["bpe_dir"]),
            lambda: distill(teacher=teacher, data=captions, out=tmp_path / "out.tsv", bpe_dir=other_vocabulary),
            lambda: calibrate(student, captions, task_overrides=other),
            lambda: loading.load(student, task_overrides=other),
            lambda: loading.load(student, task_overrides={"num_bins": 11}),
            lambda: loading.load(student, task_overrides={"num_bins": 9}),
        ):
            with pytest.raises(InputError, match="trained with another vocabulary"):
                use()

    @pytest.mark.parametrize("bins", [9, 12])
    def test_it_never_grows_or_shrinks_in_generation(
        self, bins: int, vocabulary: Path, write_checkpoint: Write
    ) -> None:
        student = write_checkpoint("student.pt", "narvl", "caption", bpe_dir=str(vocabulary), num_bins=10)
        state = read_checkpoint(student)
        state["cfg"]["model"]["vocabulary"] = ""  # as in files of others
        rewrite(student, state)
        with pytest.raises(InputError, match="labels and the model's dictionary"):
            loading.load(student, task_overrides={"num_bins": bins})


class TestRoles:
    def test_teacher_and_student_are_not_swapped(
        self, captions: Path, vocabulary: Path, tmp_path: Path, write_checkpoint: Write
    ) -> None:
        trained = {"bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 32}
        teacher = write_checkpoint("teacher.pt", "ofa", "caption", **trained)
        student = write_checkpoint("student.pt", "narvl", "caption", **trained)
        with pytest.raises(InputError, match=r"student.pt: is a student; give a teacher"):
            timing.latency(tmp_path / "l.json", teacher=student, student=teacher, data=captions)
        with pytest.raises(InputError, match=r"teacher.pt: is a teacher; give a student"):
            timing.latency(tmp_path / "l.json", teacher=teacher, student=teacher, data=captions)
        with pytest.raises(InputError, match=r"teacher.pt: is a teacher"):
            calibrate(teacher, captions)
        with pytest.raises(InputError, match=r"student.pt: is a student"):
            calibrate(student, captions, test=captions, teacher=student)
        grounding = write_checkpoint("boxes.pt", "ofa", "refcoco", **trained)
        with pytest.raises(InputError, match=r"boxes.pt was trained for refcoco, .*student.pt for caption"):
            calibrate(student, captions, test=captions, teacher=grounding)

    def test_a_student_of_questions_does_not_caption(
        self, captions: Path, vocabulary: Path, write_checkpoint: Write, run_generate: Run
    ) -> None:
        student = write_checkpoint("vqa.pt", "narvl", "vqa_gen", bpe_dir=str(vocabulary), num_bins=10)
        with pytest.raises(InputError, match=r"trained for vqa_gen, not for caption; take --task vqa_gen"):
            run_generate(captions, "--task", "caption", "--path", student, "--cpu")


@pytest.mark.integration
class TestStartingFromACheckpoint:
    @pytest.fixture
    def start(self, captions: Path, vocabulary: Path, tmp_path: Path, run_train: Run) -> Run:
        """Give a function that starts to train a student of captions from a checkpoint."""

        def train(checkpoint: Path, bpe_dir: Path, *more: object) -> None:
            run_train(
                *(f"{captions},{captions}", "--task", "caption", "--bpe-dir", bpe_dir, "--num-bins", 10),
                *("--patch-image-size", 32, "--arch", "narvl_tiny", "--criterion", "qctc", "--disable-validation"),
                *("--encoder-embed-dim", 16, "--encoder-ffn-embed-dim", 32, "--encoder-attention-heads", 2),
                *("--encoder-layers", 1, "--decoder-layers", 1, "--vision-trunk", "test_resnet", "--freeze-resnet"),
                *("--optimizer", "adam", "--lr", 1e-3, "--batch-size", 6, "--max-update", 1, "--cpu", "--no-save"),
                *("--save-dir", tmp_path / "out", "--finetune-from-model", checkpoint, "--no-progress-bar", *more),
            )

        return train

    def test_another_task_or_vocabulary_must_be_meant(
        self,
        start: Run,
        vocabulary: Path,
        other_vocabulary: Path,
        write_checkpoint: Write,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        trained = {"bpe_dir": str(vocabulary), "num_bins": 10}
        questions = write_checkpoint("vqa.pt", "ofa", "vqa_gen", **trained)
        captions = write_checkpoint("caption.pt", "ofa", "caption", **trained)
        for checkpoint, folder, message in (
            (questions, vocabulary, "trained for vqa_gen, not for caption"),
            (captions, other_vocabulary, "trained with another vocabulary"),
        ):
            with pytest.raises(Exception, match="Cannot load model parameters") as caught:
                start(checkpoint, folder)
            assert isinstance(caught.value.__context__, InputError)
            assert message in str(caught.value.__context__)
            assert "--allow-transfer" in str(caught.value.__context__)
        start(questions, vocabulary, "--allow-transfer")
        start(captions, vocabulary)


def test_rescoring_asks_a_teacher_of_the_same_task_and_vocabulary(
    vocabulary: Path, other_vocabulary: Path, write_checkpoint: Write
) -> None:
    trained = {"bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 32}
    wrong = {
        "is a student": write_checkpoint("student.pt", "narvl", "caption", **trained),
        "trained for vqa_gen": write_checkpoint("vqa.pt", "ofa", "vqa_gen", **trained),
        "another vocabulary": write_checkpoint(
            "other.pt", "ofa", "caption", **{**trained, "bpe_dir": str(other_vocabulary)}
        ),
    }
    for message, file in wrong.items():
        cfg = CaptionConfig(_name="caption", data="none", rescore_with=str(file), **trained)
        task = setup_task(OmegaConf.structured(cfg))
        with pytest.raises(InputError, match=message):
            task.load_rescorer(torch.zeros(1))


def test_ensembles_keep_to_one_vocabulary(vocabulary: Path, other_vocabulary: Path, write_checkpoint: Write) -> None:
    first = write_checkpoint("a.pt", "narvl", "caption", bpe_dir=str(vocabulary), num_bins=10)
    second = write_checkpoint("b.pt", "narvl", "caption", bpe_dir=str(other_vocabulary), num_bins=10)
    assert len(loading.load([first, first]).models) == 2
    with pytest.raises(InputError, match=r"b.pt: .* trained with another vocabulary"):
        loading.load([first, second])


def test_options_of_a_mixtures_member_rule(vocabulary: Path, write_checkpoint: Write) -> None:
    student = write_checkpoint("student.pt", "narvl", "caption", bpe_dir=str(vocabulary), num_bins=10)
    member = {"_name": "vqa_gen", "patch_image_size": 96, "bpe_dir": str(vocabulary)}
    mixture = replace(Checkpoint.read(student), task_state={"members": {"gqa": member}})
    trained = task_options.trained_options(mixture, "gqa")
    cfg = task_options.task_options(student, trained, "vqa_gen", VqaGenConfig, {"max_src_length": 9})
    assert (cfg.patch_image_size, cfg.max_src_length, cfg.bpe_dir) == (96, 9, str(vocabulary))


def test_a_member_that_a_mixture_lacks_or_of_another_task_is_refused(
    captions: Path, vocabulary: Path, write_checkpoint: Write, run_generate: Run
) -> None:
    teacher = write_checkpoint("teacher.pt", "ofa", "caption", bpe_dir=str(vocabulary), num_bins=10)
    state = read_checkpoint(teacher)
    state["cfg"]["task"] = {"_name": "multitask", "data": "m.yaml", "bpe_dir": str(vocabulary), "num_bins": 10}
    own = {"bpe_dir": str(vocabulary), "num_bins": 10}
    members = {"coco": {"_name": "caption", **own}, "gqa": {"_name": "vqa_gen", **own}}
    rewrite(teacher, state | {"task_state": {"members": members}})
    given = [captions, "--task", "caption", "--path", teacher, "--cpu"]
    for more, message in (
        ([], r"teacher.pt: was trained on coco, gqa, not on 'caption'; choose by --member"),
        (["--member", "cocoa"], r"teacher.pt: was trained on coco, gqa, not on 'cocoa'; choose by --member"),
        (["--member", "gqa"], r"teacher.pt: was trained for vqa_gen, not for caption; take --task vqa_gen"),
    ):
        with pytest.raises(InputError, match=message):
            run_generate(*given, *more)
    assert loading.load(teacher, task_overrides={"member": "gqa"}).task.cfg._name == "vqa_gen"


def test_a_teacher_of_a_mixture_is_distilled_as_one_of_its_members(
    captions: Path, vocabulary: Path, write_checkpoint: Write, tmp_path: Path
) -> None:
    own = {"bpe_dir": str(vocabulary), "num_bins": 10, "patch_image_size": 32}
    teacher = write_checkpoint("teacher.pt", "ofa", "caption", **own)
    state = read_checkpoint(teacher)
    state["cfg"]["task"] = {"_name": "multitask", "data": "m.yaml", "bpe_dir": str(vocabulary), "num_bins": 10}
    members = {"coco": {"_name": "caption", **own}, "gqa": {"_name": "vqa_gen", **own}}
    rewrite(teacher, state | {"task_state": {"members": members}})
    written = tmp_path / "distilled.tsv"
    options = {"teacher": teacher, "data": captions, "out": written, "beam": 1, "max_len_b": 3}
    with pytest.raises(InputError, match=r"was trained on coco, gqa, not on 'caption'; choose by --member"):
        distill(**options)
    assert distill(member="coco", **options)
    assert len(written.read_text().splitlines()) == len(captions.read_text().splitlines())


def test_a_mixture_that_does_not_say_its_members_options_is_warned_of(
    vocabulary: Path, write_checkpoint: Write, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = write_checkpoint("teacher.pt", "ofa", "caption", bpe_dir=str(vocabulary), num_bins=10)
    state = read_checkpoint(teacher)
    state["cfg"]["task"] = {"_name": "multitask", "data": "m.yaml", "bpe_dir": str(vocabulary), "num_bins": 10}
    rewrite(teacher, state)
    loading.load(teacher)
    assert f"{teacher}: lacks the options of its members" in caplog.text
