"""The optimal variance, from Cov[x_0 | x_t]: estimated on the data for each t, or predicted by a second head."""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffusion_lab.errors import ConfigError, check_numbers
from diffusion_lab.objectives import Prediction
from diffusion_lab.schedules import PerExample, Scalars, Schedule, append_dims_like
from diffusion_lab.variances.base import FromExtra, StepVariance, Variance, floor_is_variance, to_float64

MIN_LAMBDA = -math.log(32)  # ln(α/σ) at which a second head stands for α = 0: w is still a thousandth of c


def gain(schedule: Schedule, t: Scalars, s: Scalars, floor: Float64[Tensor, "*#shape"]) -> Float64[Tensor, "*shape"]:
    """Return (α_s − √(σ_s² − floor) α_t/σ_t)², the factor of Cov[x_0 | x_t] in σ²; 0 where σ² is the floor."""
    (alpha_t, alpha_s), (sigma_t, sigma_s) = schedule.alpha_sigma(torch.stack([t.double(), s.double()]))
    direction = (sigma_s.square() - floor).clamp(min=0).sqrt()
    slope = alpha_s - direction * alpha_t / sigma_t
    return torch.where(floor_is_variance(s, floor), 0.0, slope.square())


class Analytic(Variance):
    """c = clip((σ²/α²)(1 − m_t), 0, 1), m_t = E mean(ε̂²): the optimal variance with one value for each t.

    Bao et al. 2022, theorem 1 and its bounds for data in [−1, 1]. The same moments serve every stride, DDPM, and DDIM with any
    η. Between two fitted times c is linear in t. Below the first time m is constant; above the last c is constant, which also
    covers a time with α = 0, where ε̂ is independent of x_0.

    Args:
        times: (N,), increasing in (0, 1].
        moments: (N,), m at these times, of the EMA network without clipping.

    Raises:
        ConfigError: an argument is missing or malformed.
    """

    max_final_noise = 1.0

    def __init__(
        self,
        times: Float[Tensor, " n"] | Sequence[float] | None = None,
        moments: Float[Tensor, " n"] | Sequence[float] | None = None,
    ) -> None:
        if times is None or moments is None:
            raise ConfigError(
                "variance=analytic is fitted to a trained network: train with variance=fixed_small, then run "
                "python src/fit_variance.py ckpt=PATH variance=analytic"
            )
        for name, values in (("times", times), ("moments", moments)):
            if not isinstance(values, Tensor):
                check_numbers(f"variance.{name}", values, "(0, 1]" if name == "times" else "[-1e6, 1e6]")
        self.times, self.moments = (torch.as_tensor(v, dtype=torch.float64).cpu() for v in (times, moments))
        if self.times.ndim != 1 or self.times.shape != self.moments.shape or len(self.times) == 0:
            raise ConfigError(
                f"variance=analytic needs as many moments as times and at least one of each, and has {self.times.numel()} times "
                f"and {self.moments.numel()} moments"
            )
        inside = self.times[0] > 0 and self.times[-1] <= 1
        if not bool(inside and (self.times.diff() > 0).all() and self.moments.isfinite().all()):
            raise ConfigError("variance=analytic needs times that increase in (0, 1], and finite moments")

    def covariance(self, schedule: Schedule, t: Scalars) -> Float64[Tensor, "*shape"]:
        """Return c in [0, 1] at times t of any shape."""
        t = t.double().contiguous()
        usable = len(self.times) - (schedule.zero_terminal_snr and len(self.times) > 1 and float(self.times[-1]) == 1)
        times, moments = self.times[:usable].to(t.device), self.moments[:usable].to(t.device)
        upper = torch.searchsorted(times, t).clamp(max=usable - 1)
        lower = (upper - 1).clamp(min=0)
        ends = torch.stack([times[lower], torch.where(upper == 0, t.minimum(times[0]), times[upper])])
        alpha, sigma = schedule.alpha_sigma(ends)
        c = ((sigma / alpha).square() * (1 - moments[torch.stack([lower, upper])])).clamp(0, 1)
        low, high = torch.where(alpha > 0, c, 1.0)
        width = times[upper] - times[lower]
        weight = torch.where(width > 0, ((t - times[lower]) / width).clamp(0, 1), 1.0)
        return torch.lerp(low, high, weight)

    def __call__(
        self, schedule: Schedule, t: PerExample, s: PerExample, prediction: Prediction, floor: PerExample | float = 0.0
    ) -> StepVariance:
        floor64 = to_float64(floor, s)
        return append_dims_like(floor64 + gain(schedule, t, s, floor64) * self.covariance(schedule, t), prediction.x0)


class FromHead(FromExtra):
    """c = clip((σ²/α²) w, 0, 1) of each element, w from a second head on a frozen network.

    Bao et al. 2022, "Estimating the optimal covariance with imperfect mean in diffusion probabilistic models". At α = 0 w is 0
    and does not determine c. Cov[x_0 | x_t] is continuous there, so w is evaluated at the time with α/σ = 1/32 (`extra_time`):
    on Gaussian data of variance v its c is smaller by a fraction v/1024.
    """

    max_final_noise = 1.0

    @property
    def remedy(self) -> str:  # type: ignore[override]
        return (
            f"run python src/fit_variance.py ckpt=PATH variance={self.kind} to train them; sample.py and evaluate.py then load "
            "them"
        )

    def extra_time(self, schedule: Schedule, t: Float64[Tensor, ""]) -> Float64[Tensor, ""] | None:
        return None if schedule.alpha_sigma(t)[0] > 0 else self._informative(schedule, t)

    def _informative(self, schedule: Schedule, t: PerExample) -> PerExample:
        """Return t, or where α = 0 the time with λ = `MIN_LAMBDA`."""
        return torch.where(schedule.alpha_sigma(t)[0] > 0, t, schedule.time(torch.full_like(t, MIN_LAMBDA)))

    @abstractmethod
    def scaled_covariance(self, prediction: Prediction) -> Float[Tensor, "b c h w"]:
        """Return w = (α²/σ²) Cov[x_0 | x_t] of each element."""

    def __call__(
        self, schedule: Schedule, t: PerExample, s: PerExample, prediction: Prediction, floor: PerExample | float = 0.0
    ) -> StepVariance:
        w, floor64 = self.scaled_covariance(prediction), to_float64(floor, s)
        alpha, sigma = schedule.alpha_sigma(self._informative(schedule, t.double()))
        ratio = append_dims_like(sigma / alpha, w)
        c = (ratio * (ratio * w)).clamp(0, 1)  # ratio² overflows float32 before ratio does, and ∞ · 0 is NaN
        return append_dims_like(floor64, w) + append_dims_like(gain(schedule, t, s, floor64), w) * c


class SN(FromHead):
    """w = g − ε̂², where the head g is trained on ε² ("squared noise") and ε̂ is unclipped and unguided."""

    kind = "sn"

    def scaled_covariance(self, prediction: Prediction) -> Float[Tensor, "b c h w"]:
        noise = prediction.noise if prediction.unclipped is None else prediction.unclipped
        return self.read(prediction) - noise.square()


class NPR(FromHead):
    """w = h, the head trained on (ε − ε̂)² ("noise prediction residual"); exact also where ε̂ is not the mean of ε."""

    kind = "npr"

    def scaled_covariance(self, prediction: Prediction) -> Float[Tensor, "b c h w"]:
        return self.read(prediction)
