"""CIFAR-10: 50,000 + 10,000 color images of 32×32, in torchvision's layout.

Either the unpacked `ROOT/cifar-10-batches-py` or the archive `ROOT/cifar-10-python.tar.gz` is read; nothing is unpacked.
"""

import io
import pickle
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lab.data.download import Remote, fetch
from diffusion_lab.data.sources.base import Dataset, Source, train_and_test
from diffusion_lab.errors import ConfigError

HARMLESS = ("numpy._core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype", "_codecs.encode")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class CIFAR10(Source):
    """CIFAR-10 (Krizhevsky 2009).

    torchvision supplies address, checksum and the names of files. Its data set class is not used, because it reads the
    batches with `pickle.load`, which runs whatever code a file contains; see `_BatchUnpickler`.
    """

    def load(self, root: Path, shape: tuple[int, int, int], *, download: bool) -> Dataset:
        """See `Source.load`; `shape` is not used."""
        from torchvision.datasets import CIFAR10 as Published  # late: other data sets do not need it

        folder, archive = root / Published.base_folder, root / Published.filename
        names = [name for name, _ in (*Published.train_list, *Published.test_list)]
        files: Mapping[str, bytes]
        if folder.is_dir():
            if missing := [name for name in names if not (folder / name).exists()]:
                raise ConfigError(
                    f"{folder.absolute()} lacks {', '.join(missing)}: add them, or delete the folder and run again"
                )
            source, files = folder, {name: (folder / name).read_bytes() for name in names}
        else:
            if not archive.exists():
                fetch(root, [Remote(archive.name, (Published.url,), Published.tgz_md5)], download=download)
            source, files = archive, _read_members(archive, names)
        try:
            batches = [_BatchUnpickler(io.BytesIO(files[name]), encoding="latin1").load() for name in names]
            images = [np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32) for batch in batches]
            labels = [np.asarray(batch["labels"], np.int64) for batch in batches]
        except (pickle.UnpicklingError, EOFError, KeyError, ValueError) as error:
            raise ConfigError(f"{source.absolute()} is damaged ({error}): delete it and run again") from error
        train, train_labels = np.concatenate(images[:-1]), np.concatenate(labels[:-1])
        return train_and_test((train, images[-1]), (train_labels, labels[-1]), CLASSES)


def _read_members(archive: Path, names: Sequence[str]) -> Mapping[str, bytes]:
    try:
        with tarfile.open(archive) as tar:
            members = {Path(member.name).name: member for member in tar.getmembers() if member.isfile()}
            return {name: tar.extractfile(members[name]).read() for name in names}  # type: ignore[union-attr]
    except (OSError, EOFError, KeyError, tarfile.TarError, zlib.error) as error:
        raise ConfigError(f"{archive.absolute()} is damaged ({error}): delete it and run again") from error


class _BatchUnpickler(pickle.Unpickler):
    """Unpickle the arrays and lists of a batch, and refuse every other class.

    A pickle may call any function. `pickle.load`, and torchvision through it, would run the code of a manipulated file.
    """

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")  # its name before NumPy 2
        if f"{module}.{name}" in HARMLESS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")
