"""Mean and covariance of features from running sums, so that memory does not grow with the number of images."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_lab.data.images import refuse_nan
from diffusion_lab.errors import ConfigError


class Moments(NamedTuple):
    """Mean (D,) and covariance (D, D) of features, float64; n, how many there were, None where a file does not say."""

    mean: Tensor
    covariance: Tensor
    n: int | None


class Sums:
    """Σ 1, Σ x and Σ x xᵀ in float64: added to, merged, and reduced over processes as one vector.

    Args:
        dim: D, the number of features.
        device: where they are kept.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.dim = dim
        self.vector = torch.zeros(1 + dim + dim * dim, dtype=torch.float64, device=device)  # one reduction takes it all

    @property
    def n(self) -> int:
        """How many features were added."""
        return int(self.vector[0])

    def add(self, features: Tensor) -> None:
        """Adds features (B, D). ValueError: NaN or infinity among them."""
        refuse_nan(features)
        x = features.to(self.vector.device, torch.float64)
        count, first, second = self._parts()
        count += len(x)
        first += x.sum(0)
        second.addmm_(x.T, x)

    def merge(self, other: "Sums") -> None:
        """Adds the sums of other images."""
        self.vector += other.vector.to(self.vector.device)

    def moments(self) -> Moments:
        """Mean and covariance, the latter with n − 1. ValueError: fewer than 2 images."""
        count, first, second = (part.cpu() for part in self._parts())
        n = int(count)
        refuse_few(n)
        mean = first / count
        return Moments(mean, (second - count * torch.outer(mean, mean)) / (count - 1), n)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        d = self.dim
        return self.vector[0], self.vector[1 : 1 + d], self.vector[1 + d :].view(d, d)


def moments(features: Tensor) -> Moments:
    """Moments of features (N, D), the covariance with N − 1. ValueError: fewer than 2, or NaN among them."""
    refuse_few(len(features))
    refuse_nan(features)
    x = features.double()
    return Moments(x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1]), len(x))


def refuse_few(n: int, least: int = 2, of: str = "a Fréchet distance") -> None:
    """Raise ValueError for fewer images than a measure needs."""
    if n < least:
        raise ConfigError(f"{of} needs at least {least} images in each set, not {n}: write n={least} or more")


def singular(n: int, dim: int) -> str | None:
    """What to tell the user where n images cannot fill a covariance of `dim` features; None where they can."""
    if n > dim:
        return None
    return f"n={n} images for {dim} features: the covariance is singular and the distance biased; write n={10 * dim} or more"
