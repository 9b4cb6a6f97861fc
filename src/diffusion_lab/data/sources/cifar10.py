"""CIFAR-10: 50,000 + 10,000 colour images of 32×32, in torchvision's layout.

Either the unpacked `ROOT/cifar-10-batches-py` or the archive `ROOT/cifar-10-python.tar.gz` is read, as it is.
"""

import io
import pickle
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lab.data.download import Remote, fetch
from diffusion_lab.data.sources.base import Dataset, Source, train_and_test
from diffusion_lab.errors import ConfigError

FOLDER = "cifar-10-batches-py"
ARCHIVE = Remote(
    "cifar-10-python.tar.gz",
    ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
    "c58f30108f718f92721af3b95e74349a",
)
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
HARMLESS = ("numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype", "_codecs.encode")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class CIFAR10(Source):
    """CIFAR-10 (Krizhevsky 2009)."""

    def load(self, root: Path, shape: tuple[int, int, int], *, download: bool) -> Dataset:
        """See `Source.load`; `shape` does not matter."""
        folder, archive = root / FOLDER, root / ARCHIVE.name
        files: Mapping[str, bytes]
        if folder.is_dir():
            if missing := [name for name in BATCHES if not (folder / name).exists()]:
                raise ConfigError(
                    f"{folder.absolute()} lacks {', '.join(missing)}: add them, or delete the folder and run again"
                )
            source, files = folder, {name: (folder / name).read_bytes() for name in BATCHES}
        else:
            if not archive.exists():
                fetch(root, [ARCHIVE], download=download)
            source, files = archive, _unpack(archive)
        try:
            batches = [_Reader(io.BytesIO(files[name]), encoding="latin1").load() for name in BATCHES]
            images = [np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32) for batch in batches]
            labels = [np.asarray(batch["labels"], np.int64) for batch in batches]
        except (pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
            raise ConfigError(f"{source.absolute()} is damaged ({error}): delete it and run again") from error
        train, train_labels = np.concatenate(images[:-1]), np.concatenate(labels[:-1])
        return train_and_test((train, images[-1]), (train_labels, labels[-1]), CLASSES)


def _unpack(archive: Path) -> Mapping[str, bytes]:
    try:
        with tarfile.open(archive) as tar:
            members = {Path(member.name).name: member for member in tar.getmembers() if member.isfile()}
            return {name: tar.extractfile(members[name]).read() for name in BATCHES}  # type: ignore[union-attr]
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
        raise ConfigError(f"{archive.absolute()} is damaged ({error}): delete it and run again") from error


class _Reader(pickle.Unpickler):
    """Reads the arrays and lists of the batches and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")  # its name before NumPy 2
        if f"{module}.{name}" in HARMLESS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
