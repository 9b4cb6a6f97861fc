"""The integration variable of the adaptive solver of the probability-flow ODE."""

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_lab.schedules import Schedule


class TimeParametrization:
    """A smooth variable u along the curve: t for a continuous schedule, the angle arctan(σ/α) for a table.

    A table is interpolated, so α̇ and σ̇ jump at every node. Integrated over t, a high-order solver then rejects most of its
    steps, and steps longer than a cell underestimate their error: with the exact denoiser of a mixture the error is 1e-3 at a
    tolerance of 1e-5, compared with 6e-5 at half the evaluations over the angle. All tables have α² + σ² = 1, so
    dx/du = −σ x̂_0 + α ε̂ is smooth over the angle, and finite at α = 0.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.angle = schedule, schedule.steps is not None

    def at(self, t: float) -> float:
        """Return u at time t ∈ [0, 1]."""
        if not self.angle:
            return t
        alpha, sigma = self.schedule.alpha_sigma(torch.tensor(t, dtype=torch.float64))
        return float(torch.atan2(sigma, alpha))

    def time(self, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return t at u."""
        return self.schedule.time(-u.tan().log()) if self.angle else u

    def tangent(self, u: Float[Tensor, "*shape"]) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
        """Return (dα/du, dσ/du) at u, the coefficients of dx/du = dα/du x̂_0 + dσ/du ε̂."""
        return (-u.sin(), u.cos()) if self.angle else self.schedule.derivatives(u)
