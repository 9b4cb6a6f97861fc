"""Gaussians of the chain: the forward transition and the posterior of any pair of times s < t."""

from typing import NamedTuple

from torch import Tensor

from diffusion_lab.schedules import Schedule, Times, like, match


class Transition(NamedTuple):
    """q(x_t | x_s) = N(alpha x_s, variance I)."""

    alpha: Tensor  # α_{t|s} = α_t/α_s
    variance: Tensor  # σ²_{t|s} = σ_t² − α²_{t|s} σ_s²


class Posterior(NamedTuple):
    """q(x_s | x_t, x_0) = N(c1 x_t + c0 x_0, variance I)."""

    c1: Tensor  # α_{t|s} σ_s²/σ_t²
    c0: Tensor  # α_s σ²_{t|s}/σ_t²
    variance: Tensor  # σ̃² = σ²_{t|s} σ_s²/σ_t²

    def mean(self, x_t: Tensor, x0: Tensor) -> Tensor:
        """c_1 x_t + c_0 x_0 for x_t and x0 of shape (B, …)."""
        return match(self.c1, x_t) * x_t + match(self.c0, x_t) * x0


def transition(schedule: Schedule, t: Times, s: Times) -> Transition:
    """The forward step from s to t, 0 ≤ s < t ≤ 1, tensors of one shape; the result has t's dtype or float32.

    With s = t − 1/T the variance is β_t (Ho et al. 2020, eq. 2).
    """
    alpha_t, sigma_t = schedule.alpha_sigma(t.double())
    alpha_s, sigma_s = schedule.alpha_sigma(s.double())
    alpha = alpha_t / alpha_s
    return Transition(like(alpha, t), like(sigma_t.square() - (alpha * sigma_s).square(), t))


def posterior(schedule: Schedule, t: Times, s: Times) -> Posterior:
    """The reverse step from t to s given x_0, 0 ≤ s < t ≤ 1 (Ho et al. 2020, eq. 6–7, for any pair).

    Finite at both ends: s = 0 gives c_1 = 0, c_0 = 1, variance 0, and α_t = 0 gives c_1 = 0.
    """
    _, sigma_t = schedule.alpha_sigma(t.double())
    alpha_s, sigma_s = schedule.alpha_sigma(s.double())
    alpha, variance = transition(schedule, t.double(), s.double())
    shrink = (sigma_s / sigma_t).square()
    return Posterior(
        like(alpha * shrink, t), like(alpha_s * variance / sigma_t.square(), t), like(variance * shrink, t)
    )
