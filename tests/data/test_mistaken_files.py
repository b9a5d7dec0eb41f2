"""Files that are given for others are called what they are."""

from __future__ import annotations

import gzip
import io
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from narvl_plugin.checkpoints.reading import read_checkpoint
from narvl_plugin.data.mistaken_files import as_text, mistaken
from narvl_plugin.data.plain_pickles import read_pickle
from narvl_plugin.data.text import load_codec
from narvl_plugin.data.tsv import TsvFile
from narvl_plugin.errors import InputError, MissingInput

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 12345\n"
HTML = b"\n<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n"


def tar(content: bytes) -> bytes:
    """Return a tar archive of one file."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        member = tarfile.TarInfo("a")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def zipped(content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """Return a zip archive of one file."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr(zipfile.ZipInfo("a"), content, compression)  # of no time, which would name the test
    return stream.getvalue()


NEVER_WANTED = {
    "Git LFS pointer": (LFS, "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
    "HTML page": (HTML, "is an HTML page, .* download it again"),
    "HTML page in capitals behind a mark": (b"\xef\xbb\xbf<HTML><BODY>", "is an HTML page"),
    "XML": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is XML"),
    "gzip": (gzip.compress(b"a\tb\n"), "is compressed by gzip; unpack it"),
    "xz": (lzma.compress(b"a\tb\n"), "is compressed by xz; unpack it"),
    "tar": (tar(b"a\tb\n"), "is a tar archive; unpack it"),
    "UTF-16": ("1\ta\n".encode("utf-16"), "is text in UTF-16; convert it to UTF-8"),
    "UTF-16, big end first": (b"\xfe\xff" + "1\ta\n".encode("utf-16-be"), "is text in UTF-16; convert it to UTF-8"),
    "UTF-16 without a mark": ("1\ta\n".encode("utf-16-le"), "is text in UTF-16"),
    "UTF-32": ("1\ta\n".encode("utf-32"), "is text in UTF-32; convert it to UTF-8"),
    "PDF": (b"%PDF-1.7\n", "is a PDF"),
    "image": (b"\x89PNG\r\n\x1a\n", "is an image"),
    "array": (b"\x93NUMPY\x01\x00v\x00", "is an array of numpy"),
}
EACH = pytest.mark.parametrize(("content", "message"), NEVER_WANTED.values(), ids=NEVER_WANTED.keys())


@EACH
def test_no_checkpoint(content: bytes, message: str, tmp_path: Path) -> None:
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: {message}"):
            read_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is cut off: it is empty; copy or download it again"),
        (b'{"cfg": {}}', "is JSON, not a checkpoint"),
        (b"caption\timg\ta cat\n1\timg\ttwo dogs\n", r"is a table of text \(TSV\), not a checkpoint"),
        (b"Access denied", r"is damaged or no checkpoint of fairseq \(.*text that begins 'Access denied'\)"),
        (zipped(b"a"), "is no checkpoint: it contains no data.pkl; unpack it, and give the file in it"),
        (zipped(b"a" * 99, zipfile.ZIP_DEFLATED), "is no checkpoint: it contains no data.pkl; unpack it, and give"),
        (pickle.dumps([1, 2]), "is damaged or no checkpoint: it is a pickle of Python, not as torch.save writes it"),
        (zipped(b"a" * 99)[:60], "is cut off or damaged .* copy or download it again"),
    ],
)
def test_no_checkpoint_but_what_else(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(InputError, match=f"a.pt: {message}"):
        read_checkpoint(tmp_path / "a.pt")


def test_no_checkpoint_but_an_archive_of_another_tool(tmp_path: Path) -> None:
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "traced.pt"))
    np.savez(tmp_path / "arrays.npz", first=np.zeros(3), second=np.ones(2))
    for name, message in {
        "traced.pt": "is a model of TorchScript",
        "arrays.npz": "is a file of numpy's arrays",
    }.items():
        with pytest.raises(InputError, match=f"{name}: {message}"):
            read_checkpoint(tmp_path / name)


def test_the_older_format_of_torch_is_no_other_pickle(tmp_path: Path) -> None:
    for protocol in (2, 4):
        torch.save({"a": 1}, tmp_path / "a.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=False)
        assert read_checkpoint(tmp_path / "a.pt") == {"a": 1}


def test_a_file_for_the_folder_of_a_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "spm.model").write_bytes(b"")
    with pytest.raises(InputError, match=rf"spm\.model: is a file; give the folder in which it lies, {tmp_path}$"):
        load_codec(tmp_path / "spm.model")


def test_no_checkpoint_but_a_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match=r"is a folder; give the checkpoint in it, such as .*checkpoint_best\.pt"):
        read_checkpoint(tmp_path)


def test_safetensors_under_the_name_of_a_checkpoint(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a\.pt: is a safetensors file; name it NAME\.safetensors"):
        read_checkpoint(tmp_path / "a.pt")


def test_safetensors_whose_description_was_not_downloaded(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "a.safetensors")
    (tmp_path / "a.json").write_bytes(LFS)
    with pytest.raises(InputError, match=r"a\.json: is a Git LFS pointer"):
        read_checkpoint(tmp_path / "a.safetensors")


@EACH
def test_no_list_of_answers(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(InputError, match=f"a.pkl: {message}"):
        read_pickle(tmp_path / "a.pkl")


@EACH
@pytest.mark.parametrize("name", ["spm.model", "dict.txt", "encoder.json", "vocab.bpe"])
def test_no_vocabulary(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    if name != "spm.model":
        whole = {"dict.txt": b"0 1\n1 1\n", "encoder.json": b'{"x": 0, "y": 1}', "vocab.bpe": b"#version\n"}
        for good in whole:
            (tmp_path / good).write_bytes(whole[good])
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: {message}"):
        load_codec(tmp_path, num_bins=0)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=f"{name}: is empty"):
        load_codec(tmp_path, num_bins=0)


def test_text_for_pieces_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "spm.model").write_text("404: Not Found")
    with pytest.raises(InputError, match="is not a sentencepiece model .*text that begins '404: Not Found'"):
        load_codec(tmp_path)


def test_a_dictionary_may_begin_with_a_mark_of_its_encoding(tmp_path: Path) -> None:
    whole = {"dict.txt": b"0 1\n1 1\n", "encoder.json": b'{"x": 0, "y": 1}', "vocab.bpe": b"#version\n"}
    checksums = []
    for mark in (b"", b"\xef\xbb\xbf"):
        for name, content in (whole | {"dict.txt": mark + whole["dict.txt"]}).items():
            (tmp_path / name).write_bytes(content)
        codec = load_codec(tmp_path, num_bins=0)
        assert codec.encode("yx").tolist() == [5, 4]
        checksums.append(codec.checksum)
    assert checksums[0] == checksums[1]


@EACH
def test_no_table(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(content)
    with pytest.raises(InputError, match=f"a.tsv: {message}"):
        TsvFile(tmp_path / "a.tsv", "0")


@pytest.mark.parametrize(
    ("content", "message"),
    [(zipped(b"a"), "is a zip archive; unpack it"), (pickle.dumps({"yes": 0}), "is a pickle of Python")],
)
def test_no_table_but_what_others_want(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(content)
    with pytest.raises(InputError, match=f"a.tsv: {message}"):
        TsvFile(tmp_path / "a.tsv", "0")


def test_plain_tables_are_none_of_them(write_tsv: Callable[..., Path]) -> None:
    for rows in ([["1", "a"]], [["PK1", "é"]], [["<a>", "b"]], [["version", "2"]]):
        assert mistaken(write_tsv("a.tsv", rows).read_bytes()) is None


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    for name, read in {"a.pt": read_checkpoint, "a.tsv": lambda path: TsvFile(path, "0")}.items():
        (tmp_path / name).write_bytes(b"0")
        with monkeypatch.context() as patch:
            patch.setattr("builtins.open", refuse)
            with pytest.raises(InputError, match=rf"{name}: cannot be read \(Permission denied\)"):
                read(tmp_path / name)


def test_text_is_cut_and_never_binary() -> None:
    assert as_text(("é  " * 300).encode()[:511]) == "é " * 20
    assert as_text(b"") is None
    assert as_text(b"a\x00b") is None
    assert as_text(b"\xff\xfe") is None
