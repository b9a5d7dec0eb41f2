"""What tests share: small TSV files with pictures, vocabularies, and the goldens where they are at hand."""

import base64
import io
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from narvl_plugin.data.text import TextCodec, load_codec, train_sentencepiece

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


def png(color: object = (200, 30, 30), size: tuple[int, int] = (8, 6), mode: str = "RGB") -> str:
    """Return a one-coloured PNG as base64."""
    stream = io.BytesIO()
    Image.new(mode, size, color).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


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


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with an spm.model trained on a few captions."""
    folder = tmp_path_factory.mktemp("vocabulary")
    (folder / "captions.tsv").write_text("".join(f"{caption}\n" for caption in CAPTIONS), encoding="utf-8")
    train_sentencepiece(folder / "captions.tsv", 0, folder, 500)
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
