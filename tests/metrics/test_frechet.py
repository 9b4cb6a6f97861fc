"""The Fréchet distance against closed forms, scipy and torch-fidelity, and against what theory says of finite samples."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from diffusion_lab.data.images import refuse_nan
from diffusion_lab.metrics.frechet import frechet_distance
from diffusion_lab.metrics.moments import Moments, Sums, moments, singular


def features(n, dim, seed, shift=0.0):
    """Correlated, skewed features, float32 (n, dim)."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(7)) / dim**0.5
    return (torch.randn(n, dim, generator=g).exp() @ mix + shift).float()


def by_scipy(a, b):
    """Heusel's formula with a general matrix root, float64."""
    (m1, s1), (m2, s2) = ((np.mean(x, 0), np.cov(x, rowvar=False)) for x in (a.double().numpy(), b.double().numpy()))
    root = scipy.linalg.sqrtm(s1 @ s2)
    return float(((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * root.real))


@pytest.mark.parametrize(("n", "dim"), [(500, 64), (80, 8), (300, 200)])
def test_agrees_with_torch_fidelity_and_scipy(n, dim):
    a, b = features(n, dim, 0), features(n + 50, dim, 1, shift=0.1)
    got = frechet_distance(moments(a), moments(b))
    assert got == pytest.approx(by_scipy(a, b), rel=1e-4)
    peer = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), verbose=False)
    assert got == pytest.approx(peer[KEY_METRIC_FID], rel=1e-4)


def test_closed_form_of_commuting_covariances():
    a, b = torch.linspace(0.1, 3, 20, dtype=torch.float64), torch.linspace(2, 0.5, 20, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))
    mean = torch.linspace(-1, 1, 20, dtype=torch.float64)
    one = Moments(mean, turn @ a.diag() @ turn.T, 100)
    two = Moments(torch.zeros(20, dtype=torch.float64), turn @ b.diag() @ turn.T, 100)
    want = float(mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(one, two) == pytest.approx(want, rel=1e-12)
    assert frechet_distance(two, one) == pytest.approx(want, rel=1e-12)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-12)


def test_covariances_without_full_rank_do_no_harm():
    """40 images for 64 features: tr (Σ_a Σ_b)^½ is the nuclear norm of X_a X_bᵀ, centered and scaled, which needs no root."""
    a, b = features(40, 64, 0), features(40, 64, 1)
    x, y = ((v.double() - v.double().mean(0)) / 39**0.5 for v in (a, b))
    want = (a.double().mean(0) - b.double().mean(0)).square().sum() + x.square().sum() + y.square().sum()
    want = float(want - 2 * torch.linalg.svdvals(x @ y.T).sum())
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(want, rel=1e-6)
    assert "write at least n=640" in str(singular(40, 64))
    assert singular(65, 64) is None


def expected(covariance, m):
    """E of the distance between two independent samples of m from one Gaussian, to first order in 1/m.

    The means give 2 tr Σ/m. The covariances differ by H with Var H_ij = 2 λ_i λ_j (1 + δ_ij)/(m − 1) in the eigenbasis, and the
    distance of Σ and Σ + H is ½ Σ_ij H_ij²/(λ_i + λ_j) to second order (Bures' metric).
    """
    l = torch.linalg.eigvalsh(covariance)
    pairs = torch.outer(l, l) / (l[:, None] + l[None, :])
    return float(2 * l.sum() / m + (pairs.sum() + l.sum() / 2) / (m - 1))


@pytest.mark.parametrize("m", [1000, 4000])
def test_two_halves_of_a_set_are_as_far_apart_as_theory_says(m):
    """Gaussian features of known covariance. The mean of 400 draws may miss by 4 of its standard errors (1 % each) and the
    second order of 1/m (below 12/m relative, seen by halving m)."""
    scale = torch.linspace(0.3, 2, 12, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64))
    values = []
    for _ in range(400):
        x = torch.randn(2 * m, 12, dtype=torch.float64) * scale @ turn
        values.append(frechet_distance(moments(x[:m]), moments(x[m:])))
    got, error = float(np.mean(values)), float(np.std(values)) / 20
    want = expected(turn.T @ scale.square().diag() @ turn, m)
    assert abs(got - want) < 4 * error + 12 / m * want
    assert error < 0.02 * want


def test_the_digits_halves_are_as_far_apart_as_their_fourth_moments_say():
    """Real pixels, far from Gaussian: Var H_ij = (1/m + 1/m) Var(z_i z_j) in the eigenbasis replaces the Gaussian's value."""
    from sklearn.datasets import load_digits

    pixels = torch.from_numpy(load_digits().data / 16)
    l, basis = torch.linalg.eigh(torch.cov(pixels.T))
    keep = l > 1e-2 * l.max()  # the second order of Bures' metric needs H well below λ
    z, l = ((pixels - pixels.mean(0)) @ basis)[:, keep], l[keep]
    m = len(z) // 2
    products = z[:, :, None] * z[:, None, :]
    want = float(2 * l.sum() / m + ((2 / m) * products.var(0) / (l[:, None] + l[None, :]) / 2).sum())
    values = []
    for _ in range(40):
        order = torch.randperm(len(z))
        values.append(frechet_distance(moments(z[order[:m]]), moments(z[order[m : 2 * m]])))
    assert float(np.mean(values)) == pytest.approx(want, rel=0.05)


def test_running_sums_are_the_moments_and_merge():
    x = features(1001, 30, 3)
    whole, one, two = Sums(30), Sums(30), Sums(30)
    for part in x.split(128):
        whole.add(part)
    one.add(x[:400])
    two.add(x[400:])
    one.merge(two)
    direct = moments(x)
    for sums in (whole, one):
        got = sums.moments()
        assert got.n == 1001
        assert torch.allclose(got.mean, direct.mean, rtol=1e-13)
        assert torch.allclose(got.covariance, direct.covariance, rtol=1e-11, atol=1e-14)
    assert whole.vector.dtype == torch.float64
    assert whole.vector.numel() == 1 + 30 + 900  # whatever n


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_images_are_refused(n):
    sums = Sums(3)
    sums.add(torch.zeros(n, 3))
    for call in (sums.moments, lambda: moments(torch.zeros(n, 3))):
        with pytest.raises(ValueError, match="at least 2 images"):
            call()


def test_nan_is_refused_by_index_and_not_averaged_away():
    x = torch.zeros(9, 4)
    x[5, 2], x[7, 0] = float("nan"), float("inf")
    for call in (moments, Sums(4).add):
        with pytest.raises(ValueError, match="image 5, 7 contain NaN"):
            call(x)
    with pytest.raises(ValueError, match="image 105, 107 "):
        refuse_nan(x, first=100)
    x[:] = float("nan")
    with pytest.raises(ValueError, match="image 0, 1, 2, 3, 4, … contain"):
        refuse_nan(x)


def test_features_of_two_extractors_do_not_compare():
    for a, b in itertools.permutations((moments(torch.randn(9, 4)), moments(torch.randn(9, 5)))):
        with pytest.raises(ValueError, match="sizes of the features differ"):
            frechet_distance(a, b)
