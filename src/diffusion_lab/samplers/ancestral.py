"""Ancestral sampling (DDPM) and its non-Markovian family (DDIM), every step or strided."""

from collections.abc import Iterable

import torch
from torch import Tensor

from diffusion_lab.denoiser import Prediction
from diffusion_lab.gaussian import posterior
from diffusion_lab.samplers.base import Model, Sampler
from diffusion_lab.schedules import match
from diffusion_lab.variances import FixedSmall, Variance


class DDPM(Sampler):
    """Ancestral sampling x_s = c_1 x_t + c_0 x̂_0 + σ z (Ho et al. 2020, algorithm 2; strided as in Nichol & Dhariwal 2021).

    Args:
        steps: how many; None is every step of the schedule.
        variance: σ², the spread of a step.
        grid: the time grid.
        budget: network evaluations, instead of `steps`.
    """

    deterministic = False

    def __init__(
        self,
        steps: int | None = None,
        variance: Variance | None = None,
        grid: str = "linspace",
        budget: int | None = None,
    ) -> None:
        super().__init__(steps, grid, budget)
        self.variance = variance or FixedSmall()

    def integrate(self, x: Tensor, times: Tensor, model: Model, steps: Iterable[int]) -> Tensor:
        for i in steps:
            t, s = times[i], times[i + 1]
            prediction = model(x, t)
            model.report(i, t, x, prediction)
            q = posterior(model.schedule, t, s)
            x = q.mean(x, prediction.x0)
            if s > 0:  # the step into data adds no noise
                variance = self.variance(model.schedule, t, s, prediction, floor=q.variance)
                x = x + _root(variance, x) * model.noise(i)
        return x


class DDIM(Sampler):
    """x_s = α_s x̂_0 + √(σ_s² − η²σ̃²) ε̂ + σ z (Song et al. 2021, eq. 12), σ = ησ̃ unless the variance adds to it.

    η = 0 is deterministic and first order in the probability-flow ODE; η = 1 over all steps is DDPM with fixed_small.

    Args:
        steps: how many; None is every step of the schedule.
        eta: η in [0, 1].
        variance: the estimate that adds to the floor η²σ̃²; fixed_small adds nothing.
        grid: the time grid.
        budget: network evaluations, instead of `steps`.

    Raises:
        ValueError: η outside [0, 1], or a variance for ancestral steps only.
    """

    def __init__(
        self,
        steps: int | None = 50,
        eta: float = 0.0,
        variance: Variance | None = None,
        grid: str = "trailing",
        budget: int | None = None,
    ) -> None:
        super().__init__(steps, grid, budget)
        if not 0 <= eta <= 1:
            raise ValueError(f"sampler=ddim needs eta in [0, 1], not eta={eta}: 0 is deterministic, 1 is ancestral")
        self.eta, self.variance = eta, variance or FixedSmall()
        if self.variance.ancestral_only:
            raise ValueError(
                f"variance {type(self.variance).__name__} is for ancestral steps only: write sampler=ddpm or variance=fixed_small"
            )

    @property
    def deterministic(self) -> bool:
        return self.eta == 0 and isinstance(self.variance, FixedSmall)

    def integrate(self, x: Tensor, times: Tensor, model: Model, steps: Iterable[int]) -> Tensor:
        for i in steps:
            t, s = times[i], times[i + 1]
            if t == 0:  # encoding begins: no network was trained at t = 0, so ε̂ is that of the next time, and x is x_0
                prediction = model(x, s)._replace(x0=x)
            else:
                prediction = model(x, t)
            model.report(i, t, x, prediction)
            x = self._step(model, t, s, x, prediction, i)
        return x

    def _step(self, model: Model, t: Tensor, s: Tensor, x: Tensor, prediction: Prediction, i: int) -> Tensor:
        alpha_s, sigma_s = model.schedule.alpha_sigma(s)
        floor = torch.zeros_like(s) if self.deterministic else self.eta**2 * posterior(model.schedule, t, s).variance
        direction = (sigma_s.square() - floor).clamp(min=0).sqrt()
        out = match(alpha_s, x) * prediction.x0 + match(direction, x) * prediction.noise
        if self.deterministic or s == 0:
            return out
        variance = self.variance(model.schedule, t, s, prediction, floor=floor)
        return out + _root(variance, x) * model.noise(i)


def _root(variance: Tensor, x: Tensor) -> Tensor:
    """The standard deviation in x's dtype: 0-d, or of x's shape."""
    return variance.sqrt().to(x.dtype)
