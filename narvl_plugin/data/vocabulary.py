"""The labels of a model: symbols and their numbers, in fairseq's order and file format."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

BOS, PAD, EOS, UNK = "<s>", "<pad>", "</s>", "<unk>"
SPECIALS = (BOS, PAD, EOS, UNK)
"""The first symbols of every vocabulary."""
SPM_FILE = "spm.model"
"""File of a vocabulary that was trained on the data."""
DICT_FILE = "dict.txt"
"""File of the vocabulary of the published models."""
PORT_FILE, MERGES_FILE = "vocab.json", "merges.txt"
"""Files of the same vocabulary in the Hugging Face and ModelScope ports of the published models."""
CHINESE_FILE = "vocab.txt"
"""File of the vocabulary of a Chinese port. Its tokenizer is another one, which is not supported."""
OVERWRITE = " #fairseq:overwrite"
"""End of a line of dict.txt that may repeat a symbol. The later number counts."""


class Vocabulary:
    """Symbols numbered from 0. The methods have the names of fairseq's `Dictionary`.

    Attributes:
        symbols: all symbols, by number.
    """

    def __init__(self, symbols: Iterable[str] = ()) -> None:
        self.symbols: list[str] = []
        self._numbers: dict[str, int] = {}
        for symbol in (*SPECIALS, *symbols):
            self.add_symbol(symbol)

    @classmethod
    def read(cls, file: Path) -> Vocabulary:
        """Return the vocabulary of fairseq's dict.txt, whose lines are `SYMBOL COUNT`.

        Raises:
            ValueError: if a line has another form, or a symbol is repeated.
        """
        vocabulary = cls()
        lines = file.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
        for number, line in enumerate(lines, start=1):
            entry = line.rstrip()
            overwrite = entry.endswith(OVERWRITE)
            symbol, space, count = entry.removesuffix(OVERWRITE).rpartition(" ")
            if not space or not count.isdecimal():
                raise ValueError(f"{file}:{number}: expected SYMBOL COUNT, and found {line!r:.80}")
            if symbol in vocabulary and not overwrite:
                raise ValueError(f"{file}:{number}: the symbol {symbol!r:.80} is repeated")
            vocabulary.add_symbol(symbol, overwrite=True)
        return vocabulary

    def add_symbol(self, symbol: str, overwrite: bool = False) -> int:
        """Add a symbol if it is new, and return its number. With `overwrite` it always gets a new number."""
        if symbol not in self._numbers or overwrite:
            self._numbers[symbol] = len(self.symbols)
            self.symbols.append(symbol)
        return self._numbers[symbol]

    def index(self, symbol: str) -> int:
        """Return the number of a symbol, or that of `<unk>`."""
        return self._numbers.get(symbol, self.unk())

    def bos(self) -> int:
        """Return the number of `<s>`."""
        return self._numbers[BOS]

    def pad(self) -> int:
        """Return the number of `<pad>`."""
        return self._numbers[PAD]

    def eos(self) -> int:
        """Return the number of `</s>`."""
        return self._numbers[EOS]

    def unk(self) -> int:
        """Return the number of `<unk>`."""
        return self._numbers[UNK]

    def __getitem__(self, number: int) -> str:
        return self.symbols[number] if number < len(self.symbols) else UNK

    def __len__(self) -> int:
        return len(self.symbols)

    def __contains__(self, symbol: object) -> bool:
        return symbol in self._numbers


def holds_vocabulary(folder: Path) -> bool:
    """Return whether a folder holds a vocabulary of any kind."""
    return any((folder / name).is_file() for name in (SPM_FILE, DICT_FILE, PORT_FILE))
