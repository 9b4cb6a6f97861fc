"""Images that a task of sample.py starts from, and the data of its condition."""

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
    """Return images float32 (N, C, H, W) in [−1, 1], and the labels of an .npz file that has them.

    Args:
        key: the option that names `path`.
        path: as in `ImageSet`.
        shape: (C, H, W) of each image.

    Raises:
        ConfigError: as `ImageSet`, or a color file where C = 1.
    """
    remedy = f"resize it to {shape[1]}×{shape[2]}"
    source = ImageSet(path, shape, key=key, owner="the checkpoint", remedy=remedy, minimum=1, refuse_color=True)
    images = source.block(range(source.count))
    labels = None if source.labels is None else source.labels.tolist()
    return images if images.is_floating_point() else to_float(images), labels


def read_one(key: str, path: Path, shape: tuple[int, int, int]) -> Tensor:
    """Return one image, float32 (1, C, H, W) in [−1, 1]. Raises ConfigError: as `read`, or several images."""
    images, _ = read(key, path, shape)
    if len(images) != 1:
        raise ConfigError(f"{key}={path} holds {len(images)} images: name one of them")
    return images


def read_condition(source: str | None, shape: tuple[int, int, int], condition: Condition) -> dict[str, Any] | None:
    """Read `condition_data=` as a batch: "image", and the further arrays of an .npz file by name.

    Args:
        source: an image file, a folder or .zip file of them, or an .npz file of images (arr_0) and further arrays. None
            returns None.
        shape: (C, H, W) of the checkpoint's images. For `LowResolution`, images of the lower resolution are accepted too.
        condition: the checkpoint's.

    Raises:
        ConfigError: the condition takes no data, no such path, or as `read`.
    """
    if source is None:
        return None
    if not condition.of_data:
        raise ConfigError(
            "condition_data= is for conditions made of data, and this checkpoint has "
            f"condition={option_name(condition)}: leave it out"
        )
    path = Path(source)
    if not path.exists():
        raise ConfigError(f"condition_data={path}: there is no such file or folder")
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
