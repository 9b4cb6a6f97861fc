"""Convert uint8 images to [−1, 1] (the inverse is `pictures.to_uint8`), and read batches of examples from arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_lab.errors import ConfigError

Index = NDArray[np.int64]


def to_float(images: NDArray[np.uint8] | Tensor) -> Tensor:
    """Convert uint8 of any shape to float32 in [−1, 1]: level k becomes k/127.5 − 1.

    It is computed as (2k − 255)/255, which rounds once: every level is the nearest float32, and k and 255 − k are exact
    negatives.
    """
    return torch.as_tensor(images).to(torch.float32).mul_(2).sub_(255).div_(255)


def refuse_nan(values: Tensor, first: int = 0, of: str = "the features") -> None:
    """Raise ConfigError if values (B, …) contain NaN or Inf. The message contains the image indices, starting at `first`."""
    finite = values.flatten(1).isfinite().all(1)
    if not bool(finite.all()):
        bad = [int(i) + first for i in (~finite).nonzero()[:, 0]]
        names = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
        raise ConfigError(
            f"{of} of image {names} contain NaN or Inf ({len(bad)} of {len(values)} images): remove these images, or use an "
            "earlier checkpoint of the run"
        )


class Rows:
    """A lazy selection of rows of an array. Rows are copied when they are indexed.

    In contrast, `array[index]` of a memory map reads all rows at once. `shape`, `dtype`, `len`, and indexing by an integer, a
    slice or an integer array are supported; `np.asarray` copies all rows.

    Args:
        array: the array (N, …).
        index: indices of the selected rows, int64 (n,).
    """

    def __init__(self, array: NDArray[np.uint8], index: Index) -> None:
        self.array, self.index = array, index
        self.shape, self.dtype = (len(index), *array.shape[1:]), array.dtype

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: Any) -> NDArray[np.uint8]:
        return self.array[self.index[key]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self.array[self.index], dtype)


@dataclass(frozen=True)
class Examples:
    """Images with labels, attributes and additional arrays.

    Attributes:
        images: images, uint8 (N, C, H, W), an array or `Rows`.
        labels: labels, int64 (N,), or None.
        attributes: attributes, int8 (N, A) with values −1 (no) and 1 (yes), or None.
        more: additional arrays with N rows, by their name in a batch. Arrays with four dimensions are images, which are mirrored
            together with the image.
    """

    images: NDArray[np.uint8] | Rows
    labels: Index | None = None
    attributes: NDArray[np.int8] | None = None
    more: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def select(self, index: Index) -> "Examples":
        """Return the examples with the indices `index`, int64 (n,), in this order. Images are not copied."""
        images = self.images
        rows = Rows(images.array, images.index[index]) if isinstance(images, Rows) else Rows(images, index)
        labels = None if self.labels is None else self.labels[index]
        attributes = None if self.attributes is None else self.attributes[index]
        return Examples(rows, labels, attributes, {name: array[index] for name, array in self.more.items()})

    def take(self, index: Index, flip: NDArray[np.bool_] | None = None) -> dict[str, Tensor]:
        """Return a batch.

        Args:
            index: indices of the examples, int64 (n,).
            flip: whether to mirror each image left to right, bool (n,); None for no image.

        Returns:
            "image" float32 (n, C, H, W) in [−1, 1]; "label" int64 (n,) and "attributes" float32 (n, A) with values ±1 if they
            exist; and each array of `more` by its name.
        """
        images = self.images[index]
        if flip is not None:
            images[flip] = images[flip, ..., ::-1]
        batch = {"image": to_float(images)}
        if self.labels is not None:
            batch["label"] = torch.from_numpy(self.labels[index])
        if self.attributes is not None:
            batch["attributes"] = torch.from_numpy(self.attributes[index]).float()
        for name, array in self.more.items():
            rows = array[index]
            if flip is not None and rows.ndim == 4:
                rows[flip] = rows[flip, ..., ::-1]
            batch[name] = torch.from_numpy(rows)
        return batch
