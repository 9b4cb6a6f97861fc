"""Mean and covariance of features from running sums, in memory that does not depend on the number of images."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffusion_lab.data.images import refuse_nan
from diffusion_lab.errors import ConfigError


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of the features of n images. n is None if it is unknown."""

    mean: Float64[Tensor, "d"]
    covariance: Float64[Tensor, "d d"]
    n: int | None


class Sums:
    """Running sums Σ 1, Σ x and Σ x xᵀ.

    Args:
        dim: the number of features D.
        device: device of the sums.

    Attributes:
        vector: all sums in one vector, which is reduced over processes at once; torchmetrics would reduce each state separately.
            It is float64, since the difference Σ x xᵀ − n μ μᵀ loses digits.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.dim = dim
        self.vector = torch.zeros(1 + dim + dim * dim, dtype=torch.float64, device=device)

    @property
    def n(self) -> int:
        """Number of images."""
        return int(self.vector[0])

    def add(self, features: Float[Tensor, "b d"]) -> None:
        """Add features. Raises ConfigError if they contain NaN or Inf."""
        refuse_nan(features)
        x = features.to(self.vector.device, torch.float64)
        count, first, second = self._parts()
        count += len(x)
        first += x.sum(0)
        second.addmm_(x.T, x)

    def merge(self, other: "Sums") -> None:
        """Add the sums of other images."""
        self.vector += other.vector.to(self.vector.device)

    def moments(self) -> Moments:
        """Return mean and covariance (divided by n − 1). Raises ConfigError if there are fewer than 2 images."""
        count, first, second = (part.cpu() for part in self._parts())
        n = int(count)
        refuse_few(n)
        mean = first / count
        return Moments(mean, (second - count * torch.outer(mean, mean)) / (count - 1), n)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        d = self.dim
        return self.vector[0], self.vector[1 : 1 + d], self.vector[1 + d :].view(d, d)


def moments(features: Float[Tensor, "n d"]) -> Moments:
    """Return the moments of features, with the covariance divided by n − 1.

    Raises:
        ConfigError: if there are fewer than 2 images, or features contain NaN or Inf.
    """
    refuse_few(len(features))
    refuse_nan(features)
    x = features.double()
    return Moments(x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1]), len(x))


def refuse_few(n: int, least: int = 2, of: str = "a Fréchet distance") -> None:
    """Raise ConfigError if n is less than `least`, the number of images that a metric needs."""
    if n < least:
        raise ConfigError(f"{of} needs at least {least} images in each set, not {n}: write at least n={least}")


def singular(n: int, dim: int) -> str | None:
    """Return a warning if the covariance of `dim` features of n images is singular, else None."""
    if n > dim:
        return None
    return f"n={n} images for {dim} features: the covariance is singular and the distance biased; write at least n={10 * dim}"
