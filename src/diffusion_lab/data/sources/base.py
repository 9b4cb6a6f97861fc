"""Base class of data sets."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diffusion_lab.data.images import Examples, Index


@dataclass(frozen=True)
class Dataset:
    """An opened data set.

    Attributes:
        examples: the examples of all parts.
        class_names, attribute_names: names of the classes and attributes; empty without labels or attributes.
        official: indices of the published parts "val" and "test", int64.
    """

    examples: Examples
    class_names: tuple[str, ...] = ()
    attribute_names: tuple[str, ...] = ()
    official: Mapping[str, Index] = field(default_factory=dict)


class Source(ABC):
    """A data set that can be downloaded and opened.

    The public attributes are the options of the data set. With the class name, they identify cached reference statistics.
    """

    _only_reads = False

    def only_read_folders(self) -> None:
        """Write to no folder that the options name, since a file named them: decoded images go to the user's cache folder."""
        self._only_reads = True

    @abstractmethod
    def load(self, root: Path, shape: tuple[int, int, int], *, download: bool) -> Dataset:
        """Open the data set, after downloading missing files and decoding images that are not cached.

        Args:
            root: folder of data sets, or the folder or file of the user's images.
            shape: (C, H, W) to which image files are decoded. Data sets of arrays have a fixed shape and ignore it.
            download: whether to download missing files.

        Raises:
            ConfigError: if files are missing or damaged, or cannot be downloaded.
        """


def train_and_test(
    images: tuple[np.ndarray, np.ndarray], labels: tuple[np.ndarray, np.ndarray] | None, class_names: tuple[str, ...]
) -> Dataset:
    """Return a data set with a training and an official test part: images uint8 (N, C, H, W), labels integers (N,)."""
    test = np.arange(len(images[1])) + len(images[0])
    all_labels = None if labels is None else np.concatenate(labels).astype(np.int64)
    return Dataset(Examples(np.concatenate(images), all_labels), class_names, official={"test": test})
