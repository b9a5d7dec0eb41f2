"""GPT-2's pieces in the layout of the ports of OFA, and the same in fairseq's."""

import json
from pathlib import Path
from typing import Any

import pytest
from port_folders import LABELS, MERGES, SPELLED, pieces, write_fairseq_vocabulary, write_vocabulary

from narvl_plugin.data.gpt2 import port_files
from narvl_plugin.data.text import Gpt2Codec, TextCodec, load_codec
from narvl_plugin.errors import InputError, MissingInput


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a folder with the small vocabulary of a port."""
    return write_vocabulary(tmp_path / "port")


def labels_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "vocab.json").read_text(encoding="utf-8"))


def write_labels(folder: Path, labels: dict[str, Any]) -> None:
    (folder / "vocab.json").write_text(json.dumps(labels), encoding="utf-8")


def test_tokens_are_the_numbers_of_the_port(folder: Path) -> None:
    codec = load_codec(folder)
    labels = labels_of(folder)
    assert codec.encode(" a cat is").tolist() == [labels["Ġa"], labels["Ġcat"], labels["Ġis"]]
    assert codec.decode([labels["Ġa"], labels["Ġcat"], labels["</s>"]]) == "a cat"
    assert codec.decode(codec.encode(" é, 漢!")) == "é, 漢!"
    dictionary = codec.dictionary
    assert len(dictionary) == LABELS
    expected = [labels["<mask>"], len(labels), len(labels) + 8191, len(labels) + 8192, LABELS - 1]
    assert [dictionary.index(one) for one in ("<mask>", "<code_0>", "<code_8191>", "<bin_0>", "<bin_999>")] == expected


def test_both_layouts_are_one_vocabulary(folder: Path, tmp_path: Path) -> None:
    ours, theirs = load_codec(write_fairseq_vocabulary(tmp_path / "bpe")), load_codec(folder)
    assert ours.dictionary.symbols == theirs.dictionary.symbols
    assert ours.checksum == theirs.checksum
    for text in (" a cat is", "cats & <bin_7>", " a\ncat"):
        assert ours.encode(text).tolist() == theirs.encode(text).tolist()


def test_a_vocabulary_is_written_as_it_was_read(folder: Path, tmp_path: Path) -> None:
    for codec in (load_codec(folder), load_codec(write_fairseq_vocabulary(tmp_path / "bpe"))):
        assert isinstance(codec, Gpt2Codec)
        files = port_files(codec.pieces)
        assert json.loads(files["vocab.json"]) == labels_of(folder)
        assert files["merges.txt"] == (folder / "merges.txt").read_text(encoding="utf-8")


def test_numbers_of_the_published_vocabulary(gpt2_codec: TextCodec, tmp_path: Path) -> None:
    assert isinstance(gpt2_codec, Gpt2Codec)
    for name, text in port_files(gpt2_codec.pieces).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    labels = labels_of(tmp_path)
    assert (labels["<s>"], labels["."], labels["Ġthe"], labels["<mask>"], len(labels)) == (0, 4, 5, 50264, 50265)
    codec = load_codec(tmp_path)
    assert codec.checksum == gpt2_codec.checksum
    text = " What's on the café table, at 12:30?"
    assert codec.encode(text).tolist() == gpt2_codec.encode(text).tolist()


def test_a_vocabulary_of_other_numbers_cannot_be_written(tmp_path: Path) -> None:
    folder = write_fairseq_vocabulary(tmp_path / "bpe")
    encoder = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    encoder["Ġa"], encoder["ca"] = encoder["ca"], encoder["Ġa"]
    (folder / "encoder.json").write_text(json.dumps(encoder), encoding="utf-8")
    codec = load_codec(folder)
    assert isinstance(codec, Gpt2Codec)
    with pytest.raises(InputError, match=r"encoder\.json: is not numbered as GPT-2's pieces"):
        port_files(codec.pieces)


def test_merges_may_lack_the_line_of_the_version_and_have_other_ends_of_lines(folder: Path) -> None:
    before = load_codec(folder).checksum
    file = folder / "merges.txt"
    lines = file.read_text(encoding="utf-8")
    for text in (lines.removeprefix("#version: 0.2\n"), lines.rstrip("\n"), lines.replace("\n", "\r\n"), f"{lines}\n"):
        file.write_text(text, encoding="utf-8", newline="")
        assert load_codec(folder).checksum == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"<pad>": 2, "</s>": 1}, r"expected <s>, <pad>, </s>, <unk> first and <mask> last"),
        ({"Ġa": 3}, r"gives 'Ġa' the number 3; expected each of 0 to \d+ once"),
        ({"Ġa": 10**9}, "gives 'Ġa' the number 1000000000"),
        ({"Ġa": -1}, "gives 'Ġa' the number -1"),
        ({"Ġa": "270"}, "gives 'Ġa' the number '270'"),
        ({"Ġa": True}, "gives 'Ġa' the number True"),
        ({"Ġa": None}, "gives 'Ġa' the number None"),
    ],
)
def test_numbers_that_are_wrong_are_named(change: dict[str, Any], message: str, folder: Path) -> None:
    write_labels(folder, labels_of(folder) | change)
    with pytest.raises(InputError, match=rf"vocab\.json: .*{message}"):
        load_codec(folder)


@pytest.mark.parametrize("piece", ["a\nb", "two words", "Ġdog", "漢", "", "madeupword1", "<code_0>", "<bin_0>"])
def test_pieces_that_no_merge_makes_are_named(piece: str, folder: Path) -> None:
    labels = {name: number for number, name in enumerate([*pieces()[:-1], piece, "<mask>"])}
    write_labels(folder, labels)
    with pytest.raises(InputError, match=r"vocab\.json: (no line of .*merges\.txt makes the piece|gives)"):
        load_codec(folder)


@pytest.mark.parametrize("piece", ["Ġcat", "a", "ÿ"])
def test_pieces_that_are_missing_are_named(piece: str, folder: Path) -> None:
    write_labels(folder, {name: number for number, name in enumerate(one for one in pieces() if one != piece)})
    with pytest.raises(InputError, match=rf"vocab\.json: lacks the piece '{piece}', which .*merges\.txt needs"):
        load_codec(folder)


@pytest.mark.parametrize(
    "line",
    ["Ġ dog", "a", "a b c", "", "Ġ a", "c a\x00", "a " + "b" * 1000, " ".join(SPELLED)],
    ids=["unknown", "one", "three", "empty", "again", "zero", "long", "many"],
)
def test_merges_that_are_wrong_are_named(line: str, folder: Path) -> None:
    lines = ["#version: 0.2", *map(" ".join, MERGES), line, "a b"]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InputError, match=rf"merges\.txt:{len(MERGES) + 2}: .* does not merge two pieces"):
        load_codec(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", b"[" * 100_000, r"vocab\.json: is not JSON"),
        ("vocab.json", b'["<s>"]', r"vocab\.json: holds a value of type list; expected an object"),
        ("vocab.json", b'{"<s>": 0, "<s>": 1}', r"vocab\.json: refused, because it names '<s>' twice"),
        ("vocab.json", b"", r"vocab\.json: is empty"),
        ("vocab.json", b"version https://git-lfs.github.com/spec/v1\n", r"vocab\.json: is a Git LFS pointer"),
        ("vocab.json", b"\xff{}", r"vocab\.json: is not text in UTF-8"),
        ("vocab.json", b"{" + b" " * 2**24 + b"}", r"vocab\.json: is larger than 16,777,216 bytes"),
        ("merges.txt", b"<!doctype html>", r"merges\.txt: is an HTML page"),
        ("merges.txt", b"\xff", r"merges\.txt: is not text in UTF-8"),
        ("merges.txt", b"a" * (2**24 + 1), r"merges\.txt: is larger than 16,777,216 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_of_another_kind_are_refused(name: str, content: bytes, message: str, folder: Path) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_codec(folder)


def test_what_a_folder_lacks_or_has_twice_is_named(folder: Path) -> None:
    (folder / "dict.txt").write_text("1 1\n")
    with pytest.raises(InputError, match=r"holds both dict\.txt and vocab\.json; keep only the one to use"):
        load_codec(folder)
    (folder / "dict.txt").unlink()
    (folder / "merges.txt").unlink()
    with pytest.raises(MissingInput, match=r"holds vocab\.json without merges\.txt"):
        load_codec(folder)
    (folder / "vocab.json").rename(folder / "vocab.txt")
    with pytest.raises(InputError, match=r"holds vocab\.txt of a Chinese model of OFA, which is not supported"):
        load_codec(folder)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_links_out_of_the_folder_are_refused(name: str, folder: Path) -> None:
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    with pytest.raises(InputError, match=rf"{name}: is a link that leads out of its folder"):
        load_codec(folder)
