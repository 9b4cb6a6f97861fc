"""Grids of samples, small enough that a hundred of them fit into one page."""

import base64
import io
from pathlib import Path
from typing import NamedTuple

from PIL import Image

LARGEST = 60_000  # bytes of one grid
ALL = 5_000_000  # bytes of all grids
_SIDE = 1000  # pixels
_SHRINK = 0.75


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
        raise ValueError(f"{path.name} cannot be read: {error}") from None
    image.thumbnail((_SIDE, _SIDE))
    while True:
        stream = io.BytesIO()
        image.save(stream, "webp", quality=80, method=2)
        if stream.tell() <= limit or max(image.size) <= 64:
            return Picture(_address("webp", stream.getvalue()), *image.size)
        image = image.resize((max(1, round(image.width * _SHRINK)), max(1, round(image.height * _SHRINK))))


def _address(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
