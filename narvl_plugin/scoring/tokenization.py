"""Words of captions for the metrics: by the Penn Treebank tokeniser of the COCO tools, or plainly."""

import logging
import re
import shutil
from collections.abc import Mapping
from typing import Literal

logger = logging.getLogger(__name__)

TokenizerChoice = Literal["auto", "ptb", "plain"]
TOKENIZER_CHOICES: tuple[TokenizerChoice, ...] = ("auto", "ptb", "plain")

_WORD = re.compile(r"\w+(?:[-'’]\w+)*")


def java_available() -> bool:
    """Say whether a ``java`` program is on the path (the Treebank tokeniser and METEOR are Java programs)."""
    return shutil.which("java") is not None


def plain_words(text: str) -> str:
    """Lower-case a text and keep its words, joined by spaces; hyphens and apostrophes inside words stay."""
    return " ".join(_WORD.findall(text.lower()))


def ptb_words(captions: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Tokenise as the COCO evaluation does: Stanford's Treebank tokeniser, lower case, no punctuation.

    One Java start serves all captions, so call it once with everything.

    Raises:
        RuntimeError: when the Java program cannot be run or does not give back one line a caption.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    entries = {key: [{"caption": text} for text in texts] for key, texts in captions.items()}
    try:
        words = PTBTokenizer().tokenize(entries)
    except OSError as error:
        raise RuntimeError(f"the Treebank tokeniser cannot be run: {error}") from error
    # A Java program that dies leaves fewer lines than captions; the wrapper does not look at its exit status.
    got, wanted = sum(map(len, words.values())), sum(map(len, captions.values()))
    if got != wanted or words.keys() != captions.keys():
        raise RuntimeError(f"the Treebank tokeniser gave {got} lines for {wanted} captions; run `java -version`")
    return words


def tokenize_captions(
    captions: Mapping[str, list[str]], tokenizer: TokenizerChoice = "auto"
) -> tuple[dict[str, list[str]], Literal["ptb", "plain"]]:
    """Tokenise captions and name the tokeniser that was used.

    Args:
        captions: lists of captions by key.
        tokenizer: ``ptb`` (needs Java), ``plain``, or ``auto``: ``ptb`` where it runs, else ``plain``.

    Returns:
        the captions as words joined by single spaces under the same keys, and ``"ptb"`` or ``"plain"``.

    Raises:
        ValueError: for an unknown ``tokenizer``.
        RuntimeError: when ``ptb`` is demanded and cannot be run.
    """
    if tokenizer not in TOKENIZER_CHOICES:
        raise ValueError(f"unknown tokenizer {tokenizer!r}: choose one of {', '.join(TOKENIZER_CHOICES)}")
    if tokenizer == "ptb" and not java_available():
        raise RuntimeError("the Treebank tokeniser needs Java: install a Java runtime, or use the plain tokenizer")
    if tokenizer == "ptb" or (tokenizer == "auto" and java_available()):
        try:
            return ptb_words(captions), "ptb"
        except RuntimeError as error:
            if tokenizer == "ptb":
                raise
            logger.warning("%s; using the plain tokeniser", error)
    return {key: [plain_words(text) for text in texts] for key, texts in captions.items()}, "plain"
