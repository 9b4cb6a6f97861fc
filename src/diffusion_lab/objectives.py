"""Objectives: which linear combination y = a_t x_0 + b_t ε the network outputs, and the 2×2 solve that inverts it.

With x_t = α x_0 + σ ε and D = αb − σa,

    x̂_0 = (b x_t − σ y)/D,    ε̂ = (α y − a x_t)/D,

so an error Δy is Δε = (α/D) Δy on the noise and Δx_0 = −(σ/D) Δy on the data: every weighting can be stated once, on ε.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_lab.schedules import Schedule, Times, like, match


class Prediction(NamedTuple):
    """What the network says of x_t once its output is solved for x_0 and ε, each (B, C, H, W) in x_t's dtype."""

    x0: Tensor  # x̂_0, clipped if the denoiser clips
    noise: Tensor  # ε̂, derived again from the clipped x̂_0
    output: Tensor  # y, before any clipping
    extra: Tensor | None = None  # the network's channels beyond C: a learned variance, a second head


class Objective(ABC):
    """A pair of coefficients (a_t, b_t). A new objective gives `coefficients`, and `check` if a curve breaks it."""

    @abstractmethod
    def coefficients(self, schedule: Schedule, t: Times) -> tuple[Times, Times]:
        """(a, b) of y = a x_0 + b ε at times t of any shape, in t's dtype or float32, whichever is wider."""

    def input_scale(self, schedule: Schedule, t: Times) -> Times:
        """What x_t is multiplied by before the network sees it."""
        return like(torch.ones_like(t), t)

    def conditioning(self, schedule: Schedule, t: Times) -> Times:
        """What the network is told of the time."""
        return schedule.conditioning(t)

    def determinant(self, schedule: Schedule, t: Times) -> Times:
        """D = αb − σa."""
        alpha, sigma = schedule.alpha_sigma(t)
        a, b = self.coefficients(schedule, t)
        return alpha * b - sigma * a

    def check(self, schedule: Schedule) -> None:  # noqa: B027 most objectives work on every curve
        """Raise ValueError, with the remedy, where this objective cannot work on that curve."""

    def target(self, schedule: Schedule, t: Times, x0: Tensor, noise: Tensor) -> Tensor:
        """y = a x_0 + b ε, the regression target; x0 and noise (B, …), t 0-d or (B,)."""
        a, b = self.coefficients(schedule, t.double())
        return match(a, x0) * x0 + match(b, x0) * noise

    def solve(self, schedule: Schedule, t: Times, x_t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(x̂_0, ε̂) from the state and the network's output, both (B, …); t 0-d or (B,), t > 0."""
        t = (
            t.double()
        )  # coefficients in float64, then rounded once: D of pred_mean is a difference of nearly equal numbers
        alpha, sigma = schedule.alpha_sigma(t)
        a, b = self.coefficients(schedule, t)
        d = self.determinant(schedule, t)
        x0 = match(b / d, x_t) * x_t - match(sigma / d, x_t) * y
        noise = match(alpha / d, x_t) * y - match(a / d, x_t) * x_t
        return x0, noise


class PredNoise(Objective):
    """y = ε (Ho et al. 2020, eq. 14)."""

    def coefficients(self, schedule: Schedule, t: Times) -> tuple[Times, Times]:
        alpha, _ = schedule.alpha_sigma(t)
        return torch.zeros_like(alpha), torch.ones_like(alpha)

    def check(self, schedule: Schedule) -> None:
        if schedule.ends_in_noise:
            raise ValueError(
                "objective=pred_noise cannot start from a schedule that ends in alpha = 0 (zero terminal SNR): there x_t is the "
                "noise and says nothing of x_0; write objective=pred_v or objective=pred_x0, or schedule.zero_terminal_snr=false"
            )


class PredX0(Objective):
    """y = x_0."""

    def coefficients(self, schedule: Schedule, t: Times) -> tuple[Times, Times]:
        alpha, _ = schedule.alpha_sigma(t)
        return torch.ones_like(alpha), torch.zeros_like(alpha)


class PredV(Objective):
    """y = v = α ε − σ x_0 (Salimans & Ho 2022, section 4)."""

    def coefficients(self, schedule: Schedule, t: Times) -> tuple[Times, Times]:
        alpha, sigma = schedule.alpha_sigma(t)
        return -sigma, alpha


class PredMean(Objective):
    """y = μ̃, the mean of q(x_s | x_t, x_0) one training step below: s = t − 1/T (Ho et al. 2020, eq. 7, their first option).

    The pair (t, s) is the training pair also when sampling is strided. μ̃ = c_1 x_t + c_0 x_0, hence a = c_0 + c_1 α and
    b = c_1 σ, D = −σ c_0. 1/c_0 reaches thousands at t = 1, which amplifies the network's error as much.
    """

    def coefficients(self, schedule: Schedule, t: Times) -> tuple[Times, Times]:
        wide = t.double()
        c1, c0 = self._mean(schedule, wide)
        alpha, sigma = schedule.alpha_sigma(wide)
        return like(c0 + c1 * alpha, t), like(c1 * sigma, t)

    def determinant(self, schedule: Schedule, t: Times) -> Times:
        wide = t.double()
        _, c0 = self._mean(schedule, wide)
        return like(-schedule.alpha_sigma(wide)[1] * c0, t)

    def check(self, schedule: Schedule) -> None:
        self._step(schedule)

    @staticmethod
    def _step(schedule: Schedule) -> float:
        if schedule.steps is None:
            raise ValueError(
                "objective=pred_mean needs a schedule with steps (linear, cosine, …); write objective=pred_v"
            )
        return 1 / schedule.steps

    def _mean(self, schedule: Schedule, t: Times) -> tuple[Times, Times]:
        """(c_1, c_0) of the training pair, t in float64: c_1 = α_{t|s} σ_s²/σ_t², c_0 = α_s σ²_{t|s}/σ_t² (see gaussian.py)."""
        alpha_t, sigma_t = schedule.alpha_sigma(t)
        alpha_s, sigma_s = schedule.alpha_sigma((t - self._step(schedule)).clamp(min=0))
        ratio, shrink = alpha_t / alpha_s, (sigma_s / sigma_t).square()
        return ratio * shrink, alpha_s * (1 - ratio.square() * shrink)
