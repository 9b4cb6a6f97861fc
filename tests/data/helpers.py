"""Files that the tests of decoding write."""

from pathlib import Path

import numpy as np
from PIL import Image

RNG = np.random.default_rng(0)


def save(path: Path, height: int = 8, width: int = 8, mode: str = "RGB") -> np.ndarray:
    """A random image of a mode; returns its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    pixels = RNG.integers(0, 256, (height, width, *channels), dtype=np.uint8)
    Image.fromarray(pixels, mode).save(path)
    return pixels
