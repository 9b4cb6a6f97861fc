"""Euler's method along the curve (α, σ)."""

from collections.abc import Iterable

from torch import Tensor

from diffusion_lab.samplers.base import EvaluationContext, Sampler


class Euler(Sampler):
    """dx = x̂_0 dα + ε̂ dσ with x̂_0 and ε̂ frozen over a step, so that x_s = α_s x̂_0 + σ_s ε̂. First order.

    The probability-flow ODE dx/dt = α̇ x̂_0 + σ̇ ε̂ is stepped along (α, σ) instead of t: how the curve is parametrised does not
    matter, and neither do the ends where a derivative is infinite (σ̇ at t = 0, σ/α at α = 0). On EDM's curve it is Euler's
    method of Karras et al. 2022 (x_s = x + (σ_s − σ_t) ε̂), on the straight line that of flow matching, and on every curve
    DDIM with η = 0. The step into data is x̂_0.

    Args:
        steps: how many; None is every step of the schedule.
        grid: the time grid.
        budget: network evaluations, instead of `steps`; one a step.
    """

    deterministic = True

    def __init__(self, steps: int | None = 50, grid: str = "trailing", budget: int | None = None) -> None:
        super().__init__(steps, grid, budget)

    def integrate(self, x: Tensor, times: Tensor, context: EvaluationContext, steps: Iterable[int]) -> Tensor:
        alpha, sigma = (v.tolist() for v in context.schedule.alpha_sigma(times))
        for i in steps:
            x0, noise, *_ = context.predict(i, x, times[i], times[i + 1])
            x = alpha[i + 1] * x0 + sigma[i + 1] * noise
        return x
