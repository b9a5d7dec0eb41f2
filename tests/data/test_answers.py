"""Closed lists of answers: what may follow what, and files of answers."""

import pickle
from pathlib import Path

import pytest

from narvl_plugin.data.answers import AnswerTrie, read_answers
from narvl_plugin.data.text import TextCodec
from narvl_plugin.errors import InputError, MissingInput

ANSWERS = ["a cat", "a red hat", "a red", "two dogs"]


def test_answers_are_followed_token_by_token(codec: TextCodec) -> None:
    trie = AnswerTrie(ANSWERS, codec)
    words = ("a", "cat", "red", "hat", "two", "dogs")
    a, cat, red, hat, two, dogs = (codec.encode(f" {word}").tolist() for word in words)
    assert all(len(tokens) == 1 for tokens in (a, cat, red, hat, two, dogs))
    eos = codec.dictionary.eos()
    assert sorted(trie.allowed([])) == sorted(a + two)
    assert sorted(trie.allowed(a)) == sorted(cat + red)
    assert sorted(trie.allowed(a + red)) == sorted([*hat, eos])
    assert trie.allowed(a + cat) == [eos]
    assert trie.allowed([*a, *cat, eos]) == trie.allowed(dogs) == []
    assert "a red" in trie
    assert "a" not in trie


def test_a_mask_follows_one_answer(codec: TextCodec) -> None:
    trie = AnswerTrie(ANSWERS, codec)
    tokens = trie.tokens[2].tolist()  # a, red, </s>
    mask = trie.mask(tokens, len(codec.dictionary))
    assert mask.shape == (3, len(codec.dictionary))
    for place in range(3):
        assert sorted(mask[place].nonzero().flatten().tolist()) == sorted(trie.allowed(tokens[:place]))


def test_answers_that_are_spelled_the_same_are_refused(codec: TextCodec) -> None:
    with pytest.raises(InputError, match="does not tell the answers 'Ω' and 'Ψ' apart; train it on the column"):
        AnswerTrie(["a cat", "Ω", "Ψ"], codec)


def test_an_answer_that_the_vocabulary_cannot_spell_is_warned_of(
    codec: TextCodec, caplog: pytest.LogCaptureFixture
) -> None:
    AnswerTrie(["a cat", "a  cat", "Ω cat"], codec)
    (message,) = caplog.messages
    assert "lacks characters of 1 answers, such as 'Ω cat'" in message


def test_white_space_in_answers_is_one_space(codec: TextCodec) -> None:
    assert AnswerTrie(["a  cat", "a\u00a0cat ", "two dogs"], codec).answers == ["a cat", "two dogs"]


def test_answer_files_are_pickled_dicts(tmp_path: Path) -> None:
    path = tmp_path / "answers.pkl"
    path.write_bytes(pickle.dumps({"red": 0, "two": 1}))
    assert read_answers(path) == ["red", "two"]
    for other in ({}, ["red"], {1: "red"}):
        path.write_bytes(pickle.dumps(other))
        with pytest.raises(InputError, match=r"--ans2label-file .*answers\.pkl: expected a pickled dict"):
            read_answers(path)
    path.write_bytes(pickle.dumps({"red": Path}))
    with pytest.raises(InputError, match="refused"):
        read_answers(path)
    path.write_bytes(pickle.dumps({"red": 0, "a" * 1_001: 1}))
    with pytest.raises(InputError, match=r"answers\.pkl: has an answer of 1,001 characters; at most 1,000 are read"):
        read_answers(path)
    with pytest.raises(MissingInput, match=r"none\.pkl: no such file"):
        read_answers(tmp_path / "none.pkl")
