"""Read images from a path that is given as an option."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_lab.data.image_set import ImageSet
from diffusion_lab.data.inputs import read
from diffusion_lab.data.pictures import to_uint8

from .helpers import RNG, save

SHAPE = (3, 4, 6)


def stored(tmp_path: Path, kind: str) -> tuple[Path, np.ndarray]:
    """Write three random images in the given format; return the path and the pixels (3, 3, 4, 6)."""
    pixels = np.stack([save(tmp_path / "folder" / f"{i}.png", 4, 6) for i in range(3)])
    path = tmp_path / ("folder" if kind == "folder" else f"x.{kind}")
    if kind == "npz":
        np.savez(path, pixels, np.arange(3))
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted((tmp_path / "folder").iterdir()):
                archive.write(file, file.name)
    return path, pixels.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("kind", ["folder", "zip", "npz"])
def test_all_kinds_are_read_alike(tmp_path, kind):
    path, pixels = stored(tmp_path, kind)
    images = ImageSet(path, SHAPE)
    assert images.count == 3
    assert np.array_equal(images.block(range(3)), pixels)
    assert np.array_equal(images.block(range(1, 2)), pixels[1:2])
    assert (images.labels is not None) == (kind == "npz")
    floats, labels = read("image", path, SHAPE)
    assert np.array_equal(to_uint8(floats), pixels)
    assert labels == ([0, 1, 2] if kind == "npz" else None)


def test_the_size_is_that_of_the_upright_image(tmp_path):
    pixels = RNG.integers(0, 256, (6, 4, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    upright = torch.from_numpy(np.rot90(pixels, -1).transpose(2, 0, 1).copy())
    assert torch.equal(ImageSet(tmp_path / "x.png", SHAPE, minimum=1).block(range(1))[0], upright)


def test_color_becomes_gray_or_is_refused(tmp_path):
    save(tmp_path / "x.png", 4, 6)
    assert ImageSet(tmp_path / "x.png", (1, 4, 6), minimum=1).block(range(1)).shape == (1, 1, 4, 6)
    with pytest.raises(ValueError, match=r"image=.*x\.png is in color, but .* save it in grayscale"):
        read("image", tmp_path / "x.png", (1, 4, 6))


@pytest.mark.parametrize("labels", [np.zeros(4, int), np.zeros(3), np.arange(3) - 1])
def test_an_array_that_holds_no_labels_is_ignored(tmp_path, labels):
    np.savez(tmp_path / "x.npz", np.zeros((3, 4, 6, 3), np.uint8), labels)
    assert ImageSet(tmp_path / "x.npz", SHAPE).labels is None


@pytest.mark.parametrize(
    ("array", "remedy"),
    [
        (np.zeros((0, 4, 6, 3), np.uint8), r"images=.*x\.npz contains images as uint8 \(0, 4, 6, 3\): write uint8"),
        (np.zeros((3, 4, 6, 3), int), r"contains images as int64 .* or floats in \[-1, 1\]"),
        (np.full((3, 4, 6, 3), 1.5), r"contains floats up to 1\.5: scale them to \[-1, 1\], or write uint8"),
        (np.full((3, 4, 6, 3), np.inf), r"x\.npz of image 0, 1, 2 contain NaN or Inf"),
        (np.zeros((3, 6, 4, 3), np.uint8), r"is 6×4×3 where the data set's images are 4×6×3: choose another data="),
        (np.zeros((1, 4, 6, 3), np.uint8), r"has 1 image\(s\), but at least 2"),
    ],
)
def test_unsuitable_arrays_are_refused(tmp_path, array, remedy):
    np.savez(tmp_path / "x.npz", array)
    with pytest.raises(ValueError, match=remedy):
        ImageSet(tmp_path / "x.npz", SHAPE)


def test_unsuitable_paths_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"images=.*none: no such file or folder"):
        ImageSet(tmp_path / "none", SHAPE)
    np.savez(tmp_path / "x.npz", latents=np.zeros(3))
    with pytest.raises(ValueError, match=r"images=.*x\.npz contains latents: name the images arr_0"):
        ImageSet(tmp_path / "x.npz", SHAPE)
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(ValueError, match=r"images=.*x\.txt cannot be read as an image"):
        ImageSet(tmp_path / "x.txt", SHAPE)
    save(tmp_path / "folder" / "x.png", 6, 4)
    with pytest.raises(
        ValueError, match=r"x\.png in image=.*folder is 6×4 where the checkpoint's images are 4×6: resize"
    ):
        read("image", tmp_path / "folder", SHAPE)
    with pytest.raises(ValueError, match=r"data\.channels=2"):
        read("image", tmp_path / "folder" / "x.png", (2, 6, 4))
