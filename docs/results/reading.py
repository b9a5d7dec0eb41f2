"""Measures what a CPU core takes to read a JPEG: ``python docs/results/reading.py``.

The images are noise whose amplitude falls with its frequency, as in photos, in sizes from COCO's to a camera's. They
are saved with a quality of 90. Reading is what all commands do: decode, turn as EXIF says, resize to 480 pixels,
normalise. The time is that of the core, so that other work on the machine disturbs it little.
"""

from __future__ import annotations

import io
import time

import numpy as np
import torch
from PIL import Image

from narvl_plugin.data.any_image import as_seen
from narvl_plugin.data.images import ImageReader

SIZES = ((640, 480), (1280, 960), (2560, 1920), (4000, 3000))
SIDE = 480
REPEATS = 7
CONTRAST = 55
"""Standard deviation of a pixel, of 255."""


def drawn(width: int, height: int) -> bytes:
    """Return the JPEG of a coloured image of 1/f noise."""
    draw = np.random.default_rng(1)
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequencies[0, 0] = 1
    grey, red, blue = (np.fft.irfft2(np.fft.rfft2(draw.normal(size=(height, width))) / frequencies) for _ in range(3))
    grey, red, blue = (one / one.std() for one in (grey, red, blue))
    colours = np.stack([grey + 0.3 * red, grey, grey + 0.3 * blue], axis=-1)
    pixels = np.clip(128 + CONTRAST * colours, 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def main() -> None:
    """Print size, bytes, and the core's time to decode and to read, in ms: the medians of turns."""
    torch.set_num_threads(1)
    reader = ImageReader(SIDE)
    files = {f"{width} x {height}": drawn(width, height) for width, height in SIZES}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in files}
    for turn in range(REPEATS + 1):
        for name, data in files.items():
            start = time.thread_time()
            image = as_seen(data, name)
            decoded = time.thread_time()
            reader.to_tensor(image)
            if turn:
                times[name].append((decoded - start, time.thread_time() - start))
    for name, found in times.items():
        decoding, whole = 1000 * np.median(found, axis=0)
        print(f"{name}: {len(files[name]) / 1000:.1f} kB, decoding {decoding:.2f} ms, reading {whole:.2f} ms")


if __name__ == "__main__":
    main()
