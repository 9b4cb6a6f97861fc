"""Image files of any kind → uint8 arrays of one shape, by Pillow."""

import io
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from diffusion_lab.errors import ConfigError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


class Files:
    """The images below a folder, or in a .zip file, in the order of their names; hidden ones are passed over.

    names: relative, with "/". stamps: (name, size, modification time in ns | CRC) of each, what a cache is keyed by.

    Raises:
        ValueError: there is no such folder or archive, or no image in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            self._zip = None
            self.stamps = sorted(_scan(path, ""))
        elif zipfile.is_zipfile(path):
            self._zip = zipfile.ZipFile(path)
            members = (m for m in self._zip.infolist() if _is_image(m.filename))
            self.stamps = sorted((m.filename, m.file_size, m.CRC) for m in members)
        else:
            raise ConfigError(f"{path.absolute()} is neither a folder nor a .zip file: point data.root at your images")
        self.names = [name for name, _, _ in self.stamps]
        if not self.names:
            raise ConfigError(
                f"{path.absolute()} holds no images: accepted are {' '.join(SUFFIXES)}, in nested folders too"
            )

    def read(self, name: str) -> bytes:
        """The bytes of a file; safe to call from several threads. ValueError: it cannot be read."""
        try:
            return self._zip.read(name) if self._zip else (self.path / name).read_bytes()
        except (OSError, zipfile.BadZipFile, zlib.error) as error:
            raise ConfigError(f"{name} in {self.path} cannot be read ({error}): repair or remove it") from error


def _is_image(name: str) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    return name.lower().endswith(SUFFIXES) and not hidden


def _scan(folder: Path, prefix: str) -> list[tuple[str, int, int]]:
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir() and not entry.name.startswith("."):
                found += _scan(folder / entry.name, name + "/")
            elif _is_image(entry.name):
                stat = entry.stat()
                found.append((name, stat.st_size, stat.st_mtime_ns))
    return found


@dataclass(frozen=True)
class Decoder:
    """What turns a file into an image of a fixed shape: cut `box`, resize, cut the middle.

    shape: (C, H, W), C = 1 grey or 3 colours.
    box: what is cut from the original first: a central square of so many pixels, (top, left, height, width), or None.
    resize: "shorter" scales until the image just covers H×W, "exact" to H×W whatever its aspect, "none" does not scale.
    centre: cut the central H×W after that; otherwise the image must have that size by then.
    filter: Pillow's, antialiased when it shrinks: one of `FILTERS`.

    The orientation that a camera noted is applied, transparency is laid on white, 16 bits become 8 by rounding, and
    palettes and CMYK become RGB.

    Raises:
        ValueError: an option that is none of these.
    """

    shape: tuple[int, int, int]
    box: int | tuple[int, ...] | None = None
    resize: str = "shorter"
    centre: bool = True
    filter: str = "lanczos"

    def __post_init__(self) -> None:
        if self.shape[0] not in (1, 3):
            raise ConfigError(f"data.channels={self.shape[0]}: image files are read as 1 (grey) or 3 (RGB)")
        if self.resize not in ("shorter", "exact", "none"):
            raise ConfigError(f"data.source.resize={self.resize}: write shorter, exact or none")
        if self.filter not in FILTERS:
            raise ConfigError(f"data.source.filter={self.filter}: write one of {', '.join(FILTERS)}")
        if not (self.box is None or isinstance(self.box, int) or len(self.box) == 4):
            raise ConfigError(f"data.source.crop={list(self.box)}: a box is [top,left,height,width]")

    def __call__(self, data: bytes, name: str) -> NDArray[np.uint8]:
        """The bytes of a file → uint8 (C, H, W).

        Raises:
            ValueError: the file is no image that Pillow can read, is smaller than `box`, or does not come out as H×W.
        """
        try:
            with Image.open(io.BytesIO(data)) as opened:
                image = _flatten(ImageOps.exif_transpose(opened), "L" if self.shape[0] == 1 else "RGB")
        except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
            reason = " ".join(str(error).split())
            raise ConfigError(f"{name} cannot be read as an image ({reason}): repair or remove it") from error
        height, width = self.shape[1:]
        if self.box is not None:
            image = _cut(image, self.box, name)
        if self.resize != "none":
            size = (width, height)
            if self.resize == "shorter":
                scale = max(width / image.width, height / image.height)
                size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
            image = image.resize(size, Image.Resampling[self.filter.upper()])
        if self.centre:
            image = _cut(image, (height, width), name)
        if image.size != (width, height):
            raise ConfigError(
                f"{name} is {image.height}×{image.width} where data.image_size=[{height},{width}]: "
                "write data.source.resize=exact, or resize=shorter with crop=center"
            )
        return np.asarray(image).reshape(height, width, -1).transpose(2, 0, 1)


def _cut(image: Image.Image, box: int | Sequence[int], name: str) -> Image.Image:
    """A box (top, left, height, width), or the central (height, width) or square of that side."""
    if isinstance(box, int):
        box = (box, box)
    if len(box) == 2:
        box = ((image.height - box[0]) // 2, (image.width - box[1]) // 2, *box)
    top, left, height, width = box
    if top < 0 or left < 0 or top + height > image.height or left + width > image.width:
        raise ConfigError(
            f"{name} is {image.height}×{image.width}, too small to cut {height}×{width} from it: "
            "write a smaller data.source.crop, or data.source.resize=shorter"
        )
    return image.crop((left, top, left + width, top + height))


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    """Any mode of Pillow → "L" or "RGB"."""
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
        image = Image.fromarray(np.rint(np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ConfigError("floating-point pixels, whose range is not known: save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)
