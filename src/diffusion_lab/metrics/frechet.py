"""Fréchet distance between Gaussians fitted to two sets of features."""

import torch

from diffusion_lab.errors import ConfigError
from diffusion_lab.metrics.moments import Moments, moments

__all__ = ["Moments", "frechet_distance", "moments"]


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) (Dowson & Landau 1982; Heusel et al. 2017, eq. 6), in float64.

    Raises:
        ConfigError: if the sizes of the features differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ConfigError(
            f"the sizes of the features differ ({len(a.mean)} and {len(b.mean)}): compute both with the same extractor"
        )
    # tr (Σ_a Σ_b)^½ from the eigenvalues of Σ_a^½ Σ_b Σ_a^½, which is symmetric: the root is real, also for singular covariances.
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)
