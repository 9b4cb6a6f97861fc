"""The data sets, from files that the tests write in the published formats."""

import gzip
import hashlib
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets as published

from diffusion_lab.data.sources import CIFAR10, MNIST, CelebA, Digits, FashionMNIST, ImageFolder, Source

from .helpers import RNG, UNREACHABLE, save, served

SHARED = Path(__file__).parents[3] / "shared" / "data"


def load(source: Source, root: Path, shape=(3, 8, 8), download=False):
    return source.load(root, shape, download=download)


# --- digits ----------------------------------------------------------------------------------------------------------


def test_digits_are_whole_and_on_the_grid(tmp_path):
    digits = load(Digits(), tmp_path / "none")
    images = np.asarray(digits.examples.images)
    assert (images.shape, images.dtype) == ((1797, 1, 8, 8), np.uint8)
    assert set(np.unique(images)) == {round(k * 255 / 16) for k in range(17)}
    assert np.bincount(digits.examples.labels).min() >= 174
    assert digits.class_names == tuple("0123456789")
    assert not digits.official


@pytest.mark.integration
def test_digits_need_no_torchvision():
    """Its import takes seconds."""
    code = """
import sys
from pathlib import Path
from diffusion_lab.data.sources import Digits
Digits().load(Path(), (1, 8, 8), download=True)
sys.exit("torchvision" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- MNIST -----------------------------------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray) -> None:
    data = struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_mnist(root: Path, name: str = "MNIST", suffix: str = ".gz") -> dict[str, np.ndarray]:
    arrays = {}
    for part, n in (("train", 7), ("t10k", 3)):
        arrays[f"{part}-images-idx3-ubyte"] = RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = RNG.integers(0, 10, n, dtype=np.uint8)
    for file, array in arrays.items():
        write_idx(root / name / "raw" / (file + suffix), array)
    return arrays


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("source", [MNIST(), FashionMNIST()])
def test_mnist_reads_both_layouts_and_writes_nothing(tmp_path, source, suffix):
    arrays = write_mnist(tmp_path, type(source).__name__, suffix)
    raw = tmp_path / type(source).__name__ / "raw"
    raw.chmod(0o555)
    before = sorted(tmp_path.rglob("*"))
    data = load(source, tmp_path, download=True)
    assert sorted(tmp_path.rglob("*")) == before
    raw.chmod(0o755)
    images, labels = np.asarray(data.examples.images), data.examples.labels
    assert np.array_equal(images[:7, 0], arrays["train-images-idx3-ubyte"])
    assert np.array_equal(images[data.official["test"], 0], arrays["t10k-images-idx3-ubyte"])
    assert labels.tolist() == [*arrays["train-labels-idx1-ubyte"], *arrays["t10k-labels-idx1-ubyte"]]
    assert (images.shape, labels.dtype, len(data.class_names)) == ((10, 1, 28, 28), np.int64, 10)


def test_incomplete_mnist_names_the_missing_files(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(published.MNIST, "mirrors", [UNREACHABLE])
    write_mnist(tmp_path)
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz").unlink()
    for download in (False, True):
        with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz") as caught:
            load(MNIST(), tmp_path, download=download)
        line = str(caught.value)
        assert str(tmp_path / "MNIST" / "raw") in line
        assert "train-" not in line
        assert "\n" not in line


def test_mnist_downloads_what_is_missing(tmp_path, monkeypatch):
    arrays = write_mnist(tmp_path / "mirror")
    mirror, raw = tmp_path / "mirror" / "MNIST" / "raw", tmp_path / "root" / "MNIST" / "raw"
    sums = [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in sorted(mirror.iterdir())]
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(published.MNIST, "resources", sums)
    raw.mkdir(parents=True)
    (mirror / "t10k-labels-idx1-ubyte.gz").rename(raw / "t10k-labels-idx1-ubyte.gz")
    with served(mirror) as address:
        monkeypatch.setattr(published.MNIST, "mirrors", [UNREACHABLE, address])
        data = load(MNIST(), tmp_path / "root", download=True)
    assert np.array_equal(data.examples.images[:7, 0], arrays["train-images-idx3-ubyte"])
    assert sorted(path.name for path in raw.iterdir()) == [name for name, _ in sums]


def test_mnist_names_damaged_files(tmp_path):
    write_mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    images = raw / "train-images-idx3-ubyte.gz"
    whole = images.read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        b"<html>",
        gzip.compress(gzip.decompress(whole)[:-1]),
        gzip.compress(b""),
    ):
        images.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{images} is damaged .* delete it and run again"):
            load(MNIST(), tmp_path)
    images.write_bytes(whole)
    write_idx(raw / "train-labels-idx1-ubyte.gz", np.zeros(6, np.uint8))
    with pytest.raises(ValueError, match="has 7 images, but 6 labels"):
        load(MNIST(), tmp_path)


@pytest.mark.skipif(not (SHARED / "MNIST").exists(), reason="no MNIST beside the repository")
def test_mnist_as_published():
    data = load(MNIST(), SHARED)
    assert data.examples.images.shape == (70_000, 1, 28, 28)
    assert data.examples.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert round(float(data.examples.images[:60_000].mean()) / 255, 4) == 0.1307


# --- CIFAR-10 --------------------------------------------------------------------------------------------------------


FOLDER, ARCHIVE = published.CIFAR10.base_folder, published.CIFAR10.filename
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")


def write_cifar(root: Path) -> tuple[np.ndarray, list[int]]:
    images = RNG.integers(0, 256, (6, 2, 3072), dtype=np.uint8)
    (root / FOLDER).mkdir(parents=True)
    for i, name in enumerate(BATCHES):
        data = pickle.dumps({"data": images[i], "labels": [i, i + 1], "filenames": ["a", "b"]}, protocol=2)
        for key in (b"data", b"labels"):  # strings of Python 2, as published
            data = data.replace(b"X%c\0\0\0%b" % (len(key), key), b"U%c%b" % (len(key), key))
        (root / FOLDER / name).write_bytes(data)
    return images.reshape(12, 3, 32, 32), [i + k for i in range(6) for k in (0, 1)]


@pytest.mark.parametrize("layout", ["folder", "archive"])
def test_cifar_reads_both_layouts(tmp_path, layout):
    images, labels = write_cifar(tmp_path)
    if layout == "archive":
        with tarfile.open(tmp_path / ARCHIVE, "w:gz") as tar:
            tar.add(tmp_path / FOLDER, FOLDER)
        (tmp_path / FOLDER).rename(tmp_path / "away")
    data = load(CIFAR10(), tmp_path)
    assert np.array_equal(data.examples.images, images)
    assert data.examples.labels.tolist() == labels
    assert data.official["test"].tolist() == [10, 11]
    assert data.class_names[3] == "cat"


def test_cifar_names_missing_and_damaged_files(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(published.CIFAR10, "url", UNREACHABLE)
    with pytest.raises(ValueError, match=rf"cannot download .* put cifar-10-python.tar.gz into {tmp_path}"):
        load(CIFAR10(), tmp_path, download=True)
    write_cifar(tmp_path)
    batch = tmp_path / FOLDER / "data_batch_3"
    whole = batch.read_bytes()
    for damaged in (whole[:50], b"", pickle.dumps({"data": np.zeros((2, 7), np.uint8), "labels": [0, 1]})):
        batch.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            load(CIFAR10(), tmp_path)
    batch.unlink()
    with pytest.raises(ValueError, match=r"data_batch_3.* missing in"):
        load(CIFAR10(), tmp_path)
    (tmp_path / FOLDER).rename(tmp_path / "away")
    (tmp_path / ARCHIVE).write_bytes(b"half")
    with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz is damaged"):
        load(CIFAR10(), tmp_path)


def test_cifar_runs_no_code_of_a_batch(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    write_cifar(tmp_path)
    (tmp_path / FOLDER / "data_batch_1").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="it refers to"):
        load(CIFAR10(), tmp_path)
    assert not (tmp_path / "ran").exists()


# --- CelebA ----------------------------------------------------------------------------------------------------------


def write_celeba(root: Path, n: int = 6) -> np.ndarray:
    folder = root / "celeba"
    attributes = RNG.choice([-1, 1], (n, 3))
    for i in range(n):
        save(folder / "img_align_celeba" / f"{i + 1:06d}.jpg", 218, 178)
    rows = [" ".join(f"{value:2d}" for value in row) for row in attributes]
    lines = [f"{i + 1:06d}.jpg {row}" for i, row in enumerate(rows)]
    (folder / "list_attr_celeba.txt").write_text("\n".join([str(n), "Bald Young Smiling ", *lines, ""]))
    parts = [0, 0, 0, 1, 2, 2]
    (folder / "list_eval_partition.txt").write_text("".join(f"{i + 1:06d}.jpg {parts[i]}\n" for i in range(n)))
    return attributes


def test_celeba_has_attributes_and_official_parts(tmp_path):
    attributes = write_celeba(tmp_path)
    data = load(CelebA(), tmp_path, (3, 64, 64))
    assert data.examples.images.shape == (6, 3, 64, 64)
    assert np.array_equal(data.examples.attributes, attributes)
    assert data.attribute_names == ("Bald", "Young", "Smiling")
    assert {name: part.tolist() for name, part in data.official.items()} == {"val": [3], "test": [4, 5]}
    assert (tmp_path / "celeba" / ".cache").is_dir()
    assert not np.array_equal(load(CelebA(178), tmp_path, (3, 64, 64)).examples.images, data.examples.images)
    assert load(CelebA([57, 25, 128, 128]), tmp_path, (3, 64, 64)).examples.images.shape == (6, 3, 64, 64)


def test_celeba_reads_the_archive(tmp_path):
    write_celeba(tmp_path)
    folder = tmp_path / "celeba"
    expected = np.asarray(load(CelebA(), tmp_path).examples.images)
    with zipfile.ZipFile(folder / "img_align_celeba.zip", "w") as archive:
        for path in (folder / "img_align_celeba").iterdir():
            archive.write(path, f"img_align_celeba/{path.name}")
    (folder / "img_align_celeba").rename(tmp_path / "away")
    assert np.array_equal(load(CelebA(), tmp_path).examples.images, expected)


def test_incomplete_celeba_names_the_missing_files(tmp_path):
    with pytest.raises(ValueError, match=r"put img_align_celeba\.zip, list_attr_celeba\.txt, list_eval_partition\.txt"):
        load(CelebA(), tmp_path)
    write_celeba(tmp_path)
    (tmp_path / "celeba" / "img_align_celeba" / "000004.jpg").unlink()
    with pytest.raises(ValueError, match="has 5 images, 6 lines"):
        load(CelebA(), tmp_path)
    (tmp_path / "celeba" / "list_eval_partition.txt").unlink()
    with pytest.raises(ValueError, match=rf"put list_eval_partition\.txt \(.*\) into {tmp_path}"):
        load(CelebA(), tmp_path)


# --- Image folders ---------------------------------------------------------------------------------------------------


def test_folders_of_mixed_images(tmp_path):
    save(tmp_path / "a" / "gray.png", 20, 10, "L")
    save(tmp_path / "a" / "deep" / "color.jpg", 9, 30)
    save(tmp_path / "b" / "clear.png", 16, 16, "RGBA")
    save(tmp_path / "c" / "print.tif", 12, 15, "CMYK")
    for channels in (1, 3):
        data = load(ImageFolder(), tmp_path, (channels, 8, 6))
        assert data.examples.images.shape == (4, channels, 8, 6)
    assert data.class_names == ("a", "b", "c")
    assert data.examples.labels.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("names", "labels", "official"),
    [
        (["x.png", "y.png"], None, {}),
        (["only/x.png", "only/y.png"], None, {}),
        (["a/x.png", "y.png"], None, {}),
        (["train/a/x.png", "train/b/y.png"], [0, 1], {}),
        (["test/b/x.png", "train/a/y.png", "train/b/z.png"], [1, 0, 1], {"test": [0]}),
        (["test/x.png", "train/y.png", "valid/z.png"], None, {"test": [0], "val": [2]}),
    ],
)
def test_the_layout_defines_classes_and_parts(tmp_path, names, labels, official):
    for name in names:
        save(tmp_path / name)
    data = load(ImageFolder(), tmp_path)
    actual = data.examples.labels
    assert (None if actual is None else actual.tolist()) == labels
    assert {name: part.tolist() for name, part in data.official.items()} == official


def test_archives_are_read_directly(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("train/a/1.png", "train/b/1.png"):
            save(tmp_path / name)
            archive.write(tmp_path / name, name)
    zipped, folder = load(ImageFolder(), tmp_path / "x.zip"), load(ImageFolder(), tmp_path / "train")
    assert np.array_equal(zipped.examples.images, folder.examples.images)
    assert zipped.class_names == ("a", "b")


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_arrays_are_used_unchanged(tmp_path, channels):
    images = RNG.integers(0, 256, (5, 4, 6, *([channels] if channels else [])), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", images, np.array([0, 2, 1, 2, 0], np.int32))
    data = load(ImageFolder(), tmp_path / "x.npz")
    assert np.array_equal(np.asarray(data.examples.images).transpose(0, 2, 3, 1).reshape(images.shape), images)
    assert data.examples.labels.tolist() == [0, 2, 1, 2, 0]
    assert data.class_names == ("0", "1", "2")


def test_arrays_may_hold_a_test_part(tmp_path):
    images = RNG.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", train_images=images[:3], test_images=images[3:])
    data = load(ImageFolder(), tmp_path / "x.npz")
    assert data.official["test"].tolist() == [3, 4]
    assert data.examples.labels is None


def test_arrays_that_are_not_images_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, np.zeros((5, 4, 4, 3), np.float32))
    with pytest.raises(ValueError, match=r"images as float32 \(5, 4, 4, 3\): write uint8"):
        load(ImageFolder(), path)
    for labels in (np.zeros(4, int), np.zeros(5), np.arange(5) - 1):
        np.savez(path, np.zeros((5, 4, 4, 3), np.uint8), labels)
        with pytest.raises(ValueError, match="contains labels as"):
            load(ImageFolder(), path)
    np.savez(path, latents=np.zeros(3))
    with pytest.raises(ValueError, match="contains latents: name the images arr_0"):
        load(ImageFolder(), path)
    path.write_bytes(b"half")
    with pytest.raises(ValueError, match=r"cannot be read as an \.npz"):
        load(ImageFolder(), path)


def test_wrong_roots_and_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none does not exist: write data\.root=FOLDER"):
        load(ImageFolder(), tmp_path / "none")
    with pytest.raises(ValueError, match="contains no images"):
        load(ImageFolder(), tmp_path)
    with pytest.raises(ValueError, match=r"data\.source\.crop=middle"):
        ImageFolder(crop="middle")
    with pytest.raises(ValueError, match=r"top,left,height,width"):
        ImageFolder(crop=[1, 2])
    with pytest.raises(ValueError, match=r"data\.source\.filter=cubic"):
        CelebA(filter="cubic")


def test_a_box_is_cropped_before_the_resize(tmp_path):
    pixels = save(tmp_path / "x.png", 20, 30)
    data = load(ImageFolder(crop=[2, 3, 8, 8]), tmp_path)
    assert np.array_equal(data.examples.images[0], pixels[2:10, 3:11].transpose(2, 0, 1))
    assert load(ImageFolder(crop=[0, 0, 20, 30]), tmp_path).examples.images.shape == (1, 3, 8, 8)
