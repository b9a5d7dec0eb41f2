"""The worked example of a task in docs/how-to/add-a-task.md runs as it stands, and CONTRIBUTING leads to it."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, Page, commands
from PIL import Image

from narvl_plugin.data.text import train_sentencepiece

PAGE = Page("docs/how-to/add-a-task.md")
CONTRIBUTING = Page("CONTRIBUTING.md")
SMALL = (
    "--num-bins 10 --patch-image-size 32 --vision-trunk test_resnet --encoder-embed-dim 16 --encoder-ffn-embed-dim 32 "
    "--encoder-attention-heads 2 --encoder-layers 1 --decoder-layers 1 --optimizer adam --lr 0.01 --batch-size 3 "
    "--max-update 2 --cpu --no-progress-bar --save-dir out"
)
START = "import narvl_plugin.registered\n"
RUN = """
import shlex
import sys

from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import train

from narvl_plugin.inference.predictor import Predictor
from narvl_plugin.tasks import TASKS

program, *words = shlex.split(sys.argv[1])
assert program == "fairseq-train"
arguments = options.parse_args_and_arch(options.get_training_parser(), words)
train.main(convert_namespace_to_omegaconf(arguments))
model = Predictor.load("out/checkpoint_last.pt", "train.tsv")
assert set(model.predict(range(3))) <= set(COLOURS), model.predict(range(3))
assert model.task.name == "colour" and "colour" in TASKS
print("answered")
"""


def png(colour: tuple[int, int, int]) -> str:
    """Return an image of one colour as base64."""
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a folder with rows of images of one colour, and a vocabulary that spells the colours."""
    colours = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}
    for name in ("train", "valid"):
        lines = ("\t".join((colour, png(pixel), "hat", colour)) + "\n" for colour, pixel in colours.items())
        (tmp_path / f"{name}.tsv").write_text("".join(lines))
    (tmp_path / "words.tsv").write_text("red\ngreen\nblue\nwhat is the colour of the hat\n")
    train_sentencepiece(tmp_path / "words.tsv", [0], tmp_path / "vocab", 300)
    return tmp_path


@pytest.mark.integration
@PAGE.block("from typing import ClassVar", "dataset")
@PAGE.block("from dataclasses import dataclass, field", "task")
@PAGE.block("from dataclasses import dataclass\n", "registered")
@PAGE.block("fairseq-train", "command")
def test_the_worked_example_trains_and_answers(
    dataset: str, task: str, registered: str, command: str, folder: Path
) -> None:
    whole = command.replace("\\\n", " ").replace("…", SMALL)
    whole = whole.replace("--user-dir narvl_plugin", f"--user-dir {ROOT / 'narvl_plugin'}")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join((START, dataset, task, registered, RUN)), whole],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "answered"
    assert "colour_score" in done.stdout + done.stderr


def test_places_that_the_page_names_are_there() -> None:
    named = {span for span in PAGE.spans if re.fullmatch(r"(narvl_plugin|tests)/[\w/.]+", span)}
    assert len(named) >= 7
    for path in named - {"narvl_plugin/data/colour.py", "narvl_plugin/tasks/colour.py"}:
        assert (ROOT / path).exists(), path


def test_contributing_leads_to_the_example() -> None:
    assert f"({PAGE.name})" in CONTRIBUTING.text


@CONTRIBUTING.block("make setup")
def test_contributing_names_what_is_there(block: str) -> None:
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {re.split(r"\s+", command)[1] for command in commands(block)} <= set(targets)
    packages = {
        name for row in re.findall(r"^\| (`.*?) \|", CONTRIBUTING.text, re.M) for name in re.findall(r"\w+", row)
    }
    assert len(packages) >= 15
    for name in packages - {"criterions"}:
        assert (ROOT / "narvl_plugin" / name).is_dir(), name


@pytest.mark.parametrize("page", [PAGE, CONTRIBUTING], ids=lambda page: page.name)
def test_every_block_is_tested(page: Page) -> None:
    page.require_tests()
