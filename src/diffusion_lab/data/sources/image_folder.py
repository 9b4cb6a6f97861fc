"""Images of the user: a folder, a .zip file, or an .npz file of arrays."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffusion_lab.data.cache import cache_folders, decoded
from diffusion_lab.data.decode import Decoder, Files
from diffusion_lab.data.images import Examples, Index
from diffusion_lab.data.npz import images_of_npz, labels_of_npz
from diffusion_lab.data.sources.base import Dataset, Source, train_and_test
from diffusion_lab.errors import ConfigError
from diffusion_lab.io import read_npz

PARTS = {"train": "train", "val": "val", "valid": "val", "test": "test"}


class ImageFolder(Source):
    """All images in `root` and nested folders, grayscale or color, of any size.

    Common parent folders are skipped. The folders on the first remaining level are the classes. If they are `train` and `test`
    or `val`, they are the official parts, and the classes are the folders on the next level. `root` may also be a .zip file of
    such folders, or an .npz file of arrays that are not modified: `arr_0` uint8 (N, H, W, C) and, for labels, `arr_1` integers
    (N,), as written by sample.py; or `train_images`, `train_labels`, `test_images`, `test_labels`.

    Args:
        resize: "shorter" scales the image to the smallest size that covers H×W, "exact" scales it to H×W and ignores the aspect
            ratio, "none" does not scale it.
        crop: "center" crops the central H×W after resizing; [top, left, height, width] crops this box before resizing, and the
            center afterwards; "none" does not crop.
        filter: Pillow's antialiased resampling filter: lanczos, bicubic, bilinear, box, hamming or nearest.
        cache: folder of decoded images; None for `.cache` in the folder of the images, or the user's cache folder if that is
            read-only.

    Raises:
        ConfigError: if an option is unknown.
    """

    def __init__(
        self,
        resize: str = "shorter",
        crop: str | Sequence[int] | None = "center",
        filter: str = "lanczos",
        cache: str | None = None,
    ) -> None:
        if isinstance(crop, str) and crop not in ("center", "none"):
            raise ConfigError(f"data.source.crop={crop}: write center, none or [top,left,height,width]")
        self.box = None if isinstance(crop, str) else crop
        self.resize, self.center, self.filter = resize, crop not in ("none", None), filter
        self.cache = cache
        self._decoder((3, 1, 1))  # check the options early

    def _decoder(self, shape: tuple[int, int, int]) -> Decoder:
        return Decoder(shape, self.box, self.resize, self.center, self.filter)

    def load(self, root: Path, shape: tuple[int, int, int], *, download: bool) -> Dataset:
        """See `Source.load`. No file is downloaded."""
        if not root.exists():
            raise ConfigError(
                f"{root.absolute()} does not exist: write data.root=FOLDER with your images, or a .zip or .npz file"
            )
        if root.suffix == ".npz":
            return _read_npz(root)
        files = Files(root)
        labels, class_names, official = _labels_and_parts([name.split("/") for name in files.names])
        folders = cache_folders(self.cache, root if root.is_dir() else root.parent, self._only_reads)
        return Dataset(Examples(decoded(files, self._decoder(shape), *folders), labels), class_names, official=official)


def _labels_and_parts(paths: list[list[str]]) -> tuple[Index | None, tuple[str, ...], dict[str, Index]]:
    """Return labels, class names and official parts of images. A path is a list of the names of folders and file."""
    paths = _below_common(paths)
    official = {}
    if {"train"} < {path[0] for path in paths} <= set(PARTS):
        part = np.array([PARTS[path[0]] for path in paths])
        official = {str(name): np.flatnonzero(part == name) for name in np.unique(part) if name != "train"}
        paths = _below_common([path[1:] for path in paths])
    first = sorted({path[0] for path in paths})
    if len(first) == 1 or any(len(path) == 1 for path in paths):
        return None, (), official
    number = {name: i for i, name in enumerate(first)}
    return np.array([number[path[0]] for path in paths]), tuple(first), official


def _below_common(paths: list[list[str]]) -> list[list[str]]:
    while all(len(path) > 1 for path in paths) and len({path[0] for path in paths}) == 1:
        paths = [path[1:] for path in paths]
    return paths


def _read_npz(path: Path) -> Dataset:
    arrays = read_npz(path)
    if "arr_0" in arrays:
        images, labels = _read_part(path, arrays, "arr_0", "arr_1")
        return Dataset(Examples(images, labels), _numbers(labels))
    if "train_images" in arrays and "test_images" in arrays:
        train, train_labels = _read_part(path, arrays, "train_images", "train_labels")
        test, test_labels = _read_part(path, arrays, "test_images", "test_labels")
        if train_labels is None or test_labels is None:
            return train_and_test((train, test), None, ())
        names = _numbers(np.concatenate([train_labels, test_labels]))
        return train_and_test((train, test), (train_labels, test_labels), names)
    raise ConfigError(
        f"{path.absolute()} contains {', '.join(arrays)}: name the images arr_0, or train_images and test_images"
    )


def _read_part(
    path: Path, arrays: Mapping[str, np.ndarray], images: str, labels: str
) -> tuple[NDArray[np.uint8], Index | None]:
    """Return the images named `images`, uint8 (N, C, H, W), and the labels named `labels`, int64 (N,)."""
    where = str(path.absolute())
    pixels = images_of_npz(arrays[images], where).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(pixels, np.uint8), labels_of_npz(arrays.get(labels), len(pixels), where)


def _numbers(labels: Index | None) -> tuple[str, ...]:
    return () if labels is None else tuple(str(i) for i in range(int(labels.max()) + 1))
