"""What tests share: small TSV files with images, programs, and the goldens where they are at hand."""

import base64
import gc
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parent))  # where what tests share lies

from captions import CAPTIONS

# Goldens of the published models and their dict.txt are no part of the repository; tests that need them are
# skipped without.
SHARED = Path(os.environ.get("NARVL_GOLDENS", Path(__file__).resolve().parents[2] / "shared"))
PRELOADED = (
    "narvl",
    "forked-python",
    "torchrun",
    *(f"fairseq-{name}" for name in ("train", "generate", "validate", "hydra-train", "interactive")),
)
WHICH = shutil.which


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures that need torch, but for xdist's controller: it runs no test, and starts workers at once."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("model_fixtures")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave what is imported out of the garbage collector's passes: a million objects, for a third of a second each."""
    gc.disable()
    result = yield
    gc.collect()
    gc.freeze()
    gc.enable()
    return result


def png(color: object = (200, 30, 30), size: tuple[int, int] = (8, 6), mode: str = "RGB") -> str:
    """Return a one-coloured PNG as base64."""
    stream = io.BytesIO()
    Image.new(mode, size, color).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Restore torch's number of threads after each test: the last digits of sums depend on it."""
    import torch

    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Give the folder of what is no part of the repository, whether it is there or not."""
    return SHARED


@pytest.fixture
def write_tsv(tmp_path: Path) -> Callable[..., Path]:
    """Write rows of columns to a file in the test's folder."""

    def write(name: str, rows: Sequence[Sequence[str]]) -> Path:
        path = tmp_path / name
        path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def caption_rows() -> list[list[str]]:
    """Rows in the columns of captioning: id, image id, caption, objects, image."""
    return [[str(row), f"img{row}", caption, "", png((40 * row, 10, 10))] for row, caption in enumerate(CAPTIONS)]


@pytest.fixture
def refcoco_rows() -> list[list[str]]:
    """Rows in the columns of grounding: id, image id, text, box, image of 8 x 6 pixels."""
    boxes = ("0,0,4,3", "1,2,7,5", "2,1,8,6")
    return [[str(row), f"img{row}", CAPTIONS[row], box, png((40 * row, 10, 10))] for row, box in enumerate(boxes)]


@pytest.fixture
def regions_rows(refcoco_rows: list[list[str]]) -> list[list[str]]:
    """Rows in the columns of sets of regions, with two boxes, one and none."""
    columns = ("1,2,7.5,6&&0,0,4,3", "2,1,8,6", "")
    return [[*row[:3], boxes, row[4]] for row, boxes in zip(refcoco_rows, columns, strict=True)]


@pytest.fixture
def scene_graph_rows(refcoco_rows: list[list[str]]) -> list[list[str]]:
    """Rows in the columns of scene graphs, with two triplets, one and none, on images of 8 x 6 pixels."""
    columns = (
        "dog 4,0,8,6 | on | red hat 0,0,4,3&&dog 0,0,4,6 | left of | dog 4,0,8,6",
        "red hat 2,1,8,6 | on | dog 0,0,8,6",
        "",
    )
    return [[*row[:2], triplets, row[4]] for row, triplets in zip(refcoco_rows, columns, strict=True)]


@pytest.fixture
def names_file(tmp_path: Path) -> Path:
    """The names that may occur in `scene_graph_rows`."""
    names = {"label_to_idx": {"dog": 1, "red hat": 2, "red": 3}, "predicate_to_idx": {"on": 1, "left of": 2}}
    file = tmp_path / "names.json"
    file.write_text(json.dumps(names))
    return file


@pytest.fixture
def scene_tree_rows(refcoco_rows: list[list[str]]) -> list[list[str]]:
    """Rows in the columns of scene trees, with four objects, one and none."""
    columns = (
        "( red plain ( left ( small red hat ) ( dog ) ( dog ) ) ( right ( dog ) ) )",
        "(blue plain (right (red hat)))",
        "( red plain )",
    )
    return [[*row[:2], tree, row[4]] for row, tree in zip(refcoco_rows, columns, strict=True)]


@pytest.fixture
def tree_names_file(tmp_path: Path) -> Path:
    """The words that may occur in `scene_tree_rows`."""
    words = {
        "scene": [["red", "blue"], ["plain"]],
        "region": [["left", "right"]],
        "object": [["", "small"], ["dog", "red hat"]],
    }
    file = tmp_path / "tree_names.json"
    file.write_text(json.dumps(words))
    return file


@pytest.fixture
def snli_ve_rows() -> list[list[str]]:
    """Rows in the columns of visual entailment: id, image id, image, hypothesis, caption, label."""
    labels = ("entailment", "contradiction", "neutral", "entailment")
    return [
        [str(row), f"img{row}", png((40 * row, 10, 10)), CAPTIONS[row], CAPTIONS[row + 1], label]
        for row, label in enumerate(labels)
    ]


@pytest.fixture
def vqa_rows() -> list[list[str]]:
    """Rows in the columns of visual question answering: id, image id, question, answers, objects, image."""
    answers = ("1.0|!+red", "0.6|!+two&&0.3|!+a red hat", "0.3|!+a dog&&0.9|!+a cat", "1.0|!+red")
    return [
        [str(row), f"img{row}", f"what {CAPTIONS[row]}", answer, "dog&&hat&&dog", png((40 * row, 10, 10))]
        for row, answer in enumerate(answers)
    ]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Give the folder of the raw files."""
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


@pytest.fixture
def photo(raw: Path) -> Callable[..., str]:
    """Give a function that writes a photograph into the folder of raw files and returns its bytes as base64."""

    def write(name: str, size: tuple[int, int] = (8, 6)) -> str:
        file = raw / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (len(name), sum(name.encode()) % 256, 90)).save(file)
        return base64.b64encode(file.read_bytes()).decode()

    return write


@pytest.fixture
def write_json(raw: Path) -> Callable[[str, Any], Path]:
    """Give a function that writes a JSON file into the folder of raw files."""

    def write(name: str, content: Any) -> Path:
        file = raw / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content), encoding="utf-8")
        return file

    return write


@pytest.fixture
def read_rows() -> Callable[[Path], list[list[str]]]:
    """Give a function that reads the rows of a TSV file, cut at line ends and tabs alone."""

    def read(path: Path) -> list[list[str]]:
        content = path.read_bytes().decode("utf-8")
        assert content.endswith("\n")
        return [line.split("\t") for line in content[:-1].split("\n")]

    return read


@pytest.fixture(scope="session")
def bpe_dir() -> Path:
    """Give the folder of the published checkpoints' dict.txt."""
    if not (SHARED / "bpe" / "dict.txt").is_file():
        pytest.skip(f"{SHARED / 'bpe' / 'dict.txt'} is not at hand")
    return SHARED / "bpe"


@pytest.fixture(scope="session")
def goldens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a copy of the goldens' folder, so that indexes are written beside the copy."""
    if not (SHARED / "parity").is_dir():
        pytest.skip(f"{SHARED / 'parity'} is not at hand")
    folder = tmp_path_factory.mktemp("goldens")
    for name in ("ofa_datasets_tasks.json", "data"):
        source = SHARED / "parity" / name
        if source.is_dir():
            (folder / name).mkdir()
            for file in source.iterdir():
                shutil.copyfile(file, folder / name / file.name)
        else:
            shutil.copyfile(source, folder / name)
    return folder


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give a folder, for PATH, with our programs as forks of one process (see preloaded.py), and with python.

    Its java fails: METEOR, which is in Java, takes ten seconds to start, and has tests of its own.
    """
    folder, server_file = tmp_path_factory.mktemp("programs"), str(Path(__file__).with_name("preloaded.py"))
    address = str(folder / "socket")
    run = shlex.join([sys.executable, "-SE", server_file, "run", address])
    starts = {program: f'exec {run} {program} "$@"' for program in PRELOADED}
    starts |= {"java": "exit 1", "python": f'exec {shlex.quote(sys.executable)} "$@"'}
    for program, start in starts.items():
        (folder / program).write_text(f"#!/bin/sh\n{start}\n")
        (folder / program).chmod(0o755)
    serve = [sys.executable, server_file, "serve", address]
    server = subprocess.Popen(serve, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, process_group=0)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    yield folder
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide Java: METEOR, which is in Java, takes ten seconds to start, and has tests of its own."""
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "java" else WHICH(name))


MEASURED: dict[tuple[str, str], float] = {}


@pytest.fixture(scope="session")
def measured() -> Callable[[str, str, float], None]:
    """Give a function that keeps the largest figure of a subject and quantity, for the table at the end."""

    def keep(subject: str, quantity: str, figure: float) -> None:
        MEASURED[subject, quantity] = max(figure, MEASURED.get((subject, quantity), 0.0))

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests have measured."""
    if MEASURED:
        terminalreporter.section("measured")
    for (subject, quantity), figure in MEASURED.items():
        terminalreporter.write_line(f"{subject:30} {quantity:50} {figure:.2g}")
