"""Words of captions for the metrics, from the Penn Treebank tokeniser of the COCO tools or a plain one."""

import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pycocoevalcap.tokenizer import ptbtokenizer

from narvl_plugin.errors import InputError
from narvl_plugin.scoring.java import JavaError, java

logger = logging.getLogger(__name__)

TokenizerChoice = Literal["auto", "ptb", "plain"]
TOKENIZER_CHOICES: tuple[TokenizerChoice, ...] = ("auto", "ptb", "plain")

# The tokeniser takes seconds for 10,000 captions; the limit allows for a slow and busy machine.
_PTB_BASE_SECONDS = 60.0
_PTB_SECONDS_PER_CAPTION = 0.01

_WORD = re.compile(r"\w+(?:[-'’]\w+)*")
# Programs end lines not only at "\n" but at "\r", form feeds, U+2028 and others. Lone surrogates have no UTF-8 form.
_NOT_IN_A_LINE = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")


def java_available() -> bool:
    """Tell whether a ``java`` is on the path, executable or not.

    The Treebank tokeniser and METEOR are Java programs.
    """
    return shutil.which("java") is not None or any(Path(folder, "java").is_file() for folder in _closed_folders())


def _closed_folders() -> list[str]:
    """Return the folders of the path whose ``java`` is not executable; ``shutil.which`` ignores these."""
    return [folder for folder in os.get_exec_path() if not os.access(os.path.join(folder, "java"), os.X_OK)]


def why_plain() -> str:
    """Return why ``auto`` used the plain tokeniser: Java is missing, or it failed with a warning."""
    return "Java failed, see the warning" if java_available() else "no Java"


def plain_words(text: str) -> str:
    """Lower-case a text and join its words by spaces; hyphens and apostrophes inside words stay."""
    return " ".join(_WORD.findall(text.lower()))


def one_line(text: str) -> str:
    """Replace each run of white space and control characters by one space, and strip the text."""
    return _NOT_IN_A_LINE.sub(" ", text).strip()


def ptb_words(captions: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Tokenise as the COCO evaluation does: Stanford's Treebank tokeniser, lower case, no punctuation.

    One Java process handles all captions, so one call with all of them is fastest.

    Args:
        captions: lists of captions by key.

    Returns:
        The captions as words joined by single spaces, under the same keys.

    Raises:
        JavaError: if the Java program cannot be run, fails, or does not answer in time.
        InputError: if it returns a wrong number of lines.
    """
    texts = [one_line(text) for together in captions.values() for text in together]
    name = "the Treebank tokeniser"
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ("-cp", jar, "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase")
    with java(name, command, _PTB_BASE_SECONDS + _PTB_SECONDS_PER_CAPTION * len(texts)) as program:
        output, _ = program.communicate("".join(f"{text}\n" for text in texts).encode())
        *lines, rest = output.decode().split("\n")
        if program.returncode:
            raise EOFError(f"it gave {len(lines)} lines for {len(texts)} captions")
    if len(lines) != len(texts) or rest:
        raise InputError(
            f"{name} gave {len(lines)} lines for {len(texts)} captions; it is unknown whose they are; "
            "check `java -version`, or score without Java on the PATH"
        )
    silent = ("", *ptbtokenizer.PUNCTUATIONS)
    words = (" ".join(word for word in line.split(" ") if word not in silent) for line in lines)
    return {key: [next(words) for _ in together] for key, together in captions.items()}


def tokenize_captions(
    captions: Mapping[str, list[str]], tokenizer: TokenizerChoice = "auto"
) -> tuple[dict[str, list[str]], Literal["ptb", "plain"]]:
    """Tokenise captions and return the name of the tokeniser.

    Args:
        captions: lists of captions by key.
        tokenizer: ``ptb`` (needs Java), ``plain``, or ``auto``: ``ptb`` if it runs, else ``plain``.

    Returns:
        The captions as words joined by single spaces under the same keys, and ``"ptb"`` or ``"plain"``.

    Raises:
        ValueError: for an unknown ``tokenizer``.
        JavaError: if ``ptb`` is requested and cannot be run.
        InputError: if the Java program returns a wrong number of lines.
    """
    if tokenizer not in TOKENIZER_CHOICES:
        raise ValueError(f"unknown tokenizer {tokenizer!r}: choose one of {', '.join(TOKENIZER_CHOICES)}")
    if tokenizer == "ptb" and not java_available():
        raise JavaError("the Treebank tokeniser needs Java: install a Java runtime, or use the plain tokenizer")
    if tokenizer == "ptb" or (tokenizer == "auto" and java_available()):
        try:
            return ptb_words(captions), "ptb"
        except JavaError as error:
            if tokenizer == "ptb":
                raise
            logger.warning("%s; using the plain tokeniser", error)
    return {key: [plain_words(text) for text in texts] for key, texts in captions.items()}, "plain"
