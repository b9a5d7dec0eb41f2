"""Files of n-grams: a round trip, other vocabularies, and files of strangers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from narvl_plugin.data.ngram_files import FORMAT, TYPES, read_ngrams, write_ngrams
from narvl_plugin.data.text import TextCodec, load_codec
from narvl_plugin.errors import InputError, MissingInput


@pytest.fixture
def file(write_tsv: Callable[..., Path], codec: TextCodec, tmp_path: Path) -> Path:
    """Give a file of the n-grams of three captions."""
    data = write_tsv("train.tsv", [["1", "1", "a cat&&two red cats!"], ["2", "2", "a red cat"]])
    out = tmp_path / "captions.ngrams"
    write_ngrams(data, out, codec, order=3, hard=2, column=2)
    return out


def test_round_trip_with_any_number_of_bins(file: Path, codec: TextCodec, vocabulary: Path) -> None:
    for other in (codec, load_codec(vocabulary, 7)):
        read = read_ngrams(file, other)
        chances = [
            read.log_prob(codec.encode(f" {text}").tolist()) for text in ("a cat", "two red cats", "two red cat")
        ]
        assert all(chance > -np.inf for chance in chances)
        assert read.log_prob(codec.encode(" red").tolist()) == -np.inf


def test_refused_inputs(write_tsv: Callable[..., Path], codec: TextCodec, tmp_path: Path) -> None:
    data = write_tsv("train.tsv", [["1", "1", ".&&!"]])
    with pytest.raises(InputError, match=r"train.tsv: column 2 .* holds no words"):
        write_ngrams(data, tmp_path / "out", codec, order=3, hard=2, column=2)
    with pytest.raises(InputError, match="--hard 4: is above --order 3"):
        write_ngrams(data, tmp_path / "out", codec, order=3, hard=4, column=2)
    with pytest.raises(MissingInput, match="gone: no such file"):
        read_ngrams(tmp_path / "gone", codec)


def test_another_vocabulary_is_refused(file: Path, codec: TextCodec) -> None:
    arrays = safetensors.numpy.load_file(file)
    file.write_bytes(safetensors.numpy.save(arrays, {"format": FORMAT, "vocabulary": "0" * 16}))
    with pytest.raises(InputError, match=r"captions.ngrams: was made with another vocabulary .* --bpe-dir"):
        read_ngrams(file, codec)


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"\xff" * 64, b'{"a": 1}'])
def test_other_files_are_refused(content: bytes, file: Path, codec: TextCodec) -> None:
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"captions.ngrams: is not a file of n-grams"):
        read_ngrams(file, codec)


def test_a_large_file_is_refused_unread(file: Path, codec: TextCodec) -> None:
    with file.open("r+b") as opened:
        opened.truncate((1 << 30) + 1)
    with pytest.raises(InputError, match="more than 1,073,741,824 are refused"):
        read_ngrams(file, codec)


DAMAGES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "type": ("targets", lambda array: array.astype(np.int32)),
    "shape": ("labels", lambda array: array[None]),
    "lengths": ("backoffs", lambda array: array[1:]),
    "arcs": ("log_probs", lambda array: array[1:]),
    "places": ("first", lambda array: array[::-1].copy()),
    "far place": ("first", lambda array: array + 5),
    "token": ("labels", lambda array: array + 10_000),
    "negative token": ("labels", lambda array: -array),
    "target": ("targets", lambda array: array + 1000),
    "mixed targets": ("targets", lambda array: array[::-1].copy()),
    "circle": ("shorter", lambda array: np.where(array >= 0, np.arange(len(array)), array)),
    "far context": ("shorter", lambda array: array - 5),
    "endless probability": ("log_probs", lambda array: array - np.inf),
    "nan weight": ("backoffs", lambda array: array * np.nan),
    "empty": ("labels", lambda array: array[:0]),
    "probability": ("log_probs", lambda array: -array + 1),
    "nan": ("log_probs", lambda array: array * np.nan),
    "weight": ("backoffs", lambda array: array + 1),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_arrays_are_refused(name: str, file: Path, codec: TextCodec) -> None:
    arrays = safetensors.numpy.load_file(file)
    key, damage = DAMAGES[name]
    arrays[key] = damage(arrays[key])
    about = {"format": FORMAT, "vocabulary": codec.text_checksum}
    file.write_bytes(safetensors.numpy.save(arrays, about))
    with pytest.raises(InputError, match=r"captions.ngrams: is damaged"):
        read_ngrams(file, codec)


def test_a_long_chain_of_contexts_is_refused(file: Path, codec: TextCodec) -> None:
    token, end, states = codec.encode(" cat")[0].item(), codec.dictionary.eos(), 1000
    arrays = {
        "first": np.array([0, *range(1, states), states - 1]),
        "labels": np.array([token] * (states - 2) + [end]),
        "targets": np.arange(1, states),
        "log_probs": np.zeros(states - 1, np.float32),
        "shorter": np.array([-1, -1, *range(1, states - 2), -1]),
        "backoffs": np.zeros(states, np.float32),
    }
    about = {"format": FORMAT, "vocabulary": codec.text_checksum}
    file.write_bytes(safetensors.numpy.save(arrays, about))
    with pytest.raises(InputError, match=r"captions.ngrams: is damaged \(more than 8 contexts"):
        read_ngrams(file, codec)
    arrays["shorter"][9:] = -1
    file.write_bytes(safetensors.numpy.save(arrays, about))
    read_ngrams(file, codec)


@pytest.mark.parametrize("shorter", [[-1, -1, -1, 2], [-1, 0, -1, -1]])
def test_the_start_and_the_end_have_no_part_in_backing_off(shorter: list[int], file: Path, codec: TextCodec) -> None:
    """State 1 follows `cat`, nothing enters state 2, and state 3 is the end."""
    cat, end = codec.encode(" cat")[0].item(), codec.dictionary.eos()
    arrays = {
        "first": np.array([0, 1, 2, 3, 3]),
        "labels": np.array([cat, end, cat]),
        "targets": np.array([1, 3, 1]),
        "log_probs": np.zeros(3, np.float32),
        "shorter": np.array([-1, -1, -1, -1]),
        "backoffs": np.zeros(4, np.float32),
    }
    about = {"format": FORMAT, "vocabulary": codec.text_checksum}
    file.write_bytes(safetensors.numpy.save(arrays, about))
    read_ngrams(file, codec)
    file.write_bytes(safetensors.numpy.save(arrays | {"shorter": np.array(shorter)}, about))
    with pytest.raises(InputError, match="a context that is not shorter"):
        read_ngrams(file, codec)


def test_a_truncated_file_is_refused(file: Path, codec: TextCodec) -> None:
    content = file.read_bytes()
    for length in (7, 8, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"captions.ngrams: is not a file of n-grams"):
            read_ngrams(file, codec)
    file.write_bytes((1 << 62).to_bytes(8, "little") + content[8:])  # a huge header is only claimed
    with pytest.raises(InputError, match=r"captions.ngrams: is not a file of n-grams"):
        read_ngrams(file, codec)


def test_what_is_no_file_is_refused_unopened(file: Path, codec: TextCodec, tmp_path: Path) -> None:
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(file)
    assert read_ngrams(link, codec).last_state > 0
    os.mkfifo(pipe)
    for other in (tmp_path, pipe, Path("/dev/zero")):
        with pytest.raises(InputError, match=f"{other}: is not a regular file"):
            read_ngrams(other, codec)
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(MissingInput, match="link: no such file"):
        read_ngrams(link, codec)


def test_other_formats_and_arrays_are_refused(file: Path, codec: TextCodec) -> None:
    arrays = safetensors.numpy.load_file(file)
    file.write_bytes(safetensors.numpy.save(arrays, {"format": "another"}))
    with pytest.raises(InputError, match=f"is not a file of n-grams \\({FORMAT}\\)"):
        read_ngrams(file, codec)
    assert arrays.keys() == TYPES.keys()
    del arrays["shorter"]
    file.write_bytes(safetensors.numpy.save(arrays, {"format": FORMAT, "vocabulary": codec.text_checksum}))
    with pytest.raises(InputError, match="holds other arrays than n-grams have"):
        read_ngrams(file, codec)
