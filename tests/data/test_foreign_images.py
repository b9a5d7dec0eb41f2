"""Images from anywhere: formats that are not meant, bombs, files that never end, deep colours, EXIF, transparency."""

import base64
import io
import os
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageFile, ImageOps, features
from PIL.PngImagePlugin import PngImageFile

from narvl_plugin.data.images import (
    FORMATS,
    IMAGE_SUFFIXES,
    MAX_BYTES,
    ImageReader,
    image_size,
    open_image,
    opened,
    upright_on_white,
)
from narvl_plugin.errors import BadRow

WHERE = "train.tsv:3"
WIDTH, HEIGHT = 8, 6
LOSSLESS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "TIFF": {},
    "WEBP": {"lossless": True},
    "JPEG": {"quality": 100, "subsampling": 0},
}


def noise(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (HEIGHT, WIDTH, *shape)).astype(np.uint8)


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def png(bits: int, color_type: int, samples: np.ndarray, *chunks: bytes) -> bytes:
    """Write a PNG of 8 x 6 pixels by hand, of big-endian samples (6, bytes of a row)."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, bits, color_type, 0, 0, 0))
    extra = b"".join(chunk(body[:4], body[4:]) for body in chunks)
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(tags: dict[int, int], body: bytes) -> bytes:
    """Write a TIFF by hand, all of whose tags are one 32-bit number; 273 is set to where the body starts."""
    tags = tags | {273: 8 + 2 + 12 * (len(tags) + 1) + 4}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + body


def gray_tiff(bits: int, white_is_zero: bool, body: bytes) -> bytes:
    sizes = {256: WIDTH, 257: HEIGHT, 258: bits, 259: 1, 277: 1, 278: HEIGHT, 279: len(body)}
    return tiff(sizes | {262: int(not white_is_zero)}, body)


def as_column(data: bytes) -> str:
    return base64.b64encode(data).decode()


def upright(data: bytes) -> np.ndarray:
    with opened(data, WHERE) as image:
        return np.asarray(upright_on_white(image))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EndComments\n{ } loop\n%%EOF\n"


class TestOnlyKnownFormats:
    def test_an_image_starts_no_ghostscript(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        program = tmp_path / "bin" / "gs"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
        (tmp_path / "cat.jpg").write_bytes(EPS)
        for column in ("cat.jpg", as_column(EPS), as_column(b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, 99) + EPS)):
            with pytest.raises(BadRow, match=r"train\.tsv:3: the image is not readable \(.* none of JPEG, PNG, "):
                ImageReader(8, folder=tmp_path)(column, WHERE)
        assert not (tmp_path / "started").exists()

    @pytest.mark.parametrize(
        "file_format", ["BLP", "DDS", "DIB", "ICO", "JPEG2000", "PCX", "PPM", "SGI", "SPIDER", "TGA"]
    )
    def test_other_formats_are_bad_rows(self, file_format: str) -> None:
        if file_format == "JPEG2000" and not features.check("jpg_2000"):
            pytest.skip("Pillow was built without JPEG 2000")
        image = Image.fromarray(noise(3)).convert("F" if file_format == "SPIDER" else "RGB")
        if file_format == "BLP":
            image = image.convert("P")
        sizes = {"sizes": [image.size]} if file_format == "ICO" else {}  # else Pillow 12 leaves small images out
        data = encode(image, file_format, **sizes)
        for read in (ImageReader(8), image_size, open_image):
            with pytest.raises(BadRow, match="none of JPEG"):
                read(as_column(data) if isinstance(read, ImageReader) else data, WHERE)

    @pytest.mark.parametrize("file_format", [*FORMATS, "MPO"])
    def test_of_several_frames_or_pages_the_first_is_read(self, file_format: str) -> None:
        first, second = (Image.new("RGB", (WIDTH, HEIGHT), color) for color in ("red", "blue"))
        several = {} if file_format in ("JPEG", "BMP") else {"save_all": True, "append_images": [second]}
        data = encode(first, file_format, **several)
        assert np.abs(np.asarray(open_image(data, WHERE), dtype=int) - [255, 0, 0]).max() <= 2
        assert image_size(data, WHERE) == (WIDTH, HEIGHT)

    def test_files_of_every_suffix_are_opened_by_their_path(self, tmp_path: Path) -> None:
        assert {".jfif", ".jpe", ".gif", ".tif", ".tiff"} < set(IMAGE_SUFFIXES)
        for suffix in IMAGE_SUFFIXES:
            (tmp_path / f"a{suffix}").write_bytes(encode(Image.fromarray(noise(3)), "PNG"))
            assert ImageReader(8, folder=tmp_path)(f"a{suffix}", WHERE).shape == (3, 8, 8)


class TestBrokenAndHostileFiles:
    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("a\nb"),
            KeyError("x"),
            struct.error("y"),
            AttributeError("z"),
            RecursionError(),
            AssertionError(),
        ],
    )
    def test_whatever_a_decoder_raises_is_a_bad_row(self, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(self: PngImageFile) -> None:
            raise error

        monkeypatch.setattr(PngImageFile, "load", load)
        with pytest.raises(BadRow, match=r"^train\.tsv:3: the image is not readable \(.+\)$"):
            open_image(encode(Image.fromarray(noise(3)), "PNG"), WHERE)

    def test_an_interrupt_is_no_bad_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(self: PngImageFile) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(PngImageFile, "load", load)
        with pytest.raises(KeyboardInterrupt):
            open_image(encode(Image.fromarray(noise(3)), "PNG"), WHERE)

    @pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
    def test_a_warning_of_a_bomb_that_is_an_error_is_a_bad_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
        with pytest.raises(BadRow, match="the image is refused"):
            open_image(encode(Image.fromarray(noise(3)), "PNG"), WHERE)

    @pytest.mark.parametrize("file_format", FORMATS)
    def test_half_a_file_is_a_bad_row(self, file_format: str) -> None:
        assert not ImageFile.LOAD_TRUNCATED_IMAGES
        image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8))
        data = encode(image, file_format)
        with pytest.raises(BadRow, match="not readable"):
            open_image(data[: len(data) // 2], WHERE)

    def test_text_that_unpacks_to_megabytes_is_a_bad_row(self) -> None:
        with pytest.raises(BadRow, match="not readable"):
            open_image(png(8, 2, noise(3), b"zTXta\0\0" + zlib.compress(bytes(10_000_000))), WHERE)

    def test_huge_tiles_are_refused(self) -> None:
        body = zlib.compress(bytes(1000))
        tags = {256: 10, 257: 10, 258: 8, 259: 8, 262: 1, 277: 1, 322: 65_520, 323: 30_000, 324: 150, 325: len(body)}
        with pytest.raises(BadRow, match="tiles of 65520 x 30000 pixels"):
            open_image(tiff(tags, body), WHERE)

    def test_scans_without_end_are_refused(self) -> None:
        image = Image.fromarray(noise(3)).resize((64, 64))
        # What looks like scans inside a segment is none.
        data = encode(image, "JPEG", progressive=True, comment=b"\xff\xda" * 200)
        assert open_image(data, WHERE).size == (64, 64)
        last = data[data.rindex(b"\xff\xda") : -2]
        assert open_image(data[:-2] + last * 20 + data[-2:], WHERE).size == (64, 64)
        with pytest.raises(BadRow, match="more than 100 scans"):
            open_image(data[:-2] + last * 100 + data[-2:], WHERE)

    def test_only_regular_files_of_some_size_are_read(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.jpg")
        (tmp_path / "zero.jpg").symlink_to("/dev/zero")
        (tmp_path / "folder.jpg").mkdir()
        (tmp_path / "empty.jpg").touch()
        (tmp_path / "loop.jpg").symlink_to("loop.jpg")
        with open(tmp_path / "huge.jpg", "wb") as file:
            file.truncate(MAX_BYTES + 1)
        for name in ("pipe", "zero", "folder", "empty", "loop", "huge", "gone", "zero\0byte"):
            with pytest.raises(
                BadRow, match=r"^train\.tsv:3: the image file .*\.jpg (cannot be read \(|has \S+ bytes)"
            ):
                ImageReader(8, folder=tmp_path).read_bytes(f"{name}.jpg", WHERE)
        assert stat.S_ISFIFO((tmp_path / "pipe.jpg").stat().st_mode)


class TestDeepColours:
    @pytest.mark.parametrize("make", [
        lambda gray: png(16, 0, gray.astype(">u2")),
        lambda gray: encode(Image.fromarray(gray.astype("<u2")), "TIFF"),
        lambda gray: encode(Image.fromarray(gray.astype(">u2")), "TIFF"),
        lambda gray: gray_tiff(16, False, gray.astype("<u2").tobytes()),
        lambda gray: gray_tiff(16, True, (65_535 - gray).astype("<u2").tobytes()),
        lambda gray: png(16, 2, gray[..., None].repeat(3, axis=2).astype(">u2")),
    ])  # fmt: skip
    def test_gray_of_16_bits_keeps_its_shades(self, make: Callable[[np.ndarray], bytes]) -> None:
        shades = noise().astype(np.uint16)
        shades[0, :2] = 0, 255
        expected = shades[..., None].repeat(3, axis=2)
        for read in (lambda data: np.asarray(open_image(data, WHERE)), upright):
            assert np.array_equal(read(make(shades * 257)), expected)  # 255 becomes 65535
            assert np.array_equal(read(make(shades * 256 + 99)), expected)

    def test_gray_of_12_bits_keeps_its_white(self) -> None:
        pixels = np.asarray(open_image(gray_tiff(12, False, b"\xff" * 36 + bytes(36)), WHERE))
        assert (pixels[:3] == 255).all() and (pixels[3:] == 0).all()

    @pytest.mark.parametrize("kind", [np.int32, np.float32])
    def test_numbers_without_a_known_white_are_refused(self, kind: type) -> None:
        data = encode(Image.fromarray(noise().astype(kind)), "TIFF")
        with pytest.raises(BadRow, match="no known white; save it with 8 or 16 bits"):
            open_image(data, WHERE)
        with pytest.raises(BadRow, match="no known white"):
            upright(data)


class TestUprightOnWhite:
    @pytest.mark.parametrize("file_format", LOSSLESS)
    @pytest.mark.parametrize("orientation", range(10))
    def test_images_are_turned_as_exif_says(self, file_format: str, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encode(Image.fromarray(noise(3)), file_format, exif=exif, **LOSSLESS[file_format])
        as_it_lies = np.asarray(open_image(data, WHERE))
        assert np.array_equal(upright(data), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))
        turns = {2: np.fliplr, 3: lambda x: np.rot90(x, 2), 6: lambda x: np.rot90(x, -1), 8: np.rot90}
        if orientation in turns and file_format != "TIFF":
            assert np.array_equal(upright(data), turns[orientation](as_it_lies))
        if file_format != "TIFF":  # which Pillow turns by itself, always
            assert as_it_lies.shape == (HEIGHT, WIDTH, 3)
        assert image_size(data, WHERE) == as_it_lies.shape[1::-1]
        decoded = ImageReader(8).read(as_column(data), WHERE)
        assert decoded.turned == (orientation in range(2, 9) and file_format != "TIFF")

    @pytest.mark.parametrize("exif", [b"Exif\0\0nothing", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0"])
    @pytest.mark.filterwarnings("ignore:Corrupt EXIF")
    def test_damaged_exif_data_do_no_harm(self, exif: bytes) -> None:
        data = encode(Image.fromarray(noise(3)), "JPEG", exif=exif)
        assert np.array_equal(upright(data), np.asarray(open_image(data, WHERE)))

    def test_transparent_ground_is_white(self) -> None:
        alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
        alpha[2:4] = 255
        logo = Image.fromarray(np.dstack([np.zeros((HEIGHT, WIDTH, 3), np.uint8), alpha]))
        key = Image.fromarray(np.where(alpha == 0, 7, 0).astype(np.uint8))  # shade 7 stands for what is transparent
        deep = np.where(alpha == 0, 7 * 257, 0)
        files = [
            encode(logo, "PNG"),
            encode(logo, "TIFF"),
            encode(logo, "WEBP", lossless=True),
            encode(logo.convert("LA"), "PNG"),
            encode(key.convert("L"), "PNG", transparency=7),
            encode(key.convert("RGB"), "PNG", transparency=(7, 7, 7)),
            encode(key.convert("P"), "PNG", transparency=7),
            encode(key.convert("P"), "PNG", transparency=bytes([255] * 7 + [0])),
            encode(key.convert("P"), "GIF", transparency=7),
            png(16, 0, deep.astype(">u2"), b"tRNS" + struct.pack(">H", 7 * 257)),
            png(16, 2, deep[..., None].repeat(3, 2).astype(">u2"), b"tRNS" + struct.pack(">HHH", *[7 * 257] * 3)),
        ]
        expected = np.where(alpha == 0, 255, 0)[..., None].repeat(3, axis=2)
        for data in files:
            assert np.array_equal(upright(data), expected)
            # In a TSV file they are read as the published models read them: without looking at transparency.
            assert np.asarray(open_image(data, WHERE)).max() <= 7

    def test_half_transparent_pixels_are_mixed_with_white(self) -> None:
        data = encode(Image.new("RGBA", (WIDTH, HEIGHT), (200, 100, 0, 51)), "PNG")
        assert upright(data)[0, 0].tolist() == [244, 224, 204]  # a fifth of the colour, four fifths of white
