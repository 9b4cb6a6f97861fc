"""Ancestral sampling (DDPM) and its non-Markovian family (DDIM), every step or strided, with any variance."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.errors import ConfigError
from diffusion_lab.gaussian import Posterior, posterior
from diffusion_lab.samplers import grids
from diffusion_lab.samplers.base import Model, Sampler
from diffusion_lab.schedules import Schedule, match
from diffusion_lab.variances import Analytic, FixedSmall, Variance
from diffusion_lab.variances.trajectory import costs, shortest

LEVEL = (
    2 / 255 * math.sqrt(math.pi / 2)
)  # the deviation whose noise moves a pixel by one level of 256 on average: E|σz|


class Ancestral(Sampler):
    """What DDPM and DDIM share: the noise of a step is that of a variance, and the grid may be made for it.

    Args:
        steps: how many; None is every step of the schedule.
        variance: σ², the spread of a step.
        grid: a time grid of grids.py, or `optimal`: the times that lose least of the variational bound with the variance
            `Analytic` (variances/trajectory.py), the first node among them; the same for any η.
        budget: network evaluations, instead of `steps`.
        last_bound: y > 0, how many levels of 256 the last noisy step of a chain that ends in data may move a pixel on average:
            its σ² is at most (y · 2/255 · √(π/2))² (Bao et al. 2022 publish y = 2 for DDPM on the linear schedule,
            else 1). None: 1 for analytic, sn and npr, no bound for the others; ∞ for none. For samples only.

    Raises:
        ValueError: y that is not positive, a grid that needs another variance, and as `Sampler`.
    """

    grid_names = (*grids.NAMES, "optimal")

    def __init__(
        self, steps: int | None, variance: Variance | None, grid: str, budget: int | None, last_bound: float | None
    ) -> None:
        super().__init__(steps, grid, budget)
        self.variance = variance or FixedSmall()
        if grid == "optimal" and not isinstance(self.variance, Analytic):
            raise ConfigError(
                "grid=optimal is computed from the fitted variance: write variance=analytic, or sampler.grid=trailing"
            )
        if last_bound is not None and not last_bound > 0:
            raise ConfigError(
                f"sampler.last_bound={last_bound} is not above 0: write 1 or 2 levels, or .inf for no bound"
            )
        self.last_bound = self.variance.last_bound if last_bound is None else last_bound
        self._computed: tuple[Schedule, tuple[int | None, float, float], Tensor] | None = None  # the last optimal grid

    def check(self, denoiser: Denoiser) -> None:
        self.variance.check(getattr(denoiser, "network", None))
        super().check(denoiser)

    def times(self, denoiser: Denoiser, start: float = 1.0, stop: float = 0.0) -> Tensor:
        if not isinstance(self.variance, Analytic) or self.grid != "optimal":
            return super().times(denoiser, start, stop)
        schedule, key = denoiser.schedule, (self.steps, start, stop)
        if self._computed is None or self._computed[0] is not schedule or self._computed[1] != key:
            self._computed = (schedule, key, optimal_times(self.variance, schedule, *key))
        return self._computed[2]

    def kick(self, x: Tensor, times: Tensor, i: int, floor: Tensor, prediction: Prediction, model: Model) -> Tensor:
        """σ z of step i, and what a classifier moves its mean by, σ² s∇; from times[i] to times[i + 1] > 0, floor 0-d float64."""
        variance = self.variance(model.schedule, times[i], times[i + 1], prediction, floor=floor)
        if self.last_bound is not None and i == len(times) - 3 and times[-1] == 0:
            variance = variance.clamp(max=(self.last_bound * LEVEL) ** 2)
        kick = variance.sqrt().to(x.dtype) * self.draw(i, prediction, model)
        return kick if prediction.gradient is None else kick + variance.to(x.dtype) * prediction.gradient

    def draw(self, i: int, prediction: Prediction, model: Model) -> Tensor:
        """z of step i."""
        return model.noise(i)


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
        last_bound: float | None = None,
    ) -> None:
        super().__init__(steps, variance, grid, budget, last_bound)

    def integrate(self, x: Tensor, times: Tensor, model: Model, steps: Iterable[int]) -> Tensor:
        every = posterior(model.schedule, times[:-1], times[1:])
        for i in steps:
            prediction = model.depart(i, x, times[i], times[i + 1])
            q = Posterior(*(value[i] for value in every))
            x = q.mean(x, prediction.x0)
            if times[i + 1] > 0:  # the step into data adds no noise
                x = x + self.kick(x, times, i, q.variance, prediction, model)
        return x


class DDIM(Ancestral):
    """x_s = α_s x̂_0 + √(σ_s² − η²σ̃²) ε̂ + σ z (Song et al. 2021, eq. 12), σ = ησ̃ unless the variance adds to it.

    η = 0 with fixed_small is deterministic and first order in the probability-flow ODE; η = 1 is DDPM.

    Args:
        eta: η in [0, 1].
        variance: the estimate that adds to the floor η²σ̃²; fixed_small adds nothing.
        steps, grid, budget, last_bound: as `Ancestral`.

    Raises:
        ValueError: η outside [0, 1], a variance for ancestral steps only, and as `Ancestral`.
    """

    ancestral = False  # takes no variance that is for ancestral steps only

    def __init__(
        self,
        steps: int | None = 50,
        eta: float = 0.0,
        variance: Variance | None = None,
        grid: str = "trailing",
        budget: int | None = None,
        last_bound: float | None = None,
    ) -> None:
        super().__init__(steps, variance, grid, budget, last_bound)
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

    def integrate(self, x: Tensor, times: Tensor, model: Model, steps: Iterable[int]) -> Tensor:
        alpha, sigma = model.schedule.alpha_sigma(times[1:])
        floor = torch.zeros_like(alpha)
        if self.eta:
            floor = self.eta**2 * posterior(model.schedule, times[:-1], times[1:]).variance
        direction = (sigma.square() - floor).clamp(min=0).sqrt()
        for i in steps:
            prediction = model.depart(i, x, times[i], times[i + 1])
            x = match(alpha[i], x) * prediction.x0 + match(direction[i], x) * prediction.noise
            if not self.deterministic and times[i + 1] > 0:
                x = x + self.kick(x, times, i, floor[i], prediction, model)
        return x


def optimal_times(variance: Analytic, schedule: Schedule, steps: int | None, start: float, stop: float) -> Tensor:
    """The grid `optimal` between start > stop: float64 (steps + 1,) on the CPU, decreasing.

    Its times are nodes of the table, or those the variance was fitted at. A chain that ends in data leaves from the first of
    them, as in the paper, unless it has one step.

    Raises:
        ValueError: start ≤ stop, or more steps than times.
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
        raise ConfigError(f"steps={n} exceeds the {most} times that grid=optimal chooses from: ask for fewer")
    if n == 1:
        return inner.new_tensor([start, stop])
    path = nodes[shortest(costs(variance, schedule, nodes), n - into_data)].flip(0)
    return torch.cat([path, path.new_zeros(1)]) if into_data else path
