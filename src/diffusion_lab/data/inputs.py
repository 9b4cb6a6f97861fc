"""Read the input images of the tasks of sample.py, and the data of a condition."""

from pathlib import Path
from typing import Any

from torch import Tensor

from diffusion_lab.conditions import Condition, LowResolution, option_name
from diffusion_lab.data.image_set import ImageSet
from diffusion_lab.data.images import to_float
from diffusion_lab.data.npz import tensor_of
from diffusion_lab.errors import ConfigError
from diffusion_lab.io import read_npz


def read(key: str, path: Path, shape: tuple[int, int, int]) -> tuple[Tensor, list[int] | None]:
    """Return images float32 (N, C, H, W) in [−1, 1], and the labels of an .npz file, or None.

    Args:
        key: the option that names `path`, for error messages.
        path: a path as for `ImageSet`.
        shape: (C, H, W) of each image.

    Raises:
        ConfigError: as for `ImageSet`, and if a file is in color but C = 1.
    """
    remedy = f"resize it to {shape[1]}×{shape[2]}"
    source = ImageSet(path, shape, key=key, owner="the checkpoint", remedy=remedy, minimum=1, refuse_color=True)
    images = source.block(range(source.count))
    labels = None if source.labels is None else source.labels.tolist()
    return images if images.is_floating_point() else to_float(images), labels


def read_one(key: str, path: Path, shape: tuple[int, int, int]) -> Tensor:
    """Return one image, float32 (1, C, H, W) in [−1, 1]. Raises ConfigError as `read` does, and if there are several images."""
    images, _ = read(key, path, shape)
    if len(images) != 1:
        raise ConfigError(f"{key}={path} has {len(images)} images, but one is needed: name one of them")
    return images


def read_condition(source: str | None, shape: tuple[int, int, int], condition: Condition) -> dict[str, Any] | None:
    """Read `condition_data=` as a batch: "image", and the additional arrays of an .npz file by name.

    Args:
        source: an image file, a folder or .zip file of image files, an .npz file with images (arr_0) and additional arrays, or
            None.
        shape: (C, H, W) of the checkpoint's images. For `LowResolution`, images of the lower resolution are accepted as well.
        condition: the condition of the checkpoint.

    Returns:
        The batch; None if `source` is None.

    Raises:
        ConfigError: if the condition does not depend on data, the path does not exist, and as for `read`.
    """
    if source is None:
        return None
    if not condition.of_data:
        raise ConfigError(
            "condition_data= needs a condition that depends on data, but this checkpoint has "
            f"condition={option_name(condition)}: remove it"
        )
    path = Path(source)
    if not path.exists():
        raise ConfigError(f"condition_data={path}: no such file or folder")
    arrays = read_npz(path, "condition_data") if path.suffix == ".npz" else {}
    batch = {
        name: tensor_of(array, name, f"condition_data={path}")
        for name, array in arrays.items()
        if name not in ("arr_0", "arr_1")
    }
    if "arr_0" in arrays or path.suffix != ".npz":
        batch["image"] = _images_or_smaller(path, shape, condition)
    return batch


def _images_or_smaller(path: Path, shape: tuple[int, int, int], condition: Condition) -> Tensor:
    try:
        return read("condition_data", path, shape)[0]
    except ConfigError as error:
        if not isinstance(condition, LowResolution):
            raise
        factor = condition.factor
        try:
            small, _ = read("condition_data", path, (shape[0], shape[1] // factor, shape[2] // factor))
        except ConfigError:
            raise error from None
        return small.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
