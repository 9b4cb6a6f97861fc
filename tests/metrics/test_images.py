"""Metrics of torchmetrics on uint8 images: their updates, channels, names of figures."""

import numpy as np
import pytest
import torch
from own_features import Colored, Extremes, Pooled
from torchmetrics import MeanMetric, MeanSquaredError, Metric
from torchmetrics.image import FrechetInceptionDistance, KernelInceptionDistance, TotalVariation
from torchmetrics.wrappers import LambdaInputTransformer

from diffusion_lab.metrics.frechet import frechet_distance, moments
from diffusion_lab.metrics.images import PART, ImageMetric

KEEPS = pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all extracted features")


def images(n=70, channels=1, seed=0, most=256):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, most, (n, channels, 8, 8), dtype=torch.uint8, generator=g)


def fed(metric, samples, real=None, name="mine"):
    """The figures of one metric, real images first."""
    wrapped = ImageMetric(name, metric, images(2, samples.shape[1]))
    if real is not None:
        wrapped.add(real, real=True)
    wrapped.add(samples)
    return wrapped.figures()


def test_a_frechet_distance_is_ours():
    samples, real = images(300), images(400, seed=1, most=200)
    got = fed(FrechetInceptionDistance(feature=Pooled()), samples, real)
    want = frechet_distance(moments(Pooled()(samples)), moments(Pooled()(real)))
    assert got == {"mine": pytest.approx(want, rel=1e-3)}
    assert want > 1e-3


def test_a_copy_keeps_the_real_images_and_shares_nothing_else():
    wrapped = ImageMetric("mine", FrechetInceptionDistance(feature=Pooled()), images(2))
    wrapped.add(images(200, seed=1), real=True)
    figures = []
    for seed in (2, 3, 2):
        one = wrapped.copy()
        one.add(images(200, seed=seed))
        figures.append(one.figures()["mine"])
    assert figures[0] == figures[2] != figures[1]


def test_gray_images_are_repeated_only_where_one_channel_is_refused():
    gray = ImageMetric("mine", FrechetInceptionDistance(feature=Pooled()), images(2))
    assert (gray.channels, "uint8, 1 channels" in gray.protocol) == (1, True)
    three = ImageMetric("mine", FrechetInceptionDistance(feature=Colored()), images(2))
    assert three.channels == 3
    samples, real = images(200), images(300, seed=1)
    got = fed(FrechetInceptionDistance(feature=Colored()), samples, real)["mine"]
    repeated = frechet_distance(moments(Colored()(samples.expand(-1, 3, -1, -1))), moments(Pooled()(real)))
    assert got == pytest.approx(repeated, rel=1e-3)
    with pytest.raises(ValueError, match=r"FrechetInceptionDistance raised an error .*3 channels, but got 2 channels"):
        ImageMetric("mine", FrechetInceptionDistance(feature=Colored()), images(2, channels=2))


@KEEPS
def test_a_pair_is_mean_and_spread_and_the_figure_is_repeatable():
    """KID draws its subsets at random; the generator of the rest is left as it was."""
    samples, real = images(100), images(100, seed=1)
    make = lambda: KernelInceptionDistance(feature=Pooled(), subsets=5, subset_size=20)  # noqa: E731
    torch.manual_seed(5)
    first = fed(make(), samples, real)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(6)
    assert fed(make(), samples, real) == first
    assert first["mine_std"] > 0
    assert set(first) == {"mine", "mine_std"}
    with pytest.raises(ValueError, match=r"metrics\.mine: KernelInceptionDistance raised an error .*subset_size"):
        fed(KernelInceptionDistance(feature=Pooled(), subset_size=1000), samples, real)


def test_a_mapping_and_a_list_have_names():
    samples = images(3 * PART + 1, most=200)
    got = fed(Extremes(), samples)
    assert got == {"mine_min": float(samples.min()), "mine_max": float(samples.max()), "mine_images": len(samples)}
    each = fed(LambdaInputTransformer(TotalVariation(reduction="none"), torch.Tensor.float), samples)["mine"]
    x = samples.numpy().astype(float)
    want = np.abs(np.diff(x, axis=2)).sum((1, 2, 3)) + np.abs(np.diff(x, axis=3)).sum((1, 2, 3))
    assert each == pytest.approx(want.tolist())
    assert fed(MeanMetric(), samples)["mine"] == pytest.approx(x.mean(), rel=1e-6)


def test_bytes_that_wrap_around_are_warned_of():
    raw = ImageMetric("tv", TotalVariation(), images(2))
    assert raw.warning is not None
    assert "transform_pred={_target_: torch.Tensor.float, _partial_: true}" in raw.warning
    for metric in (LambdaInputTransformer(TotalVariation(), torch.Tensor.float), MeanMetric(), Extremes()):
        assert ImageMetric("mine", metric, images(2)).warning is None
    assert ImageMetric("mine", FrechetInceptionDistance(feature=Pooled()), images(2)).warning is None


def test_another_signature_and_another_result_are_refused():
    with pytest.raises(ValueError, match=r"MeanSquaredError.update has the signature .*preds.*choose a metric such as"):
        ImageMetric("mine", MeanSquaredError(), images(2))

    class Word(Metric):
        def update(self, images):
            pass

        def compute(self):
            return "good"

    with pytest.raises(ValueError, match=r"compute\(\) returns str: choose a metric"):
        fed(Word(), images())
