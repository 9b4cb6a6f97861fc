"""The optimal variance, from the covariance of x_0 given x_t: measured, or predicted by a second head."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lab.errors import ConfigError
from diffusion_lab.objectives import Prediction
from diffusion_lab.schedules import Scalars, Schedule, append_dims_like
from diffusion_lab.variances.base import FromExtra, Variance, stands_for_all, wide


def gain(schedule: Schedule, t: Scalars, s: Scalars, floor: Tensor) -> Tensor:
    """(α_s − √(σ_s² − floor) α_t/σ_t)², what Cov[x_0 | x_t] is multiplied by; 0 where the floor stands for all. Float64."""
    (alpha_t, alpha_s), (sigma_t, sigma_s) = schedule.alpha_sigma(torch.stack([t.double(), s.double()]))
    direction = (sigma_s.square() - floor).clamp(min=0).sqrt()
    slope = alpha_s - direction * alpha_t / sigma_t
    return torch.where(stands_for_all(s, floor), 0.0, slope.square())


class Analytic(Variance):
    """c = clip((σ²/α²)(1 − m_t), 0, 1), m_t = E mean(ε̂²): the best variance that is one number for each t (Bao et al. 2022,
    theorem 1 and its bounds for data in [−1, 1]). The same numbers serve every stride, DDPM, and DDIM with any η.

    Between two fitted times c is linear in t; below the first m is that of the first, above the last c is that of the last,
    which also stands for a time with α = 0, where ε̂ is independent of x_0.

    Args:
        times: float (N,), increasing in (0, 1].
        moments: m at these times, of the raw averaged network without clipping.

    Raises:
        ConfigError: none given, or not of this form.
    """

    max_final_noise = 1.0

    def __init__(
        self, times: Tensor | Sequence[float] | None = None, moments: Tensor | Sequence[float] | None = None
    ) -> None:
        if times is None or moments is None:
            raise ConfigError(
                "variance=analytic is fitted to a trained network: train with variance=fixed_small, then "
                "python src/fit_variance.py ckpt=PATH variance=analytic"
            )
        self.times, self.moments = (torch.as_tensor(v, dtype=torch.float64).cpu() for v in (times, moments))
        if self.times.ndim != 1 or self.times.shape != self.moments.shape or len(self.times) == 0:
            raise ConfigError("variance=analytic needs as many moments as times, and at least one")
        inside = self.times[0] > 0 and self.times[-1] <= 1
        if not bool(inside and (self.times.diff() > 0).all() and self.moments.isfinite().all()):
            raise ConfigError("variance=analytic needs times that increase in (0, 1], and finite moments")

    def covariance(self, schedule: Schedule, t: Scalars) -> Tensor:
        """c in [0, 1] at times t of any shape, float64."""
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
        self, schedule: Schedule, t: Scalars, s: Scalars, prediction: Prediction, floor: Tensor | float = 0.0
    ) -> Tensor:
        least = wide(floor, s)
        return append_dims_like(least + gain(schedule, t, s, least) * self.covariance(schedule, t), prediction.x0)


class FromHead(FromExtra):
    """c of each element from a second head on a frozen network (Bao et al. 2022, "Estimating the optimal covariance with
    imperfect mean in diffusion probabilistic models"): c = clip((σ²/α²) w, 0, 1). At α = 0, where no head applies, c = 1.
    """

    max_final_noise = 1.0

    @property
    def remedy(self) -> str:  # type: ignore[override]
        return f"python src/fit_variance.py ckpt=PATH variance={self.kind} trains them; sample.py and evaluate.py find them"

    @abstractmethod
    def second(self, prediction: Prediction) -> Tensor:
        """w = (α²/σ²) Cov[x_0 | x_t] of each element."""

    def __call__(
        self, schedule: Schedule, t: Scalars, s: Scalars, prediction: Prediction, floor: Tensor | float = 0.0
    ) -> Tensor:
        w, least = self.second(prediction), wide(floor, s)
        alpha, sigma = schedule.alpha_sigma(t.double())
        known = alpha > 0
        ratio = torch.where(known, (sigma / alpha).square(), 0.0)
        c = (append_dims_like(ratio, w) * w + append_dims_like((~known).double(), w)).clamp(0, 1)
        return append_dims_like(least, w) + append_dims_like(gain(schedule, t, s, least), w) * c


class SN(FromHead):
    """w = g − ε̂², the head g having learned ε² ("squared noise"); ε̂ of the network itself, not clipped."""

    kind = "sn"

    def second(self, prediction: Prediction) -> Tensor:
        noise = prediction.noise if prediction.unclipped is None else prediction.unclipped
        return self.read(prediction) - noise.square()


class NPR(FromHead):
    """w = h, the head having learned (ε − ε̂)² ("noise prediction residual"): right also where ε̂ is not the mean of ε."""

    kind = "npr"

    def second(self, prediction: Prediction) -> Tensor:
        return self.read(prediction)
