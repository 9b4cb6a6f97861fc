"""Check the arrays of images and labels in an .npz file."""

from typing import TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion_lab.data.images import Index, refuse_nan
from diffusion_lab.errors import ConfigError

MOST_CLASSES = 1 << 20  # a label counts the classes, each of which has a name


def images_of_npz(array: np.ndarray, where: str, *, floats: bool = False) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Return images (N, H, W, C), uint8, or float32 in [−1, 1] if `floats` is true.

    Args:
        array: array of shape (N, H, W, C) or (N, H, W), N ≥ 1.
        where: name of the file, for error messages.
        floats: whether to accept floats in [−1, 1] as well.

    Raises:
        ConfigError: if dtype or shape is not supported, there is no image, or values are NaN, Inf or outside [−1, 1].
    """
    accepted = array.dtype == np.uint8 or (floats and array.dtype.kind == "f")
    if not accepted or array.ndim not in (3, 4) or len(array) == 0:
        remedy = "write uint8 N×H×W×C, N ≥ 1" + (", or floats in [-1, 1]" if floats else "")
        raise ConfigError(f"{where} contains images as {array.dtype} {array.shape}: {remedy}")
    images: NDArray[np.uint8] | NDArray[np.float32] = array[..., None] if array.ndim == 3 else array
    if images.dtype != np.uint8:
        images = images.astype(np.float32)
        refuse_nan(torch.from_numpy(images), of=f"the pixels in {where}")
        if (largest := np.abs(images).max()) > 1:
            raise ConfigError(f"{where} contains floats up to {largest:.3g}: scale them to [-1, 1], or write uint8")
    return images


def tensor_of(array: np.ndarray, name: str, where: str) -> torch.Tensor:
    """Return an array as a tensor. Raises ConfigError: it holds no numbers."""
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise ConfigError(f"{where} holds {name} as {array.dtype} {array.shape}: write integers or floats")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def are_labels(array: np.ndarray | None, count: int) -> TypeGuard[np.ndarray]:
    """Return whether an array holds the class labels of `count` images: integers (count,) from 0 to MOST_CLASSES − 1."""
    if array is None or array.shape != (count,) or array.dtype.kind not in "iu":
        return False
    return bool(array.min(initial=0) >= 0 and array.max(initial=0) < MOST_CLASSES)


def labels_of_npz(array: np.ndarray | None, count: int, where: str) -> Index | None:
    """Return labels, int64 (count,), or None if `array` is None. Raises ConfigError if the array does not contain labels."""
    if array is None:
        return None
    if not are_labels(array, count):
        raise ConfigError(
            f"{where} contains labels as {array.dtype} {array.shape}: write N integers from 0 to {MOST_CLASSES - 1:,}"
        )
    return array.astype(np.int64)
