"""CIFAR-10: 50,000 + 10,000 color images of 32×32, in torchvision's layout.

Either the unpacked `ROOT/cifar-10-batches-py` or the archive `ROOT/cifar-10-python.tar.gz` is read, without unpacking it.
"""

import io
import pickle
import pickletools
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_lab.data.download import Remote, fetch
from diffusion_lab.data.sources.base import Dataset, Source, train_and_test
from diffusion_lab.errors import ConfigError, DamagedFileError
from diffusion_lab.io import read_bytes, require_file

HARMLESS = ("numpy.dtype", "_codecs.encode")
MOST_BYTES = 512 << 20  # of the unpacked archive: the published one has 186 million
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class CIFAR10(Source):
    """CIFAR-10 (Krizhevsky 2009).

    URL, checksum and file names are those of torchvision. Its data set class is not used, because it reads the batches with
    `pickle.load`, which executes code in the file; see `_BatchUnpickler`.
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
                    f"{', '.join(missing)} missing in {folder.absolute()}: add the files, or delete the folder and run again"
                )
            source, files = folder, {name: read_bytes(folder / name, MOST_BYTES) for name in names}
        else:
            if not archive.exists():
                fetch(root, [Remote(archive.name, (Published.url,), Published.tgz_md5)], download=download)
            source, files = archive, _read_members(archive, names)
        try:
            batches = [_unpickled(files[name]) for name in names]
            images = [np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32) for batch in batches]
            labels = [np.asarray(batch["labels"], np.int64) for batch in batches]
            if any(
                len(a) != len(b) or not ((b >= 0) & (b < len(CLASSES))).all()
                for a, b in zip(images, labels, strict=True)
            ):
                raise DamagedFileError("its labels do not fit its images")
        except Exception as error:  # a damaged pickle raises nearly anything
            raise ConfigError(f"{source.absolute()} is damaged ({error}): delete it and run again") from error
        train, train_labels = np.concatenate(images[:-1]), np.concatenate(labels[:-1])
        return train_and_test((train, images[-1]), (train_labels, labels[-1]), CLASSES)


def _read_members(archive: Path, names: Sequence[str]) -> Mapping[str, bytes]:
    require_file(archive)
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                # Checked before tar unpacks it, to read or to pass over
                if member.offset_data + member.size > MOST_BYTES:
                    raise tarfile.TarError(f"it unpacks to more than {MOST_BYTES / 2**20:,.0f} MiB")
                if member.isfile() and (name := Path(member.name).name) in names:
                    contents[name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    except Exception as error:  # tarfile and zlib raise nearly anything on damaged files
        raise ConfigError(f"{archive.absolute()} is damaged ({error}): delete it and run again") from error
    if missing := [name for name in names if name not in contents]:
        raise ConfigError(f"{archive.absolute()} is damaged (no {missing[0]}): delete it and run again")
    return contents


def _unpickled(data: bytes) -> Any:
    for code, argument, _ in pickletools.genops(data):
        # A table of so many pointers would be allocated
        if code.name == "LONG_BINPUT" and int(argument or 0) > len(data):
            raise pickle.UnpicklingError(f"it numbers its values from {argument:,}")
    return _BatchUnpickler(io.BytesIO(data), encoding="latin1").load()


def _empty(kind: object, shape: object, dtype: object) -> np.ndarray:
    """Return the array that a pickle fills next: NumPy pickles every array as one without elements and its state."""
    if shape != (0,):
        raise pickle.UnpicklingError(f"it declares an array {shape}")
    return np.empty(0, np.uint8)


class _BatchUnpickler(pickle.Unpickler):
    """Unpickle the arrays and lists of a batch, and raise an error for every other class.

    A pickle may call any function, so that `pickle.load` (also in torchvision) executes the code of a manipulated file.
    """

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")  # its name before NumPy 2
        if f"{module}.{name}" == "numpy._core.multiarray._reconstruct":
            return _empty
        if f"{module}.{name}" == "numpy.ndarray":
            return "numpy.ndarray"  # only `_empty` receives it; called with a shape it would allocate it
        if f"{module}.{name}" in HARMLESS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")
