"""Ancestral sampling (DDPM) and its non-Markovian generalization (DDIM), strided or not, with any variance."""

import functools
import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.gaussian import Posterior, posterior
from diffusion_lab.samplers import grids
from diffusion_lab.samplers.base import EvaluationContext, Sampler
from diffusion_lab.schedules import Schedule, append_dims_like
from diffusion_lab.variances import Analytic, FixedSmall, Variance
from diffusion_lab.variances.trajectory import costs, shortest

# The standard deviation σ whose noise changes a pixel by one 8-bit level on average: E|σz| = 2/255
LEVEL = 2 / 255 * math.sqrt(math.pi / 2)

# draw(i, prediction) → z of step i, standard normal (B, C, H, W)
Draw = Callable[[int, Prediction], Tensor]


class Ancestral(Sampler):
    """Base class of DDPM and DDIM: steps whose noise has a configurable variance.

    Args:
        steps: number of steps; None: every step of the schedule.
        variance: σ², the variance of a step; None: `FixedSmall`.
        grid: a time grid of grids.py, or `optimal`: the times that minimize the variational bound with the variance `Analytic`
            (variances/trajectory.py), always including the first node; the same for every η.
        budget: maximal number of network evaluations, one a step; replaces `steps`.
        max_final_noise: y > 0, maximum mean pixel change (8-bit levels) by the noise of the last stochastic step into data:
            σ² ≤ (y · 2/255 · √(π/2))² there. Bao et al. 2022 publish y = 2 for DDPM on the linear schedule, else 1. None: 1 for
            analytic, sn and npr, no bound for the others; ∞: no bound. Likelihoods ignore it.

    Raises:
        ConfigError: y ≤ 0, `optimal` without `Analytic`, and as `Sampler`.
    """

    grid_names = (*grids.NAMES, "optimal")

    def __init__(
        self, steps: int | None, variance: Variance | None, grid: str, budget: int | None, max_final_noise: float | None
    ) -> None:
        super().__init__(steps, grid, budget)
        self.variance = variance or FixedSmall()
        if grid == "optimal" and not isinstance(self.variance, Analytic):
            raise ConfigError("grid=optimal needs a fitted variance: write variance=analytic, or sampler.grid=trailing")
        hint = "1 or 2 (levels), or .inf for no bound"
        check_number("sampler.max_final_noise", max_final_noise, "(0, inf]", hint, optional=True)
        self.max_final_noise = self.variance.max_final_noise if max_final_noise is None else max_final_noise

    def check(self, denoiser: Denoiser) -> None:
        self.variance.check(denoiser.network)
        super().check(denoiser)

    def time_grid(self, denoiser: Denoiser, start: float = 1.0, stop: float = 0.0) -> Float64[Tensor, " n_plus_1"]:
        if not isinstance(self.variance, Analytic) or self.grid != "optimal":
            return super().time_grid(denoiser, start, stop)
        return optimal_grid(self.variance, denoiser.schedule, self.steps, start, stop)

    def predict(
        self, context: EvaluationContext, i: int, x: Float[Tensor, "b c h w"], times: Float64[Tensor, " n_plus_1"]
    ) -> Prediction:
        """Evaluate the denoiser for step i, with the channels that the variance reads at the time it needs."""
        extra_time = (context.variance or self.variance).extra_time(context.schedule, times[i])
        return context.predict(i, x, times[i], times[i + 1], extra_time)

    def step_noise(
        self,
        context: EvaluationContext,
        times: Float64[Tensor, " n_plus_1"],
        i: int,
        floor: Float64[Tensor, ""],
        prediction: Prediction,
        z: Float[Tensor, "b c h w"],
    ) -> Float[Tensor, "b c h w"]:
        """Return σ z of step i, plus σ² s∇ if a classifier shifts the mean.

        Args:
            context: the run; its variance replaces the sampler's unless None.
            times: the grid; step i is from times[i] to times[i + 1] > 0.
            i: the step.
            floor: lower bound of σ².
            prediction: the prediction at times[i].
            z: standard normal.
        """
        variance = context.variance or self.variance
        sigma2 = variance(context.schedule, times[i], times[i + 1], prediction, floor=floor)
        after = times[i + 2] if i + 2 < len(times) else context.following
        if self.max_final_noise is not None and after is not None and after == 0:  # the next step is into data
            sigma2 = sigma2.clamp(max=(self.max_final_noise * LEVEL) ** 2)
        noise = sigma2.sqrt().to(z.dtype) * z
        return noise if prediction.gradient is None else noise + sigma2.to(z.dtype) * prediction.gradient


class DDPM(Ancestral):
    """Ancestral sampling x_s = c_1 x_t + c_0 x̂_0 + σ z (Ho et al. 2020, algorithm 2; strided as in Nichol & Dhariwal 2021).

    Arguments as in `Ancestral`.
    """

    deterministic, moves_mean = False, True

    def __init__(
        self,
        steps: int | None = None,
        variance: Variance | None = None,
        grid: str = "linspace",
        budget: int | None = None,
        max_final_noise: float | None = None,
    ) -> None:
        super().__init__(steps, variance, grid, budget, max_final_noise)

    def integrate(
        self,
        x: Float[Tensor, "b c h w"],
        times: Float64[Tensor, " n_plus_1"],
        context: EvaluationContext,
        steps: Iterable[int],
    ) -> Float[Tensor, "b c h w"]:
        return self.chain(x, times, context, steps, lambda i, prediction: context.noise(i))

    def chain(
        self,
        x: Float[Tensor, "b c h w"],
        times: Float64[Tensor, " n_plus_1"],
        context: EvaluationContext,
        steps: Iterable[int],
        draw: Draw,
    ) -> Float[Tensor, "b c h w"]:
        """Integrate as `integrate` does, with draw(i, prediction) as z of step i."""
        posteriors = posterior(context.schedule, times[:-1], times[1:])
        for i in steps:
            prediction = self.predict(context, i, x, times)
            q = Posterior(*(value[i] for value in posteriors))
            x = q.mean(x, prediction.x0)
            if times[i + 1] > 0:  # the step into data adds no noise
                x = x + self.step_noise(context, times, i, q.variance, prediction, draw(i, prediction))
        return x


class DDIM(Ancestral):
    """x_s = α_s x̂_0 + √(σ_s² − η²σ̃²) ε̂ + σ z (Song et al. 2021, eq. 12), with σ = ησ̃ for the variance `FixedSmall`.

    η = 0 with `FixedSmall` is deterministic, a first-order method for the probability-flow ODE; η = 1 is DDPM, with all its
    variances and guidance.

    Args:
        eta: η in [0, 1].
        variance: σ² with the floor η²σ̃²; `FixedSmall` is the floor itself.
        steps, grid, budget, max_final_noise: as in `Ancestral`.

    Raises:
        ConfigError: η outside [0, 1], with η < 1 a variance for ancestral steps only, and as `Ancestral`.
    """

    ancestral = False  # below η = 1 refuses variances with `ancestral_only`

    def __init__(
        self,
        steps: int | None = 50,
        eta: float = 0.0,
        variance: Variance | None = None,
        grid: str = "trailing",
        budget: int | None = None,
        max_final_noise: float | None = None,
    ) -> None:
        super().__init__(steps, variance, grid, budget, max_final_noise)
        check_number("sampler.eta", eta, "[0, 1]", "0 is deterministic, 1 is ancestral")
        if self.variance.ancestral_only and not is_ancestral(type(self), eta):
            raise ConfigError(
                f"variance {type(self.variance).__name__} is for ancestral steps only: write sampler=ddpm, sampler.eta=1 or "
                "variance=fixed_small"
            )
        self.eta, self.moves_mean = eta, eta == 1

    @property
    def deterministic(self) -> bool:
        return self.eta == 0 and isinstance(self.variance, FixedSmall)

    def integrate(
        self,
        x: Float[Tensor, "b c h w"],
        times: Float64[Tensor, " n_plus_1"],
        context: EvaluationContext,
        steps: Iterable[int],
    ) -> Float[Tensor, "b c h w"]:
        alpha, sigma = context.schedule.alpha_sigma(times[1:])
        floor = torch.zeros_like(alpha)
        if self.eta:
            floor = self.eta**2 * posterior(context.schedule, times[:-1], times[1:]).variance
        direction = (sigma.square() - floor).clamp(min=0).sqrt()
        for i in steps:
            prediction = self.predict(context, i, x, times)
            x = append_dims_like(alpha[i], x) * prediction.x0 + append_dims_like(direction[i], x) * prediction.noise
            if not self.deterministic and times[i + 1] > 0:
                x = x + self.step_noise(context, times, i, floor[i], prediction, context.noise(i))
        return x


def is_ancestral(sampler: type, eta: object = None) -> bool:
    """Return whether a sampler of this class, with this η if it has one, can use variances with `ancestral_only`."""
    return bool(getattr(sampler, "ancestral", True)) or eta == 1


@functools.lru_cache(maxsize=16)  # `check` and every call of a sampler share one run of the dynamic program
def optimal_grid(
    variance: Analytic, schedule: Schedule, steps: int | None, start: float, stop: float
) -> Float64[Tensor, " n_plus_1"]:
    """Return the grid `optimal` from start > stop: steps + 1 decreasing times on the CPU.

    The times are nodes of the table, or on a continuous curve the times at which the variance was fitted. The last step of a
    grid into data starts at the first node, as in the paper, unless it is the only step. The tensor is cached: do not modify it.

    Raises:
        ConfigError: start ≤ stop, or more steps than times.
    """
    if not 0 <= stop < start <= 1:
        raise ConfigError(
            f"grid=optimal needs 1 >= start > stop >= 0 (from noise to data), not start={start} and stop={stop}"
        )
    every = variance.times if schedule.steps is None else torch.arange(1, schedule.steps + 1).double() / schedule.steps
    margin = grids.NODE_TOLERANCE / (schedule.steps or len(every))
    inner = every[(every > stop + margin) & (every < start - margin)]
    into_data = stop == 0
    nodes = torch.cat([inner.new_tensor([] if into_data else [stop]), inner, inner.new_tensor([start])])
    n_max = len(nodes) - (not into_data)
    n = n_max if steps is None else steps
    if n > n_max:
        raise ConfigError(f"steps={n} exceeds the {n_max} candidate times of grid=optimal: write fewer steps")
    if n == 1:
        return inner.new_tensor([start, stop])
    path = nodes[shortest(costs(variance, schedule, nodes), n - into_data)].flip(0)
    return torch.cat([path, path.new_zeros(1)]) if into_data else path
