"""What the tests of documents share: a page's blocks of code, and someone who types its commands in a folder.

Every block that can be run belongs to a test. Blocks of other languages, such as ``text``, are shown and not run.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import torch
import typer
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from narvl_plugin.checkpoints.reading import whole_checkpoint
from narvl_plugin.cli.app import app
from narvl_plugin.data.scenes import write_scenes
from narvl_plugin.models import build
from narvl_plugin.models.config import SIZES, OfaConfig
from narvl_plugin.models.interop import flags_of, tables_of
from narvl_plugin.tasks import TASKS

ROOT = Path(__file__).parents[1]
RUN = ("bash", "python", "yaml")
"""Languages of blocks that a test must run."""
SMALL = (
    "--encoder-embed-dim 16 --encoder-ffn-embed-dim 32 --encoder-attention-heads 2 --encoder-layers 1 "
    "--decoder-layers 1 --vision-trunk test_resnet --freeze-resnet"
)
"""Sizes of a model that is trained in no time."""
SHORT = "--max-update 1 --batch-size 2 --optimizer adam --lr 1e-4 --cpu --num-workers 0 --no-epoch-checkpoints"
LONE = re.compile(r"(?<!\S)…(?!\S)")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str


class Page:
    """A Markdown page of the repository, whose blocks are run by tests.

    Args:
        name: its path in the repository.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.text = (ROOT / name).read_text(encoding="utf-8")
        self.blocks = [Block(*found) for found in FENCED.findall(self.text)]
        outside = re.findall(r"`([^`]+)`", FENCED.sub("", self.text))
        self.spans = sorted({" ".join(span.split()) for span in outside})
        self.tested: list[Block] = []

    def block(self, beginning: str, name: str = "block") -> pytest.MarkDecorator:
        """Hand a test the one block that begins so, as its argument of that name, and take note that it is tested."""
        found = [block for block in self.blocks if block.text.startswith(beginning)]
        assert len(found) == 1, f"{self.name} has {len(found)} blocks that begin with {beginning!r}"
        self.tested.extend(found)
        return pytest.mark.parametrize(name, [found[0].text], ids=[found[0].language])

    def in_text(self, beginning: str) -> str:
        """Return the one command in the text, outside of blocks, that begins so."""
        found = [span for span in self.spans if span.startswith(beginning)]
        assert len(found) == 1, f"{self.name}'s text has {len(found)} commands that begin with {beginning!r}"
        return found[0]

    def require_tests(self) -> None:
        """Raise AssertionError if a block that can be run has no test."""
        fences = len(re.findall(r"^\s*(?:```|~~~)", self.text, flags=re.MULTILINE))
        assert fences == 2 * len(self.blocks), f"{self.name} has a fence that is no ```LANGUAGE line of its own"
        untested = [block for block in self.blocks if block.language in RUN and block not in self.tested]
        assert untested == [], f"{self.name} has blocks without a test: {untested}"


def commands(block: str) -> list[str]:
    """Return the commands of a block, with their comments; a line that ends in a backslash goes on in the next."""
    return re.findall(r"(?:[^\n]*\\\n)*[^\n]+", block)


def lines_of(file: Path) -> list[str]:
    """Return the lines of a text file."""
    return file.read_text(encoding="utf-8").splitlines()


class Newcomer:
    """Someone who types the commands of a page in a folder."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self.programs = folder, programs

    def types(self, command: str, more: str = "") -> str:
        """Run a command, with `more` in the place of its `…`, and return what it printed."""
        assert bool(LONE.search(command.partition("  # ")[0])) == bool(more), f"`…` in: {command}"
        command = LONE.sub(lambda _: more, command)
        path = f"{self.programs}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert "was trained with" not in done.stderr, "options of generation differ from those of the training"
        return done.stdout

    def keep_last(self, name: str) -> None:
        """Keep the checkpoint that a training has left under a name of the page's."""
        shutil.copyfile(self.folder / "checkpoints" / "checkpoint_last.pt", self.folder / name)

    def generated(self, command: str, more: str = "") -> list[str]:
        """Run a fairseq-generate, and return the lines of what it says."""
        return [line for line in self.types(command, more).splitlines() if line.startswith("D-")]


def parsed(call: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of a program's call as the program itself reads them; it ends at those that are wrong."""
    program, *words = call
    if program == "narvl":
        command, words = command_of(words)
        return command.make_context(program, words).params
    training = program == "fairseq-train"
    parser = options.get_training_parser() if training else options.get_generation_parser()
    arguments = options.parse_args_and_arch(parser, words)
    convert_namespace_to_omegaconf(arguments)
    return vars(arguments)


def command_of(words: Sequence[str]) -> tuple[click.Command, list[str]]:
    """Return the command of `narvl` that some words name, and the words after its name."""
    command: Any = typer.main.get_command(app)
    words = list(words)
    while hasattr(command, "commands") and words:
        assert words[0] in command.commands, f"narvl has no command {words[0]}"
        command = command.commands[words.pop(0)]
    return command, words


@cache
def known_options() -> set[str]:
    """Return the options of narvl and of fairseq's programs, with our tasks, models and criterions."""
    known: set[str] = set()
    waiting: list[Any] = [command_of([])[0]]
    while waiting:
        command = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        known |= {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
    known |= options.get_generation_parser()._option_string_actions.keys()
    chosen = ["--arch", "narvl_tiny", "--optimizer", "adam", "--lr-scheduler", "polynomial_decay_ratio"]
    for task in (*TASKS, "multitask"):
        parser = options.get_training_parser(task)
        words = ["data", "--task", task, "--bpe-dir", "vocab", "--criterion", "qctc", "--num-queries", "7", *chosen]
        options.parse_args_and_arch(parser, words)  # which adds those of the parts that are chosen
        known |= parser._option_string_actions.keys()
    return known


def draw_scene(folder: Path) -> None:
    """Write scene.png, a scene that the model in the box may know."""
    write_scenes(folder, train=1, valid=1, test=1, size=96, seed=99, nouns=24, max_objects=1, tasks=("caption",))
    image = (folder / "caption" / "test.tsv").read_text().split("\t")[4]
    (folder / "scene.png").write_bytes(base64.b64decode(image))


def save_model(file: Path, size: str, labels: int, layout: Callable[[OfaConfig], Any] = asdict) -> None:
    """Write a teacher of random weights in one of OFA's sizes, with its configuration in our layout or in OFA's."""
    config = OfaConfig(_name="ofa", **SIZES[size])
    cfg = {"model": layout(config), "task": {"_name": "unify_task", "bpe_dir": "../../utils/BPE"}}
    tables = tables_of(config) if layout is flags_of else {}
    torch.save(whole_checkpoint(build(f"ofa_{size}", vocab_size=labels).state_dict() | tables, cfg), file)
