"""Files of n-gram automata: counted from the captions of a TSV file, written and read as safetensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from narvl_plugin.ctc.ngrams import LONGEST, NgramArrays, NgramAutomaton, count_ngrams
from narvl_plugin.data.text import TextCodec, clean_target, split_references
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import InputError, MissingInput
from narvl_plugin.whole_files import require_writable, write_whole

FORMAT = "narvl n-grams 1"
LARGEST = 1 << 30
"""Largest file that is read, in bytes."""
TYPES = {
    "first": np.int64,
    "labels": np.int64,
    "targets": np.int64,
    "log_probs": np.float32,
    "shorter": np.int64,
    "backoffs": np.float32,
}
"""Type of each array of an automaton."""


def write_ngrams(data: Path, out: Path, codec: TextCodec, *, order: int, hard: int, column: int) -> NgramAutomaton:
    """Count the n-grams of a TSV file's captions and write their automaton.

    Args:
        data: TSV file; a row may hold several captions, joined by `&&`.
        out: file to write.
        codec: the vocabulary whose tokens are counted.
        order: see `count_ngrams`.
        hard: see `count_ngrams`.
        column: the number (from 0) of the column with captions.

    Returns:
        The automaton.

    Raises:
        InputError: if a file cannot be used, the numbers are outside their range, or the column holds no words.
    """
    require_writable(out)
    if hard > order:
        raise InputError(f"--hard {hard}: is above --order {order}")
    rows = TsvFile(data, [column])

    def sentences() -> Iterator[list[int]]:
        for row in range(len(rows)):
            for caption in split_references(rows[row][0]):
                yield codec.encode(f" {clean_target(caption)}").tolist()

    try:
        automaton = count_ngrams(sentences(), order=order, hard=hard, end=codec.dictionary.eos())
    except ValueError as error:
        raise InputError(f"{data}: column {column} (columns count from 0) holds no words") from error
    about = {"format": FORMAT, "vocabulary": codec.text_checksum}
    write_whole(out, safetensors.numpy.save(automaton.arrays._asdict(), about))
    return automaton


def read_ngrams(file: Path, codec: TextCodec) -> NgramAutomaton:
    """Read the automaton of a file that `write_ngrams` wrote.

    Args:
        file: the file; it may be anybody's.
        codec: the vocabulary of the model.

    Raises:
        MissingInput: if there is no such file.
        InputError: if it is not such a file, or it was made with another vocabulary.
    """
    if not file.exists():
        raise MissingInput(f"{file}: no such file; make it by narvl ngrams")
    if not file.is_file():  # a pipe or a device may never end
        raise InputError(f"{file}: is not a regular file; give a file of narvl ngrams")
    if file.stat().st_size > LARGEST:
        raise InputError(f"{file}: has {file.stat().st_size:,} bytes; more than {LARGEST:,} are refused")
    advice = "make it again by narvl ngrams"
    try:
        with safetensors.safe_open(str(file), "numpy") as opened:
            about = opened.metadata() or {}
            if about.get("format") != FORMAT:
                raise InputError(f"{file}: is not a file of n-grams ({FORMAT}); {advice}")
            if about.get("vocabulary") != codec.text_checksum:
                raise InputError(
                    f"{file}: was made with another vocabulary (checksum {str(about.get('vocabulary')):.16}, and the "
                    f"model's is {codec.text_checksum}); make it with the model's --bpe-dir"
                )
            if set(opened.keys()) != TYPES.keys():
                raise InputError(f"{file}: holds other arrays than n-grams have; {advice}")
            arrays = NgramArrays(**{name: opened.get_tensor(name) for name in TYPES})
    except InputError:
        raise
    except Exception as error:  # the library raises errors of several types
        raise InputError(f"{file}: is not a file of n-grams ({str(error):.200}); {advice}") from error
    end = codec.dictionary.eos()
    wrong = _fault(arrays, end, len(codec.dictionary))
    if wrong:
        raise InputError(f"{file}: is damaged ({wrong}); {advice}")
    return NgramAutomaton(arrays, end)


def _fault(arrays: NgramArrays, end: int, num_tokens: int) -> str | None:
    """Return what is wrong with the arrays of an automaton; None if a search can trust them."""
    first, labels, targets, log_probs, shorter, backoffs = arrays
    for name, kind in TYPES.items():
        array: Any = getattr(arrays, name)
        if array.ndim != 1 or array.dtype != kind:
            return f"{name} is {array.dtype} of {array.ndim} dimensions"
    num_states, num_arcs = len(shorter), len(labels)
    if num_states < 2 or len(first) != num_states + 1 or len(backoffs) != num_states:
        return f"{len(first)} places, {num_states} states and {len(backoffs)} weights"
    if not 0 < num_arcs == len(targets) == len(log_probs):
        return f"{num_arcs} tokens, {len(targets)} targets and {len(log_probs)} probabilities"
    if first[0] != 0 or first[-1] != num_arcs or (np.diff(first) < 0).any() or first[-2] != num_arcs:
        return "the places of the arcs are out of order"
    if labels.min() < 0 or labels.max() >= num_tokens:
        return f"a token outside [0, {num_tokens})"
    if targets.min() < 1 or targets.max() >= num_states or ((labels == end) != (targets == num_states - 1)).any():
        return "an arc to a wrong state"
    if (shorter < -1).any() or (shorter == 0).any() or (shorter >= np.arange(num_states)).any() or shorter[-1] != -1:
        return "a context that is not shorter"
    left = shorter
    for _ in range(LONGEST):
        left = np.where(left >= 0, shorter[left], -1)
    if (left >= 0).any():
        return f"more than {LONGEST} contexts, each shorter than the one before"
    last, backing = arrays.last_tokens(num_tokens), shorter >= 0
    if (last[targets] != labels).any() or (last[shorter[backing]] != last[backing]).any():
        return "a state that follows two tokens"
    for name, weights in (("probability", log_probs), ("weight", backoffs)):
        if not np.isfinite(weights).all() or (weights > 0).any():
            return f"a {name} outside (0, 1]"
    return None
