"""What tests of the raw data sets share: small photographs, JSON files, rows read back."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


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
