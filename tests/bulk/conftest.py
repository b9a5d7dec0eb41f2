"""What tests of bulk inference share: images in every kind of input."""

from __future__ import annotations

import base64
import io
import random
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from PIL import Image

NUMBER = 10


@pytest.fixture(scope="session")
def pictures() -> dict[str, bytes]:
    """Images of noise, as PNG files by name."""
    draw, found = random.Random(0), {}
    for number in range(NUMBER):
        stream = io.BytesIO()
        Image.frombytes("RGB", (16, 12), draw.randbytes(16 * 12 * 3)).save(stream, "PNG")
        found[f"{number:03}.png"] = stream.getvalue()
    return found


@pytest.fixture
def folder(tmp_path: Path, pictures: Mapping[str, bytes]) -> Path:
    """A folder with these images."""
    (tmp_path / "pictures").mkdir()
    for name, data in pictures.items():
        (tmp_path / "pictures" / name).write_bytes(data)
    return tmp_path / "pictures"


@pytest.fixture
def tsv(tmp_path: Path, pictures: Mapping[str, bytes]) -> Path:
    """A TSV file of captions with these images."""
    rows = (f"{name}\t{name}\ta caption\t\t{base64.b64encode(data).decode()}\n" for name, data in pictures.items())
    (tmp_path / "rows.tsv").write_text("".join(rows))
    return tmp_path / "rows.tsv"


@pytest.fixture
def write_tar(tmp_path: Path) -> Callable[..., Path]:
    """Write an archive of members: bytes, or headers with their contents."""

    def write(name: str, members: Mapping[str, bytes | tarfile.TarInfo]) -> Path:
        with tarfile.open(tmp_path / name, "w") as archive:
            for member, data in members.items():
                header = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(member)
                header.name = member
                if isinstance(data, bytes):
                    header.size = len(data)
                archive.addfile(header, io.BytesIO(data) if isinstance(data, bytes) else None)
        return tmp_path / name

    return write
