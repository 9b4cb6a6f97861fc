"""MNIST and Fashion-MNIST: 60,000 + 10,000 grey images of 28×28, in torchvision's layout `ROOT/MNIST/raw`.

The archives are read as they are, so that the folder may be read-only.
"""

import gzip
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np

from diffusion_lab.data.download import Remote, fetch
from diffusion_lab.data.sources.base import Dataset, Source, train_and_test
from diffusion_lab.errors import ConfigError


class _IdxSource(Source):
    """A set of four idx files, each plain or with `.gz`; `name` is torchvision's class and the folder."""

    name: ClassVar[str]
    class_names: ClassVar[tuple[str, ...]]

    def load(self, root: Path, shape: tuple[int, int, int], *, download: bool) -> Dataset:
        """See `Source.load`; `shape` does not matter."""
        folder = root / self.name / "raw"
        parts = [f"{part}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1") for part in ("train", "t10k")]
        missing = [part for part in parts if not _find(folder, part).exists()]
        if missing:
            fetch(folder, self._remotes(missing), download=download)
        train, test, train_labels, test_labels = (_read(folder, part) for part in parts)
        for images, labels in ((train, train_labels), (test, test_labels)):
            if len(images) != len(labels):
                raise ConfigError(
                    f"{folder} holds {len(images)} images with {len(labels)} labels: delete it and run again"
                )
        return train_and_test((train[:, None], test[:, None]), (train_labels, test_labels), self.class_names)

    def _remotes(self, parts: list[str]) -> list[Remote]:
        from torchvision import datasets

        published = getattr(datasets, self.name)
        sums = dict(published.resources)
        names = [f"{part}.gz" for part in parts]
        return [Remote(name, tuple(mirror + name for mirror in published.mirrors), sums[name]) for name in names]


class MNIST(_IdxSource):
    """Handwritten digits (LeCun et al. 1998)."""

    name = "MNIST"
    class_names = tuple("0123456789")


class FashionMNIST(_IdxSource):
    """Articles of clothing (Xiao et al. 2017)."""

    name = "FashionMNIST"
    class_names = (
        *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    )


def _find(folder: Path, part: str) -> Path:
    """Where a file lies or, if it does not, belongs."""
    return folder / part if (folder / part).exists() else folder / f"{part}.gz"


def _read(folder: Path, part: str) -> np.ndarray:
    """An idx file: two zero bytes, type 8 (uint8), the number of axes, their lengths as big-endian int32, the bytes."""
    path = _find(folder, part)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        axes = data[3]
        if data[:3] != b"\0\0\x08":
            raise ConfigError("no idx file of bytes")
        lengths = np.frombuffer(data, ">i4", axes, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(lengths)
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise ConfigError(f"{path.absolute()} is damaged ({error}): delete it and run again") from error
