"""Thresholds for x̂_0: the option `clip` of a denoiser, applied once, after guidance and before known pixels."""

from torch import Tensor

from diffusion_lab.errors import ConfigError
from diffusion_lab.schedules import append_dims_like, cast_like


class NoThreshold:
    """Return x̂_0 unchanged. A `Denoiser` replaces it by None, so that ε̂ is not derived a second time.

    Attributes:
        identity: marks a threshold that changes nothing.
    """

    identity = True

    def __call__(self, x0: Tensor) -> Tensor:
        return x0


class StaticThreshold:
    """Clamp x̂_0 to [−limit, limit] (Ho et al. 2020, the published sampler).

    Args:
        limit: > 0; 1 is the range of the images.

    Raises:
        ConfigError: limit ≤ 0.
    """

    def __init__(self, limit: float = 1.0) -> None:
        if limit <= 0:
            raise ConfigError(f"clip static needs limit > 0, not limit={limit}")
        self.limit = limit

    def __call__(self, x0: Tensor) -> Tensor:
        return x0.clamp(-self.limit, self.limit)


class DynamicThreshold:
    """Clamp each image to its own quantile s of |x̂_0|, s ≥ 1, and divide by s (Saharia et al. 2022, section 2.3).

    Args:
        quantile: in (0, 1]; the published value is 0.995.
        maximum: an upper bound of s, at least 1, or None.

    Raises:
        ConfigError: an argument out of range.
    """

    def __init__(self, quantile: float = 0.995, maximum: float | None = None) -> None:
        if not 0 < quantile <= 1:
            raise ConfigError(f"clip dynamic needs a quantile in (0, 1], not {quantile}: the published value is 0.995")
        if maximum is not None and maximum < 1:
            raise ConfigError(f"clip dynamic needs maximum >= 1, not {maximum}: images lie in [-1, 1]")
        self.quantile, self.maximum = quantile, maximum

    def __call__(self, x0: Tensor) -> Tensor:
        size = cast_like(x0.abs().flatten(1), x0)  # float32 at least: torch has no quantile of half precision
        s = append_dims_like(size.quantile(self.quantile, dim=1).clamp(1, self.maximum), x0)
        return x0.clamp(-s, s) / s
