"""Tokenisers: what they keep, which one is taken, and what happens when Java is missing or broken."""

import os
import shutil
from pathlib import Path

import pytest

from narvl_plugin.scoring import tokenization
from narvl_plugin.scoring.tokenization import plain_words, tokenize_captions

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A Dog, and two cats.", "a dog and two cats"),
        ("  the dog's  hot-dog!? ", "the dog's hot-dog"),
        ("- ... -", ""),
        ("", ""),
    ],
)
def test_plain_words(text: str, words: str) -> None:
    assert plain_words(text) == words


def test_auto_is_plain_without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization.shutil, "which", lambda _: None)
    assert tokenize_captions({"p": ["A dog.", ""]}) == ({"p": ["a dog", ""]}, "plain")


def test_ptb_without_java_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match="needs Java"):
        tokenize_captions({"p": ["a dog"]}, "ptb")


def test_unknown_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="'moses'.*auto, ptb, plain"):
        tokenize_captions({"p": ["a dog"]}, "moses")  # type: ignore[arg-type]


@needs_java
def test_ptb_splits_clitics_and_drops_punctuation() -> None:
    words, used = tokenize_captions({"p": ["A dog's mat, isn't it.", ""], "q": [""], "r": ["Two cats"]}, "ptb")
    assert used == "ptb"
    assert words == {"p": ["a dog 's mat is n't it", ""], "q": [""], "r": ["two cats"]}


@pytest.fixture
def broken_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a ``java`` first on the path that only fails."""
    program = tmp_path / "java"
    program.write_text("#!/bin/sh\necho 'no memory' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.usefixtures("broken_java")
def test_broken_java_falls_back_only_under_auto(caplog: pytest.LogCaptureFixture) -> None:
    captions = {"p": ["A dog."], "q": ["Two."]}
    assert tokenize_captions(captions) == ({"p": ["a dog"], "q": ["two"]}, "plain")
    assert "using the plain tokeniser" in caplog.text
    with pytest.raises(RuntimeError, match="lines for 2 captions"):
        tokenize_captions(captions, "ptb")
