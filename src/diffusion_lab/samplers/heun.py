"""Heun's method along the curve (α, σ), with the stochastic churn of EDM."""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.gaussian import transition
from diffusion_lab.samplers.base import EvaluationContext, Sampler
from diffusion_lab.schedules import Schedule


class Heun(Sampler):
    """The trapezoidal rule for dx = x̂_0 dα + ε̂ dσ (Karras et al. 2022, algorithms 1 and 2). Second order, 2N − 1 evaluations.

    An Euler step to s, then the estimates at t and s averaged; the step into data is an Euler step. The rule is applied along
    (α, σ) instead of t: on EDM's curve it is the published method, on the straight line Heun's method of flow matching. It
    needs no derivative, so that α = 0 and t = 0 are not special cases. The state is kept in float64.

    Churn: if σ/α is in [s_min, s_max], a forward step before the solver's step raises the state to the time t̂ at which σ/α is
    (1 + γ) times as large, γ = min(s_churn/N, √2 − 1), with noise of s_noise times the standard deviation of the forward process.
    t̂ is at most 1, the largest time in training; the published code exceeds it, but not with any published s_max.

    Args:
        steps: N, the number of steps; None: every step of the schedule.
        grid: the time grid.
        budget: maximal number of network evaluations; replaces `steps`. The last step is an Euler step if the budget ends there.
        s_churn: amount of noise renewed over all steps, in [0, 100000]; 0 is deterministic.
        s_min: the smallest σ/α with churn.
        s_max: the largest σ/α with churn.
        s_noise: factor on the noise, in [0, 10]; slightly above 1 compensates for detail that the network removes.

    Raises:
        ConfigError: a churn argument outside its range.
    """

    def __init__(
        self,
        steps: int | None = 18,
        grid: str = "linspace",
        budget: int | None = None,
        s_churn: float = 0.0,
        s_min: float = 0.0,
        s_max: float = math.inf,
        s_noise: float = 1.0,
    ) -> None:
        super().__init__(steps, grid, budget)
        check_number("sampler.s_churn", s_churn, "[0, 100000]", "0 is deterministic, the published values are up to 80")
        check_number("sampler.s_min", s_min, "[0, inf)")
        check_number("sampler.s_max", s_max, "[0, inf]", ".inf for no bound")
        check_number("sampler.s_noise", s_noise, "[0, 10]", "the published values are 1 to 1.01")
        if s_min > s_max:
            raise ConfigError(f"sampler=heun needs s_min <= s_max, not s_min={s_min}, s_max={s_max}")
        self.budget = budget
        self.s_churn, self.s_min, self.s_max, self.s_noise = s_churn, s_min, s_max, s_noise

    @property
    def deterministic(self) -> bool:
        return self.s_churn == 0

    def steps_for_budget(self, budget: int) -> int:
        return (budget + 1) // 2

    def integrate(
        self,
        x: Float[Tensor, "b c h w"],
        times: Float64[Tensor, " n_plus_1"],
        context: EvaluationContext,
        steps: Iterable[int],
    ) -> Float[Tensor, "b c h w"]:
        dtype, x = x.dtype, x.double()
        raised = self._raised(context.schedule, times[:-1]) if self.s_churn else times[:-1]
        forward = transition(context.schedule, raised, times[:-1])
        scale, std = forward.alpha.tolist(), (self.s_noise * forward.variance.clamp(min=0).sqrt()).tolist()
        alpha, sigma = (v.tolist() for v in context.schedule.alpha_sigma(raised))
        alpha_s, sigma_s = (v.tolist() for v in context.schedule.alpha_sigma(times[1:]))
        for i in steps:
            t, s = raised[i], times[i + 1]
            if self.s_churn and t > times[i]:
                x = scale[i] * x + std[i] * context.noise(i)
            at_t = context.predict(i, x, t, s)
            euler = alpha_s[i] * at_t.x0 + sigma_s[i] * at_t.noise
            if s == 0 or (self.budget is not None and context.nfe >= self.budget):
                x = euler
                continue
            at_s = context(euler, s)
            x = x + (alpha_s[i] - alpha[i]) / 2 * (at_t.x0 + at_s.x0)
            x = x + (sigma_s[i] - sigma[i]) / 2 * (at_t.noise + at_s.noise)
        return x.to(dtype)

    def _raised(self, schedule: Schedule, times: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
        """Return t̂ of every step."""
        # N of the whole grid, also on a segment
        gamma = min(self.s_churn / (self.steps or len(times)), math.sqrt(2) - 1)
        lam = schedule.lam(times)
        raised = schedule.time(lam - math.log1p(gamma))
        inside = ((-lam).exp() >= self.s_min) & ((-lam).exp() <= self.s_max) & (raised > times)
        return torch.where(inside, raised, times)
