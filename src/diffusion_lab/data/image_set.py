"""Read the images at a path of the user: a file, a folder, a .zip file or an .npz file."""

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.data.decode import MOST_BYTES, Files, open_image, to_array
from diffusion_lab.data.npz import are_labels, images_of_npz
from diffusion_lab.errors import ConfigError
from diffusion_lab.io import read_bytes, read_npz, require_file


class ImageSet:
    """Images of one shape, read in blocks and not modified.

    An .npz file must contain `arr_0`: uint8 (N, H, W, C) or (N, H, W), as written by sample.py, or floats in [−1, 1]. `arr_1` is
    read as labels if it contains N integers ≥ 0. The defaults are those of images to evaluate.

    Args:
        path: an image file, a folder or .zip file of image files, or an .npz file.
        shape: (C, H, W) of each image.
        key: the option that names `path`, for error messages.
        owner: the object whose images have this shape, for error messages.
        remedy: an imperative for images of another shape, for error messages.
        minimum: minimum number of images.
        refuse_color: if C = 1, raise an error for color files instead of converting them to grayscale.

    Attributes:
        count: number of images.
        labels: labels, int64 (count,), or None.

    Raises:
        ConfigError: if the path does not exist, a file is unreadable, an image has another shape, NaN or Inf (the message
            contains its index) or values out of range, or there are fewer images than `minimum`. The constructor checks only
            the first file, `block` the others.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int, int],
        *,
        key: str = "images",
        owner: str = "the data set",
        remedy: str = "choose another data=",
        minimum: int = 2,
        refuse_color: bool = False,
    ) -> None:
        self.path, self.shape = path, shape
        self.labels: Tensor | None = None
        self._where, self._refuse_color = f"{key}={path}", refuse_color
        self._mismatch = f"where {owner}'s images are", remedy
        self._array: np.ndarray | None = None
        self._files: Files | None = None
        self._names: list[str] = []
        if not path.exists():
            raise ConfigError(f"{self._where}: no such file or folder")
        if path.suffix == ".npz":
            self._array, self.labels = self._read_npz(key)
            self.count = len(self._array)
        else:
            if not path.is_dir():
                require_file(path, key)
            if path.is_dir() or path.suffix == ".zip" or zipfile.is_zipfile(path):
                self._files = Files(path)
                self._names = self._files.names
            else:
                self._names = [str(path)]
            self.count = len(self._names)
            self._decode(self._names[0])  # check the size early
        if self.count < minimum:
            raise ConfigError(
                f"{self._where} has {self.count} image(s), but at least {minimum} are needed: name another path"
            )

    def block(self, part: range) -> Tensor:
        """Return the images of a contiguous range, (b, C, H, W), uint8 or float32 in [−1, 1]."""
        if self._array is not None:
            return torch.from_numpy(np.ascontiguousarray(self._array[part.start : part.stop].transpose(0, 3, 1, 2)))
        return torch.from_numpy(np.stack([self._decode(name) for name in self._names[part.start : part.stop]]))

    def _decode(self, name: str) -> np.ndarray:
        where = f"{name} in {self._where}" if self._files else self._where
        try:
            data = self._files.read(name) if self._files else read_bytes(self.path, MOST_BYTES)
        except OSError as error:
            raise ConfigError(f"{where} cannot be read ({error}): name another file") from None
        image = open_image(data, where, self.shape[0], refuse_color=self._refuse_color)
        self._check_size(where, (image.height, image.width))
        return to_array(image)

    def _read_npz(self, key: str) -> tuple[np.ndarray, Tensor | None]:
        arrays = read_npz(self.path, key)
        if "arr_0" not in arrays:
            raise ConfigError(f"{self._where} contains {', '.join(arrays)}: name the images arr_0, uint8 (N, H, W, C)")
        images, labels = images_of_npz(arrays["arr_0"], self._where, floats=True), arrays.get("arr_1")
        self._check_size(self._where, images.shape[1:])
        return images, torch.from_numpy(labels.astype(np.int64)) if are_labels(labels, len(images)) else None

    def _check_size(self, where: str, size: tuple[int, ...]) -> None:
        """Compare (H, W) or (H, W, C)."""
        expected = (*self.shape[1:], self.shape[0])[: len(size)]
        if size != expected:
            actual, needed = ("×".join(map(str, s)) for s in (size, expected))
            owner, remedy = self._mismatch
            raise ConfigError(f"{where} is {actual} {owner} {needed}: {remedy}")
