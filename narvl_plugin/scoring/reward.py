"""The reward for captions in training: CIDEr-D over tokens, and whether all runs of tokens are known.

Everything is computed on the device of the captions, for a whole batch at once, and nothing is read back.

Legend: B batch, M captions of a sample, K references of a sample, T and S padded lengths, L length of a sequence.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from narvl_plugin.ctc.lattice import length_mask
from narvl_plugin.errors import InputError

ORDERS = (1, 2, 3, 4)
"""Lengths of the n-grams that CIDEr-D compares."""
SIGMA = 6.0
"""Width of CIDEr-D's penalty of other lengths, in tokens."""
RUN = 4
"""Length of the runs that must be known, in tokens; the start and the end of a caption count as tokens."""
WORDING = 0.5
"""Share of the reward that a caption gets for its wording; the rest is its CIDEr-D."""
ROWS_SCALED = 500
"""Largest number of rows whose references are scored to find the CIDEr-D of a perfect caption."""

_START, _END, _AFTER = 1, 2, 3
_FIRST = 4
"""What is added to a token, so that the three marks above are no token."""
_FACTOR = 0x5851F42D4C957F2D
_NOT_SAID, _NOT_MEANT = -1, -2


class Ngrams(NamedTuple):
    """The n-grams of one order of some sequences.

    Attributes:
        keys: (..., G), a number for each n-gram.
        squares: (..., G), the square of its inverse document frequency; 0 on padding.
        counts: (..., G), how often the sequence holds it.
    """

    keys: Tensor
    squares: Tensor
    counts: Tensor

    @property
    def norms(self) -> Tensor:
        """(...): the length of the vector of tf-idf weights."""
        return (self.counts * self.squares).sum(-1).sqrt()


class CaptionReward:
    """Scores captions against references, given the training references.

    The reward is (1 - WORDING) times CIDEr-D, as a share of a perfect caption's, plus WORDING if all of the caption's
    runs of `RUN` tokens occur in the training references. CIDEr-D is that of `BatchwiseCider`, with tokens for words.
    An n-gram is represented by a number of 64 bits; two n-grams share one with a probability of about 1e-19.

    Sources: Vedantam et al., CIDEr, CVPR 2015; Rennie et al., Self-critical sequence training, CVPR 2017.

    Args:
        rows: the references of each training row, as tokens without `</s>`.
        end: the label of `</s>`, which is left out of captions and references.
        one_each: whether captions will be compared with one reference of a row, not with all of them.

    Attributes:
        perfect: the CIDEr-D of a perfect caption: the mean over training rows of the best reference's.

    Raises:
        InputError: if CIDEr-D cannot tell the references apart, as with fewer than two rows.
    """

    def __init__(self, rows: Iterable[Sequence[Sequence[int]]], *, end: int, one_each: bool = False) -> None:
        self.end = end
        references = [[list(reference) for reference in row if len(reference)] for row in rows]
        references = [row for row in references if row]
        owners = torch.arange(len(references)).repeat_interleave(torch.tensor([len(row) for row in references]).long())
        tokens, lengths = _padded([reference for row in references for reference in row])
        self.number = len(references)
        frequencies = [_frequencies(tokens, lengths, owners, order) for order in ORDERS]
        keys = torch.cat([found for found, _ in frequencies])
        weights = np.log(max(1, self.number)) - np.log(torch.cat([counts for _, counts in frequencies]).numpy())
        self._rarest = float(np.log(max(1, self.number)))
        keys, order = keys.sort()
        tables = keys, torch.from_numpy(weights)[order].square().float(), _runs(tokens, lengths)[0].unique()
        self._tables = {torch.device("cpu"): tables}
        self.perfect = self._perfect([row[:1] for row in references] if one_each else references)
        if not self.perfect > 0:
            raise InputError(
                f"the {self.number:,} training rows with references hold the same n-grams, or are fewer than two, so "
                "that CIDEr cannot score captions by them"
            )

    def __call__(self, outputs: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
        """Return the reward of M captions of each sample, about 1 for a perfect one.

        Args:
            outputs: (B, M, T).
            lengths: (B, M).
            targets: (B, K, S).
            target_lengths: (B, K); -1 excludes a target.

        Returns:
            (B, M), at least 0.
        """
        lengths, target_lengths = self._without_end(outputs, lengths), self._without_end(targets, target_lengths)
        cider = self.cider(outputs, lengths, targets, target_lengths) / self.perfect
        return (1 - WORDING) * cider + WORDING * self.is_known(outputs, lengths)

    def cider(self, outputs: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
        """Return the CIDEr-D of captions: (B, M, T), (B, M), (B, K, S), (B, K) -> (B, M), from 0 to 10."""
        total = lengths.new_zeros((*lengths.shape, target_lengths.size(1)), dtype=torch.float32)
        for order in ORDERS:
            said = self._ngrams(outputs, lengths, order, _NOT_SAID)
            meant = self._ngrams(targets, target_lengths, order, _NOT_MEANT)
            # Each place of a reference stands for its share of the n-gram's product, which is the smaller count times
            # the reference's.
            equal = said.keys[:, :, None, :, None] == meant.keys[:, None, :, None, :]  # (B, M, K, G, H)
            smaller = torch.minimum(equal.sum(3), meant.counts[:, None])
            products = (smaller * meant.squares[:, None]).sum(3)
            norms = said.norms[:, :, None] * meant.norms[:, None]
            total += torch.where(norms > 0, products / norms.where(norms > 0, 1.0), 0.0)
        # As in the COCO tools, the length is the number of bigrams.
        bigrams, target_bigrams = (size.clamp(min=1) for size in (lengths, target_lengths))
        total *= (-(bigrams[:, :, None] - target_bigrams[:, None]).float().square() / (2 * SIGMA**2)).exp()
        counts = (target_lengths >= 0)[:, None].float()
        return 10 / len(ORDERS) * (total * counts).sum(2) / counts.sum(2).clamp(min=1)

    def is_known(self, outputs: Tensor, lengths: Tensor) -> Tensor:
        """Return whether the training references hold all runs of a caption: (..., T), (...) -> (...)."""
        runs, inside = _runs(outputs, lengths)
        known = self._on(outputs.device)[2]
        return ((known[_places(known, runs)] == runs) | ~inside).all(-1)

    def _ngrams(self, tokens: Tensor, lengths: Tensor, order: int, padding: int) -> Ngrams:
        """Return the n-grams of one order: (..., T), (...)."""
        inside = length_mask(lengths - order + 1, max(0, tokens.size(-1) - order + 1))
        keys = _keys(tokens, order).masked_fill(~inside, padding)
        table, squares, _ = self._on(tokens.device)
        places = _places(table, keys)
        found = torch.where(table[places] == keys, squares[places], self._rarest**2) * inside
        return Ngrams(keys, found, (keys[..., :, None] == keys[..., None, :]).sum(-1))

    def _without_end(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Return the lengths without a final `</s>`."""
        if not tokens.size(2):
            return lengths
        last = tokens.gather(2, (lengths - 1).clamp(min=0)[..., None])[..., 0]
        return lengths - ((last == self.end) & (lengths > 0)).long()

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tables on a device: known n-grams in order, their squared weights, known runs in order."""
        if device not in self._tables:
            tables = self._tables[torch.device("cpu")]
            keys, squares, runs = (table.to(device, non_blocking=True) for table in tables)
            self._tables[device] = keys, squares, runs
        return self._tables[device]

    def _perfect(self, references: Sequence[Sequence[Sequence[int]]]) -> float:
        count = min(len(references), ROWS_SCALED)
        if not count:
            return 0.0
        rows = [references[place * len(references) // count] for place in range(count)]
        most = max(map(len, rows))
        filled = [[*row, *([[]] * (most - len(row)))] for row in rows]
        tokens, lengths = _padded([reference for row in filled for reference in row])
        lengths = lengths.masked_fill(lengths == 0, -1).view(count, most)
        tokens = tokens.view(count, most, -1)
        return float(self.cider(tokens, lengths, tokens, lengths).amax(1).mean())


def _padded(references: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return references as tokens (R, S) and lengths (R,)."""
    lengths = torch.tensor([len(reference) for reference in references], dtype=torch.int64)
    tokens = torch.zeros(len(references), max(map(len, references), default=0), dtype=torch.int64)
    tokens[length_mask(lengths, tokens.size(1))] = torch.tensor(
        [token for reference in references for token in reference], dtype=torch.int64
    )
    return tokens, lengths


def _keys(tokens: Tensor, order: int) -> Tensor:
    """Return a number for each n-gram of an order: (..., T) -> (..., T - order + 1). Products wrap around."""
    size = max(0, tokens.size(-1) - order + 1)
    keys = torch.full_like(tokens[..., :size], order, dtype=torch.int64)
    for place in range(order):
        keys = keys * _FACTOR + (tokens[..., place : place + size] + _FIRST)
        keys = keys ^ (keys >> 29)
    return keys


def _runs(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return a number for each run of `RUN` tokens, and which of them are inside: (..., T), (...) -> (..., T) twice.

    A caption of L tokens has L + 3 - RUN runs with its start and its end, but at least one.
    """
    shape = (*lengths.shape, 1)
    longest = tokens.size(-1)
    marked = torch.where(length_mask(lengths, longest), tokens, _AFTER - _FIRST)
    room = tokens.new_full((*lengths.shape, RUN), _AFTER - _FIRST)
    whole = torch.cat([tokens.new_full(shape, _START - _FIRST), marked, room], -1)
    places = torch.arange(whole.size(-1), device=tokens.device)
    whole = whole.masked_fill(places == lengths.clamp(min=0)[..., None] + 1, _END - _FIRST)
    runs = _keys(whole, RUN)
    inside = length_mask((lengths + 3 - RUN).clamp(min=1), runs.size(-1))
    return torch.where(inside, runs, runs[..., :1]), inside


def _frequencies(tokens: Tensor, lengths: Tensor, owners: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """Return the distinct n-grams of an order, and the number of rows that hold each: (U,), (U,)."""
    inside = length_mask(lengths - order + 1, max(0, tokens.size(1) - order + 1))
    keys = _keys(tokens, order)[inside].numpy()
    rows = owners[:, None].expand(inside.shape)[inside].numpy()
    sorting = np.lexsort((rows, keys))
    keys, rows = keys[sorting], rows[sorting]
    is_new = np.ones(len(keys), dtype=bool)
    is_new[1:] = (keys[1:] != keys[:-1]) | (rows[1:] != rows[:-1])
    found, counts = np.unique(keys[is_new], return_counts=True)
    return torch.from_numpy(found), torch.from_numpy(counts)


def _places(table: Tensor, keys: Tensor) -> Tensor:
    """Return where keys are in a table in order, or where another key is."""
    return torch.searchsorted(table, keys.contiguous()).clamp(max=len(table) - 1)
