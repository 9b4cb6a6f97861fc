"""Multistep exponential integrators: a DDIM step, and a correction for the slope of x̂_0 from earlier estimates.

In λ = ln(α/σ) the probability-flow ODE is x_s = (σ_s/σ_t) x_t + σ_s ∫ e^λ x̂_0 dλ. With x̂_0 frozen that is the DDIM step
α_s x̂_0 + σ_s ε̂, exact also where λ is infinite; with a polynomial through earlier estimates it is that and a weighted sum of
their differences. So these solvers differ in weights alone: numbers, known before the first evaluation.
"""

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from diffusion_lab.errors import ConfigError
from diffusion_lab.samplers.base import EvaluationContext, Sampler
from diffusion_lab.schedules import Schedule


class Weights(NamedTuple):
    """What is added to a DDIM step from t to s; D_0 is the estimate of x_0 at t, D_j that of j steps before, D_s that at s."""

    predictor: Sequence[float] = ()  # on D_1 − D_0, D_2 − D_0, …
    corrector: Sequence[float] = ()  # on D_s − D_0, D_1 − D_0, …, in place of the predictor's once D_s is known


class Step(NamedTuple):
    """The coefficients of one step from t to s; h = λ_s − λ_t."""

    alpha: float  # α_s, on x̂_0
    keep: float  # σ_s, of the SDE σ_s e^−h, on ε̂
    spread: float  # 0, of the SDE σ_s √(1 − e^−2h), on new noise
    sigma_t: float
    weights: Weights


class Multistep(Sampler):
    """A solver that keeps the last `order` estimates of a run. A subclass implements `weights`.

    Where h is infinite (into data, out of it, at α = 0) a step is of first order, and no later step looks back across it. A
    corrector costs no evaluation: x_s is corrected with the evaluation at its prediction, which the next step needs anyway.
    The callback sees the prediction.

    Args:
        order: p ≥ 1, the estimates that a step uses.
        lower_below: in runs of fewer steps than this the k-th step from the end is of order k at most.
        sde: integrate the reverse SDE in place of the ODE.
        steps, grid, budget: as in `Sampler`.

    Raises:
        ConfigError: fewer steps than `order`.
    """

    def __init__(
        self, steps: int | None, grid: str, budget: int | None, *, order: int, lower_below: float, sde: bool = False
    ) -> None:
        super().__init__(steps, grid, budget)
        if self.steps is not None and self.steps < order:
            raise ConfigError(
                f"sampler {type(self).__name__} of order {order} needs steps >= {order}, not steps={self.steps}: "
                "take more steps or a lower order"
            )
        self.order, self.lower_below, self.sde = order, lower_below, sde

    @property
    def deterministic(self) -> bool:
        return not self.sde

    @abstractmethod
    def weights(self, h: float, r: Sequence[float]) -> Weights:
        """The weights of a step of order p, over α_s.

        Args:
            h: λ_s − λ_t, finite.
            r: (λ − λ_t)/h < 0 of the p − 1 estimates before, the nearest first.
        """

    def plan(self, schedule: Schedule, times: Tensor) -> list[Step]:
        """The coefficients of all steps."""
        alpha, sigma = schedule.alpha_sigma(times)
        lam = (alpha.log() - sigma.log()).tolist()
        plan: list[Step] = []
        count, known = len(times) - 1, 0  # known: how many estimates lie at finite distances
        for i, (alpha_s, sigma_s, sigma_t) in enumerate(
            zip(alpha[1:].tolist(), sigma[1:].tolist(), sigma[:-1].tolist(), strict=True)
        ):
            h = lam[i + 1] - lam[i]
            known = known + 1 if math.isfinite(h) else 0
            order = min(self.order, known, count - i if count < self.lower_below else known)
            weights = Weights()
            if order:
                weights = self.weights(h, [(lam[i - j] - lam[i]) / h for j in range(1, order)])
                weights = Weights(*([alpha_s * w for w in part] for part in weights))
            decay, spread = (math.exp(-h), math.sqrt(-math.expm1(-2 * h))) if self.sde else (1.0, 0.0)
            plan.append(Step(alpha_s, sigma_s * decay, sigma_s * spread, sigma_t, weights))
        return plan

    def integrate(self, x: Tensor, times: Tensor, context: EvaluationContext, steps: Iterable[int]) -> Tensor:
        plan = self.plan(context.schedule, times)
        known: deque[Tensor] = deque(maxlen=self.order)  # D_0, D_1, …
        base = None  # x_s of the DDIM step, while it waits for the corrector
        for i in steps:
            prediction = context.predict(i, x, times[i], times[i + 1])
            x0, noise = prediction.x0, prediction.noise
            if base is not None:
                corrector = plan[i - 1].weights.corrector
                noise = noise + (_add(base, corrector, [x0, *list(known)[1:]], known[0]) - x) / plan[i].sigma_t
            known.appendleft(x0)
            x = plan[i].alpha * x0 + plan[i].keep * noise
            if plan[i].spread:
                x = x + plan[i].spread * context.noise(i)
            base = x if plan[i].weights.corrector else None
            x = _add(x, plan[i].weights.predictor, list(known)[1:], x0)
            del prediction, x0, noise  # the next evaluation need not find them in memory
        return x


def _add(x: Tensor, weights: Sequence[float], estimates: Iterable[Tensor], origin: Tensor) -> Tensor:
    """x + Σ_j weights[j] (estimates[j] − origin)."""
    for weight, estimate in zip(weights, estimates, strict=False):
        x = x + weight * (estimate - origin)
    return x


def phi(k: int, z: float) -> float:
    """φ_k(z) = Σ_n zⁿ/(n + k)!, the functions of exponential integrators: φ_0 = e^z, φ_k = (φ_{k−1} − 1/(k−1)!)/z."""
    if abs(z) < 1:  # where the recurrence cancels: the series, by Horner's rule
        value = 1.0
        for n in range(18, 0, -1):
            value = 1 + value * z / (n + k)
        return value / math.factorial(k)
    value = math.exp(z)
    for j in range(k):
        value = (value - 1 / math.factorial(j)) / z
    return value
