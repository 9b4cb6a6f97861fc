"""KID, Inception score, precision, recall, density, coverage: against torch-fidelity, formulas written out, extremes."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from diffusion_lab.metrics.collect import Collected
from diffusion_lab.metrics.extractors import Extractor
from diffusion_lab.metrics.moments import Sums
from diffusion_lab.metrics.options import KID, InceptionScore
from diffusion_lab.metrics.reference import Reference
from diffusion_lab.metrics.scores import inception_score, kid, prdc


class Inception(Extractor):
    """An extractor by its name alone: the features are given."""

    name = "inception"

    def extract(self, images):
        raise NotImplementedError


def two(n=600, m=700, dim=32, shift=0.15):
    g = torch.Generator().manual_seed(5)
    return torch.randn(n, dim, generator=g) + shift, 1.2 * torch.randn(m, dim, generator=g)


def test_kid_agrees_with_torch_fidelity():
    a, b = two()
    got = kid(a, b)
    peer = kid_features_to_metric(a, b, kid_subsets=100, kid_subset_size=600, verbose=False)
    assert got.mean == pytest.approx(peer["kernel_inception_distance_mean"], rel=1e-4)
    assert got.std == pytest.approx(peer["kernel_inception_distance_std"], rel=1e-3, abs=1e-6)


def test_kid_is_the_unbiased_mmd_of_the_cubic_kernel():
    """With subsets as large as the sets every subset is the whole, in another order."""
    a, b = two(n=40, m=40)
    x, y = a.double(), b.double()
    kernel = lambda u, v: (u @ v.T / 32 + 1) ** 3  # noqa: E731
    off = ~torch.eye(40, dtype=torch.bool)
    want = kernel(x, x)[off].mean() + kernel(y, y)[off].mean() - 2 * kernel(x, y).mean()
    assert kid(a, b).mean == pytest.approx(float(want), rel=1e-10)
    assert kid(a, b).std == pytest.approx(0, abs=1e-12)
    assert (kid(a, b).subsets, kid(a, b, subset_size=39).subsets, kid(a, a[:39]).subsets) == (1, 100, 100)


@pytest.mark.parametrize(
    ("metric", "n", "names"),
    [
        (KID(subset_size=40), 40, {"kid"}),
        (KID(subset_size=39), 40, {"kid", "kid_std"}),
        (KID(subsets=1, subset_size=39), 40, {"kid"}),
        (InceptionScore(splits=1), 40, {"is"}),
        (InceptionScore(splits=2), 40, {"is", "is_std"}),
    ],
)
def test_the_spread_of_one_subset_is_not_reported(metric, n, names):
    """Where both sets fit one subset every subset is the whole: a standard deviation of 0 would claim an exact figure."""
    a, b = two(n=n, m=n)
    sums = Sums(32)
    sums.add(b)
    reference = Reference(sums.moments(), b, None, Path())
    figures = metric.figures(metric.key, Inception(torch.nn.Identity()), Collected(n, sums, a, a), reference)
    assert set(figures) == names


def test_kid_of_one_distribution_is_zero_on_average():
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2000, 16, generator=g), torch.randn(2000, 16, generator=g)
    got = kid(a, b)
    # The 100 subsets of half the images share them: at least 2 are independent
    assert abs(got.mean) < 4 * got.std / math.sqrt(2)


def test_inception_score_agrees_with_torch_fidelity_and_reaches_its_extremes():
    logits = 3 * torch.randn(1000, 20)
    got = inception_score(logits)
    peer = isc_features_to_metric(logits)
    assert got.mean == pytest.approx(peer["inception_score_mean"], rel=1e-4)
    assert got.std == pytest.approx(peer["inception_score_std"], rel=1e-4)
    assert inception_score(torch.zeros(100, 20)).mean == pytest.approx(1, abs=1e-9)  # uniform probabilities
    sure = 1e3 * torch.nn.functional.one_hot(torch.arange(20_000) % 10, 10).float()
    # Ten classes, evenly. A split of N = 2000 draws them unevenly: E H(q) = ln 10 − 9/2N, spread √18/2N; 4 of these for ten.
    assert inception_score(sure).mean == pytest.approx(10 * (1 - 9 / 4000), abs=4 * 10 * 18**0.5 / 4000 / 10**0.5)


def test_precision_and_recall_agree_with_torch_fidelity():
    a, b = two(n=1300, m=1100)
    got = prdc(a, b)
    peer = prc_features_to_metric(a, b, prc_neighborhood=3, prc_batch_size=10_000, save_cpu_ram=False, verbose=False)
    assert got["precision"] == pytest.approx(peer["precision"], rel=1e-4)
    assert got["recall"] == pytest.approx(peer["recall"], rel=1e-4)
    assert 0 < got["precision"] < 1


def test_density_and_coverage_follow_their_definitions():
    """Loops over all pairs (Naeem et al. 2020, eq. 4 and 6), k = 5, with more images than a block."""
    a, b = two(n=1203, m=61, dim=3)
    far = np.sqrt(((b[:, None].numpy() - a[None].numpy()) ** 2).sum(-1))  # (61, 1203)
    among_real = np.sqrt(((b[:, None].numpy() - b[None].numpy()) ** 2).sum(-1))
    radii = np.sort(among_real, 1)[:, 5]
    inside = far <= radii[:, None]
    got = prdc(a, b)
    assert got["density"] == pytest.approx(inside.sum() / (5 * 1203), rel=2e-3)
    assert got["coverage"] == pytest.approx(inside.any(1).mean(), abs=1e-9)


def test_neighbors_of_features_far_from_zero():
    """Features 50 ± 0.05 in float32: all four figures are those of exact distances, and of the features less 50."""
    g = torch.Generator().manual_seed(3)
    a, b = (50 + 0.05 * torch.randn(n, 32, generator=g) for n in (400, 300))
    far = np.sqrt(((b[:, None].double().numpy() - a[None].double().numpy()) ** 2).sum(-1))
    among = [np.sqrt(((v[:, None].double().numpy() - v[None].double().numpy()) ** 2).sum(-1)) for v in (a, b)]
    (radii_a, _), (radii_b, radii_5) = ((np.sort(d, 1)[:, 3], np.sort(d, 1)[:, 5]) for d in among)
    want = {
        "precision": (far <= radii_b[:, None]).any(0).mean(),
        "recall": (far <= radii_a[None]).any(1).mean(),
        "density": (far <= radii_5[:, None]).sum() / (5 * 400),
        "coverage": (far <= radii_5[:, None]).any(1).mean(),
    }
    assert prdc(a, b) == pytest.approx(want, abs=1e-6)
    assert prdc(a.double() - 50, b.double() - 50) == pytest.approx(want, abs=1e-6)


def test_extremes_of_neighbors():
    a, _ = two(n=300)
    same = prdc(a, a)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert same["density"] >= 1  # each point in its own ball, and in those of its neighbors
    assert prdc(a + 100, a) == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    one = a[:1].expand(300, -1) + 1e-3 * torch.randn(300, 32)  # one mode: high precision, low recall and coverage
    dropped = prdc(one, a)
    assert dropped["precision"] > 0.99
    assert dropped["recall"] < 0.02
    assert dropped["coverage"] < 0.1


def test_too_few_images_and_nan_are_refused():
    a, b = two(n=20, m=20)
    for call, least in ((lambda x: kid(x, b), 2), (lambda x: prdc(x, b), 6), (inception_score, 10)):
        with pytest.raises(ValueError, match=f"at least {least} images"):
            call(a[: least - 1])
        bad = a.clone()
        bad[3, 0] = float("nan")
        with pytest.raises(ValueError, match="image 3 "):
            call(bad)
    with pytest.raises(ValueError, match="sizes of the features differ"):
        kid(a, b[:, :5])
