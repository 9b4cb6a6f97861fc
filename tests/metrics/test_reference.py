"""Reference statistics: computed once, refused for another data set, read and written in the format of other tools."""

import collections
import shutil
import threading

import numpy as np
import pytest
import torch

from diffusion_lab.data.sources import CelebA, Digits, ImageFolder
from diffusion_lab.metrics import reference
from diffusion_lab.metrics.classifier import ClassifierExtractor
from diffusion_lab.metrics.frechet import moments
from diffusion_lab.metrics.reference import described, file_stem, key_of, read, write
from diffusion_lab.metrics.scores import MOST


@pytest.fixture
def images(digits):
    return digits.images("test")


@pytest.fixture
def key(images, extractor):
    return key_of(images, described(Digits()), "test", extractor)


class Counting(ClassifierExtractor):
    """Counts its calls."""

    def __init__(self, extractor):
        super().__init__(extractor.trained)
        self.calls = 0

    def __call__(self, images):
        self.calls += 1
        return super().__call__(images)


def test_it_is_the_moments_of_the_images_made_once(images, key, extractor, tmp_path):
    counting = Counting(extractor)
    first = reference.reference(images, key, counting, tmp_path, features=False)
    want = moments(extractor(torch.from_numpy(np.asarray(images))).features)
    assert first.moments.n == len(images) == 180
    assert torch.allclose(first.moments.mean, want.mean, rtol=1e-6)
    assert torch.allclose(first.moments.covariance, want.covariance, rtol=1e-6, atol=1e-9)
    calls = counting.calls
    again = reference.reference(images, key, counting, tmp_path, features=False)
    assert counting.calls == calls
    assert torch.equal(again.moments.covariance, first.moments.covariance)
    assert len(list(tmp_path.iterdir())) == 1


def test_features_are_kept_where_kid_and_neighbors_need_them(images, key, extractor, tmp_path, monkeypatch):
    kept = reference.reference(images, key, extractor, tmp_path, features=True)
    want = extractor(torch.from_numpy(np.asarray(images))).features
    assert torch.allclose(kept.features, want, atol=1e-5)
    assert torch.allclose(kept.moments.mean, want.double().mean(0), rtol=1e-6)
    for module in (reference, __import__("diffusion_lab.metrics.collect", fromlist=["MOST"])):
        monkeypatch.setattr(module, "MOST", 50)
    few = reference.reference(images, key, extractor, tmp_path / "few", features=True)
    assert few.features.shape == (50, extractor.dim)
    spaced = np.linspace(0, 179, 50).round().astype(int)
    assert torch.allclose(few.features, want[spaced], atol=1e-5)
    assert torch.equal(few.moments.covariance, kept.moments.covariance)  # of all images all the same
    assert MOST == 10_000


def test_everything_that_it_depends_on_is_in_its_name(digits, images, extractor, key):
    other = images[:].copy()
    other[3, 0, 0, 0] ^= 255
    keys = [
        key,
        key_of(images, described(Digits()), "val", extractor),
        key_of(digits.images("val"), described(Digits()), "test", extractor),
        key_of(other, described(Digits()), "test", extractor),
        key_of(images, described(ImageFolder(crop=[0, 0, 8, 8])), "test", extractor),
        key_of(images, described(ImageFolder(filter="box")), "test", extractor),
        key_of(images, described(CelebA(crop=140)), "test", extractor),
        key_of(images, described(CelebA(crop=178)), "test", extractor),
        {**key, "weights": "0" * 16},
        {**key, "extractor": "inception"},
    ]
    assert len({file_stem(k) for k in keys}) == len(keys)
    assert described(CelebA(cache="a")) == described(CelebA(cache="b"))
    assert file_stem(key).startswith("reference-digits-test-classifier-")


def test_processes_that_come_at_once_make_one(images, key, extractor, tmp_path):
    counting, references = Counting(extractor), []
    call = lambda: references.append(reference.reference(images, key, counting, tmp_path, features=False))  # noqa: E731
    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counting.calls == 1  # 180 images are one batch
    assert len(references) == 4
    assert [p.suffix for p in tmp_path.iterdir()] == [".npz"]


def test_import_and_export_in_the_form_of_other_tools(images, key, extractor, tmp_path):
    computed = reference.reference(images, key, extractor, tmp_path, features=False)
    write(tmp_path / "ours.npz", computed.moments, key)
    with np.load(tmp_path / "ours.npz", allow_pickle=False) as file:  # as pytorch-fid and EDM read it
        assert np.array_equal(file["mu"], computed.moments.mean.numpy())
        assert np.array_equal(file["sigma"], computed.moments.covariance.numpy())
        mu, sigma = file["mu"], file["sigma"]
    back = read(tmp_path / "ours.npz", extractor, key)
    assert torch.equal(back.moments.covariance, computed.moments.covariance)
    assert (back.key, back.moments.n) == (key, 180)
    with pytest.raises(ValueError, match=r"ours\.npz exists"):
        write(tmp_path / "ours.npz", computed.moments)
    # Another tool's: float32, and with images and spatial features as well (the batches of guided diffusion).
    more = {"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "mu_s": np.zeros(5), "sigma_s": np.zeros((5, 5))}
    np.savez(tmp_path / "theirs.npz", mu=mu.astype(np.float32), sigma=sigma.astype(np.float32), **more)
    theirs = read(tmp_path / "theirs.npz", extractor, key)
    assert (theirs.key, theirs.moments.n) == (None, None)
    assert torch.allclose(theirs.moments.mean, computed.moments.mean, rtol=1e-6)


def test_another_set_another_size_and_broken_files_are_refused(images, key, extractor, tmp_path, digits):
    computed = reference.reference(images, key, extractor, tmp_path, features=False)
    path = tmp_path / "mine.npz"
    write(path, computed.moments, {**key, "data": "mnist"})
    with pytest.raises(ValueError, match="was computed with data=mnist, but this evaluation has data=digits"):
        read(path, extractor, key)
    good = {"mu": np.zeros(extractor.dim), "sigma": np.eye(extractor.dim)}
    hole = good["sigma"].copy()
    hole[2, 2] = np.nan
    for name, arrays, message in (
        (
            "small",
            {"mu": np.zeros(9), "sigma": np.eye(9)},
            f"has 9 features, but extractor=classifier has {extractor.dim}",
        ),
        ("none", {"arr_0": np.zeros(3)}, "contains arr_0, but not mu and sigma"),
        ("shape", {**good, "sigma": np.zeros(extractor.dim)}, r"write \(D,\) and \(D, D\)"),
        ("nan", {**good, "sigma": hole}, "NaN"),
        ("pickle", {**good, "mu": np.array([{}] * extractor.dim)}, "cannot be read"),
    ):
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            read(tmp_path / f"{name}.npz", extractor, key)
    (tmp_path / "short.npz").write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path / "short.npz", extractor, key)
    with pytest.raises(ValueError, match="no reference statistics at"):
        read(tmp_path / "nowhere.npz", extractor, key)


def test_a_full_disk_is_refused_beforehand_and_leaves_nothing(images, key, extractor, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**7))
    with pytest.raises(ValueError, match=rf"not enough disk at {tmp_path}.* 10 MiB are free.* write cache=FOLDER"):
        reference.reference(images, key, extractor, tmp_path, features=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cache=FOLDER"):
        reference.reference(images, key, extractor, tmp_path / "file" / "cache", features=False)
