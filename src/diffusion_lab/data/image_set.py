"""Images that somebody else made: a folder, a .zip of one, or an .npz of arrays."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from diffusion_lab.data.decode import Decoder, Files
from diffusion_lab.data.images import refuse_nan
from diffusion_lab.errors import ConfigError
from diffusion_lab.io import read_npz


class ImageSet:
    """count images, read a block at a time; labels int64 (count,) where an .npz says them.

    An .npz holds `arr_0`: uint8 N×H×W×C (or N×H×W), as sample.py writes, or floats in [−1, 1]; `arr_1`, if any, the labels.

    Args:
        path: of them.
        shape: (C, H, W) that each must have; files in colour become grey where C = 1.

    Raises:
        ValueError: nothing there, another size, NaN (with the image's index), values out of range.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path, self.shape = path, shape
        self.labels: Tensor | None = None
        self._array: np.ndarray | None = None
        if not path.exists():
            raise ConfigError(f"images={path}: there is no such folder or file")
        if path.suffix == ".npz":
            self._array, self.labels = self._read()
            self.count = len(self._array)
        else:
            self._files = Files(path)
            self._decoder = Decoder(shape, resize="none", centre=False)
            self.count = len(self._files.names)
            self._decode(self._files.names[0])  # a wrong size is known now
        if self.count < 2:
            raise ConfigError(f"images={path} holds {self.count} image(s), and a distance needs at least 2")

    def block(self, part: range) -> Tensor:
        """The images of a block, (b, C, H, W), uint8 or float in [−1, 1]."""
        if self._array is not None:
            return torch.from_numpy(np.ascontiguousarray(self._array[part.start : part.stop].transpose(0, 3, 1, 2)))
        return torch.from_numpy(np.stack([self._decode(name) for name in self._files.names[part.start : part.stop]]))

    def _decode(self, name: str) -> np.ndarray:
        data = self._files.read(name)
        try:
            with Image.open(io.BytesIO(data)) as image:
                size = image.size
        except (UnidentifiedImageError, OSError):
            size = (self.shape[2], self.shape[1])  # the decoder says what is wrong with it
        if size != (self.shape[2], self.shape[1]):
            self._refuse(name, (size[1], size[0]))
        return self._decoder(data, name)

    def _read(self) -> tuple[np.ndarray, Tensor | None]:
        found = read_npz(self.path, "images")
        if "arr_0" not in found:
            raise ConfigError(f"{self.path.absolute()} holds {', '.join(found)}: name the images arr_0, uint8 N×H×W×C")
        images = found["arr_0"]
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4 or not (images.dtype == np.uint8 or images.dtype.kind == "f"):
            raise ConfigError(
                f"{self.path.absolute()} holds images as {images.dtype} {images.shape}: write uint8 N×H×W×C"
            )
        if (images.shape[3], *images.shape[1:3]) != self.shape:
            self._refuse("each image", images.shape[1:])
        if images.dtype.kind == "f":
            images = images.astype(np.float32)
            refuse_nan(torch.from_numpy(images), of="the pixels")
            if np.abs(images).max(initial=0) > 1:
                raise ConfigError(
                    f"{self.path.absolute()} holds floats up to {np.abs(images).max():.3g}: scale to [-1, 1]"
                )
        labels = found.get("arr_1")
        fits = labels is not None and labels.shape == (len(images),) and labels.dtype.kind in "iu"
        return images, torch.from_numpy(labels.astype(np.int64)) if fits and labels is not None else None

    def _refuse(self, name: str, size: tuple[int, ...]) -> None:
        has, wanted = ("×".join(map(str, s)) for s in (size, (*self.shape[1:], self.shape[0])[: len(size)]))
        raise ConfigError(
            f"{name} in {self.path} is {has}, and the data set's images are {wanted}: choose another data="
        )
