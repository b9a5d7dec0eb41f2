"""Tokenisers: what they keep, which one is taken, and what happens when Java is missing or broken."""

import shutil
import sys
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from narvl_plugin.errors import InputError
from narvl_plugin.scoring import coco_caption, tokenization
from narvl_plugin.scoring.java import JavaError
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


@pytest.mark.usefixtures("no_java")
def test_auto_is_plain_without_java() -> None:
    assert tokenize_captions({"p": ["A dog.", ""]}) == ({"p": ["a dog", ""]}, "plain")


@pytest.mark.usefixtures("no_java")
def test_ptb_without_java_is_refused() -> None:
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


@needs_java
def test_characters_that_end_lines_shift_no_caption() -> None:
    """The tokeniser's program ends lines at more than a line feed, and later captions became others'."""
    kinds = ("Cc", "Cf", "Cs", "Zl", "Zp", "Zs")
    characters = [chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in kinds]
    texts = {f"{number}": [f"A cat{mark}sits.", f"{mark}", f"{number}"] for number, mark in enumerate(characters)}
    texts["both"] = ["A cat\r\non\r\ra\u2028mat", "\r"]
    words, used = tokenize_captions(texts, "ptb")
    assert used == "ptb" and words.keys() == texts.keys()
    assert all(words[f"{number}"][2] == f"{number}" for number in range(len(characters)))
    between = {words[f"{number}"][0] for number, mark in enumerate(characters) if mark.isspace()}
    assert between == {"a cat sits"}
    assert words["both"] == ["a cat on a mat", ""]


@pytest.mark.parametrize("lines", ["one", "one\\ntwo\\nthree", "one\\ntwo\\n\\n", "one\\ntwo\\nthree\\n", ""])
def test_another_number_of_lines_is_an_error(put_java: Callable[[str], None], lines: str) -> None:
    """Of two texts whose lines do not agree in number, the surplus was dropped in silence."""
    put_java(f"cat > /dev/null; printf '{lines}'")
    for tokenizer in ("auto", "ptb"):
        with pytest.raises(InputError, match=r"gave \d lines for 2 captions.*whose they are") as caught:
            tokenize_captions({"p": ["A dog."], "q": ["Two."]}, tokenizer)
        assert not isinstance(caught.value, JavaError)  # for which auto takes the plain tokeniser


def test_java_that_never_answers_is_stopped_with_its_children(
    put_java: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It was waited for without end."""
    put_java(f"sleep 60 & echo $! > {tmp_path}/child; sleep 60")
    monkeypatch.setattr(tokenization, "_PTB_BASE_SECONDS", 1)
    assert tokenize_captions({"p": ["A dog."]}) == ({"p": ["a dog"]}, "plain")
    assert "the Treebank tokeniser failed within 1 s: it did not end, and was stopped" in caplog.text
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    for _ in range(100):  # a process that is killed ends when the system comes to it
        if not child.exists() or child.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child of java still runs")
    with pytest.raises(JavaError, match="did not end.*`java -version`"):
        tokenize_captions({"p": ["A dog."]}, "ptb")


def test_limit_grows_with_the_captions() -> None:
    """240,000 texts, a test set of 40,000 images, may take 40 minutes."""
    assert 2400 < tokenization._PTB_BASE_SECONDS + 240_000 * tokenization._PTB_SECONDS_PER_CAPTION < 3600


@pytest.fixture
def broken_java(put_java: Callable[[str], None]) -> None:
    """Put a ``java`` first on the path that only fails."""
    put_java("echo 'no memory' >&2\nexit 1")


@pytest.mark.usefixtures("broken_java")
def test_broken_java_falls_back_only_under_auto(caplog: pytest.LogCaptureFixture) -> None:
    captions = {"p": ["A dog."], "q": ["Two."]}
    assert tokenize_captions(captions) == ({"p": ["a dog"], "q": ["two"]}, "plain")
    assert "using the plain tokeniser" in caplog.text
    with pytest.raises(RuntimeError, match="lines for 2 captions"):
        tokenize_captions(captions, "ptb")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'no memory' >&2; exit 1", "it gave 0 lines for 1 captions, exit status 1 (no memory)"),
        ("kill -9 $$", "it gave 0 lines for 1 captions, ended by signal 9 (Killed)"),
        ("kill -SEGV $$", "it gave 0 lines for 1 captions, ended by signal 11 (Segmentation fault)"),
    ],
)
def test_how_java_failed_is_said(
    script: str, reason: str, put_java: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    put_java(script)
    assert tokenize_captions({"p": ["A dog."]}) == ({"p": ["a dog"]}, "plain")
    assert reason in caplog.text
    assert tokenization.why_plain() == "Java failed, see the warning"


@pytest.mark.parametrize("mode", [0o644, 0o000])
def test_java_that_cannot_be_executed_is_not_said_to_be_missing(
    mode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "java").write_text("#!/bin/sh\n")
    (tmp_path / "java").chmod(mode)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tokenize_captions({"p": ["A dog."]}) == ({"p": ["a dog"]}, "plain")
    assert "the Treebank tokeniser cannot be started: [Errno 13] Permission denied" in caplog.text
    assert tokenization.why_plain() == "Java failed, see the warning"
    (tmp_path / "java").unlink()
    assert tokenization.why_plain() == "no Java"


def test_java_of_another_kind_of_machine_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "java").write_bytes(b"\x7fELF of another machine")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tokenize_captions({"p": ["A dog."]}) == ({"p": ["a dog"]}, "plain")
    assert "the Treebank tokeniser cannot be started: [Errno 8] Exec format error" in caplog.text


def test_without_any_temporary_folder_words_are_split_plainly(
    put_java: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    put_java("cat")
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert tokenize_captions({"p": ["A dog."]}) == ({"p": ["a dog"]}, "plain")
    assert "No usable temporary directory found; set TMPDIR to a folder with room" in caplog.text


def test_children_of_java_end_with_it(put_java: Callable[[str], None], tmp_path: Path) -> None:
    put_java(f"sleep 60 > /dev/null & echo $! > {tmp_path}/child; exit 3")
    with pytest.raises(JavaError, match="exit status 3"):
        coco_caption._meteor({"p": ["a dog"]}, {"": {"p": ["a dog"]}})
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    for _ in range(100):  # a process that is killed ends when the system comes to it
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child of java still runs")
