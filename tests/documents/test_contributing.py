"""CONTRIBUTING's worked example of a task runs as it stands."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from pathlib import Path

import narvl_plugin.registered
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import train

from narvl_plugin.inference.predictor import Predictor

words = [sys.argv[1], "--task", "colour", "--criterion", "qctc", "--arch", "narvl_tiny", "--num-queries", "3"]
words += ["--bpe-dir", sys.argv[2], "--num-bins", "10", "--patch-image-size", "32", "--vision-trunk", "test_resnet"]
words += ["--encoder-embed-dim", "16", "--encoder-ffn-embed-dim", "32", "--encoder-attention-heads", "2"]
words += ["--encoder-layers", "1", "--decoder-layers", "1", "--optimizer", "adam", "--lr", "0.01", "--batch-size", "3"]
words += ["--max-update", "2", "--cpu", "--save-dir", sys.argv[3], "--no-progress-bar", "--eval-acc"]
arguments = options.parse_args_and_arch(options.get_training_parser(), words)
train.main(convert_namespace_to_omegaconf(arguments))
model = Predictor.load(Path(sys.argv[3]) / "checkpoint_last.pt", Path(sys.argv[1].split(",")[0]))
assert set(model.predict(range(3))) <= set(COLOURS), model.predict(range(3))
assert Path(sys.argv[3]) and model.task.name == "colour"
print("answered")
"""


def png(colour: tuple[int, int, int]) -> str:
    """Return an image of one colour as base64."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


@pytest.mark.integration
def test_the_worked_example_trains_and_answers(tmp_path: Path, vocabulary_of_colours: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M | re.S)
    assert len(blocks) == 3
    colours = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}
    for name in ("train", "valid"):
        lines = ("\t".join((colour, png(pixel), "hat", colour)) + "\n" for colour, pixel in colours.items())
        (tmp_path / f"{name}.tsv").write_text("".join(lines))
    data = f"{tmp_path / 'train.tsv'},{tmp_path / 'valid.tsv'}"
    command = [sys.executable, "-W", "ignore", "-c", "\n".join([*blocks, RUN])]
    command += [data, str(vocabulary_of_colours), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "answered"
    assert "colour_score" in done.stderr


@pytest.fixture
def vocabulary_of_colours(tmp_path: Path) -> Path:
    """Give a vocabulary that spells the colours."""
    from narvl_plugin.data.text import train_sentencepiece

    (tmp_path / "words.tsv").write_text("red\ngreen\nblue\nwhat is the colour of the hat\n")
    train_sentencepiece(tmp_path / "words.tsv", [0], tmp_path, 300)
    return tmp_path
