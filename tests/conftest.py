"""What tests share: small TSV files with pictures, vocabularies, and the goldens where they are at hand."""

import base64
import gc
import io
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils, options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks import TASK_DATACLASS_REGISTRY, setup_task
from fairseq_cli import generate, train
from omegaconf import OmegaConf
from PIL import Image

sys.path.append(str(Path(__file__).parent))  # where what tests share lies

import quick_hydra  # noqa: F401 - makes it so
from device_waits import DeviceWaits

import narvl_plugin.registered  # noqa: F401 - registers the tasks
from narvl_plugin.checkpoints.reading import whole_checkpoint
from narvl_plugin.data.text import TextCodec, load_codec, train_sentencepiece
from narvl_plugin.models.registered import FAMILIES

# Goldens of the published models and their dict.txt are no part of the repository; tests that need them are
# skipped without.
SHARED = Path(os.environ.get("NARVL_GOLDENS", Path(__file__).resolve().parents[2] / "shared"))
CAPTIONS = (
    "a red square on a wall",
    "two dogs run",
    "the blue hat",
    "a cat",
    "a bird and a boat",
    "one tree",
)
PRELOADED = (
    "narvl",
    "forked-python",
    *(f"fairseq-{name}" for name in ("train", "generate", "validate", "hydra-train", "interactive")),
)
WHICH = shutil.which
TEXTS_WITH_ANSWERS = (*CAPTIONS[:4], "yes", "no", "maybe", "0123456789.|!+")


def pytest_collection() -> None:
    """Collect no garbage while test modules are imported."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave what is imported out of the garbage collector's passes: a million objects, for a third of a second each."""
    gc.collect()
    gc.freeze()
    gc.enable()


def png(color: object = (200, 30, 30), size: tuple[int, int] = (8, 6), mode: str = "RGB") -> str:
    """Return a one-coloured PNG as base64."""
    stream = io.BytesIO()
    Image.new(mode, size, color).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


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
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with an spm.model trained on a few captions."""
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "captions.tsv").write_text("".join(f"{caption}\n" for caption in CAPTIONS), encoding="utf-8")
    train_sentencepiece(folder / "captions.tsv", [0], folder, 500)
    return folder


@pytest.fixture(scope="session")
def answer_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with an spm.model that can spell yes, no and maybe, and columns of answers."""
    folder = tmp_path_factory.mktemp("answer_vocabulary")
    (folder / "texts.tsv").write_text("".join(f"{text}\n" for text in TEXTS_WITH_ANSWERS))
    train_sentencepiece(folder / "texts.tsv", [0], folder, 500)
    return folder


@pytest.fixture(scope="session")
def codec(vocabulary: Path) -> TextCodec:
    """Give the codec of that vocabulary, with ten bins."""
    return load_codec(vocabulary, num_bins=10)


@pytest.fixture(scope="session")
def bpe_dir() -> Path:
    """Give the folder of the published checkpoints' dict.txt."""
    if not (SHARED / "bpe" / "dict.txt").is_file():
        pytest.skip(f"{SHARED / 'bpe' / 'dict.txt'} is not at hand")
    return SHARED / "bpe"


@pytest.fixture(scope="session")
def gpt2_codec(bpe_dir: Path) -> TextCodec:
    """Give the codec of the published checkpoints."""
    return load_codec(bpe_dir)


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


@pytest.fixture
def device() -> Iterator[DeviceWaits]:
    """Give a pretended device that counts what a GPU would be waited for (see device_waits.py)."""
    with DeviceWaits() as waits:
        yield waits


@pytest.fixture
def quiet() -> Iterator[None]:
    """Give fairseq's programs the root logger's handlers back to us."""
    handlers = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = handlers


@pytest.fixture
def run_train(quiet: None) -> Callable[..., None]:
    """Give a function that runs fairseq-train in this process, as if no other run had left its best score there.

    It reads rows in this process, too, unless told otherwise: a worker of each epoch would copy all that is in memory.
    """

    def run(*arguments: object) -> None:
        vars(checkpoint_utils.save_checkpoint).pop("best", None)
        parsed = options.parse_args_and_arch(options.get_training_parser(), ["--num-workers=0", *map(str, arguments)])
        train.main(convert_namespace_to_omegaconf(parsed))

    return run


@pytest.fixture
def run_generate(quiet: None) -> Callable[..., None]:
    """Give a function that runs fairseq-generate in this process, which reads rows, too, unless told otherwise."""

    def run(*arguments: object) -> None:
        parsed = options.parse_args_and_arch(options.get_generation_parser(), ["--num-workers=0", *map(str, arguments)])
        generate.main(parsed)

    return run


@pytest.fixture
def make_model(
    write_tsv: Callable[..., Path],
    caption_rows: list[list[str]],
    vocabulary: Path,
    tmp_path: Path,
    run_train: Callable[..., None],
) -> Callable[..., Path]:
    """Give a function that trains a tiny model of captions on train.tsv for a few updates; returns its checkpoint."""
    data = f"{write_tsv('train.tsv', caption_rows)},{write_tsv('valid.tsv', caption_rows)}"

    def make(arch: str, *criterion: object, updates: int = 1) -> Path:
        run_train(
            *(data, "--task", "caption", "--bpe-dir", vocabulary, "--num-bins", 10, "--patch-image-size", 32),
            *("--arch", arch, "--criterion", *criterion, "--save-dir", tmp_path / arch, "--disable-validation"),
            *("--encoder-embed-dim", 16, "--encoder-ffn-embed-dim", 32, "--encoder-attention-heads", 2),
            *("--encoder-layers", 1, "--decoder-layers", 1, "--vision-trunk", "test_resnet", "--freeze-resnet"),
            *("--optimizer", "adam", "--lr", 1e-2, "--batch-size", 6, "--max-update", updates, "--cpu"),
            *("--max-epoch", updates, "--save-interval", updates, "--no-epoch-checkpoints", "--no-progress-bar"),
        )
        return tmp_path / arch / "checkpoint_last.pt"

    return make


@pytest.fixture(scope="session")
def save_checkpoint() -> Callable[..., Path]:
    """Give a function that writes the checkpoint of a small random model, `narvl` or `ofa`, for a task's options."""

    def save(file: Path, family: str, task: str, **task_options: Any) -> Path:
        task_cfg = OmegaConf.structured(TASK_DATACLASS_REGISTRY[task](_name=task, data="none", **task_options))
        small = {"encoder_embed_dim": 16, "encoder_ffn_embed_dim": 32, "encoder_attention_heads": 2}
        layers = {"encoder_layers": 1, "decoder_layers": 1, "vision_trunk": "test_resnet", "freeze_resnet": True}
        model_cfg = OmegaConf.structured(FAMILIES[family][0](_name=family, **small, **layers))
        torch.manual_seed(5)
        model = setup_task(task_cfg).build_model(model_cfg)
        cfg = {"model": model_cfg, "task": task_cfg, "criterion": {"_name": "label_smoothed_cross_entropy"}}
        plain = OmegaConf.to_container(OmegaConf.create(cfg), enum_to_str=True)
        torch.save(whole_checkpoint(model.state_dict(), plain), file)
        return file

    return save


@pytest.fixture
def write_checkpoint(tmp_path: Path, save_checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """Give a function that writes such a checkpoint to a file in the test's folder."""

    def write(name: str, family: str, task: str, **task_options: Any) -> Path:
        return save_checkpoint(tmp_path / name, family, task, **task_options)

    return write


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
