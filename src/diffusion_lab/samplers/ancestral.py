"""Ancestral sampling (DDPM) and its non-Markovian family (DDIM), every step or strided, with any variance."""

import functools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.errors import ConfigError
from diffusion_lab.gaussian import Posterior, posterior
from diffusion_lab.samplers import grids
from diffusion_lab.samplers.base import EvaluationContext, Sampler
from diffusion_lab.schedules import Schedule, append_dims_like
from diffusion_lab.variances import Analytic, FixedSmall, Variance
from diffusion_lab.variances.trajectory import costs, shortest

# the deviation σ whose noise moves a pixel by one level of 256 on average, E|σz|
LEVEL = 2 / 255 * math.sqrt(math.pi / 2)

Draw = Callable[[int, Prediction], Tensor]  # (step, prediction) → z of that step, standard normal of the state's shape


class Ancestral(Sampler):
    """Base of DDPM and DDIM: the noise of a step has the spread of a variance, and the grid may be optimal for it.

    Args:
        steps: how many; None is every step of the schedule.
        variance: σ², the spread of a step.
        grid: a time grid of grids.py, or `optimal`: the times that lose least of the variational bound with the variance
            `Analytic` (variances/trajectory.py), the first node among them; the same for any η.
        budget: network evaluations, instead of `steps`.
        max_final_noise: y > 0, the mean pixel change (8-bit levels) that the last stochastic step of a chain into data may make:
            its σ² is at most (y · 2/255 · √(π/2))² (Bao et al. 2022 publish y = 2 for DDPM on the linear schedule,
            else 1). None: 1 for analytic, sn and npr, no bound for the others; ∞ for none. For samples only.

    Raises:
        ConfigError: y that is not positive, a grid that needs another variance, and as `Sampler`.
    """

    grid_names = (*grids.NAMES, "optimal")

    def __init__(
        self, steps: int | None, variance: Variance | None, grid: str, budget: int | None, max_final_noise: float | None
    ) -> None:
        super().__init__(steps, grid, budget)
        self.variance = variance or FixedSmall()
        if grid == "optimal" and not isinstance(self.variance, Analytic):
            raise ConfigError(
                "grid=optimal is computed from the fitted variance: write variance=analytic, or sampler.grid=trailing"
            )
        if max_final_noise is not None and not max_final_noise > 0:
            raise ConfigError(
                f"sampler.max_final_noise={max_final_noise} is not above 0: write 1 or 2 levels, or .inf for no bound"
            )
        self.max_final_noise = self.variance.max_final_noise if max_final_noise is None else max_final_noise

    def check(self, denoiser: Denoiser) -> None:
        self.variance.check(denoiser.network)
        super().check(denoiser)

    def time_grid(self, denoiser: Denoiser, start: float = 1.0, stop: float = 0.0) -> Tensor:
        if not isinstance(self.variance, Analytic) or self.grid != "optimal":
            return super().time_grid(denoiser, start, stop)
        return optimal_grid(self.variance, denoiser.schedule, self.steps, start, stop)

    def step_noise(
        self,
        context: EvaluationContext,
        times: Tensor,
        i: int,
        floor: Tensor,
        prediction: Prediction,
        z: Tensor,
    ) -> Tensor:
        """Return σ z of step i, plus σ² s∇ where a classifier moves the mean: (B, C, H, W).

        Args:
            context: of the run; its schedule, and its variance in place of the sampler's own if it has one.
            times: the grid; the step is from times[i] to times[i + 1] > 0.
            i: the step.
            floor: the least σ², 0-d float64.
            prediction: at times[i].
            z: standard normal, of the state's shape.
        """
        variance = context.variance or self.variance
        spread = variance(context.schedule, times[i], times[i + 1], prediction, floor=floor)
        if self.max_final_noise is not None and i == len(times) - 3 and times[-1] == 0:
            spread = spread.clamp(max=(self.max_final_noise * LEVEL) ** 2)
        noise = spread.sqrt().to(z.dtype) * z
        return noise if prediction.gradient is None else noise + spread.to(z.dtype) * prediction.gradient


class DDPM(Ancestral):
    """Ancestral sampling x_s = c_1 x_t + c_0 x̂_0 + σ z (Ho et al. 2020, algorithm 2; strided as in Nichol & Dhariwal 2021).

    Arguments as `Ancestral`.
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

    def integrate(self, x: Tensor, times: Tensor, context: EvaluationContext, steps: Iterable[int]) -> Tensor:
        return self.chain(x, times, context, steps, lambda i, prediction: context.noise(i))

    def chain(self, x: Tensor, times: Tensor, context: EvaluationContext, steps: Iterable[int], draw: Draw) -> Tensor:
        """Integrate as `integrate` does, with draw(i, prediction) for the z of step i."""
        every = posterior(context.schedule, times[:-1], times[1:])
        for i in steps:
            prediction = context.predict(i, x, times[i], times[i + 1])
            q = Posterior(*(value[i] for value in every))
            x = q.mean(x, prediction.x0)
            if times[i + 1] > 0:  # the step into data adds no noise
                x = x + self.step_noise(context, times, i, q.variance, prediction, draw(i, prediction))
        return x


class DDIM(Ancestral):
    """x_s = α_s x̂_0 + √(σ_s² − η²σ̃²) ε̂ + σ z (Song et al. 2021, eq. 12), σ = ησ̃ unless the variance adds to it.

    η = 0 with fixed_small is deterministic and first order in the probability-flow ODE; η = 1 is DDPM.

    Args:
        eta: η in [0, 1].
        variance: the estimate that adds to the floor η²σ̃²; fixed_small adds nothing.
        steps, grid, budget, max_final_noise: as `Ancestral`.

    Raises:
        ConfigError: η outside [0, 1], a variance for ancestral steps only, and as `Ancestral`.
    """

    ancestral = False  # takes no variance that is for ancestral steps only

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
        if not 0 <= eta <= 1:
            raise ConfigError(f"sampler=ddim needs eta in [0, 1], not eta={eta}: 0 is deterministic, 1 is ancestral")
        if self.variance.ancestral_only:
            raise ConfigError(
                f"variance {type(self.variance).__name__} is for ancestral steps only: write sampler=ddpm or variance=fixed_small"
            )
        self.eta = eta

    @property
    def deterministic(self) -> bool:
        return self.eta == 0 and isinstance(self.variance, FixedSmall)

    def integrate(self, x: Tensor, times: Tensor, context: EvaluationContext, steps: Iterable[int]) -> Tensor:
        alpha, sigma = context.schedule.alpha_sigma(times[1:])
        floor = torch.zeros_like(alpha)
        if self.eta:
            floor = self.eta**2 * posterior(context.schedule, times[:-1], times[1:]).variance
        direction = (sigma.square() - floor).clamp(min=0).sqrt()
        for i in steps:
            prediction = context.predict(i, x, times[i], times[i + 1])
            x = append_dims_like(alpha[i], x) * prediction.x0 + append_dims_like(direction[i], x) * prediction.noise
            if not self.deterministic and times[i + 1] > 0:
                x = x + self.step_noise(context, times, i, floor[i], prediction, context.noise(i))
        return x


@functools.lru_cache(maxsize=16)  # of its arguments alone: check and every call of a sampler share the dynamic program
def optimal_grid(variance: Analytic, schedule: Schedule, steps: int | None, start: float, stop: float) -> Tensor:
    """Return the grid `optimal` between start > stop: float64 (steps + 1,) on the CPU, decreasing.

    Its times are nodes of the table, or those the variance was fitted at. A chain that ends in data has the first of them as
    its last time before data, as in the paper, unless it has one step. The tensor is shared: do not write to it.

    Raises:
        ConfigError: start ≤ stop, or more steps than times.
    """
    if not 0 <= stop < start <= 1:
        raise ConfigError(f"grid=optimal runs from noise to data inside [0, 1], not from {start} to {stop}")
    every = variance.times if schedule.steps is None else torch.arange(1, schedule.steps + 1).double() / schedule.steps
    margin = grids.NODE_TOLERANCE / (schedule.steps or len(every))
    inner = every[(every > stop + margin) & (every < start - margin)]
    into_data = stop == 0
    nodes = torch.cat([inner.new_tensor([] if into_data else [stop]), inner, inner.new_tensor([start])])
    most = len(nodes) - (not into_data)
    n = most if steps is None else steps
    if n > most:
        raise ConfigError(f"steps={n} exceeds the {most} times that grid=optimal chooses from: write fewer steps")
    if n == 1:
        return inner.new_tensor([start, stop])
    path = nodes[shortest(costs(variance, schedule, nodes), n - into_data)].flip(0)
    return torch.cat([path, path.new_zeros(1)]) if into_data else path
