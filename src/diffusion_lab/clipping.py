"""Thresholds for x̂_0, the option `clip` of a denoiser: applied once, after guidance and before `on_x0`."""

from jaxtyping import Float
from torch import Tensor

from diffusion_lab.errors import check_number
from diffusion_lab.schedules import append_dims_like, cast_like


class NoThreshold:
    """Return x̂_0 unchanged. A `Denoiser` replaces it by None, so that ε̂ is not recomputed.

    Attributes:
        identity: marks a threshold that changes nothing.
    """

    identity = True

    def __call__(self, x0: Float[Tensor, "b *chw"]) -> Float[Tensor, "b *chw"]:
        return x0


class StaticThreshold:
    """Clamp x̂_0 to [−limit, limit] (Ho et al. 2020, the published sampler).

    Args:
        limit: in (0, 1000]; images lie in [−1, 1].

    Raises:
        ConfigError: the limit is out of range.
    """

    def __init__(self, limit: float = 1.0) -> None:
        check_number("clip.limit", limit, "(0, 1000]", "images are in [-1, 1]; clip=none for no limit")
        self.limit = limit

    def __call__(self, x0: Float[Tensor, "b *chw"]) -> Float[Tensor, "b *chw"]:
        return x0.clamp(-self.limit, self.limit)


class DynamicThreshold:
    """Clamp each image to ±s, s ≥ 1 its quantile of |x̂_0|, and divide it by s (Saharia et al. 2022, section 2.3).

    Args:
        quantile: in (0, 1]; the published value is 0.995.
        maximum: upper bound of s, in [1, 1000]; None for no bound.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(self, quantile: float = 0.995, maximum: float | None = None) -> None:
        check_number("clip.quantile", quantile, "(0, 1]", "the published value is 0.995")
        check_number("clip.maximum", maximum, "[1, 1000]", "images are in [-1, 1]", optional=True)
        self.quantile, self.maximum = quantile, maximum

    def __call__(self, x0: Float[Tensor, "b *chw"]) -> Float[Tensor, "b *chw"]:
        size = cast_like(x0.abs().flatten(1), x0)  # float32 at least: torch.quantile does not support half precision
        s = append_dims_like(size.quantile(self.quantile, dim=1).clamp(1, self.maximum), x0)
        return x0.clamp(-s, s) / s
