"""The Fréchet distance between Gaussians fitted to two sets of features."""

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Mean (D,) and covariance (D, D) of features, float64, and n, how many there were."""

    mean: Tensor
    covariance: Tensor
    n: int


def moments(features: Tensor) -> Moments:
    """Moments of features (N, D), the covariance with N − 1. Raises ValueError for fewer than 2."""
    if len(features) < 2:
        raise ValueError(f"a Fréchet distance needs at least 2 images in each set, not {len(features)}")
    x = features.double()
    return Moments(x.mean(0), torch.cov(x.T), len(x))


def frechet_distance(a: Moments, b: Moments) -> float:
    """‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) (Dowson & Landau 1982; Heusel et al. 2017, eq. 6), float64.

    tr (Σ_a Σ_b)^½ is the sum of the square roots of the eigenvalues of Σ_a^½ Σ_b Σ_a^½, which is symmetric: no complex matrix
    root, and singular covariances do no harm.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)
