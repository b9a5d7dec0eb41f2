"""Exported students: what they say, without this code, is what their checkpoints say."""

from __future__ import annotations

import base64
import copy
import importlib.util
import io
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import train
from PIL import Image

import narvl
from narvl_plugin.data.images import ImageReader, open_image
from narvl_plugin.data.text import TextCodec, clean_caption, clean_question
from narvl_plugin.errors import InputError
from narvl_plugin.export import FORMATS, RUN, _write_code, export, runner
from narvl_plugin.export.graph import StudentGraph
from narvl_plugin.export.runner import Answer, Student, clean
from narvl_plugin.inference.calibration import keep_calibration
from narvl_plugin.inference.predictor import Predictor
from narvl_plugin.models import build

ALONE = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
sys.argv = {argv}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def png(color: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (64, 64)) -> bytes:
    """Return a one-coloured image."""
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, format="PNG")
    return stream.getvalue()


def installed(package: str) -> bool:
    """Say whether a package is there."""
    return importlib.util.find_spec(package) is not None


def run_alone(folder: Path, *arguments: str, refused: tuple[str, ...]) -> str:
    """Run an exported student in a process of its own that cannot import some packages."""
    code = ALONE.format(refused=refused, argv=[str(folder / "run.py"), *arguments])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.integration
def test_captions_are_those_of_the_checkpoint(
    make_model: Callable[..., Path], caption_rows: list[list[str]], tmp_path: Path
) -> None:
    checkpoint = make_model("narvl_tiny", "qctc", "--num-queries", 16, updates=150)
    images = [base64.b64decode(row[4]) for row in caption_rows]
    predictor = Predictor.load(checkpoint, tmp_path / "train.tsv").with_options({}, beam=1, min_len=0)
    expected = [predictor(row) for row in range(len(images))]
    assert any(expected)
    (tmp_path / "image.png").write_bytes(images[0])
    formats = [to for to, packages in FORMATS.items() if all(map(installed, packages))]
    for to in formats:
        assert export(checkpoint, tmp_path / to, to=to) < 1e-4
        answers = Student(tmp_path / to, threads=1)(images)
        assert [answer.text for answer in answers] == expected
        assert all(0 < answer.probability <= 1 for answer in answers)
        assert answers[0].probability == pytest.approx(np.prod(answers[0].probabilities))
        refused = ("narvl_plugin", "fairseq", "torchvision", "timm") + (() if to == "torch-export" else ("torch",))
        said = run_alone(tmp_path / to, str(tmp_path / "image.png"), refused=refused)
        assert said == f"{expected[0]}\t{answers[0].probability:.4f}\n"
    if "onnx" in formats:
        assert 0 < export(checkpoint, tmp_path / "int8", int8=True) < 0.2
        sizes = [(tmp_path / name / "student.onnx").stat().st_size for name in ("onnx", "int8")]
        assert sizes[1] < sizes[0]


@pytest.fixture(scope="module")
def grounding(answer_vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Give a calibrated student of grounding that has learned nothing yet, and rows with images of several sizes."""
    folder = tmp_path_factory.mktemp("grounding")
    data = folder / "test.tsv"
    images = [png((90 * row, 10, 10), size) for row, size in enumerate(((8, 6), (30, 90), (200, 50)))]
    first, second, third = (base64.b64encode(image).decode() for image in images)
    rows = [
        ["0", "a", "a red square on a wall", "0,0,4,3", first],
        ["1", "b", "a <person>", "1,2,7,5", second],
        ["2", "c", "two dogs run", "2,1,8,6", third],
    ]
    data.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    handlers = logging.getLogger().handlers[:]
    words = (
        *(f"{data},{data}", "--task", "refcoco", "--bpe-dir", answer_vocabulary, "--num-bins", 50),
        *("--disable-validation", "--patch-image-size", 32, "--max-image-size", 48, "--arch", "narvl_tiny"),
        *("--imagenet-default-mean-and-std", "--criterion", "qctc", "--num-queries", 8, "--cpu"),
        *("--encoder-embed-dim", 16, "--encoder-ffn-embed-dim", 32, "--encoder-attention-heads", 2),
        *("--encoder-layers", 1, "--decoder-layers", 1, "--vision-trunk", "test_resnet", "--freeze-resnet"),
        *("--optimizer", "adam", "--lr", 1e-2, "--batch-size", 3, "--max-update", 5, "--save-dir", folder / "model"),
        *("--no-epoch-checkpoints", "--no-progress-bar"),
    )
    parsed = options.parse_args_and_arch(options.get_training_parser(), [str(word) for word in words])
    train.main(convert_namespace_to_omegaconf(parsed))
    logging.getLogger().handlers[:] = handlers
    checkpoint = folder / "model" / "checkpoint_last.pt"
    keep_calibration(checkpoint, temperature=1.7, slope=0.6, offset=-0.4)
    return checkpoint, data


@pytest.fixture(scope="module")
def exported_grounding(grounding: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of that student's graph of torch."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    assert export(grounding[0], folder, to="torch-export", prompt_length=40) < 1e-4
    return folder


def image_files(data: Path) -> list[bytes]:
    """Return the images of a file of grounding."""
    return [base64.b64decode(row.split("\t")[4]) for row in data.read_text(encoding="utf-8").splitlines()]


@pytest.mark.integration
@pytest.mark.parametrize("to", ["onnx", "torch-export"])
def test_exported_grounding_says_the_box_of_the_checkpoint_in_pixels(
    to: str,
    grounding: tuple[Path, Path],
    exported_grounding: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoint, data = grounding
    out = exported_grounding
    if to != "torch-export":
        if not all(map(installed, FORMATS[to])):
            pytest.skip(f"{' or '.join(FORMATS[to])} is not installed")
        out = tmp_path / "out"
        assert export(checkpoint, out, to=to, prompt_length=40) < 1e-4
    predictor = Predictor.load(checkpoint, data).with_options({}, beam=1)
    hypotheses = predictor.hypotheses_of(range(3))
    boxes = [box for (box,) in predictor.task.boxes_of_best(predictor.batch(0, 1, 2), hypotheses)]
    dataset = predictor.task.dataset("test")
    fields = [{"text": dataset.tsv[row][2]} for row in range(3)]
    answers = Student(out)(image_files(data), fields)
    for answer, box, (best, *_) in zip(answers, boxes, hypotheses, strict=True):
        assert answer.box == pytest.approx(box, rel=1e-5)
        assert answer.text == ",".join(f"{edge:.6g}" for edge in box)
        assert [*answer.tokens, 2] == best["tokens"].tolist()
        # Of 256 paths a few may be drawn otherwise, and then odds change.
        assert answer.confidence == pytest.approx(float(best["confidence"]), abs=0.02)
        assert answer.box[0] <= answer.box[2] and answer.box[1] <= answer.box[3]
    (tmp_path / "image.png").write_bytes(image_files(data)[1])
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "image.png"), "text=a <person>"])
    runner.main(out)
    assert capsys.readouterr().out == f"{answers[1].text}\t{answers[1].confidence:.4f}\n"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "python run.py IMAGE"),
        (["{good}"], 2, "the task reads text=TEXT; missing: text"),
        (["{good}", "text=a hat", "{good}"], 2, "expected FIELD=TEXT after the images"),
        (["{good}", "txt=a hat", "text=a hat"], 2, "txt=: the task reads text=TEXT"),
        (["{good}", "text=?!"], 2, "text='?!' has no words"),
        (["{good}", f"text={'a red square ' * 30}"], 2, "was exported for 40"),
        (["{good}", "text=a hat", "text=a cat"], 2, "text= is given twice"),
        (["{good}", "text=a \udcff hat"], 2, "is not UTF-8 text"),
        (["text=a hat"], 2, "'text=a hat': an image is missing; it comes first, and the task reads text=TEXT"),
        (["", "text=a hat"], 2, "'': an image is missing; it comes first"),
        (["{folder}/pointer.png", "text=a hat"], 1, "pointer.png: is a Git LFS pointer"),
        (["{folder}/page.png", "text=a hat"], 1, "page.png: is an HTML page, as a failed download leaves it; download"),
        (["{folder}/none.png", "text=a hat"], 1, "none.png: No such file"),
        (["{folder}", "text=a hat"], 1, "Is a directory"),
        (["{folder}/empty.png", "text=a hat"], 1, "empty.png: the image is broken, or none of JPEG"),
        (["{folder}/cut.png", "text=a hat"], 1, "cut.png: the image cannot be read"),
    ],
)
def test_what_run_py_cannot_do_is_said_in_a_line(
    arguments: list[str],
    code: int,
    message: str,
    exported_grounding: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = png()
    files = {"good.png": good, "empty.png": b"", "cut.png": good[:80]}
    files |= {"pointer.png": b"version https://git-lfs.github.com/spec/v1\n", "page.png": b"\n<!DOCTYPE html>"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    given = [argument.format(good=tmp_path / "good.png", folder=tmp_path) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["run.py", *given])
    monkeypatch.setitem(runner.RUNTIMES, "torch-export", lambda *_: None)  # the graph is not reached
    with pytest.raises(SystemExit) as ended:
        runner.main(exported_grounding)
    said = capsys.readouterr()
    assert ended.value.code == code
    assert message in said.err and said.out == ""
    assert not arguments or said.err.count("\n") == 1


@pytest.mark.integration
def test_run_py_answers_many_images_and_names_those_that_cannot_be_read(
    exported_grounding: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b=1.png").write_bytes(png((9, 9, 200)))
    (tmp_path / "cut.png").write_bytes(png()[:80])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", "a.png", "cut.png", "b=1.png", "text=a hat"])
    with pytest.raises(SystemExit) as ended:
        runner.main(exported_grounding)
    said = capsys.readouterr()
    assert ended.value.code == 1
    assert [line.split("\t")[0] for line in said.out.splitlines()] == ["a.png", "b=1.png"]
    assert said.err.startswith("run.py: cut.png: the image cannot be read") and said.err.count("\n") == 1


@pytest.mark.integration
def test_a_student_that_is_damaged_or_lacks_its_runtime_is_said_in_a_line(
    exported_grounding: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "image.png", "text=a hat"])
    monkeypatch.setattr(runner, "RUNTIMES", {"torch-export": lambda *_: importlib.import_module("no_runtime")})
    (tmp_path / "student.json").write_text('{"side": 32,')
    folders = {
        exported_grounding: "No module named 'no_runtime'",
        tmp_path: "JSONDecodeError",
        tmp_path / "none": "No such",
    }
    for folder, message in folders.items():
        with pytest.raises(SystemExit) as ended:
            runner.main(folder)
        said = capsys.readouterr()
        assert ended.value.code == 1
        assert "the student cannot be loaded" in said.err and message in said.err and said.err.count("\n") == 1


@pytest.mark.integration
def test_a_file_of_a_student_that_was_never_downloaded_is_named(
    exported_grounding: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    student = shutil.copytree(exported_grounding, tmp_path / "student")
    (student / "student.pt2").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    monkeypatch.setattr(sys, "argv", ["run.py", "image.png", "text=a hat"])
    with pytest.raises(SystemExit) as ended:
        runner.main(student)
    assert ended.value.code == 1
    assert "cannot be loaded (student.pt2 is a Git LFS pointer, not the file itself; fetch" in capsys.readouterr().err


def test_run_py_without_what_it_imports_ends_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(RUN)
    for refused, message in {(): "No module named 'narvl_student'", ("numpy",): "numpy"}.items():
        code = ALONE.format(refused=("narvl_plugin", *refused), argv=[str(tmp_path / "run.py"), "a.png"])
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert ended.returncode == 1 and ended.stdout == ""
        assert ended.stderr.startswith("run.py: ") and ended.stderr.count("\n") == 1
        assert message in ended.stderr and "pip install numpy pillow" in ended.stderr
        _write_code(tmp_path)


@pytest.mark.integration
def test_a_terminal_without_utf_8_is_told_the_answer(
    exported_grounding: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image.png").write_bytes(png())
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "image.png"), "text=a hat"])
    answer = Answer("café ☃", [], [], 1.0, 1.0, None)
    monkeypatch.setattr(Student, "__call__", lambda *_: [answer])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    runner.main(exported_grounding)
    sys.stdout.seek(0)
    assert sys.stdout.read() == "caf\\xe9 \\u2603\t1.0000\n"


@pytest.mark.integration
@pytest.mark.parametrize("asked", ["-h", "--help"])
def test_run_py_says_how_it_is_used(
    asked: str, exported_grounding: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", asked])
    with pytest.raises(SystemExit) as ended:
        runner.main(exported_grounding)
    assert not ended.value.code and "python run.py IMAGE" in capsys.readouterr().out


@pytest.mark.integration
def test_a_student_abstains_as_its_task_says(grounding: tuple[Path, Path], exported_grounding: Path) -> None:
    student = Student(exported_grounding)
    (answer,) = student(image_files(grounding[1])[:1], [{"text": "a hat"}])
    assert answer.box is not None
    student.settings["abstain_below"] = answer.confidence + 0.01
    (answer,) = student(image_files(grounding[1])[:1], [{"text": "a hat"}])
    assert (answer.text, answer.tokens, answer.box) == ("", [], None)


def test_pieces_are_what_the_codecs_write(gpt2_codec: TextCodec, codec: TextCodec) -> None:
    for used, texts in ((gpt2_codec, ["a naïve café ☃ <person>", " two  dogs"]), (codec, ["two dogs run", "one tree"])):
        for text in texts:
            tokens = [0, *used.encode(text).tolist(), 2, used.dictionary.index("<bin_3>")]
            pieces = [used.piece(used.dictionary[token]) for token in tokens]
            assert b"".join(pieces).decode().strip() == used.decode(tokens)


def test_images_and_texts_are_read_as_in_training(caption_rows: list[list[str]]) -> None:
    image = base64.b64decode(caption_rows[2][4])
    student = Student.__new__(Student)
    student.settings = {"side": 48, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    wanted = ImageReader(48).to_tensor(open_image(image, "here")).numpy()
    np.testing.assert_allclose(student.read(image), wanted, atol=1e-6)
    for text in ("?What is-it, one/two?", "A <person> there ", "!!", "one two three four five"):
        assert clean(text, 4) == clean_caption(text, 4)
        assert clean(text, 4) == clean_question(text, 4) or "<person>" in text
        assert runner.clean_question(text, 4) == clean_question(text, 4)


def test_what_cannot_be_exported_is_refused(make_model: Callable[..., Path], tmp_path: Path) -> None:
    teacher = make_model("ofa_tiny", "cross_entropy")
    with pytest.raises(InputError, match=r"checkpoint_last.pt: is no student's"):
        export(teacher, tmp_path / "out", to="torch-export")
    with pytest.raises(InputError, match="--to tflite: choose onnx, openvino, torch-export"):
        export(teacher, tmp_path / "out", to="tflite")
    with pytest.raises(InputError, match="--int8: is for --to onnx, not torch-export"):
        export(teacher, tmp_path / "out", to="torch-export", int8=True)


@pytest.mark.integration
@pytest.mark.parametrize("backbone", ["test_resnet", "tf_efficientnet_lite0"])
def test_a_graph_of_any_side_says_what_the_model_does(backbone: str) -> None:
    """Also where the side is no multiple of the 16 pixels of a patch, of which there is then one more."""
    torch.manual_seed(1)
    sizes = {"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
    options = {"encoder_attention_heads": 2, "vision_trunk": backbone, "vision_pretrained": False}
    model = build("narvl_tiny", vocab_size=50, num_queries=6, **sizes, **options).eval()
    prompts = torch.randint(4, 49, (2, 7))
    prompts[0, 5:] = 1
    for side in (16, 20, *range(96, 113)):
        images = torch.randn(2, 3, side, side)
        graph = StudentGraph(copy.deepcopy(model), side=side, length=7, padded=True)
        with torch.no_grad():
            expected = model(prompts, patch_images=images)[0].log_softmax(2)
            torch.testing.assert_close(graph(images, prompts), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.integration
@pytest.mark.parametrize("task", ["caption", "refcoco", "vqa_gen", "snli_ve"])
def test_a_student_of_a_side_that_is_no_multiple_of_16_is_exported(
    task: str, answer_vocabulary: Path, write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    options = {"val_inference_type": "beamsearch"} if task == "vqa_gen" else {}
    checkpoint = write_checkpoint(
        "student.pt", "narvl", task, bpe_dir=str(answer_vocabulary), num_bins=10, patch_image_size=100, **options
    )
    assert export(checkpoint, tmp_path / "out", to="torch-export") < 1e-4
    student = Student(tmp_path / "out")
    fields = {"caption": {}, "refcoco": {"text": "a hat"}, "vqa_gen": {"question": "a hat"}}
    answers = student([png(size=(90, 60))], [fields.get(task, {"hypothesis": "a hat", "caption": "a hat"})])
    assert len(answers) == 1


@pytest.mark.parametrize("task", ["regions", "scene_graph"])
def test_sets_are_not_exported(
    task: str, graph_vocabulary: Path, names_file: Path, write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    options = {"num_bins": 10, "patch_image_size": 32, "max_image_size": 32}
    options |= {"names_file": str(names_file)} if task == "scene_graph" else {}
    checkpoint = write_checkpoint("student.pt", "narvl", task, bpe_dir=str(graph_vocabulary), **options)
    with pytest.raises(InputError, match=f"student.pt: is a student of {task}, which cannot be exported, since run.py"):
        export(checkpoint, tmp_path / "out", to="torch-export")
    assert not (tmp_path / "out").exists()


@pytest.mark.integration
@pytest.mark.skipif(not installed("onnxruntime"), reason="onnxruntime is not installed")
def test_sets_have_a_graph_beside_their_checkpoint(
    graph_vocabulary: Path,
    write_checkpoint: Callable[..., Path],
    write_tsv: Callable[..., Path],
    regions_rows: list[list[str]],
) -> None:
    checkpoint = write_checkpoint(
        "student.pt",
        "narvl",
        "regions",
        **{"bpe_dir": str(graph_vocabulary), "num_bins": 10, "patch_image_size": 32, "max_image_size": 32},
    )
    data = write_tsv("test.tsv", regions_rows)
    expected = Predictor.load(checkpoint, data).predict([0, 1, 2])
    out = checkpoint.with_suffix(".onnx")
    export(checkpoint, out)
    assert {file.name for file in out.iterdir()} == {"student.onnx", "student.json"}
    found = Predictor.load(checkpoint, data)
    assert found.model.exported is not None and found.predict([0, 1, 2]) == expected
    with pytest.raises(InputError, match=r"student.onnx: is a graph for the checkpoint beside it alone"):
        narvl.load(out)


def test_a_side_that_the_model_cannot_take_is_refused_before_anything_is_written(
    vocabulary: Path, write_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = write_checkpoint(
        "student.pt", "narvl", "caption", bpe_dir=str(vocabulary), num_bins=10, patch_image_size=700
    )
    with pytest.raises(ValueError, match="an image grid of 44 x 44 patches does not fit the position table of 42 x 42"):
        export(checkpoint, tmp_path / "out", to="torch-export")
    assert not (tmp_path / "out").exists()
