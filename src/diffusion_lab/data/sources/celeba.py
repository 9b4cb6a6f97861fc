"""CelebA: 202,599 aligned faces of 178×218 with 40 attributes, in torchvision's layout `ROOT/celeba`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffusion_lab.data.cache import cache_folders, decoded
from diffusion_lab.data.decode import Decoder, Files
from diffusion_lab.data.images import Examples
from diffusion_lab.data.sources.base import Dataset, Source
from diffusion_lab.errors import ConfigError, DamagedFileError
from diffusion_lab.io import read_bytes

FOLDER, IMAGES = "celeba", "img_align_celeba"
ATTRIBUTES, PARTITION = "list_attr_celeba.txt", "list_eval_partition.txt"
MOST_BYTES = 64 << 20  # of a table: the published one has 26 million
PARTS = {"val": 1, "test": 2}  # train is 0


class CelebA(Source):
    """CelebA (Liu et al. 2015) with its official train, val and test parts.

    Papers crop the face differently, and FIDs of different crops are not comparable:
    crop=140, the central square (score SDE); crop=178, the full width; crop=[57,25,128,128], the box centered at column 89,
    row 121 (DDIM, Analytic-DPM).

    Args:
        crop: side of the central square in pixels, [top, left, height, width], or None for the whole image; it is resized to
            the image size.
        filter: Pillow's, antialiased: bilinear, bicubic, lanczos, box, hamming or nearest.
        cache: folder of decoded images. None is `ROOT/celeba/.cache`, or the user's cache folder if that is read-only.

    Raises:
        ConfigError: an unknown option.
    """

    def __init__(
        self, crop: int | Sequence[int] | None = 140, filter: str = "bilinear", cache: str | None = None
    ) -> None:
        self.crop = crop
        self.filter, self.cache = filter, cache
        self._decoder((3, 1, 1))  # check the options early

    def _decoder(self, shape: tuple[int, int, int]) -> Decoder:
        return Decoder(shape, box=self.crop, resize="exact", center=False, filter=self.filter)

    def load(self, root: Path, shape: tuple[int, int, int], *, download: bool) -> Dataset:
        """See `Source.load`."""
        folder = root / FOLDER
        _require(folder, download)
        attribute_names, attributes = _read_table(folder / ATTRIBUTES, skip=2)  # a count, the names, then 1 or -1
        _, partition = _read_table(folder / PARTITION, skip=0)
        images = folder / IMAGES
        files = Files(images if images.is_dir() else images.with_suffix(".zip"))
        if not len(files.names) == len(partition) == len(attributes):
            raise ConfigError(
                f"{folder.absolute()} has {len(files.names)} images, {len(partition)} lines of {PARTITION} and "
                f"{len(attributes)} of {ATTRIBUTES}: add the missing images, or replace {IMAGES} by {IMAGES}.zip"
            )
        faces = decoded(files, self._decoder(shape), *cache_folders(self.cache, folder, self._only_reads))
        official = {part: np.flatnonzero(partition[:, 0] == number) for part, number in PARTS.items()}
        return Dataset(
            Examples(faces, attributes=attributes.astype(np.int8)), attribute_names=attribute_names, official=official
        )


def _require(folder: Path, download: bool) -> None:
    """Download missing files from Google Drive, which needs the package gdown and has a quota.

    Raises:
        ConfigError: if files are missing, and `download` is false or the download fails.
    """
    archive = f"{IMAGES}.zip"
    missing = [name for name in (archive, ATTRIBUTES, PARTITION) if not (folder / name).exists()]
    if archive in missing and (folder / IMAGES).is_dir():
        missing.remove(archive)
    if not missing:
        return
    remedy = f"put {', '.join(missing)} (mmlab.ie.cuhk.edu.hk/projects/CelebA.html) into {folder.absolute()}"
    if not download:
        raise ConfigError(f"CelebA is incomplete: {remedy}, or write data.download=true")
    from torchvision.datasets import CelebA as Published
    from torchvision.datasets.utils import download_file_from_google_drive

    published = {name: (drive, md5) for drive, md5, name in Published.file_list}
    for name in missing:
        drive, md5 = published[name]
        part = folder / f"{name}.part"
        try:
            download_file_from_google_drive(drive, folder, part.name, md5)
            part.replace(folder / name)
        except Exception as error:  # errors of gdown, which may not be installed
            reason = " ".join(str(error).split())
            raise ConfigError(f"cannot download {name} ({reason}): {remedy}") from error
        finally:
            part.unlink(missing_ok=True)


def _read_table(path: Path, skip: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Read a table with a name and integers on each line, and sort it by name.

    Args:
        path: the file.
        skip: number of header lines.

    Returns:
        The words of the last header line, and the integers, int64 (N, columns).

    Raises:
        ConfigError: if the file is damaged.
    """
    try:
        lines = read_bytes(path, MOST_BYTES).decode().splitlines()
        header = tuple(lines[skip - 1].split()) if skip else ()
        table = np.array([line.split()[1:] for line in sorted(filter(None, lines[skip:]))], dtype=np.int64)
        if table.ndim != 2 or table.shape[1] != (len(header) or 1):
            raise DamagedFileError(f"it holds {table.shape} integers")
        return header, table
    except (ValueError, IndexError, OverflowError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path.absolute()} is damaged ({error}): delete it and run again") from error
