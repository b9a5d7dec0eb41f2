"""Text files that are whole wherever they exist."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file in one step, and the folders above it where they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
