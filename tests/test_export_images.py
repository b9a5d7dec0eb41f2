"""Images of strangers, as an exported student reads them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from narvl_plugin.export.images import FORMATS, open_image

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 6
%%EndComments
{ } loop
%%EOF
"""


def file(image: Image.Image, to: str, **options: Any) -> bytes:
    """Return an image as a file of some format."""
    stream = io.BytesIO()
    image.save(stream, format=to, **options)
    return stream.getvalue()


def gradient() -> Image.Image:
    """Return an image of 8 x 6 pixels whose left half is red, and right half blue, with one green row on top."""
    pixels = np.zeros((6, 8, 3), dtype=np.uint8)
    pixels[:, :4, 0] = pixels[:, 4:, 2] = 255
    pixels[0] = (0, 255, 0)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("to", FORMATS)
def test_usual_formats_are_read(to: str) -> None:
    if to == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    image = open_image(file(Image.new("RGB", (16, 12), (200, 30, 30)), to))
    assert (image.mode, image.size) == ("RGB", (16, 12))
    assert np.abs(np.asarray(image, dtype=int) - (200, 30, 30)).max() < 12


def test_two_images_of_a_camera_are_read_as_the_first() -> None:
    first, second = Image.new("RGB", (16, 12), "red"), Image.new("RGB", (16, 12), "blue")
    for to in ("MPO", "GIF"):
        image = open_image(file(first, to, save_all=True, append_images=[second]))
        assert image.getpixel((8, 6))[0] > 240 > 20 > image.getpixel((8, 6))[2]


def test_no_other_program_is_started_for_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr("subprocess.Popen.__init__", lambda self, *args, **kwargs: started.append(args))
    others = {to: file(Image.new("RGB", (8, 6), "red"), to) for to in ("EPS", "PPM", "ICNS", "DDS", "SGI", "TGA")}
    for data in (EPS, *others.values(), b"#FIG 3.2", b"", b"\x00" * 512):
        with pytest.raises(ValueError, match="broken, or none of JPEG, PNG, WEBP, BMP, GIF, TIFF"):
            open_image(data)
    assert not started


def test_whatever_a_decoder_raises_is_a_value_error() -> None:
    whole = {to: file(gradient().resize((64, 48)), to) for to in FORMATS if to != "AVIF" or features.check("avif")}
    generator = np.random.default_rng(1)
    for to, data in whole.items():
        for cut in (5, 20, len(data) // 2, len(data) - 30):
            try:
                open_image(data[:cut])
            except ValueError as error:
                assert "the image" in str(error), to
        for _ in range(30):
            damaged = np.frombuffer(data, dtype=np.uint8).copy()
            damaged[generator.integers(0, len(data), 8)] = generator.integers(0, 256, 8)
            try:
                assert open_image(damaged.tobytes()).mode == "RGB"
            except ValueError as error:
                assert "the image" in str(error), to


def test_an_image_that_unpacks_to_too_much_is_refused() -> None:
    for size in ((10_000, 10_000), (70_000, 1)):
        with pytest.raises(ValueError, match="cannot be read"):
            open_image(file(Image.new("1", size), "PNG"))


@pytest.mark.parametrize("to", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 1), (8, 3)])
def test_images_are_upright_as_exif_says(to: str, orientation: int, turns: int) -> None:
    upright = gradient().resize((64, 48), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = orientation
    # As a camera that was turned has them: against the turn that the viewer then makes.
    lying = Image.fromarray(np.rot90(np.asarray(upright), turns).copy())
    options = {"lossless": True} if to == "WEBP" else {}
    found = open_image(file(lying, to, exif=exif, **options))
    assert found.size == upright.size
    assert np.abs(np.asarray(found, dtype=int) - np.asarray(upright)).mean() < 12


def test_damaged_exif_does_not_make_an_image_unreadable() -> None:
    data = file(gradient(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert open_image(data).size == (8, 6)


def test_mirrored_exif_is_followed() -> None:
    exif = Image.Exif()
    exif[0x0112] = 2
    assert open_image(file(gradient(), "PNG", exif=exif)).getpixel((0, 5)) == (0, 0, 255)


def with_alpha(mode: str) -> Image.Image:
    """Return a black image whose left half is transparent."""
    image = Image.new("LA", (8, 6), (0, 255))
    image.paste((0, 0), (0, 0, 4, 6))
    return image.convert(mode)


@pytest.mark.parametrize(("mode", "to"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF")])
def test_transparency_is_white_ground(mode: str, to: str) -> None:
    options = {"lossless": True} if to == "WEBP" else {}
    image = open_image(file(with_alpha(mode), to, **options))
    assert image.getpixel((1, 1)) == (255, 255, 255)
    assert image.getpixel((6, 1)) == (0, 0, 0)


@pytest.mark.parametrize("to", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_is_white_ground(to: str) -> None:
    image = Image.new("P", (8, 6), 1)
    image.putpalette([10, 10, 10, 200, 30, 30])
    image.paste(0, (0, 0, 4, 6))
    read = open_image(file(image, to, transparency=0))
    assert (read.getpixel((1, 1)), read.getpixel((6, 1))) == ((255, 255, 255), (200, 30, 30))


@pytest.mark.parametrize(("mode", "clear", "ink"), [("L", 7, 0), ("RGB", (1, 2, 3), (0, 0, 0))])
def test_a_transparent_colour_is_white_ground(mode: str, clear: Any, ink: Any) -> None:
    image = Image.new(mode, (8, 6), ink)
    image.paste(clear, (0, 0, 4, 6))
    read = open_image(file(image, "PNG", transparency=clear))
    assert (read.getpixel((1, 1)), read.getpixel((6, 1))) == ((255, 255, 255), (0, 0, 0))


def test_gray_of_16_bits_keeps_its_range() -> None:
    gray = np.array([[0, 257 * 128, 65535]], dtype=np.uint16)
    for to in ("PNG", "TIFF"):
        image = open_image(file(Image.fromarray(gray), to))
        assert [image.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (128,) * 3, (255,) * 3]
    assert open_image(file(Image.fromarray(gray), "PNG", transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_numbers_without_a_white_are_refused() -> None:
    for dtype in (np.float32, np.int32):
        with pytest.raises(ValueError, match="do not tell what is white"):
            open_image(file(Image.fromarray(np.ones((4, 4), dtype=dtype)), "TIFF"))
