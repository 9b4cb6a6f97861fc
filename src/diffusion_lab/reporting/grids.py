"""Grids of samples, small enough that a hundred of them fit into one page."""

import base64
import io
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from diffusion_lab.errors import ConfigError

LARGEST = 60_000  # bytes of one grid
ALL = 5_000_000  # bytes of all grids
_DENSE = 0.32  # bytes that a pixel of samples takes as WebP, about
_SHRINK = 0.8


class Picture(NamedTuple):
    """A data: address and the size to reserve for it."""

    address: str
    width: int
    height: int


def limit(count: int) -> int:
    """Bytes that each of `count` grids may take."""
    return min(LARGEST, ALL // max(count, 1))


def picture(path: Path, limit: int) -> Picture:
    """The file as it is if it is small enough, else as WebP, smaller until it is.

    Raises:
        ValueError: no picture, or a cut one.
    """
    try:
        raw = path.read_bytes()
        with Image.open(io.BytesIO(raw)) as opened:
            opened.load()
            if opened.format == "PNG" and len(raw) <= limit:
                return Picture(_address("png", raw), *opened.size)
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path.name} cannot be read: {error}") from None
    fits = math.sqrt(min(1.0, limit / _DENSE / (image.width * image.height)))
    image.thumbnail((max(1, round(fits * image.width)), max(1, round(fits * image.height))), reducing_gap=2.0)
    while True:
        stream = io.BytesIO()
        image.save(stream, "webp", quality=75, method=2)
        if stream.tell() <= limit or max(image.size) <= 64:
            return Picture(_address("webp", stream.getvalue()), *image.size)
        image = image.resize((max(1, round(image.width * _SHRINK)), max(1, round(image.height * _SHRINK))))


def pictures(paths: Sequence[Path | None]) -> list[Picture | str | None]:
    """Of each path its picture, or why there is none; None of None. On all cores: Pillow works without Python's lock."""
    each = limit(sum(path is not None for path in paths))

    def made(path: Path | None) -> Picture | str | None:
        try:
            return None if path is None else picture(path, each)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(made, paths))


def _address(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
