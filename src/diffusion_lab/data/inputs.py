"""Images that an option names: a file that Pillow reads, a folder of them, or an .npz; of the checkpoint's shape, unchanged."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from diffusion_lab.conditions import Condition, LowResolution, option_name
from diffusion_lab.data.decode import Decoder, Files
from diffusion_lab.data.images import to_float
from diffusion_lab.errors import ConfigError
from diffusion_lab.io import read_npz


def read(key: str, path: Path, shape: tuple[int, int, int]) -> tuple[Tensor, list[int] | None]:
    """Images float32 (N, C, H, W) in [−1, 1], and the labels of an .npz that says them.

    Args:
        key: the option that named it.
        path: a file, a folder or .zip of them, or an .npz of arr_0: uint8 N×H×W×C (or N×H×W), or floats in [−1, 1].
        shape: (C, H, W) that each must have.

    Raises:
        ValueError: nothing there, unreadable, another size, colour where C = 1.
    """
    if path.suffix == ".npz":
        return _read_npz(key, path, shape)
    if path.is_dir() or path.suffix == ".zip":
        found = Files(path)
        pictures = [_decode(key, name, found.read(name), shape) for name in found.names]
    else:
        try:
            pictures = [_decode(key, str(path), path.read_bytes(), shape)]
        except OSError as error:
            raise ConfigError(f"{key}={path} cannot be read ({error}): name another file") from None
    return to_float(np.stack(pictures)), None


def read_one(key: str, path: Path, shape: tuple[int, int, int]) -> Tensor:
    """One image, float32 (1, C, H, W) in [−1, 1]. ValueError: as `read`, or several."""
    images, _ = read(key, path, shape)
    if len(images) != 1:
        raise ConfigError(f"{key}={path} holds {len(images)} images: name one of them")
    return images


def read_condition(stated: str | None, shape: tuple[int, int, int], condition: Condition) -> dict[str, Any] | None:
    """Read `condition_data=` as the batch that the condition is made of: "image", and the further arrays of an .npz by name.

    Args:
        stated: an image file, a folder or .zip of them, or an .npz of images (arr_0) and further arrays; None returns None.
        shape: (C, H, W) of the checkpoint's images. For `LowResolution` images of the lower resolution are accepted as well.
        condition: the checkpoint's.

    Raises:
        ConfigError: a condition that is not made of data, no such path, or as `read`.
    """
    if stated is None:
        return None
    if not condition.of_data:
        raise ConfigError(
            "condition_data= is for conditions made of data, and this checkpoint has "
            f"condition={option_name(condition)}: leave it out"
        )
    path = Path(stated)
    if not path.exists():
        raise ConfigError(f"condition_data={path}: there is no such file or folder")
    arrays = read_npz(path, "condition_data") if path.suffix == ".npz" else {}
    batch = {name: torch.from_numpy(array) for name, array in arrays.items() if name not in ("arr_0", "arr_1")}
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


def _decode(key: str, name: str, data: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """The bytes of a file → uint8 (C, H, W)."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image)
            size, colours = (upright.height, upright.width), np.asarray(upright.convert("RGB"))
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files
        reason = " ".join(str(error).split())
        raise ConfigError(f"{key}={name} cannot be read as an image ({reason}): name a PNG, a JPEG, …") from None
    if size != shape[1:]:
        _refuse_size(key, name, size, shape[1:])
    if shape[0] == 1 and (colours != colours[..., :1]).any():
        raise ConfigError(f"{key}={name} is in colour where the checkpoint's images are grey: save it in grey")
    return Decoder(shape, resize="none", centre=False)(data, name)


def _read_npz(key: str, path: Path, shape: tuple[int, int, int]) -> tuple[Tensor, list[int] | None]:
    found = read_npz(path, key)
    images, labels = found.get("arr_0", np.zeros(0)), found.get("arr_1")
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or not len(images) or not (images.dtype == np.uint8 or images.dtype.kind == "f"):
        raise ConfigError(f"{key}={path} holds no images in arr_0: write uint8 N×H×W×C, or floats in [-1, 1]")
    if images.shape[1:] != (*shape[1:], shape[0]):
        _refuse_size(key, f"{path}", images.shape[1:], (*shape[1:], shape[0]))
    whole = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    whole = to_float(whole) if images.dtype == np.uint8 else whole.float()
    if not bool((whole.abs() <= 1).all()):  # NaN neither
        raise ConfigError(f"{key}={path} holds floats outside [-1, 1], or NaN: scale it, or write uint8")
    fits = labels is not None and labels.shape == (len(images),) and labels.dtype.kind in "iu"
    return whole, labels.tolist() if fits and labels is not None else None


def _refuse_size(key: str, name: str, size: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    has, needs = ("×".join(map(str, s)) for s in (size, wanted))
    raise ConfigError(f"{key}={name} is {has} where the checkpoint's images are {needs}: resize it to {needs}")
