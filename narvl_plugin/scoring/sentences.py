"""BLEU and CIDEr of single captions, without Java."""

from collections.abc import Callable, Iterable, Sequence

from pycocoevalcap.cider.cider_scorer import CiderScorer, cook_refs
from sacrebleu.metrics import BLEU

from narvl_plugin.scoring.tokenization import plain_words

Score = Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]
"""Gives each of B captions a score against its references."""


def sentence_bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return the BLEU (0 to 1) of each of B captions against its references, of as many n-gram orders as it has."""
    bleu = BLEU(tokenize="none", effective_order=True)
    return [
        bleu.sentence_score(plain_words(caption), [plain_words(text) for text in texts]).score / 100
        for caption, texts in zip(captions, references, strict=True)
    ]


class BatchwiseCider:
    """CIDEr with the n-gram frequencies of a whole validation set, taken batch by batch.

    The mean over all captions, in whatever batches and processes, is the CIDEr of the set; a batch's own
    frequencies would give another number. Words are split plainly, as Java per batch would be slow.
    """

    def __init__(self, references: Iterable[Sequence[str]]) -> None:
        whole = CiderScorer()
        whole.crefs = [cook_refs([plain_words(text) for text in texts]) for texts in references]
        whole.compute_doc_freq()
        self._frequencies = whole.document_frequency
        self._images = len(whole.crefs)

    def __call__(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """Return the CIDEr (0 to 10) of each of B captions against its references."""
        batch = CiderScorer()
        for caption, texts in zip(captions, references, strict=True):
            batch += (plain_words(caption), [plain_words(text) for text in texts])
        batch.document_frequency = self._frequencies
        # The scorer counts images by its list of references, and walks along its list of captions.
        batch.crefs += [[]] * (self._images - len(batch.crefs))
        return [float(score) for score in batch.compute_cider()]
