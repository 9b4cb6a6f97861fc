"""What a data set is to the rest of the package."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diffusion_lab.data.images import Examples, Index


@dataclass(frozen=True)
class Dataset:
    """All images of a set.

    examples: every image, all parts together. class_names, attribute_names: empty without labels, attributes.
    official: "val" and "test" → int64 indices, where the authors of the set fixed them.
    """

    examples: Examples
    class_names: tuple[str, ...] = ()
    attribute_names: tuple[str, ...] = ()
    official: Mapping[str, Index] = field(default_factory=dict)


class Source(ABC):
    """A data set that can be fetched and opened."""

    @abstractmethod
    def load(self, root: Path, shape: tuple[int, int, int], *, download: bool) -> Dataset:
        """Opens the set, after fetching and decoding what is missing.

        Args:
            root: the folder of data sets; for one's own images, these.
            shape: (C, H, W) that image files are decoded to; sets of arrays have a shape of their own.
            download: fetch missing files.

        Raises:
            ValueError: files are missing, damaged or cannot be fetched.
        """


def train_and_test(
    images: tuple[np.ndarray, np.ndarray], labels: tuple[np.ndarray, np.ndarray] | None, class_names: tuple[str, ...]
) -> Dataset:
    """A set from its training and its official test part: images uint8 (N, C, H, W), labels integers (N,)."""
    test = np.arange(len(images[1])) + len(images[0])
    joined = None if labels is None else np.concatenate(labels).astype(np.int64)
    return Dataset(Examples(np.concatenate(images), joined), class_names, official={"test": test})
