"""Target texts for fairseq-generate. They come from the file, because the vocabulary may lack some characters."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from narvl_plugin.data.collate import Batch
from narvl_plugin.data.text import TextCodec
from narvl_plugin.data.vocabulary import UNK
from narvl_plugin.errors import InputError


class TargetTexts:
    """Converts symbols to text for fairseq-generate, and the symbols of targets to the texts in the file.

    fairseq converts a target's tokens to text for its scorers. Characters that the vocabulary lacks would be lost. A
    text is one line, because fairseq writes one line for each.
    """

    def __init__(self, codec: TextCodec) -> None:
        self.codec = codec
        self._expected: deque[tuple[str, str, str]] = deque()
        self._previous: object = None
        self._first: str | None = None

    def remember(self, batch: Batch) -> None:
        """Keep the target texts of a batch (`target_texts`, a list of str, if present) until the next batch.

        fairseq decodes in the order of the batch, and decodes each target after its source. That order identifies a
        target.
        """
        texts = batch.get("target_texts", [])
        sources = [self._symbols(tokens) for tokens in batch["net_input"]["src_tokens"].tolist()]
        targets = (self._symbols(tokens, escape_unk=True) for tokens in batch["target"].tolist())
        self._expected = deque(zip(sources, targets, texts, strict=True) if texts else ())
        self._first = sources[0]

    def decode(self, tokens: str | torch.Tensor | Sequence[int]) -> str:
        """Return the text of symbols joined by spaces, or of token ids (T,).

        Raises:
            InputError: if --post-process has changed the symbols; the first source of a batch shows it.
        """
        first, self._first = self._first, None
        if first not in (None, tokens):
            raise InputError("--post-process (--remove-bpe) damages the texts of this task; leave it out")
        if self._expected and self._expected[0][:2] == (self._previous, tokens):
            text = self._expected.popleft()[2]
        else:
            text = self.codec.decode(tokens)
        self._previous = tokens
        return " ".join(text.splitlines())

    def _symbols(self, tokens: list[int], escape_unk: bool = False) -> str:
        """Return padded token ids as fairseq writes them. In targets, it writes `<unk>` as `<<unk>>`."""
        dictionary = self.codec.dictionary
        silent = (dictionary.bos(), dictionary.pad(), dictionary.eos())
        symbols = (dictionary[token] for token in tokens if token not in silent)
        return " ".join(f"<{UNK}>" if escape_unk and symbol == UNK else symbol for symbol in symbols)
