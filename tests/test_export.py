"""Exported students: what they say, without this code, is what their checkpoints say."""

from __future__ import annotations

import base64
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from narvl_plugin import checkpoints
from narvl_plugin.bench import Predictor
from narvl_plugin.ctc import greedy
from narvl_plugin.data.images import ImageReader, open_image
from narvl_plugin.data.text import TextCodec, clean_caption, clean_question
from narvl_plugin.errors import InputError
from narvl_plugin.export import FORMATS, export
from narvl_plugin.export.runner import Student, clean

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
    pictures = [base64.b64decode(row[4]) for row in caption_rows]
    predictor = Predictor.load(checkpoint, tmp_path / "train.tsv").with_options({}, beam=1, min_len=0)
    expected = [predictor(row) for row in range(len(pictures))]
    assert any(expected)
    (tmp_path / "picture.png").write_bytes(pictures[0])
    formats = [to for to, packages in FORMATS.items() if all(map(installed, packages))]
    for to in formats:
        assert export(checkpoint, tmp_path / to, to=to) < 1e-4
        answers = Student(tmp_path / to, threads=1)(pictures)
        assert [answer.text for answer in answers] == expected
        assert all(0 < answer.probability <= 1 for answer in answers)
        assert answers[0].probability == pytest.approx(np.prod(answers[0].probabilities))
        refused = ("narvl_plugin", "fairseq", "torchvision", "timm") + (() if to == "torch-export" else ("torch",))
        said = run_alone(tmp_path / to, str(tmp_path / "picture.png"), refused=refused)
        assert said == f"{expected[0]}\t{answers[0].probability:.4f}\n"
    if "onnx" in formats:
        assert 0 < export(checkpoint, tmp_path / "int8", int8=True) < 0.2
        sizes = [(tmp_path / name / "student.onnx").stat().st_size for name in ("onnx", "int8")]
        assert sizes[1] < sizes[0]


@pytest.mark.integration
@pytest.mark.parametrize("to", ["onnx", "torch-export"])
def test_tasks_with_a_text_read_it(
    to: str,
    run_train: Callable[..., None],
    write_tsv: Callable[..., Path],
    refcoco_rows: list[list[str]],
    answer_vocabulary: Path,
    tmp_path: Path,
) -> None:
    if not all(map(installed, FORMATS[to])):
        pytest.skip(f"{' or '.join(FORMATS[to])} is not installed")
    data = write_tsv("train.tsv", refcoco_rows)
    run_train(
        *(
            f"{data},{data}",
            "--task",
            "refcoco",
            "--bpe-dir",
            answer_vocabulary,
            "--num-bins",
            10,
            "--disable-validation",
        ),
        *("--patch-image-size", 32, "--arch", "narvl_tiny", "--criterion", "qctc", "--num-queries", 8, "--cpu"),
        *("--encoder-embed-dim", 16, "--encoder-ffn-embed-dim", 32, "--encoder-attention-heads", 2),
        *("--encoder-layers", 1, "--decoder-layers", 1, "--vision-trunk", "test_resnet", "--freeze-resnet"),
        *("--optimizer", "adam", "--lr", 1e-2, "--batch-size", 3, "--max-epoch", 20, "--save-dir", tmp_path / "model"),
        *("--save-interval", 20, "--no-epoch-checkpoints", "--no-progress-bar"),
    )
    checkpoint = tmp_path / "model" / "checkpoint_last.pt"
    export(checkpoint, tmp_path / "out", to=to, prompt_length=40)
    (model,), task, _ = checkpoints.load(checkpoint, task_overrides={"data": str(data)})
    task.load_dataset("test")
    dataset = task.dataset("test")
    batch = dataset.collater([dataset[row] for row in range(3)])
    with torch.no_grad():
        said = [task.codec.decode(path.tokens) for path in greedy(model(**batch["net_input"])[0], blank=model.blank)]
    assert any(said)
    student = Student(tmp_path / "out")
    fields = [{"text": row[2]} for row in refcoco_rows]
    pictures = [base64.b64decode(row[4]) for row in refcoco_rows]
    assert [answer.text for answer in student(pictures, fields)] == said
    with pytest.raises(ValueError, match="text=TEXT"):
        student(pictures[:1])
    with pytest.raises(ValueError, match="was exported for 40"):
        student(pictures[:1], [{"text": "a red square on a wall " * 8}])


def test_pieces_are_what_the_codecs_write(gpt2_codec: TextCodec, codec: TextCodec) -> None:
    for used, texts in ((gpt2_codec, ["a naïve café ☃ <person>", " two  dogs"]), (codec, ["two dogs run", "one tree"])):
        for text in texts:
            tokens = [0, *used.encode(text).tolist(), 2, used.dictionary.index("<bin_3>")]
            pieces = [used.piece(used.dictionary[token]) for token in tokens]
            assert b"".join(pieces).decode().strip() == used.decode(tokens)


def test_pictures_and_texts_are_read_as_in_training(caption_rows: list[list[str]]) -> None:
    picture = base64.b64decode(caption_rows[2][4])
    student = Student.__new__(Student)
    student.settings = {"side": 48, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    wanted = ImageReader(48).to_tensor(open_image(picture, "here")).numpy()
    np.testing.assert_allclose(student.read(picture), wanted, atol=1e-6)
    for text in ("?What is-it, one/two?", "A <person> there ", "!!", "one two three four five"):
        assert clean(text, 4) == clean_caption(text, 4)
        assert clean(text, 4) == clean_question(text, 4) or "<person>" in text


def test_what_cannot_be_exported_is_refused(make_model: Callable[..., Path], tmp_path: Path) -> None:
    teacher = make_model("ofa_tiny", "cross_entropy")
    with pytest.raises(InputError, match=r"checkpoint_last.pt: is no student's"):
        export(teacher, tmp_path / "out", to="torch-export")
    with pytest.raises(InputError, match="--to tflite: choose onnx, openvino, torch-export"):
        export(teacher, tmp_path / "out", to="tflite")
    with pytest.raises(InputError, match="--int8: is for --to onnx, not torch-export"):
        export(teacher, tmp_path / "out", to="torch-export", int8=True)
