"""Multistep exponential integrators: a DDIM step plus a correction for the slope of x̂_0, from earlier estimates.

In λ = ln(α/σ) the solution of the probability-flow ODE is x_s = (σ_s/σ_t) x_t + σ_s ∫ e^λ x̂_0 dλ. With a constant x̂_0 this is
the DDIM step α_s x̂_0 + σ_s ε̂, also where λ is infinite. A polynomial through earlier estimates adds a weighted sum of their
differences. These solvers differ only in their weights, which are computed before the first evaluation.
"""

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxtyping import Float, Float64
from torch import Tensor

from diffusion_lab.errors import ConfigError
from diffusion_lab.samplers.base import EvaluationContext, Sampler
from diffusion_lab.schedules import Schedule


class Weights(NamedTuple):
    """Weights of the terms added to a DDIM step from t to s.

    D_0 is the estimate of x_0 at t, D_j the one j steps earlier, D_s the one at s.
    """

    predictor: Sequence[float] = ()  # of D_1 − D_0, D_2 − D_0, …
    corrector: Sequence[float] = ()  # of D_s − D_0, D_1 − D_0, …; replace the predictor's after the evaluation at s


class Step(NamedTuple):
    """The coefficients of one step from t to s; h = λ_s − λ_t."""

    alpha: float  # of x̂_0: α_s
    keep: float  # of ε̂: σ_s for the ODE, σ_s e^−h for the SDE
    spread: float  # of new noise: 0 for the ODE, σ_s √(1 − e^−2h) for the SDE
    sigma_t: float
    weights: Weights


class Multistep(Sampler):
    """Base class of solvers that use the last `order` estimates of x_0. A subclass implements `weights`.

    A step with infinite h (into data, out of data, at α = 0) is of first order, and later steps use no estimate before it. A
    corrector costs no evaluation: x_s is corrected with the evaluation at the predicted x_s, which the next step needs anyway.
    The callback receives the predicted state.

    Args:
        order: p ≥ 1, the number of estimates in a step.
        lower_below: in runs of fewer steps than this, the k-th step from the end has order k at most.
        sde: integrate the reverse SDE instead of the ODE.
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
                "write more steps or a lower order"
            )
        self.order, self.lower_below, self.sde = order, lower_below, sde

    @property
    def deterministic(self) -> bool:
        return not self.sde

    @abstractmethod
    def weights(self, h: float, r: Sequence[float]) -> Weights:
        """Return the weights of a step of order p, divided by α_s.

        Args:
            h: λ_s − λ_t, finite.
            r: (λ − λ_t)/h < 0 of the p − 1 earlier estimates, latest first.
        """

    def plan(self, schedule: Schedule, times: Float64[Tensor, " n_plus_1"]) -> list[Step]:
        """Return the coefficients of all steps."""
        alpha, sigma = schedule.alpha_sigma(times)
        lam = (alpha.log() - sigma.log()).tolist()
        plan: list[Step] = []
        count, usable = len(times) - 1, 0  # usable: number of estimates at finite distance in λ
        for i, (alpha_s, sigma_s, sigma_t) in enumerate(
            zip(alpha[1:].tolist(), sigma[1:].tolist(), sigma[:-1].tolist(), strict=True)
        ):
            h = lam[i + 1] - lam[i]
            usable = usable + 1 if math.isfinite(h) else 0
            order = min(self.order, usable, count - i if count < self.lower_below else usable)
            weights = Weights()
            if order:
                weights = self.weights(h, [(lam[i - j] - lam[i]) / h for j in range(1, order)])
                weights = Weights(*([alpha_s * w for w in part] for part in weights))
            decay, spread = (math.exp(-h), math.sqrt(-math.expm1(-2 * h))) if self.sde else (1.0, 0.0)
            plan.append(Step(alpha_s, sigma_s * decay, sigma_s * spread, sigma_t, weights))
        return plan

    def integrate(
        self,
        x: Float[Tensor, "b c h w"],
        times: Float64[Tensor, " n_plus_1"],
        context: EvaluationContext,
        steps: Iterable[int],
    ) -> Float[Tensor, "b c h w"]:
        plan = self.plan(context.schedule, times)
        estimates: deque[Tensor] = deque(maxlen=self.order)  # D_0, D_1, …
        base = None  # x_s of the DDIM step, kept for the corrector
        for i in steps:
            prediction = context.predict(i, x, times[i], times[i + 1])
            x0, noise = prediction.x0, prediction.noise
            if base is not None:
                corrector = plan[i - 1].weights.corrector
                # one expression, so that no name keeps the corrected state in memory
                noise = noise + (_add(base, corrector, [x0, *list(estimates)[1:]], estimates[0]) - x) / plan[i].sigma_t
            estimates.appendleft(x0)
            x = plan[i].alpha * x0 + plan[i].keep * noise
            if plan[i].spread:
                x = x + plan[i].spread * context.noise(i)
            base = x if plan[i].weights.corrector else None
            x = _add(x, plan[i].weights.predictor, list(estimates)[1:], x0)
            del prediction, x0, noise  # free their memory before the next evaluation
        return x


def _add(x: Tensor, weights: Sequence[float], estimates: Iterable[Tensor], origin: Tensor) -> Tensor:
    """Return x + Σ_j weights[j] (estimates[j] − origin)."""
    for weight, estimate in zip(weights, estimates, strict=False):
        x = x + weight * (estimate - origin)
    return x


def phi(k: int, z: float) -> float:
    """Return φ_k(z) = Σ_n zⁿ/(n + k)!, as in exponential integrators: φ_0 = e^z, φ_k = (φ_{k−1} − 1/(k−1)!)/z."""
    if abs(z) < 1:  # the recurrence cancels for small z: sum the series by Horner's rule
        value = 1.0
        for n in range(18, 0, -1):
            value = 1 + value * z / (n + k)
        return value / math.factorial(k)
    value = math.exp(z)
    for j in range(k):
        value = (value - 1 / math.factorial(j)) / z
    return value
