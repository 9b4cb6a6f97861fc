"""Encode grids of samples as data: URLs, small enough that a hundred of them fit into one page."""

import base64
import io
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from diffusion_lab.errors import ConfigError, DamagedFileError
from diffusion_lab.io import read_bytes

MOST_BYTES, MOST_PIXELS = 64 << 20, 1 << 26  # of the file of a grid
LARGEST = 60_000  # bytes of one grid
TOTAL = 5_000_000  # bytes of all grids
_BYTES_PER_PIXEL = 0.32  # of samples as WebP, approximately
_SHRINK = 0.8  # factor of width and height at each further attempt


class Picture(NamedTuple):
    """A data: URL and the size of the image in pixels."""

    address: str
    width: int
    height: int


def limit(count: int) -> int:
    """Return the maximum bytes of each of `count` grids."""
    return min(LARGEST, TOTAL // max(count, 1))


def picture(path: Path, limit: int) -> Picture:
    """Return the PNG file unchanged if it has at most `limit` bytes, else as WebP, reduced until it fits.

    Raises:
        ConfigError: the file is not an image, or is truncated.
    """
    try:
        raw = read_bytes(path, MOST_BYTES)
        with Image.open(io.BytesIO(raw), formats=("PNG",)) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise DamagedFileError(f"it has {opened.width}×{opened.height} pixels")
            opened.load()
            if opened.format == "PNG" and len(raw) <= limit:
                return Picture(_data_url("png", raw), *opened.size)
            image = opened.convert("RGB")
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise ConfigError(f"{path.name} cannot be read: {error}") from None
    factor = math.sqrt(min(1.0, limit / _BYTES_PER_PIXEL / (image.width * image.height)))
    image.thumbnail((max(1, round(factor * image.width)), max(1, round(factor * image.height))), reducing_gap=2.0)
    while True:
        stream = io.BytesIO()
        image.save(stream, "webp", quality=75, method=2)
        if stream.tell() <= limit or max(image.size) <= 64:
            return Picture(_data_url("webp", stream.getvalue()), *image.size)
        image = image.resize((max(1, round(image.width * _SHRINK)), max(1, round(image.height * _SHRINK))))


def pictures(paths: Sequence[Path | None]) -> list[Picture | str | None]:
    """Return for each path its picture, or the error message; None for None.

    Files are encoded by several threads, since Pillow releases the global interpreter lock.
    """
    bytes_each = limit(sum(path is not None for path in paths))

    def encode(path: Path | None) -> Picture | str | None:
        try:
            return None if path is None else picture(path, bytes_each)
        except ConfigError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(encode, paths))


def _data_url(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
