"""MNIST and Fashion-MNIST: 60,000 + 10,000 grayscale images of 28×28, in torchvision's layout `ROOT/MNIST/raw`."""

import gzip
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import Tensor

from diffusion_lab.data.download import Remote, fetch
from diffusion_lab.data.sources.base import Dataset, Source, train_and_test
from diffusion_lab.errors import ConfigError, DamagedFileError
from diffusion_lab.io import read_bytes, require_file

MOST_BYTES = 128 << 20  # of an idx file: the largest published one has 47 million


class _IdxSource(Source):
    """A data set of torchvision in four idx files, unpacked or with `.gz`.

    URLs, checksums and parser are those of torchvision. Its data set class is not used, because it needs unpacked files in the
    folder. Here archives are unpacked to a temporary folder, so that the folder may be read-only.

    Attributes:
        name: name of torchvision's class and of the folder.
        class_names: names of the classes.
    """

    name: ClassVar[str]
    class_names: ClassVar[tuple[str, ...]]

    def load(self, root: Path, shape: tuple[int, int, int], *, download: bool) -> Dataset:
        """See `Source.load`; `shape` is not used."""
        from torchvision import datasets  # late: other data sets do not need it
        from torchvision.datasets.mnist import read_image_file, read_label_file

        published, folder = getattr(datasets, self.name), root / self.name / "raw"
        missing = [
            Remote(archive, tuple(mirror + archive for mirror in published.mirrors), md5)
            for archive, md5 in published.resources
            if not _locate(folder, archive.removesuffix(".gz")).exists()
        ]
        if missing:
            fetch(folder, missing, download=download)
        images, labels = [], []
        for part in ("train", "t10k"):
            images.append(_read(_locate(folder, f"{part}-images-idx3-ubyte"), read_image_file)[:, None])
            labels.append(_read(_locate(folder, f"{part}-labels-idx1-ubyte"), read_label_file))
            if not ((labels[-1] >= 0) & (labels[-1] < len(self.class_names))).all():
                raise ConfigError(f"{folder} holds labels beyond {len(self.class_names) - 1}: delete it and run again")
            if len(images[-1]) != len(labels[-1]):
                raise ConfigError(
                    f"{folder} has {len(images[-1])} images, but {len(labels[-1])} labels: delete it and run again"
                )
        return train_and_test((images[0], images[1]), (labels[0], labels[1]), self.class_names)


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


def _locate(folder: Path, name: str) -> Path:
    """Return the path of the unpacked idx file if it exists, otherwise that of its `.gz` archive."""
    return folder / name if (folder / name).exists() else folder / f"{name}.gz"


def _read(path: Path, parse: Callable[[str], Tensor]) -> np.ndarray:
    """Parse an idx file, unpacked or `.gz`.

    Raises:
        ConfigError: if the file is damaged, or cannot be read or unpacked.
    """
    require_file(path)
    try:
        if path.suffix != ".gz":
            read_bytes(path, MOST_BYTES)
            return parse(str(path)).numpy()
        with tempfile.TemporaryDirectory() as temporary, gzip.open(path) as packed:
            content = packed.read(MOST_BYTES + 1)
            if len(content) > MOST_BYTES:
                raise DamagedFileError(f"it unpacks to more than {MOST_BYTES / 2**20:,.0f} MiB")
            plain = Path(temporary) / "idx"
            plain.write_bytes(content)
            return parse(str(plain)).numpy()
    except ConfigError:
        raise
    except gzip.BadGzipFile as error:
        damage: Exception = error
    except OSError as error:
        raise ConfigError(
            f"{path.absolute()} cannot be read ({error}): check its permissions, and free disk space in {tempfile.gettempdir()}"
        ) from error
    except Exception as error:  # torchvision's parser and zlib raise nearly anything on damaged files
        damage = error
    reason = " ".join(str(damage).split()) or "no idx file of bytes"
    raise ConfigError(f"{path.absolute()} is damaged ({reason}): delete it and run again") from damage
