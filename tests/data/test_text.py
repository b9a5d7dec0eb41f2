"""Cleaning, and the two codecs: round trips, ids, symbols that are no text."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narvl_plugin.data.text import (
    PROMPTS,
    TextCodec,
    clean_caption,
    clean_question,
    clean_target,
    load_codec,
    split_references,
    train_sentencepiece,
)
from narvl_plugin.errors import InputError, MissingInput


@pytest.mark.parametrize(
    ("text", "max_words", "expected"),
    [
        ("?! What's on the T-shirt/cap?", 9, "what's on the t shirt cap?"),
        ("  Red   car\n", 9, "red car"),
        ("one two three", 2, "one two"),
        ("<person> sits", 9, "<person> sits"),
    ],
)
def test_questions(text: str, max_words: int, expected: str) -> None:
    assert clean_question(text, max_words) == expected


def test_captions_given_as_input_write_person_as_a_word() -> None:
    assert clean_caption("#The <PERSON> and/or <person>.", 9) == "the person and or person."


def test_targets_lose_punctuation_and_keep_case() -> None:
    assert clean_target("The man's hat, on a green-blue wall!") == "The mans hat on a greenblue wall"
    assert clean_target("table & <b>chairs</b>") == "table  bchairsb"
    assert clean_target("table & <b>chairs</b>", max_words=2) == "table bchairsb"
    assert clean_target("a b c", max_words=2) == "a b"


def test_references_without_words_are_left_out() -> None:
    assert split_references("a cat&&&&...&& a dog") == ["a cat", " a dog"]


class TestSentencePiece:
    def test_words_of_the_data_are_single_pieces(self, codec: TextCodec) -> None:
        assert len(codec.encode("a red square on a wall")) == 6
        assert len(codec.encode(PROMPTS["caption"])) == 6  # five words and "?"

    @pytest.mark.parametrize("text", ["two dogs run", "a cat&&the blue hat&&one tree", "what does the image"])
    def test_round_trip(self, codec: TextCodec, text: str) -> None:
        tokens = codec.encode(text)
        assert codec.decode(tokens) == text
        assert codec.decode(" ".join(codec.dictionary[token] for token in tokens)) == text

    def test_prompts_hold_nothing_unknown(self, codec: TextCodec) -> None:
        for prompt in PROMPTS.values():
            text = prompt.format(text="cat", caption="cat", hypothesis="cat", question="cat")
            assert codec.dictionary.unk() not in codec.encode(text).tolist()

    def test_specials_come_first_and_bins_last(self, codec: TextCodec) -> None:
        dictionary = codec.dictionary
        assert [dictionary[token] for token in range(4)] == ["<s>", "<pad>", "</s>", "<unk>"]
        assert [dictionary.index(f"<bin_{k}>") for k in range(10)] == list(range(len(dictionary) - 10, len(dictionary)))

    def test_symbols_that_are_no_text_pass_through(self, codec: TextCodec) -> None:
        dictionary = codec.dictionary
        tokens = [
            dictionary.bos(),
            dictionary.index("<bin_7>"),
            dictionary.index("<bin_3>"),
            dictionary.eos(),
        ]
        assert codec.decode(tokens) == "<bin_7><bin_3>"
        assert codec.decode("<s> ▁a <<unk>> ▁cat </s> <pad>") == "a<<unk>> cat"

    def test_an_unseen_character_is_unknown(self, codec: TextCodec) -> None:
        assert codec.dictionary.unk() in codec.encode("a Ω").tolist()

    def test_the_same_input_gives_the_same_bytes(self, write_tsv: Callable[..., Path], tmp_path: Path) -> None:
        path = write_tsv("a.tsv", [["1", "a cat&&a dog"], ["2", "two cats"]])
        models = [train_sentencepiece(path, [1], tmp_path / name, 300).read_bytes() for name in ("one", "two")]
        assert models[0] == models[1]

    def test_a_column_without_words_is_an_error(self, write_tsv: Callable[..., Path], tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"a\.tsv: column 1 .* holds no words"):
            train_sentencepiece(write_tsv("a.tsv", [["1", "?!"]]), "1", tmp_path, 300)

    def test_answers_of_all_tasks_are_learned_as_they_are_said(
        self, write_tsv: Callable[..., Path], tmp_path: Path
    ) -> None:
        rows = [["what is red", "0.6|!+crimson&&0.3|!+scarlet hat", "neutral"], ["is it", "1.0|!+yes", "entailment"]]
        train_sentencepiece(write_tsv("a.tsv", rows), "0,1,2", tmp_path, 300)
        codec = load_codec(tmp_path)
        for word in ("what", "crimson", "scarlet", "hat", "yes", "maybe"):
            assert len(codec.encode(f" {word}")) == 1
        for column in (0, 1):
            assert [codec.decode(codec.encode(f" {row[column]}")) for row in rows] == [row[column] for row in rows]


class TestGpt2:
    def test_ids_of_the_published_vocabulary(self, gpt2_codec: TextCodec) -> None:
        dictionary = gpt2_codec.dictionary
        assert len(dictionary) == 59457
        symbols = ["<mask>", "<code_0>", "<code_8191>", "<bin_0>", "<bin_999>"]
        assert [dictionary.index(symbol) for symbol in symbols] == [50264, 50265, 58456, 58457, 59456]
        assert gpt2_codec.encode(PROMPTS["caption"]).tolist() == [99, 473, 5, 2274, 6190, 116]

    @given(text=st.text(st.characters(exclude_categories=("Cs",)), max_size=30))
    def test_round_trip_of_any_text(self, gpt2_codec: TextCodec, text: str) -> None:
        # Bytes that follow no rule of UTF-8 cannot come from text, so every text has its way back.
        assert gpt2_codec.decode(gpt2_codec.encode(f" {text}")) == text.strip()

    def test_symbols_that_are_no_text_pass_through(self, gpt2_codec: TextCodec) -> None:
        dictionary = gpt2_codec.dictionary
        words = gpt2_codec.encode(" a cat").tolist()
        assert gpt2_codec.decode([0, 58464, *words, 50264, 59456, 2, 1]) == "<bin_7> a cat<mask><bin_999>"
        assert gpt2_codec.decode(" ".join(dictionary[token] for token in (58464, *words))) == "<bin_7> a cat"


class TestFolder:
    def test_says_what_it_misses(self, tmp_path: Path) -> None:
        with pytest.raises(MissingInput, match=r"--bpe-dir .*: no spm\.model .* and no dict\.txt"):
            load_codec(tmp_path)

    def test_refuses_two_vocabularies(self, vocabulary: Path, tmp_path: Path) -> None:
        (tmp_path / "spm.model").write_bytes((vocabulary / "spm.model").read_bytes())
        (tmp_path / "dict.txt").write_text("1 1\n")
        with pytest.raises(InputError, match="holds both"):
            load_codec(tmp_path)

    def test_refuses_a_file_that_is_no_model(self, tmp_path: Path) -> None:
        (tmp_path / "spm.model").write_bytes(b"nonsense")
        with pytest.raises(InputError, match="is not a sentencepiece model"):
            load_codec(tmp_path)

    def test_takes_gpt2_files_from_the_folder_first(self, bpe_dir: Path, tmp_path: Path) -> None:
        (tmp_path / "dict.txt").write_text("0 1\n1 1\n")
        (tmp_path / "encoder.json").write_text('{"x": 0, "y": 1}')
        (tmp_path / "vocab.bpe").write_text("#version\n")
        codec = load_codec(tmp_path, num_bins=0)
        assert codec.encode("yx").tolist() == [5, 4]

    @pytest.mark.parametrize(
        "files",
        [
            {"dict.txt": b"\xff 1\n"},
            {"dict.txt": b"a\n"},
            {"dict.txt": b"a 1\na 1\n"},
            {"encoder.json": b"[" * 100_000},
            {"encoder.json": b'["x"]'},
            {"encoder.json": b'{"x": [1]}'},
            {"encoder.json": b'{"x": "y"}'},
            {"encoder.json": '{"漢": 1}'.encode()},
            {"vocab.bpe": b"\xff"},
            {"encoder.json": b'{"x": 0}'},  # of which "y" cannot be made
        ],
    )
    def test_refuses_gpt2_files_of_another_form(self, files: dict[str, bytes], tmp_path: Path) -> None:
        whole = {"dict.txt": b"0 1\n1 1\n", "encoder.json": b'{"x": 0, "y": 1}', "vocab.bpe": b"#version\n"}
        for name, content in (whole | files).items():
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError):
            load_codec(tmp_path, num_bins=0).encode("yx")

    def test_refuses_pieces_that_are_no_text(self, tmp_path: Path) -> None:
        unknown, piece = b"\n\x09\n\x05<unk>\x18\x02", b"\n\x02\xff\xfe"
        (tmp_path / "spm.model").write_bytes(unknown + b"\n" + bytes([len(piece)]) + piece + b"\x12\x02\x18\x02")
        with pytest.raises(InputError, match="vocabulary cannot be read .*utf-8"):
            load_codec(tmp_path)

    def test_refuses_a_name_that_no_file_system_has(self) -> None:
        with pytest.raises(InputError) as error:
            load_codec("x" * 1_000_000)
        assert len(str(error.value)) < 1000

    def test_symbols_of_dict_txt_that_are_no_piece_stay_as_they_are(self, tmp_path: Path) -> None:
        (tmp_path / "dict.txt").write_text("0 1\n99 1\n² 1\n")
        (tmp_path / "encoder.json").write_text('{"x": 0}')
        (tmp_path / "vocab.bpe").write_text("#version\n")
        assert load_codec(tmp_path, num_bins=0).decode([4, 5, 6]) == "x99²"

    @pytest.mark.integration
    def test_text_without_spaces_takes_no_longer_than_words(self, bpe_dir: Path) -> None:
        codec = load_codec(bpe_dir, num_bins=0)
        letters = random.Random(1).choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZéàüßñ漢字", k=40_000)
        start = time.process_time()
        assert codec.decode(codec.encode("".join(letters))) == "".join(letters)
        assert time.process_time() - start < 8  # without cuts 20 seconds, and four times as long for twice the text
