"""Heun's method along the curve (α, σ), with the churn of EDM."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from diffusion_lab.errors import ConfigError
from diffusion_lab.gaussian import transition
from diffusion_lab.samplers.base import EvaluationContext, Sampler
from diffusion_lab.schedules import Schedule


class Heun(Sampler):
    """The trapezoidal rule for dx = x̂_0 dα + ε̂ dσ (Karras et al. 2022, algorithms 1 and 2). Second order, 2N − 1 evaluations.

    Euler's step to s, then both estimates averaged with those at s; the step into data is Euler's alone. The rule runs along
    (α, σ) instead of t: on EDM's curve it is the published method, on the straight line Heun's method of flow matching, and
    it needs no derivative, so that α = 0 and t = 0 are times like others. The state is kept in float64.

    Churn, inside [s_min, s_max] of σ/α: before a step the state goes up by the forward process to the time t̂ where σ/α is
    (1 + γ) times as large, γ = min(s_churn/N, √2 − 1), with noise of s_noise times the right spread. t̂ ends at 1, where the
    network was trained last; the published code goes beyond, though with no published s_max does it.

    Args:
        steps: N; None is every step of the schedule.
        grid: the time grid.
        budget: network evaluations, instead of `steps`; where they are spent the last step is Euler's.
        s_churn: how much noise is renewed over all steps; 0 is deterministic.
        s_min: the least σ/α with churn.
        s_max: the largest σ/α with churn.
        s_noise: the factor on the noise; a little over 1 makes up for detail that networks remove.

    Raises:
        ConfigError: an argument of the churn outside its range.
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
        if not (0 <= s_churn < math.inf and 0 <= s_min <= s_max and 0 <= s_noise < math.inf):
            raise ConfigError(
                "sampler=heun needs s_churn >= 0, 0 <= s_min <= s_max and s_noise >= 0, not "
                f"s_churn={s_churn}, s_min={s_min}, s_max={s_max}, s_noise={s_noise}; s_churn=0 is deterministic"
            )
        self.budget = budget
        self.s_churn, self.s_min, self.s_max, self.s_noise = s_churn, s_min, s_max, s_noise

    @property
    def deterministic(self) -> bool:
        return self.s_churn == 0

    def steps_for_budget(self, budget: int) -> int:
        return (budget + 1) // 2

    def integrate(self, x: Tensor, times: Tensor, context: EvaluationContext, steps: Iterable[int]) -> Tensor:
        given, x = x.dtype, x.double()
        begins = self._raised(context.schedule, times[:-1]) if self.s_churn else times[:-1]
        up = transition(context.schedule, begins, times[:-1])
        grown, spread = up.alpha.tolist(), (self.s_noise * up.variance.clamp(min=0).sqrt()).tolist()
        alpha, sigma = (v.tolist() for v in context.schedule.alpha_sigma(begins))
        alpha_s, sigma_s = (v.tolist() for v in context.schedule.alpha_sigma(times[1:]))
        for i in steps:
            t, s = begins[i], times[i + 1]
            if self.s_churn and t > times[i]:
                x = grown[i] * x + spread[i] * context.noise(i)
            here = context.predict(i, x, t, s)
            euler = alpha_s[i] * here.x0 + sigma_s[i] * here.noise
            if s == 0 or (self.budget is not None and context.nfe >= self.budget):
                x = euler
                continue
            there = context(euler, s)
            x = x + (alpha_s[i] - alpha[i]) / 2 * (here.x0 + there.x0)
            x = x + (sigma_s[i] - sigma[i]) / 2 * (here.noise + there.noise)
        return x.to(given)

    def _raised(self, schedule: Schedule, times: Tensor) -> Tensor:
        """t̂ of every step."""
        gamma = min(self.s_churn / (self.steps or len(times)), math.sqrt(2) - 1)  # N also on a part of the way
        lam = schedule.lam(times)
        raised = schedule.time(lam - math.log1p(gamma))
        inside = ((-lam).exp() >= self.s_min) & ((-lam).exp() <= self.s_max) & (raised > times)
        return torch.where(inside, raised, times)
