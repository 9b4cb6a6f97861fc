"""Find image files, and decode them with Pillow to uint8 arrays of a fixed shape."""

import io
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from diffusion_lab.errors import ConfigError, DamagedFileError, check_number, check_numbers
from diffusion_lab.io import read_bytes, require_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
# Pillow would also open formats that other programs decode: Ghostscript runs the PostScript in an .eps, whatever its name.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MOST_BYTES = 128 << 20  # of an image file
MOST_PIXELS = 89_478_485  # of an image: Pillow's limit, beyond which it warns
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")


class Files:
    """The image files in a folder (recursively) or a .zip file, sorted by name. Hidden files and folders are skipped.

    Args:
        path: the folder or .zip file.

    Attributes:
        names: relative paths, separated by "/".
        stamps: (name, size, modification time in ns or CRC) of each file, from which the key of the cache is computed.

    Raises:
        ConfigError: if `path` is neither a folder nor a .zip file, or contains no image.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        try:
            if path.is_dir():
                self.stamps = sorted(_scan(path))
            else:
                require_file(path)
                if not zipfile.is_zipfile(path):
                    raise ConfigError(
                        f"{path.absolute()} is neither a folder nor a .zip file: point data.root at your images"
                    )
                self._zip = zipfile.ZipFile(path)
                members = [m for m in self._zip.infolist() if not m.is_dir() and _is_image(m.filename)]
                self._members = {m.filename: m for m in members}
                self.stamps = sorted((m.filename, m.file_size, m.CRC) for m in self._members.values())
        except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path.absolute()} cannot be read ({error}): repair it, or name another") from None
        self.names = [name for name, _, _ in self.stamps]
        if not self.names:
            raise ConfigError(
                f"{path.absolute()} contains no images: accepted are {' '.join(SUFFIXES)}, also in nested folders"
            )

    def read(self, name: str) -> bytes:
        """Return the bytes of a file. Safe to call from several threads.

        Raises:
            ConfigError: it cannot be read, is not a regular file, or is larger than the limit.
        """
        try:
            if self._zip is None:
                return read_bytes(self.path / name, MOST_BYTES)
            if self._members[name].file_size > MOST_BYTES:
                raise DamagedFileError(f"it declares {self._members[name].file_size / 2**20:,.0f} MiB")
            return self._zip.read(name)
        except ConfigError:
            raise
        except Exception as error:  # zipfile and its decompressors raise nearly anything on damaged files
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise ConfigError(f"{name} in {self.path} cannot be read ({reason}): repair or remove it") from error


def _is_image(name: str) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    return name.lower().endswith(SUFFIXES) and not hidden


def _scan(root: Path) -> list[tuple[str, int, int]]:
    """Return the stamps of the images below a folder.

    Raises:
        ConfigError: a folder that links lead to twice (a loop of links never ends), or a link to nothing.
    """
    stamps, seen, waiting = [], set[tuple[int, int]](), [(root, "")]
    while waiting:
        folder, prefix = waiting.pop()
        identity = folder.stat().st_dev, folder.stat().st_ino
        if identity in seen:
            raise ConfigError(f"{folder} is a link to a folder that is read already: remove it")
        seen.add(identity)
        with os.scandir(folder) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_dir() and not entry.name.startswith("."):
                    waiting.append((folder / entry.name, name + "/"))
                elif _is_image(entry.name):
                    try:
                        stat = entry.stat()
                    except OSError as error:
                        raise ConfigError(
                            f"{folder / entry.name} is a link to nothing ({error.strerror}): remove it"
                        ) from None
                    stamps.append((name, stat.st_size, stat.st_mtime_ns))
    return stamps


def open_image(data: bytes, name: str, channels: int, *, refuse_color: bool = False) -> Image.Image:
    """Decode the bytes of an image file to Pillow's mode "L" (1 channel) or "RGB" (3).

    The EXIF orientation is applied, transparency is composited on white, 16 bits are rounded to 8, and palettes and CMYK
    become RGB.

    Args:
        data: contents of the file.
        name: name of the file, for error messages.
        channels: number of channels, 1 or 3.
        refuse_color: if `channels` is 1, raise an error for a color image instead of converting it to grayscale.

    Raises:
        ConfigError: if Pillow cannot read the file, it is in color and `refuse_color` is set, or the number of channels is not
            supported.
    """
    mode = _mode(channels)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            refuse_large(file.size)
            upright = ImageOps.exif_transpose(file)
        image = _flatten(upright, mode)
        colored = refuse_color and mode == "L" and _is_color(upright)
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ConfigError(f"{name} cannot be read as an image ({reason}): repair or remove it") from error
    if colored:
        raise ConfigError(f"{name} is in color, but an image with 1 channel is needed: save it in grayscale")
    return image


def refuse_large(size: tuple[float, float]) -> None:
    """Raise ConfigError for images of more pixels than Pillow warns of, since a small file may declare them."""
    if size[0] * size[1] > MOST_PIXELS:
        raise ConfigError(f"it has {size[0]:,.0f}×{size[1]:,.0f} pixels, more than {MOST_PIXELS:,}")


def _mode(channels: int) -> str:
    if channels not in (1, 3):
        raise ConfigError(f"data.channels={channels} is not supported for image files: write 1 (grayscale) or 3 (RGB)")
    return "L" if channels == 1 else "RGB"


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """Return the pixels of an "L" or "RGB" image, uint8 (C, H, W)."""
    return np.asarray(image).reshape(image.height, image.width, -1).transpose(2, 0, 1)


@dataclass(frozen=True)
class Decoder:
    """Decode an image file to a fixed shape: crop `box`, resize, crop the center.

    Args:
        shape: (C, H, W), C = 1 (grayscale) or 3 (RGB).
        box: crop before resizing: the side of a central square in pixels, (top, left, height, width), or None; in [0, 65536].
        resize: "shorter" scales until the image just covers H×W, "exact" to H×W whatever its aspect ratio, "none" not at all.
        center: crop the central H×W after resizing; otherwise the image must have that size by then.
        filter: Pillow's, antialiased when it shrinks: one of `FILTERS`.

    Raises:
        ConfigError: an unknown option, a number out of range.
    """

    shape: tuple[int, int, int]
    box: int | Sequence[int] | None = None
    resize: str = "shorter"
    center: bool = True
    filter: str = "lanczos"

    def __post_init__(self) -> None:
        check_numbers("data.image_size", self.shape[1:], "[1, 65536]", whole=True, length=2)
        _mode(self.shape[0])
        if self.resize not in ("shorter", "exact", "none"):
            raise ConfigError(f"data.source.resize={self.resize}: write shorter, exact or none")
        if self.filter not in FILTERS:
            raise ConfigError(f"data.source.filter={self.filter}: write one of {', '.join(FILTERS)}")
        if isinstance(self.box, list | tuple):
            check_numbers("data.source.crop", self.box, "[0, 65536]", "[top,left,height,width]", whole=True, length=4)
            check_numbers("data.source.crop", self.box[2:], "[1, 65536]", "[height,width] of the box", whole=True)
        else:
            hint = "the side of a square, or [top,left,height,width]"
            check_number("data.source.crop", self.box, "[1, 65536]", hint, whole=True, optional=True)

    def __call__(self, data: bytes, name: str) -> NDArray[np.uint8]:
        """Decode the bytes of a file to uint8 (C, H, W).

        Raises:
            ConfigError: if Pillow cannot read the file, the image is smaller than a crop, or the result is not H×W.
        """
        image = open_image(data, name, self.shape[0])
        height, width = self.shape[1:]
        if self.box is not None:
            image = _crop(image, self.box, name)
        if self.resize != "none":
            size = (width, height)
            if self.resize == "shorter":
                scale = max(width / image.width, height / image.height)
                size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
                if size[0] * size[1] > MOST_PIXELS:
                    raise ConfigError(
                        f"{name} is {image.height}×{image.width}, too long to scale its shorter side to {height}×{width}: "
                        "remove it, or write data.source.resize=exact"
                    )
            image = image.resize(size, Image.Resampling[self.filter.upper()])
        if self.center:
            image = _crop(image, (height, width), name)
        if image.size != (width, height):
            raise ConfigError(
                f"{name} is {image.height}×{image.width}, but data.image_size=[{height},{width}]: "
                "write data.source.resize=exact, or resize=shorter with crop=center"
            )
        return to_array(image)


def _crop(image: Image.Image, box: int | Sequence[int], name: str) -> Image.Image:
    """Crop a box (top, left, height, width), the central (height, width), or the central square of that side."""
    if isinstance(box, int):
        box = (box, box)
    if len(box) == 2:
        box = ((image.height - box[0]) // 2, (image.width - box[1]) // 2, *box)
    top, left, height, width = box
    if top < 0 or left < 0 or top + height > image.height or left + width > image.width:
        raise ConfigError(
            f"{name} is {image.height}×{image.width}, too small for a crop of {height}×{width}: "
            "write a smaller data.source.crop, or data.source.resize=shorter"
        )
    return image.crop((left, top, left + width, top + height))


def _flatten(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image of any mode to "L" or "RGB"."""
    if image.mode.startswith("I"):  # 16 bits, which convert() would clip at 255
        image = Image.fromarray(np.rint(np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ConfigError("floating-point pixels of unknown range: save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


def _is_color(image: Image.Image) -> bool:
    pixels = np.asarray(image.convert("RGB"))
    return bool((pixels != pixels[..., :1]).any())
