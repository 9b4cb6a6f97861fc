"""The one signature of all samplers, and what they share: the grid, keyed noise, counting, the callback.

A sampler is a value: its attributes are its configuration, set once, and a call keeps what belongs to the call in an
`EvaluationContext`. So one sampler serves several threads, and two calls with equal arguments give equal results.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.errors import ConfigError
from diffusion_lab.io import progress as show_progress
from diffusion_lab.noise import Draws
from diffusion_lab.samplers import grids
from diffusion_lab.schedules import Schedule, append_dims_like, to_device
from diffusion_lab.variances import Variance

Callback = Callable[[int, float, Tensor, Prediction], None]


class Samples(NamedTuple):
    """The result of a sampler."""

    x: Tensor  # (B, C, H, W), the state at `stop`, in the shape and dtype of the state it began with
    nfe: int  # network evaluations: of an adaptive solver those of the image that needed most
    evaluations: Tensor | None = None  # int64 (B,) on the CPU, those of each image; None where all have `nfe`


class EvaluationContext:
    """One run of a sampler: evaluates the denoiser under the run's condition, carries x̂_0 to the next evaluation, counts.

    Args:
        denoiser: predicts (x̂_0, ε̂).
        condition: keyword arguments for the network, each with B rows.
        callback: invoked by `report`.
        noise: noise(i), that of step i, standard normal of the state's shape; each i is one draw of the key.
        variance: replaces that of an ancestral sampler; None keeps it.

    Attributes:
        nfe: network evaluations so far.
        evaluations: int64 (B,), set by a sampler whose images differ in them.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        condition: Mapping[str, Tensor],
        callback: Callback | None,
        noise: Draws,
        variance: Variance | None = None,
    ) -> None:
        self.denoiser, self.schedule, self.condition = denoiser, denoiser.schedule, condition
        self.callback, self.noise, self.variance, self.nfe = callback, noise, variance, 0
        self.evaluations: Tensor | None = None
        self._previous: Tensor | None = None
        self._times: list[Tensor] = []
        self._sums: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Prediction:
        """Evaluate the network once at state x (B, …) and time t, 0-d on the CPU, or (B,) with one for each image.

        Where x holds a part of the batch, `rows`, int64 (B,), are its indices: they select the condition. The x̂_0 of the
        evaluation before is then not passed, so a sampler that gives `rows` sets `uses_previous = False`.
        """
        condition, previous = self.condition, self._previous
        if rows is not None:
            condition, previous = {name: value[rows.to(value.device)] for name, value in condition.items()}, None
        prediction = self.denoiser(x, t, previous=previous, **condition)
        self._previous = prediction.x0 if rows is None else None
        self.nfe += 1
        sums = prediction.x0.flatten(1).sum(1, dtype=torch.float64)  # finite just where every number is
        self._times.append(t if t.ndim == 0 else torch.where(sums.isfinite(), 0.0, to_device(t, x.device)).max())
        self._sums.append(sums.sum())  # stays on the device; read once, at the end
        return prediction

    def predict(self, i: int, x: Tensor, t: Tensor, s: Tensor) -> Prediction:
        """Evaluate the denoiser at state x (B, …) for step i from t to s, and invoke the callback.

        Encoding begins at t = 0, where no network is trained: there x is x_0, and ε̂ is that of the next time.
        """
        prediction = self(x, s)._replace(x0=x) if t == 0 else self(x, t)
        self.report(i, t, x, prediction)
        return prediction

    def report(self, i: int, t: Tensor, x: Tensor, prediction: Prediction) -> None:
        """Invoke the callback with step i, its time, the state there and the prediction."""
        if self.callback is not None:
            self.callback(i, float(t), x, prediction)

    def refuse_nan(self) -> None:
        """Raise ConfigError if an evaluation was not finite, naming the first."""
        finite: list[bool] = torch.stack(self._sums).isfinite().tolist() if self._sums else []
        if not all(finite):
            i = finite.index(False)
            t = float(self._times[i])
            raise ConfigError(
                f"the network gave NaN or infinity at evaluation {i + 1} of {self.nfe}, t={t:.4g}: "
                "sample in float32, or take a checkpoint from before the training diverged"
            )


class Sampler(ABC):
    """An integrator from `start` to `stop` over a grid of times. A subclass implements `integrate` and `deterministic`.

    Args:
        steps: how many; None means every step of a discrete schedule.
        grid: the name of a time grid (see grids.py).
        budget: instead of `steps`, how many network evaluations a call may take at most.

    Raises:
        ConfigError: an unknown grid, no steps, or a budget that allows none.
    """

    grid_names: tuple[str, ...] = grids.NAMES  # the time grids it accepts
    uses_previous = True  # whether it passes x̂_0 of the evaluation before, which self-conditioning networks read
    moves_mean = False  # whether it adds Σ times the gradient of a classifier to the mean of a step

    def __init__(self, steps: int | None, grid: str, budget: int | None = None) -> None:
        if grid not in self.grid_names:
            raise ConfigError(f"unknown time grid {grid!r}: write one of {', '.join(self.grid_names)}")
        if budget is not None:
            steps = self.steps_for_budget(budget)
            if steps < 1:
                raise ConfigError(f"sampler.budget={budget} allows not one step of {type(self).__name__}: allow more")
        if steps is not None and steps < 1:
            raise ConfigError(f"a sampler needs steps >= 1, not steps={steps}")
        self.steps, self.grid = steps, grid

    @property
    @abstractmethod
    def deterministic(self) -> bool:
        """Whether the result is a function of the state alone. Only then can it run from data to noise."""

    def steps_for_budget(self, budget: int) -> int:
        """Return the most steps that take at most `budget` network evaluations: here one evaluation a step."""
        return budget

    @abstractmethod
    def integrate(self, x: Tensor, times: Tensor, context: EvaluationContext, steps: Iterable[int]) -> Tensor:
        """Integrate from the state x at times[0] to the state at times[-1].

        Args:
            x: (B, C, H, W).
            times: float64 (N + 1,) on the CPU, so that coefficients cost no device synchronisation.
            context: evaluates the denoiser; also `context.noise(i)`, the noise of step i, and `context.report`.
            steps: 0 … N − 1, with or without a progress bar.
        """

    def time_grid(self, denoiser: Denoiser, start: float = 1.0, stop: float = 0.0) -> Tensor:
        """Return the grid between two times, float64 (N + 1,). Raises ConfigError as grids.make_grid does."""
        return grids.make_grid(self.grid, denoiser.schedule, self.steps, start, stop)

    def check(self, denoiser: Denoiser) -> None:
        """Raise ConfigError where this sampler cannot be used with the denoiser."""
        self._check_denoiser(denoiser)
        self.time_grid(denoiser)

    def _check_denoiser(self, denoiser: Denoiser) -> None:
        if denoiser.moves_mean and not self.moves_mean:
            raise ConfigError(
                f"sampler {type(self).__name__} takes no ancestral steps, whose mean the published form of classifier guidance "
                "moves: write guidance.form=exact, or sampler=ddpm"
            )
        if denoiser.self_conditioning and not self.uses_previous:
            raise ConfigError(
                f"sampler {type(self).__name__} solves an ODE in x alone and cannot carry the previous estimate that this "
                "self-conditioning network takes: write sampler=ddim"
            )

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        x_T: Tensor,
        *,
        seed: int = 0,
        index: Tensor | None = None,
        condition: Mapping[str, Tensor] | None = None,
        start: float = 1.0,
        stop: float = 0.0,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Samples:
        """Integrate from `start` to `stop`.

        Args:
            denoiser: predicts (x̂_0, ε̂).
            x_T: the state at time `start`, float (B, C, H, W); at 1 that is σ(1) · noise.
            seed: with `index` the key of all noise.
            index: int64 (B,), the image of each row; default 0 … B − 1.
            condition: keyword arguments for the network, each with B rows.
            start: the time of x_T, in [0, 1].
            stop: the time of the result, in [0, 1]; start < stop runs a deterministic sampler the other way.
            callback: callback(i, t, x, prediction) at every step, before it is taken.
            progress: show a bar.

        Returns:
            The state at `stop`, in x_T's shape and dtype, and the network evaluations.

        Raises:
            ConfigError: a grid that does not exist between these times, a stochastic sampler with start < stop, NaN from the
                network.
        """
        if start < stop and not self.deterministic:
            raise ConfigError(
                f"sampler {type(self).__name__} as configured is stochastic and runs from noise to data only: to encode "
                "(start < stop) write sampler=ddim with eta=0 and variance=fixed_small"
            )
        self._check_denoiser(denoiser)
        times = self.time_grid(denoiser, start, stop)
        key = torch.arange(len(x_T), device=x_T.device) if index is None else index.to(x_T.device)
        noise = Draws(tuple(x_T.shape[1:]), seed, key, x_T.dtype)
        return self.integrate_grid(
            denoiser, x_T, times, noise=noise, condition=condition, callback=callback, progress=progress
        )

    @torch.no_grad()
    def integrate_grid(
        self,
        denoiser: Denoiser,
        x: Tensor,
        times: Tensor,
        *,
        noise: Draws,
        condition: Mapping[str, Tensor] | None = None,
        variance: Variance | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Samples:
        """Integrate over given times, for example a part of a grid: a call after its checks, with its times and noise.

        Args:
            denoiser: predicts (x̂_0, ε̂).
            x: the state at times[0], float (B, C, H, W).
            times: float64 (N + 1,) on the CPU, strictly monotone; increasing ones are for deterministic samplers.
            noise: that of the steps, of x's shape and dtype. The parts of one grid need draws of their own (see editing.py).
            variance: in place of an ancestral sampler's own; the others have none.
            condition, callback, progress: as for a call.

        Returns:
            The state at times[-1], in x's shape and dtype, and the network evaluations.

        Raises:
            ConfigError: NaN from the network. Whether sampler and denoiser fit each other is left to `check`.
        """
        context = EvaluationContext(denoiser, condition or {}, callback, noise, variance)
        x = self.integrate(x, times, context, progress_range(len(times) - 1, progress))
        context.refuse_nan()
        return Samples(x, context.nfe, context.evaluations)


def prior(schedule: Schedule, noise: Tensor) -> Tensor:
    """Return the state at t = 1 that sampling begins with: σ(1) · noise, noise standard normal (B, …)."""
    return append_dims_like(schedule.alpha_sigma(torch.ones((), dtype=torch.float64))[1], noise) * noise


def progress_range(n: int, progress: bool) -> Iterable[int]:
    """Return 0 … n − 1, with a progress bar if `progress`."""
    return show_progress(range(n), "sampling", "step", progress)
