"""The base class of all samplers: signature, time grid, keyed noise, evaluation count and callback.

A sampler is immutable: its attributes are its configuration, and the state of a call lives in an `EvaluationContext`. So several
threads can share a sampler, and two calls with equal arguments return equal results.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int, Shaped
from torch import Tensor

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.io import progress as show_progress
from diffusion_lab.noise import Draws
from diffusion_lab.samplers import grids
from diffusion_lab.schedules import Schedule, append_dims_like, to_device
from diffusion_lab.variances import Variance

# callback(i, t, x, prediction): step, time, state (B, C, H, W) and prediction there
Callback = Callable[[int, float, Tensor, Prediction], None]


class Samples(NamedTuple):
    """The result of a sampler."""

    x: Float[Tensor, "b c h w"]  # the state at `stop`, in the dtype of the initial state
    nfe: int  # network evaluations; of an adaptive solver the largest number over the images
    evaluations: Int[Tensor, " b"] | None = None  # of each image, int64 on the CPU; None if all have `nfe`


class EvaluationContext:
    """The state of one run of a sampler: condition, last x̂_0 for self-conditioning, evaluation count.

    Args:
        denoiser: predicts (x̂_0, ε̂).
        condition: keyword arguments for the network, each with B rows.
        callback: invoked by `report`.
        noise: noise(i) is the noise of step i, standard normal, of the state's shape; each i is one draw of the key.
        variance: replaces the variance of an ancestral sampler; None keeps it.
        following: the time after the last one, if the times are a segment of a grid; None: there is none.

    Attributes:
        nfe: network evaluations so far.
        evaluations: int64 (B,) on the CPU; set by a sampler whose images differ in their number of evaluations.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        condition: Mapping[str, Shaped[Tensor, "b ..."]],
        callback: Callback | None,
        noise: Draws,
        variance: Variance | None = None,
        following: Float64[Tensor, ""] | None = None,
    ) -> None:
        self.following = following
        self.denoiser, self.schedule, self.condition = denoiser, denoiser.schedule, condition
        self.callback, self.noise, self.variance, self.nfe = callback, noise, variance, 0
        self.evaluations: Tensor | None = None
        self._previous: Tensor | None = None
        self._times: list[Tensor] = []
        self._sums: list[Tensor] = []

    def __call__(
        self,
        x: Float[Tensor, "b c h w"],
        t: Float[Tensor, ""] | Float[Tensor, " b"],
        rows: Int[Tensor, " b"] | None = None,
        extra_time: Float[Tensor, ""] | None = None,
    ) -> Prediction:
        """Evaluate the network once.

        Args:
            x: the state.
            t: the time; 0-d on the CPU, or one per image.
            rows: if x is a part of the batch, the indices of its images, which select the condition. The previous x̂_0 is then
                not passed: a sampler that uses `rows` sets `uses_previous = False`.
            extra_time: the time of the channels beyond C, if it differs from t (`Variance.extra_time`).
        """
        condition, previous = self.condition, self._previous
        if rows is not None:
            condition, previous = {name: value[rows.to(value.device)] for name, value in condition.items()}, None
        if extra_time is None:
            prediction = self.denoiser(x, t, previous=previous, **condition)
        else:
            prediction = self.denoiser.with_extra_at(x, t, extra_time, previous, **condition)
        self._previous = prediction.x0 if rows is None else None
        self.nfe += 1
        sums = prediction.x0.flatten(1).sum(1, dtype=torch.float64)  # finite if and only if all elements are
        self._times.append(t if t.ndim == 0 else torch.where(sums.isfinite(), 0.0, to_device(t, x.device)).max())
        self._sums.append(sums.sum())  # stays on the device; read once, at the end
        return prediction

    def predict(
        self,
        i: int,
        x: Float[Tensor, "b c h w"],
        t: Float[Tensor, ""],
        s: Float[Tensor, ""],
        extra_time: Float[Tensor, ""] | None = None,
    ) -> Prediction:
        """Evaluate the denoiser at state x for step i from t to s, and invoke the callback.

        Encoding begins at t = 0, where no network is trained: x̂_0 is x there, and ε̂ is predicted at the next time s.
        `extra_time` as for a call.
        """
        prediction = self(x, s)._replace(x0=x) if t == 0 else self(x, t, extra_time=extra_time)
        self.report(i, t, x, prediction)
        return prediction

    def report(self, i: int, t: Float[Tensor, ""], x: Float[Tensor, "b c h w"], prediction: Prediction) -> None:
        """Invoke the callback with step i, its time, the state and the prediction there."""
        if self.callback is not None:
            self.callback(i, float(t), x, prediction)

    def refuse_nan(self) -> None:
        """Raise ConfigError if an evaluation was NaN or infinite; the message names the first."""
        finite: list[bool] = torch.stack(self._sums).isfinite().tolist() if self._sums else []
        if not all(finite):
            i = finite.index(False)
            t = float(self._times[i])
            raise ConfigError(
                f"the network returned NaN or infinity at evaluation {i + 1} of {self.nfe}, t={t:.4g}: "
                "sample in float32, or take a checkpoint from before the training diverged"
            )


class Sampler(ABC):
    """An integrator from `start` to `stop` over a grid of times. A subclass implements `integrate` and `deterministic`.

    Args:
        steps: number of steps; None: every step of a discrete schedule.
        grid: name of a time grid (see grids.py).
        budget: maximal number of network evaluations of a call; replaces `steps`.

    Raises:
        ConfigError: if the grid is unknown, steps < 1, or the budget is too small for one step.
    """

    grid_names: tuple[str, ...] = grids.NAMES  # accepted time grids
    uses_previous = True  # whether the previous x̂_0 is passed to a self-conditioning network
    moves_mean = False  # whether a step adds Σ times the gradient of a classifier to its mean

    def __init__(self, steps: int | None, grid: str, budget: int | None = None) -> None:
        if grid not in self.grid_names:
            raise ConfigError(f"unknown time grid {grid!r}: write one of {', '.join(self.grid_names)}")
        check_number("sampler.budget", budget, "[1, 1000000]", "network evaluations", whole=True, optional=True)
        check_number("sampler.steps", steps, "[1, 100000]", whole=True, optional=True)
        if budget is not None:
            steps = self.steps_for_budget(budget)
            if steps < 1:
                raise ConfigError(
                    f"sampler.budget={budget} is too small for one step of {type(self).__name__}: write a larger budget"
                )
        self.steps, self.grid = steps, grid

    @property
    @abstractmethod
    def deterministic(self) -> bool:
        """Whether the result depends only on the initial state. Only a deterministic sampler can run from data to noise."""

    def steps_for_budget(self, budget: int) -> int:
        """Return the largest number of steps within `budget` network evaluations. The default is one evaluation a step."""
        return budget

    @abstractmethod
    def integrate(
        self,
        x: Float[Tensor, "b c h w"],
        times: Float64[Tensor, " n_plus_1"],
        context: EvaluationContext,
        steps: Iterable[int],
    ) -> Float[Tensor, "b c h w"]:
        """Integrate from the state x at times[0] to the state at times[-1].

        Args:
            x: the state at times[0].
            times: N + 1 times on the CPU, so that coefficients cost no device synchronization.
            context: evaluates the denoiser; `context.noise(i)` is the noise of step i.
            steps: 0 … N − 1, with or without a progress bar.
        """

    def time_grid(self, denoiser: Denoiser, start: float = 1.0, stop: float = 0.0) -> Float64[Tensor, " n_plus_1"]:
        """Return the N + 1 times of the grid between two times.

        Raises:
            ConfigError: as `grids.make_grid`.
        """
        return grids.make_grid(self.grid, denoiser.schedule, self.steps, start, stop)

    def check(self, denoiser: Denoiser) -> None:
        """Raise ConfigError if this sampler cannot be used with the denoiser."""
        self._check_denoiser(denoiser)
        self.time_grid(denoiser)

    def _check_denoiser(self, denoiser: Denoiser) -> None:
        if denoiser.moves_mean and not self.moves_mean:
            raise ConfigError(
                f"guidance.form=published shifts the mean of ancestral steps, and sampler {type(self).__name__} has none: "
                "write guidance.form=exact, or sampler=ddpm"
            )
        if denoiser.self_conditioning and not self.uses_previous:
            raise ConfigError(
                f"sampler {type(self).__name__} solves an ODE in x and cannot pass the previous x_0 estimate that this "
                "self-conditioning network needs: write sampler=ddim"
            )

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        x_T: Float[Tensor, "b c h w"],
        *,
        seed: int = 0,
        index: Int[Tensor, " b"] | None = None,
        condition: Mapping[str, Shaped[Tensor, "b ..."]] | None = None,
        start: float = 1.0,
        stop: float = 0.0,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Samples:
        """Integrate from `start` to `stop`.

        Args:
            denoiser: predicts (x̂_0, ε̂).
            x_T: at start = 1 σ(1) · noise; else the state at the first time of the grid, time_grid(denoiser, start)[0].
            seed: seed of the noise, which is determined by (seed, index).
            index: the image index of each row; default 0 … B − 1.
            condition: keyword arguments for the network, each with B rows.
            start: the time at which the grid starts, in [0, 1]. The first time of grid=leading is below it; pure noise is
                scaled to that time (`at_first_time`).
            stop: the time of the result, in [0, 1]; start < stop runs a deterministic sampler from data towards noise.
            callback: callback(i, t, x, prediction), invoked before every step.
            progress: whether to show a progress bar.

        Returns:
            The state at `stop`, in x_T's shape and dtype, and the number of network evaluations.

        Raises:
            ConfigError: the grid does not exist between these times, the sampler is stochastic and start < stop, or the network
                returned NaN or infinity.
        """
        if start < stop and not self.deterministic:
            raise ConfigError(
                f"sampler {type(self).__name__} as configured is stochastic and runs from noise to data only: to encode "
                "(start < stop) write sampler=ddim with eta=0 and variance=fixed_small"
            )
        self._check_denoiser(denoiser)
        times = self.time_grid(denoiser, start, stop)
        if start == 1:
            x_T = at_first_time(denoiser.schedule, x_T, times)
        key = torch.arange(len(x_T), device=x_T.device) if index is None else index.to(x_T.device)
        noise = Draws(tuple(x_T.shape[1:]), seed, key, x_T.dtype)
        return self.integrate_grid(
            denoiser, x_T, times, noise=noise, condition=condition, callback=callback, progress=progress
        )

    @torch.no_grad()
    def integrate_grid(
        self,
        denoiser: Denoiser,
        x: Float[Tensor, "b c h w"],
        times: Float64[Tensor, " n_plus_1"],
        *,
        noise: Draws,
        condition: Mapping[str, Shaped[Tensor, "b ..."]] | None = None,
        variance: Variance | None = None,
        following: Float64[Tensor, ""] | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Samples:
        """Integrate over explicit times, for example a segment of a grid. `__call__` without its checks.

        Args:
            denoiser: predicts (x̂_0, ε̂).
            x: the state at times[0].
            times: N + 1 strictly monotone times on the CPU; increasing times need a deterministic sampler.
            noise: the noise of the steps, of x's shape and dtype. Each segment of a grid needs different draws (see editing.py).
            variance: replaces the variance of an ancestral sampler; other samplers ignore it.
            following: the time after times[-1], if `times` is a segment of a grid that continues.
            condition, callback, progress: as in `__call__`.

        Returns:
            The state at times[-1], in x's shape and dtype, and the number of network evaluations.

        Raises:
            ConfigError: the network returned NaN or infinity. `check` tests whether sampler and denoiser fit each other.
        """
        context = EvaluationContext(denoiser, condition or {}, callback, noise, variance, following)
        x = self.integrate(x, times, context, progress_range(len(times) - 1, progress))
        context.refuse_nan()
        return Samples(x, context.nfe, context.evaluations)


def prior(schedule: Schedule, noise: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return σ(1) · noise, the state at t = 1 from which sampling starts, for standard normal noise."""
    return append_dims_like(schedule.alpha_sigma(torch.ones((), dtype=torch.float64))[1], noise) * noise


def at_first_time(
    schedule: Schedule, x_T: Float[Tensor, "b c h w"], times: Float64[Tensor, " n_plus_1"]
) -> Float[Tensor, "b c h w"]:
    """Return σ(times[0])/σ(1) · x_T: pure noise at the first time of a grid, from σ(1) · noise.

    Only grid=leading has a first time below 1. There x_t = α_t x_0 + σ_t ε is approximated by its noise.
    """
    if times[0] == 1:
        return x_T
    first, last = schedule.alpha_sigma(torch.stack([times[0], torch.ones_like(times[0])]))[1]
    return append_dims_like(first / last, x_T) * x_T


def progress_range(n: int, progress: bool) -> Iterable[int]:
    """Return 0 … n − 1, with a progress bar if `progress`."""
    return show_progress(range(n), "sampling", "step", progress)
