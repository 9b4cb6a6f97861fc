"""Objectives: which linear combination y = a_t x_0 + b_t ε the network outputs, and the 2×2 solve that inverts it.

With x_t = α x_0 + σ ε and D = αb − σa,

    x̂_0 = (b x_t − σ y)/D,    ε̂ = (α y − a x_t)/D,

so an error Δy is Δε = (α/D) Δy on the noise and Δx_0 = −(σ/D) Δy on the data: every weighting can be stated once, on ε.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_lab.errors import ConfigError
from diffusion_lab.schedules import Scalars, Schedule, append_dims_like, cast_like, noise_level


class Prediction(NamedTuple):
    """What the network says of x_t once its output is solved for x_0 and ε, each (B, C, H, W) in x_t's dtype."""

    x0: Tensor  # x̂_0, clipped if the denoiser clips
    noise: Tensor  # ε̂, derived again from the clipped x̂_0
    output: Tensor  # y, before any clipping
    extra: Tensor | None = None  # the network's channels beyond C: a learned variance, a second head
    unclipped: Tensor | None = None  # ε̂ as `extra` belongs to it: unclipped, unguided; None where `noise` is that
    gradient: Tensor | None = None  # s ∇ log p(y | x_t), which ancestral steps add Σ times; None without such guidance


class Objective(ABC):
    """A pair of coefficients (a_t, b_t). A new objective gives `coefficients`, and `check` if a curve breaks it.

    Args:
        scale_input: divide x_t by its standard deviation √(α²σ_d² + σ²) before the network sees it. Curves with α = 1, whose
            x_t reaches σ_max, want it; where α² + σ² = 1 it does little.
        sigma_data: σ_d > 0, the standard deviation of the data; 0.5 is EDM's for images in [−1, 1].

    Raises:
        ValueError: σ_d that is not positive.
    """

    def __init__(self, scale_input: bool = False, sigma_data: float = 0.5) -> None:
        if not 0 < sigma_data < math.inf:
            raise ConfigError(
                f"objective.sigma_data={sigma_data}: write the data's standard deviation, above 0 (EDM: 0.5)"
            )
        self.scale_input, self.sigma_data = scale_input, sigma_data

    @abstractmethod
    def coefficients(self, schedule: Schedule, t: Scalars) -> tuple[Scalars, Scalars]:
        """(a, b) of y = a x_0 + b ε at times t of any shape, in t's dtype or float32, whichever is wider."""

    def input_scale(self, schedule: Schedule, t: Scalars) -> Scalars:
        """What x_t is multiplied by before the network sees it: 1, or 1/√(α²σ_d² + σ²)."""
        return cast_like(1 / self._deviation(schedule, t) if self.scale_input else torch.ones_like(t), t)

    def _deviation(self, schedule: Schedule, t: Scalars) -> Scalars:
        """√(α²σ_d² + σ²), the standard deviation of x_t, in float64."""
        alpha, sigma = schedule.alpha_sigma(t.double())
        return ((self.sigma_data * alpha).square() + sigma.square()).sqrt()

    def conditioning(self, schedule: Schedule, t: Scalars) -> Scalars:
        """What the network is told of the time."""
        return schedule.conditioning(t)

    def determinant(self, schedule: Schedule, t: Scalars) -> Scalars:
        """D = αb − σa."""
        alpha, sigma = schedule.alpha_sigma(t)
        a, b = self.coefficients(schedule, t)
        return alpha * b - sigma * a

    def check(self, schedule: Schedule) -> None:  # noqa: B027 most objectives work on every curve
        """Raise ValueError, with the remedy, where this objective cannot work on that curve."""

    def target(self, schedule: Schedule, t: Scalars, x0: Tensor, noise: Tensor) -> Tensor:
        """y = a x_0 + b ε, the regression target; x0 and noise (B, …), t 0-d or (B,)."""
        a, b = self.coefficients(schedule, t.double())
        return append_dims_like(a, x0) * x0 + append_dims_like(b, x0) * noise

    def solve(self, schedule: Schedule, t: Scalars, x_t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(x̂_0, ε̂) from the state and the network's output, both (B, …); t 0-d or (B,), t > 0."""
        t = (
            t.double()
        )  # coefficients in float64, then rounded once: D of pred_mean is a difference of nearly equal numbers
        alpha, sigma = schedule.alpha_sigma(t)
        a, b = self.coefficients(schedule, t)
        d = self.determinant(schedule, t)
        x0 = append_dims_like(b / d, x_t) * x_t - append_dims_like(sigma / d, x_t) * y
        noise = append_dims_like(alpha / d, x_t) * y - append_dims_like(a / d, x_t) * x_t
        return x0, noise


class PredNoise(Objective):
    """y = ε (Ho et al. 2020, eq. 14)."""

    def coefficients(self, schedule: Schedule, t: Scalars) -> tuple[Scalars, Scalars]:
        alpha, _ = schedule.alpha_sigma(t)
        return torch.zeros_like(alpha), torch.ones_like(alpha)

    def check(self, schedule: Schedule) -> None:
        if schedule.zero_terminal_snr:
            raise ConfigError(
                "objective=pred_noise cannot start from a schedule that ends in alpha = 0 (flow, zero terminal SNR): x_t is the "
                "noise there and says nothing of x_0; write objective=pred_v or objective=pred_flow"
            )


class PredX0(Objective):
    """y = x_0."""

    def coefficients(self, schedule: Schedule, t: Scalars) -> tuple[Scalars, Scalars]:
        alpha, _ = schedule.alpha_sigma(t)
        return torch.ones_like(alpha), torch.zeros_like(alpha)


class PredV(Objective):
    """y = v = α ε − σ x_0 (Salimans & Ho 2022, section 4)."""

    def coefficients(self, schedule: Schedule, t: Scalars) -> tuple[Scalars, Scalars]:
        alpha, sigma = schedule.alpha_sigma(t)
        return -sigma, alpha


class PredFlow(Objective):
    """y = ε − x_0, the velocity of the straight line from data to noise (Liu et al. 2022; Lipman et al. 2022); D = α + σ.

    Papers that run t from noise to data have the other sign. On the curve `flow` it is dx/dt; on others a mixture as any.
    """

    def coefficients(self, schedule: Schedule, t: Scalars) -> tuple[Scalars, Scalars]:
        alpha, _ = schedule.alpha_sigma(t)
        return -torch.ones_like(alpha), torch.ones_like(alpha)


class EDM(Objective):
    """The preconditioning of Karras et al. 2022, table 1, as a linear map: y = (x_0 − c_skip x_t)/c_out on any curve.

    With s = σ/α, c_skip = σ_d²/(s² + σ_d²) and c_out = sσ_d/√(s² + σ_d²), x_t/α for their state; hence, n = √(α²σ_d² + σ²),
    a = σ/(σ_d n), b = −ασ_d/n, D = −n/σ_d. Input and target have variance 1 at every t. With σ_d = 1 y is −v/√(α² + σ²).
    The input is always scaled by 1/n, and the network is told ln(s)/4.

    Args:
        sigma_data: σ_d > 0, the standard deviation of the data.

    Raises:
        ValueError: σ_d that is not positive.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        super().__init__(scale_input=True, sigma_data=sigma_data)

    def coefficients(self, schedule: Schedule, t: Scalars) -> tuple[Scalars, Scalars]:
        alpha, sigma = schedule.alpha_sigma(t.double())
        n = self._deviation(schedule, t)
        return cast_like(sigma / (self.sigma_data * n), t), cast_like(-alpha * self.sigma_data / n, t)

    def determinant(self, schedule: Schedule, t: Scalars) -> Scalars:
        return cast_like(-self._deviation(schedule, t) / self.sigma_data, t)

    def conditioning(self, schedule: Schedule, t: Scalars) -> Scalars:
        return noise_level(schedule, t)

    def check(self, schedule: Schedule) -> None:
        if schedule.zero_terminal_snr:
            raise ConfigError(
                "objective=edm tells the network ln(sigma/alpha), which is infinite where a schedule ends in alpha = 0 (flow, "
                "zero terminal SNR); write objective=pred_v or objective=pred_flow"
            )


class PredMean(Objective):
    """y = μ̃, the mean of q(x_s | x_t, x_0) one training step below: s = t − 1/T (Ho et al. 2020, eq. 7, their first option).

    The pair (t, s) is the training pair also when sampling is strided. μ̃ = c_1 x_t + c_0 x_0, hence a = c_0 + c_1 α and
    b = c_1 σ, D = −σ c_0. 1/c_0 reaches thousands at t = 1, which amplifies the network's error as much.
    """

    def coefficients(self, schedule: Schedule, t: Scalars) -> tuple[Scalars, Scalars]:
        wide = t.double()
        c1, c0 = self._mean(schedule, wide)
        alpha, sigma = schedule.alpha_sigma(wide)
        return cast_like(c0 + c1 * alpha, t), cast_like(c1 * sigma, t)

    def determinant(self, schedule: Schedule, t: Scalars) -> Scalars:
        wide = t.double()
        _, c0 = self._mean(schedule, wide)
        return cast_like(-schedule.alpha_sigma(wide)[1] * c0, t)

    def check(self, schedule: Schedule) -> None:
        self._step(schedule)

    @staticmethod
    def _step(schedule: Schedule) -> float:
        if schedule.steps is None:
            raise ConfigError(
                "objective=pred_mean needs a schedule with steps (linear, cosine, …); write objective=pred_v"
            )
        return 1 / schedule.steps

    def _mean(self, schedule: Schedule, t: Scalars) -> tuple[Scalars, Scalars]:
        """(c_1, c_0) of the training pair, t in float64: c_1 = α_{t|s} σ_s²/σ_t², c_0 = α_s σ²_{t|s}/σ_t² (see gaussian.py)."""
        alpha_t, sigma_t = schedule.alpha_sigma(t)
        alpha_s, sigma_s = schedule.alpha_sigma((t - self._step(schedule)).clamp(min=0))
        ratio, shrink = alpha_t / alpha_s, (sigma_s / sigma_t).square()
        return ratio * shrink, alpha_s * (1 - ratio.square() * shrink)
