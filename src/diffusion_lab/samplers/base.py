"""The one signature of all samplers, and what they share: the grid, keyed noise, counting, the callback."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.errors import ConfigError
from diffusion_lab.noise import Draws
from diffusion_lab.samplers import grids
from diffusion_lab.schedules import Schedule, match, move

Callback = Callable[[int, float, Tensor, Prediction], None]


class Model:
    """A denoiser during one run of a sampler: carries the condition and the x̂_0 before, counts, and watches for NaN.

    Attributes:
        nfe: network evaluations so far.
        noise: noise(i), that of step i, standard normal of the state's shape; each i is one draw of the key.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        condition: Mapping[str, Tensor],
        callback: Callback | None,
        noise: Draws,
    ) -> None:
        self.denoiser, self.schedule, self.condition = denoiser, denoiser.schedule, condition
        self.callback, self.noise, self.nfe = callback, noise, 0
        self._previous: Tensor | None = None
        self._times: list[Tensor] = []
        self._sums: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Prediction:
        """One network evaluation at state x (B, …) and time t, 0-d on the CPU, or (B,) where each image has its own.

        Where x holds only some images of the batch, `rows`, int64 (B,), says which: each gets its own condition, and none x̂_0
        of the evaluation before, which a sampler that uses `rows` must refuse to need (`Sampler.uses_previous`).
        """
        condition, previous = self.condition, self._previous
        if rows is not None:
            condition, previous = {name: value[rows.to(value.device)] for name, value in condition.items()}, None
        prediction = self.denoiser(x, t, previous=previous, **condition)
        self._previous = prediction.x0 if rows is None else None
        self.nfe += 1
        sums = prediction.x0.flatten(1).sum(1, dtype=torch.float64)  # finite just where every number is
        self._times.append(t if t.ndim == 0 else torch.where(sums.isfinite(), 0.0, move(t, x.device)).max())
        self._sums.append(sums.sum())  # stays on the device; read once, at the end
        return prediction

    def depart(self, i: int, x: Tensor, t: Tensor, s: Tensor) -> Prediction:
        """What step i from t to s is made of: the prediction at state x (B, …) and time t, told to the callback.

        Encoding departs from t = 0, where no network was trained: there x is x_0, and ε̂ is that of the next time.
        """
        prediction = self(x, s)._replace(x0=x) if t == 0 else self(x, t)
        self.report(i, t, x, prediction)
        return prediction

    def report(self, i: int, t: Tensor, x: Tensor, prediction: Prediction) -> None:
        """Tell the callback of step i: its time, the state there, what the network said of it."""
        if self.callback is not None:
            self.callback(i, float(t), x, prediction)

    def refuse_nan(self) -> None:
        """Raise ValueError where an evaluation was not finite, naming the first."""
        finite: list[bool] = torch.stack(self._sums).isfinite().tolist() if self._sums else []
        if not all(finite):
            i = finite.index(False)
            t = float(self._times[i])
            raise ConfigError(
                f"the network gave NaN or infinity at evaluation {i + 1} of {self.nfe}, t={t:.4g}: "
                "sample in float32, or take a checkpoint from before the training diverged"
            )


class Sampler(ABC):
    """An integrator from `start` to `stop` over a grid of times. What a new one must give: `integrate`, `deterministic`.

    Args:
        steps: how many; None means every step of a discrete schedule.
        grid: the name of a time grid (see grids.py).
        budget: instead of `steps`, how many network evaluations a call may take at most.

    Attributes:
        nfe: network evaluations of the last call.

    Raises:
        ValueError: an unknown grid, no steps, or a budget that allows none.
    """

    grid_names: tuple[str, ...] = grids.NAMES  # the time grids it knows
    uses_previous = True  # whether a self-conditioning network may be given the x̂_0 of the evaluation before
    moves_mean = False  # whether it adds Σ times the gradient of a classifier to the mean of a step

    def __init__(self, steps: int | None, grid: str, budget: int | None = None) -> None:
        if grid not in self.grid_names:
            raise ConfigError(f"unknown time grid {grid!r}: write one of {', '.join(self.grid_names)}")
        if budget is not None:
            steps = self.within(budget)
            if steps < 1:
                raise ConfigError(f"sampler.budget={budget} allows not one step of {type(self).__name__}: allow more")
        if steps is not None and steps < 1:
            raise ConfigError(f"a sampler needs steps >= 1, not steps={steps}")
        self.steps, self.grid, self.nfe = steps, grid, 0

    @property
    @abstractmethod
    def deterministic(self) -> bool:
        """Whether the result is a function of the state alone. Only then can it run from data to noise."""

    def within(self, budget: int) -> int:
        """The most steps that take at most `budget` network evaluations: one each, unless a subclass says otherwise."""
        return budget

    @abstractmethod
    def integrate(self, x: Tensor, times: Tensor, model: Model, steps: Iterable[int]) -> Tensor:
        """From the state x at times[0] to the state at times[-1].

        Args:
            x: (B, C, H, W).
            times: float64 (N + 1,) on the CPU, so that coefficients cost no device synchronisation.
            model: the denoiser; also `model.noise(i)`, the noise of step i, and `model.report`.
            steps: 0 … N − 1, with a progress bar if one was asked for.
        """

    def times(self, denoiser: Denoiser, start: float = 1.0, stop: float = 0.0) -> Tensor:
        """The grid between two times, float64 (N + 1,). Raises ValueError as grids.times does."""
        return grids.times(self.grid, denoiser.schedule, self.steps, start, stop)

    def check(self, denoiser: Denoiser) -> None:
        """Raise ValueError where this sampler cannot work with that denoiser."""
        self._refuse(denoiser)
        self.times(denoiser)

    def _refuse(self, denoiser: Denoiser) -> None:
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
    ) -> Tensor:
        """Integrate from `start` to `stop`.

        Args:
            denoiser: what predicts (x̂_0, ε̂).
            x_T: the state at time `start`, float (B, C, H, W); at 1 that is σ(1) · noise.
            seed: with `index` the key of all noise.
            index: int64 (B,), which image each row is; default 0 … B − 1.
            condition: keyword arguments for the network, each with B rows.
            start: the time of x_T, in [0, 1].
            stop: the time of the result, in [0, 1]; start < stop runs a deterministic sampler the other way.
            callback: callback(i, t, x, prediction) at every step, before it is taken.
            progress: show a bar.

        Returns:
            The state at `stop`, in x_T's shape and dtype.

        Raises:
            ValueError: a grid that cannot be, a stochastic sampler with start < stop, NaN from the network.
        """
        if start < stop and not self.deterministic:
            raise ConfigError(
                f"sampler {type(self).__name__} as configured is stochastic and runs from noise to data only: to encode "
                "(start < stop) write sampler=ddim with eta=0 and variance=fixed_small"
            )
        self._refuse(denoiser)
        times = self.times(denoiser, start, stop)
        key = torch.arange(len(x_T), device=x_T.device) if index is None else index.to(x_T.device)
        noise = Draws(tuple(x_T.shape[1:]), seed, key, x_T.dtype)
        return self.walk(denoiser, x_T, times, noise=noise, condition=condition, callback=callback, progress=progress)

    @torch.no_grad()
    def walk(
        self,
        denoiser: Denoiser,
        x: Tensor,
        times: Tensor,
        *,
        noise: Draws,
        condition: Mapping[str, Tensor] | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Integrate over times of one's own, for example a part of the grid: a call, once it has checked and has times and noise.

        Args:
            denoiser: what predicts (x̂_0, ε̂).
            x: the state at times[0], float (B, C, H, W).
            times: float64 (N + 1,) on the CPU, strictly monotone; increasing ones are for deterministic samplers.
            noise: that of the steps, of x's shape and dtype. Who walks several parts of one way gives each draws of its own
                (see editing.py).
            condition, callback, progress: as for a call.

        Returns:
            The state at times[-1], in x's shape and dtype.

        Raises:
            ValueError: NaN from the network. `check` says whether sampler and denoiser go together.
        """
        model = Model(denoiser, condition or {}, callback, noise)
        x = self.integrate(x, times, model, bar(len(times) - 1, progress))
        self.nfe = model.nfe
        model.refuse_nan()
        return x


def prior(schedule: Schedule, noise: Tensor) -> Tensor:
    """The state at t = 1 that sampling begins with: σ(1) · noise, noise standard normal (B, …)."""
    return match(schedule.alpha_sigma(torch.ones((), dtype=torch.float64))[1], noise) * noise


def bar(n: int, progress: bool) -> Iterable[int]:
    """0 … n − 1, with a progress bar if one was asked for."""
    if not progress:
        return range(n)
    from tqdm import tqdm

    steps: Iterable[int] = tqdm(range(n), desc="sampling", unit="step", leave=False)
    return steps
