"""Images from TSV columns: every kind that is read, every kind that is refused."""

import base64
import gzip
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from narvl_plugin.data.images import ImageReader, encode_features, image_size, resize
from narvl_plugin.errors import BadRow

WHERE = "train.tsv:3"


def encode(image: Image.Image, file_format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=file_format)
    return stream.getvalue()


def npy(array: np.ndarray) -> str:
    stream = io.BytesIO()
    np.save(stream, array)
    return base64.b64encode(stream.getvalue()).decode()


def noise(width: int, height: int) -> Image.Image:
    values = np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(values)


def test_normalisation_by_half() -> None:
    tensor = ImageReader(4)(base64.b64encode(encode(Image.new("RGB", (9, 5), (255, 0, 51)))).decode(), WHERE)
    assert tensor.shape == (3, 4, 4)
    assert tensor.dtype == torch.float32
    # 51 / 255 = 0.2, and (0.2 - 0.5) / 0.5 = -0.6
    torch.testing.assert_close(tensor.mean((1, 2)), torch.tensor([1.0, -1.0, -0.6]))


def test_normalisation_of_imagenet() -> None:
    column = base64.b64encode(encode(Image.new("RGB", (4, 4), (255, 255, 255)))).decode()
    tensor = ImageReader(4, imagenet_normalisation=True)(column, WHERE)
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(tensor.mean((1, 2)), expected)


def test_both_base64_alphabets() -> None:
    data = encode(noise(32, 32))
    plain, url_safe = base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode()
    assert plain != url_safe
    reader = ImageReader(16)
    assert torch.equal(reader(plain, WHERE), reader(url_safe, WHERE))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = noise(12, 12).convert(mode)
    data = encode(image, "TIFF" if mode == "CMYK" else "PNG")
    tensor = ImageReader(12)(base64.b64encode(data).decode(), WHERE)
    expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(tensor, expected)


@pytest.mark.parametrize("size", [(40, 72), (72, 40), (64, 48), (20, 200)])
def test_the_width_is_resized_before_the_height(size: tuple[int, int]) -> None:
    # The vertical pass alone, on each column of the horizontally resized image by itself.
    image = noise(*size)
    wide = image.resize((64, image.height), Image.Resampling.BICUBIC)
    columns = [wide.crop((x, 0, x + 1, wide.height)).resize((1, 64), Image.Resampling.BICUBIC) for x in range(64)]
    expected = np.concatenate([np.array(column) for column in columns], axis=1)
    assert np.array_equal(np.array(resize(image, 64, 64)), expected)


@pytest.mark.parametrize("name", ["cat.png", "cat.JPG", "cat.jpeg"])
def test_paths_are_looked_up_from_the_tsv_folder(tmp_path: Path, name: str) -> None:
    data = encode(Image.new("RGB", (8, 8), (9, 9, 9)), "PNG" if name.endswith("png") else "JPEG")
    (tmp_path / name).write_bytes(data)
    reader = ImageReader(8, folder=tmp_path)
    assert torch.equal(reader(name, WHERE), reader(base64.b64encode(data).decode(), WHERE))
    assert torch.equal(reader(str(tmp_path / name), WHERE), reader(name, WHERE))


def test_precomputed_features_come_back_unchanged() -> None:
    features = np.random.RandomState(0).standard_normal((5, 2, 3)).astype(np.float16)
    tensor = ImageReader(64)(npy(features), WHERE)
    assert tensor.dtype == torch.float32
    assert np.array_equal(tensor.numpy(), features.astype(np.float32))


def test_features_tell_the_size_of_their_image() -> None:
    features = torch.from_numpy(np.random.RandomState(0).standard_normal((5, 2, 3)).astype(np.float16))
    data = encode_features(features, (640, 480))
    tensor, size = ImageReader(64).with_size(base64.b64encode(data).decode(), WHERE)
    assert torch.equal(tensor, features.float())
    assert size == image_size(data, WHERE) == (640, 480)
    assert ImageReader(64).with_size(npy(features.numpy()), WHERE)[1] is None
    assert ImageReader(64).with_size(base64.b64encode(encode(noise(31, 17))).decode(), WHERE)[1] == (31, 17)


def with_number(number: float, dtype: type) -> str:
    """Give features of which one is this number, as base64."""
    features = np.zeros((2, 3, 4), dtype)
    features[1, 2, 3] = number
    return npy(features)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_features_that_are_not_finite_are_a_bad_row(number: float, dtype: type) -> None:
    with pytest.raises(BadRow, match=r"^train\.tsv:3: the \.npy features .*1 of 24 numbers are NaN, infinite"):
        ImageReader(8)(with_number(number, dtype), WHERE)
    with pytest.raises(BadRow, match=r"^train\.tsv:3: "):
        image_size(base64.b64decode(with_number(number, dtype)), WHERE)


def test_features_that_are_too_large_for_the_model_are_a_bad_row() -> None:
    assert ImageReader(8)(with_number(3e38, np.float64), WHERE).max() > 2e38
    with pytest.raises(BadRow, match=r"^train\.tsv:3: .*too large for float32"):
        ImageReader(8)(with_number(1e39, np.float64), WHERE)


@pytest.mark.parametrize(
    ("number", "message"), [(65_520.0, "up to 6.55e[+]04; .* up to 65,504"), (np.nan, "NaN"), (np.inf, "infinity")]
)
def test_features_that_half_precision_does_not_hold_are_not_written(number: float, message: str) -> None:
    features = torch.zeros(2, 3, 4)
    assert encode_features(features.fill_(65_504), (8, 6))
    features[1, 2, 3] = number
    with pytest.raises(ValueError, match=message):
        encode_features(features, (8, 6))


def features_and(more: bytes) -> str:
    """Give features, and bytes after them."""
    return base64.b64encode(base64.b64decode(npy(np.zeros((1, 2, 2), np.float16))) + more).decode()


def png_header(width: int, height: int) -> bytes:
    """Build a PNG whose header claims a size that its few bytes of zeros would unpack to."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 10_000), (50_000, 50_000), (1, 1_000_000)])
def test_decompression_bombs_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(BadRow, match=r"train\.tsv:3: the image .*(refused)"):
        ImageReader(8)(base64.b64encode(png_header(*size)).decode(), WHERE)


def pickled() -> str:
    return npy(np.array([{"a": 1}], dtype=object))


def claims_too_much() -> str:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "<f2", "fortran_order": False, "shape": (1 << 20, 1 << 10, 1 << 10)}
    )
    return base64.b64encode(stream.getvalue() + bytes(100)).decode()


def with_header(header: str) -> str:
    """Return a `.npy` file with such a header, as base64."""
    start = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
    return base64.b64encode(start + header.encode() + bytes(16)).decode()


@pytest.mark.parametrize(
    ("column", "message"),
    [
        *((with_header(header), "features cannot be used") for header in ("{'descr': ((((", "'''", "-" * 9000 + "1")),
        (
            with_header("{'descr': '|V0', 'fortran_order': False, 'shape': (1" + "0" * 30 + ", 1, 1)}"),
            "features cannot be used",
        ),
        ("", "neither base64 nor a path|image is not readable"),
        ("not an image", "neither base64 nor a path"),
        (base64.b64encode(b"plain text").decode(), "image is not readable"),
        (base64.b64encode(encode(noise(32, 32))[:200]).decode(), "image is not readable"),
        ("nowhere.jpg", "nowhere.jpg cannot be read"),
        (npy(np.zeros((2, 3))), r"features of shape \(C, h, w\)"),
        (npy(np.zeros((2, 3, 4), dtype=np.int64)), r"floating-point features"),
        (pickled(), "features cannot be used"),
        (claims_too_much(), "bytes of data where"),
        (features_and(b"1"), "features cannot be used"),
        (features_and(base64.b64decode(npy(np.array([640, 480, 3])))), "features cannot be used"),
        (features_and(base64.b64decode(npy(np.array([640, 0])))), "image's width and height"),
        (features_and(base64.b64decode(npy(np.array([640, 480]))) + b"1"), "and nothing more"),
    ],
)
def test_what_is_no_image_is_named(column: str, message: str) -> None:
    with pytest.raises(BadRow, match=message) as error:
        ImageReader(8)(column, WHERE)
    assert str(error.value).startswith("train.tsv:3: ")
    assert error.value.where == WHERE


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("", "the image column is empty; check --selected-cols"),
        (" ", "the image column is empty"),
        ("\u3000 \r", "the image column is empty"),
        ("http://example.org/a.jpg", "is an address, 'http://example.org/a.jpg', and images are not downloaded"),
        ("HTTPS://example.org/" + 60 * "a", "is an address, 'HTTPS://example.org/a+…', and imag"),
        ("s3://bucket/picture.png", "is an address, .*, and images are not downloaded"),
        ("data:image/png;base64,iVBORw0KGgo=", "is a data URL, 'data:image/png;base6…'; keep only what foll"),
        ("photo", r"neither base64 nor a path ending in \.jpg, .*: 'photo' .*; check --selected-cols"),
        ("images/photo", r"column, 'images/photo', is no image as base64, and a path must end in \.jpg, .*; check"),
        ("images/photo.heic", r"neither base64 nor a path ending in \.jpg, .*: 'images/photo.heic'"),
        ("2014/COCO/train2014/000000000009/abc", r"'2014/COCO/train2014/…', is no image as base64, and a path"),
        (base64.b64encode(b"plain text " * 9).decode(), "is broken, or none of .*; it is text that begins 'plain text"),
        (base64.b64encode(b"<html>" * 9).decode(), r"not readable \(it is an HTML page"),
        ("pointer.jpg", r"file \S*pointer\.jpg is a Git LFS pointer, .* `git lfs pull`"),
        ("page.png", r"file \S*page\.png is an HTML page"),
        ("drawing.png", r"file \S*drawing\.png is a drawing \(SVG\)"),
        ("packed.npy", r"file \S*packed\.npy is compressed by gzip"),
    ],
)
def test_what_users_take_for_an_image_column_is_said(column: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "2014/COCO/train2014/000000000009").mkdir(parents=True)
    (tmp_path / "2014/COCO/train2014/000000000009/abc").touch()
    (tmp_path / "pointer.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n")
    (tmp_path / "page.png").write_text("<!doctype html><title>404</title>")
    (tmp_path / "drawing.png").write_text('<?xml version="1.0"?><!-- made by hand --><svg/>')
    (tmp_path / "packed.npy").write_bytes(gzip.compress(b"x"))
    with pytest.raises(BadRow, match=rf"train\.tsv:3: the image .*{message}"):
        ImageReader(8, folder=tmp_path)(column, WHERE)


def test_the_smallest_images_are_read() -> None:
    for kind in ("GIF", "PNG", "BMP", "JPEG", "TIFF", "WEBP"):
        stream = io.BytesIO()
        Image.new("L", (1, 1)).save(stream, format=kind)
        assert ImageReader(8)(base64.b64encode(stream.getvalue()).decode(), WHERE).shape == (3, 8, 8)


def test_the_size_is_known_from_the_header() -> None:
    data = encode(noise(31, 17))
    assert image_size(data, WHERE) == (31, 17)
    assert image_size(data[: len(data) // 2], WHERE) == (31, 17)
    with pytest.raises(BadRow, match=r"train\.tsv:3: the image is not readable"):
        image_size(b"no image", WHERE)
