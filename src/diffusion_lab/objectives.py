"""Objectives: the linear combination y = a_t x_0 + b_t ε that the network outputs, and the 2×2 solve that inverts it.

With x_t = α x_0 + σ ε and D = αb − σa,

    x̂_0 = (b x_t − σ y)/D,    ε̂ = (α y − a x_t)/D,

so an error Δy of the output is Δε = (α/D) Δy on the noise and Δx_0 = −(σ/D) Δy on the data. Every weighting is therefore
stated once, on ε.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.schedules import PerExample, Scalars, Schedule, append_dims_like, cast_like, noise_level


class Prediction(NamedTuple):
    """Predicted x_0 and ε at x_t, in x_t's dtype."""

    x0: Float[Tensor, "b c h w"]  # x̂_0, after clipping and `on_x0`
    noise: Float[Tensor, "b c h w"]  # ε̂, recomputed from x̂_0 where that was changed
    output: Float[Tensor, "b c h w"]  # y, before clipping
    extra: Float[Tensor, "b extra h w"] | None = None  # channels beyond C: a learned variance or a second head
    unclipped: Float[Tensor, "b c h w"] | None = None  # ε̂ that `extra` refers to, unclipped and unguided; None: `noise`
    gradient: Float[Tensor, "b c h w"] | None = None  # s ∇ log p(y | x_t); ancestral steps add Σ times it to the mean


class Objective(ABC):
    """A pair of coefficients (a_t, b_t). A subclass implements `coefficients`, and `check` if it does not work on every curve.

    Args:
        scale_input: divide the network's input x_t by its standard deviation √(α²σ_d² + σ²). Recommended on curves with α = 1,
            where x_t reaches the size of σ_max; where α² + σ² = 1 it has little effect.
        sigma_data: σ_d in [0.001, 1000], the standard deviation of the data; EDM uses 0.5 for images in [−1, 1].

    Raises:
        ConfigError: σ_d is out of range.
    """

    def __init__(self, scale_input: bool = False, sigma_data: float = 0.5) -> None:
        check_number(
            "objective.sigma_data", sigma_data, "[0.001, 1000]", "the standard deviation of the data (EDM: 0.5)"
        )
        self.scale_input, self.sigma_data = scale_input, sigma_data

    @abstractmethod
    def coefficients(self, schedule: Schedule, t: Scalars) -> tuple[Scalars, Scalars]:
        """Return (a, b) of y = a x_0 + b ε at times t of any shape, in t's dtype, float32 at least."""

    def input_scale(self, schedule: Schedule, t: Scalars) -> Scalars:
        """Return the factor on x_t at the network's input: 1, or 1/√(α²σ_d² + σ²)."""
        return cast_like(1 / self._deviation(schedule, t) if self.scale_input else torch.ones_like(t), t)

    def _deviation(self, schedule: Schedule, t: Scalars) -> Scalars:
        """Return √(α²σ_d² + σ²), the standard deviation of x_t, in float64."""
        alpha, sigma = schedule.alpha_sigma(t.double())
        return ((self.sigma_data * alpha).square() + sigma.square()).sqrt()

    def conditioning(self, schedule: Schedule, t: Scalars) -> Scalars:
        """Return the time-conditioning input of the network at times t."""
        return schedule.conditioning(t)

    def determinant(self, schedule: Schedule, t: Scalars) -> Scalars:
        """Return D = αb − σa."""
        alpha, sigma = schedule.alpha_sigma(t)
        a, b = self.coefficients(schedule, t)
        return alpha * b - sigma * a

    def check(self, schedule: Schedule) -> None:  # noqa: B027 most objectives work on every curve
        """Raise ConfigError if this objective does not work on `schedule`."""

    def target(
        self, schedule: Schedule, t: PerExample, x0: Float[Tensor, "b *chw"], noise: Float[Tensor, "b *chw"]
    ) -> Float[Tensor, "b *chw"]:
        """Return y = a x_0 + b ε, the regression target."""
        a, b = self.coefficients(schedule, t.double())
        return append_dims_like(a, x0) * x0 + append_dims_like(b, x0) * noise

    def solve(
        self, schedule: Schedule, t: PerExample, x_t: Float[Tensor, "b *chw"], y: Float[Tensor, "b *chw"]
    ) -> tuple[Float[Tensor, "b *chw"], Float[Tensor, "b *chw"]]:
        """Return (x̂_0, ε̂) from the state x_t and the network's output y at times t > 0."""
        # coefficients in float64, rounded once: D of pred_mean is a difference of nearly equal numbers
        t = t.double()
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
                "objective=pred_noise does not work on a schedule that ends in alpha = 0 (flow, zero terminal SNR), where x_t is "
                "pure noise and epsilon does not determine x_0: write objective=pred_v or objective=pred_flow"
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

    Papers with t from noise to data use the opposite sign. On the curve `flow` y is dx/dt.
    """

    def coefficients(self, schedule: Schedule, t: Scalars) -> tuple[Scalars, Scalars]:
        alpha, _ = schedule.alpha_sigma(t)
        return -torch.ones_like(alpha), torch.ones_like(alpha)


class EDM(Objective):
    """The preconditioning of Karras et al. 2022, table 1, as a linear map: y = (x_0 − c_skip x_t)/c_out on any curve.

    With s = σ/α, c_skip = σ_d²/(s² + σ_d²) and c_out = sσ_d/√(s² + σ_d²), and x_t/α as their state. With n = √(α²σ_d² + σ²)
    this gives a = σ/(σ_d n), b = −ασ_d/n, D = −n/σ_d. Input and target have variance 1 at every t; for σ_d = 1 y is
    −v/√(α² + σ²). The input is always scaled by 1/n, and the time-conditioning input is ln(s)/4.

    Args:
        sigma_data: σ_d in [0.001, 1000], the standard deviation of the data.

    Raises:
        ConfigError: σ_d is out of range.
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
                "objective=edm conditions the network on ln(sigma/alpha), which is infinite on a schedule that ends in alpha = 0 "
                "(flow, zero terminal SNR): write objective=pred_v or objective=pred_flow"
            )


class PredMean(Objective):
    """y = μ̃, the mean of q(x_s | x_t, x_0) at s = t − 1/T, one training step below (Ho et al. 2020, eq. 7).

    Strided sampling uses the same pair (t, s). μ̃ = c_1 x_t + c_0 x_0 gives a = c_0 + c_1 α, b = c_1 σ, D = −σ c_0. 1/c_0 is in
    the thousands near t = 1 and amplifies the network's error by that factor.
    """

    def coefficients(self, schedule: Schedule, t: Scalars) -> tuple[Scalars, Scalars]:
        t64 = t.double()
        c1, c0 = self._mean(schedule, t64)
        alpha, sigma = schedule.alpha_sigma(t64)
        return cast_like(c0 + c1 * alpha, t), cast_like(c1 * sigma, t)

    def determinant(self, schedule: Schedule, t: Scalars) -> Scalars:
        t64 = t.double()
        _, c0 = self._mean(schedule, t64)
        return cast_like(-schedule.alpha_sigma(t64)[1] * c0, t)

    def check(self, schedule: Schedule) -> None:
        self._step(schedule)

    @staticmethod
    def _step(schedule: Schedule) -> float:
        """Return 1/T."""
        if schedule.steps is None:
            raise ConfigError(
                "objective=pred_mean needs a discrete schedule (linear, cosine, …), and this one is continuous: write "
                "objective=pred_v"
            )
        return 1 / schedule.steps

    def _mean(self, schedule: Schedule, t: Scalars) -> tuple[Scalars, Scalars]:
        """Return (c_1, c_0) of the training pair for t in float64: c_1 = α_{t|s} σ_s²/σ_t², c_0 = α_s σ²_{t|s}/σ_t²."""
        alpha_t, sigma_t = schedule.alpha_sigma(t)
        alpha_s, sigma_s = schedule.alpha_sigma((t - self._step(schedule)).clamp(min=0))
        ratio, shrink = alpha_t / alpha_s, (sigma_s / sigma_t).square()
        return ratio * shrink, alpha_s * (1 - ratio.square() * shrink)
