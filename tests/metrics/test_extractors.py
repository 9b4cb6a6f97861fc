"""Inception with random weights (shapes, resize, channels), its file of weights, and other modules as extractors."""

import dataclasses

import pytest
import torch
from torch import nn

from diffusion_lab.metrics import extractors
from diffusion_lab.metrics.extractors import (
    Inception,
    ModuleExtractor,
    digest,
    inception,
    inception_network,
    resolve,
    weights,
)


@pytest.fixture(scope="module")
def random():
    torch.manual_seed(0)
    return Inception(inception_network(), "0" * 64)


def some(n, channels=3, side=12, seed=0):
    return torch.randint(0, 256, (n, channels, side, side), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )


def test_inception_gives_2048_features_and_1008_logits(random):
    out = random(some(3))
    assert (out.features.shape, out.logits.shape) == ((3, 2048), (3, 1008))
    assert out.features.dtype == torch.float32
    assert bool(out.features.isfinite().all())
    assert float(out.features.std()) > 0
    assert (random.dim, random.classes, random.distance) == (2048, 1008, "fid")
    assert not any(p.requires_grad for p in random.network.parameters())
    assert not random.network.training


def test_gray_images_get_three_equal_channels_and_batches_do_not_matter(random, monkeypatch):
    gray = some(3, channels=1)
    whole = random(gray).features
    assert torch.equal(whole, random(gray.repeat(1, 3, 1, 1)).features)
    monkeypatch.setattr(random, "batch_size", 2)
    assert torch.allclose(whole, random(gray).features, rtol=1e-4, atol=1e-6)


def test_the_resize_is_the_published_one(random):
    """Images are resized as in TensorFlow 1: pixel j is read at position j·w/299, without half-pixel centers or antialiasing."""
    seen = []
    hook = random.network.Conv2d_1a_3x3.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    ramp = torch.tensor([0, 10, 40, 90, 160, 250, 80, 5], dtype=torch.uint8).expand(1, 3, 8, 8)
    random(ramp)
    large = some(1, side=600)
    random(large)
    hook.remove()
    at = torch.arange(299, dtype=torch.float64) * 8 / 299
    low = at.floor().long()
    high, part = (low + 1).clamp(max=7), at - low
    row = ramp[0, 0, 0].double()
    want = ((1 - part) * row[low] + part * row[high] - 128) / 128
    assert seen[0].shape == (1, 3, 299, 299)
    assert torch.allclose(seen[0][0, 1, 17].double(), want, atol=1e-5)
    # Interpolation at 2.0067 j keeps the spread, which an antialiased resize would reduce by averaging.
    assert float(seen[1].std()) > 0.8 * float((large.float() / 128).std()) * (2 / 3)


def test_only_uint8_images_are_measured(random):
    for bad in (torch.zeros(2, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="uint8 images"):
            random(bad)


def test_missing_weights_are_one_line_with_file_folder_and_address(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    nowhere = dataclasses.replace(extractors.WEIGHTS, urls=("http://127.0.0.1:9/weights.pth",))
    monkeypatch.setattr(extractors, "WEIGHTS", nowhere)
    for download in (True, False):
        with pytest.raises(ValueError, match="weights") as caught:
            inception(download=download)
        line = str(caught.value)
        assert "\n" not in line
        for named in (
            extractors.WEIGHTS.name,
            f"{tmp_path}/hub/checkpoints",
            "http://127.0.0.1:9/",
            "weights_path=FILE",
        ):
            assert named in line
    with pytest.raises(ValueError, match=r"no Inception weights at .*mine\.pth: download http"):
        weights(str(tmp_path / "mine.pth"))


def test_weights_are_checked_before_they_are_read(tmp_path, monkeypatch, random):
    path = tmp_path / "hub" / "checkpoints" / extractors.WEIGHTS.name
    path.parent.mkdir(parents=True)
    torch.save(random.network.state_dict(), path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for weights_path in (None, str(path)):
        with pytest.raises(ValueError, match="not the published Inception of 2015-12-05"):
            inception(weights_path)
    import hashlib

    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(extractors, "WEIGHTS", dataclasses.replace(extractors.WEIGHTS, checksum=checksum))
    loaded = inception()
    images = some(2)
    assert torch.equal(loaded(images).features, random(images).features)
    assert loaded.key == checksum[:16]


class Own(nn.Module):
    """Return the mean of each row; raise an error in training mode."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        assert not self.training
        return self.scale * x.mean((1, 3))


def test_any_module_is_an_extractor():
    extractor = resolve(Own(), (1, 8, 8))
    images = some(5, channels=1, side=8)
    got = extractor(images)
    assert (extractor.name, extractor.distance, extractor.dim, extractor.classes, got.logits) == (
        "own",
        "fd_own",
        8,
        0,
        None,
    )
    assert torch.allclose(got.features, (images.float() / 127.5 - 1).mean((1, 3)), atol=1e-6)
    other = Own()
    other.scale.data.add_(1)
    assert digest(Own()) == extractor.key != digest(other)

    class Classifier(Own):
        def forward(self, x):
            return super().forward(x), x.flatten(1)[:, :3]

    both = ModuleExtractor(Classifier(), (1, 8, 8))
    assert (both.name, both.classes) == (
        "own_classifier",
        3,
    )  # "classifier" is the name of the classifier of the data set


def test_a_module_that_gives_no_features_and_an_unknown_name_are_refused():
    with pytest.raises(ValueError, match=r"return features \(B, D\)"):
        resolve(nn.Identity(), (1, 8, 8))
    with pytest.raises(ValueError, match="extractor=vgg is unknown"):
        resolve("vgg", (1, 8, 8))
    with pytest.raises(ValueError, match="1 or 3 channels"):
        resolve("inception", (4, 8, 8))
