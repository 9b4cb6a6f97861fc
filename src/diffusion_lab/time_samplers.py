"""Time samplers: the distribution of t in training.

The time of an example depends only on (seed, step, position in the global batch), like all random numbers. Importance
sampling also depends on earlier losses, whose history is therefore part of a checkpoint.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.noise import Stream, uniform
from diffusion_lab.schedules import Schedule


class TimeSampler(ABC):
    """time_sampler(schedule, position, batch_size, seed=…, step=…) → t in (0, 1], float64, of the shape of `position`.

    A subclass implements `times`, the inverse of its distribution function. On a table t is rounded up to the next node, so that
    uniform times have equally likely nodes, or to the nearest one.

    Args:
        stratified: draw one u in each of B equal parts of (0, 1], B the size of the global batch, which lowers the variance of
            the loss at no cost (the low-variance sampler of Kingma et al. 2021, VDM, appendix I.1, with an independent offset
            in each part).

    Attributes:
        learns: whether `update` uses the losses.
        uniform_mean: whether the mean of weight(t) · f(t) is that of f over uniform times, as a sum over all terms of the bound.
        nearest: round to the nearest node, for a density in λ or t that rounding up would shift by half a step towards noise.
    """

    learns = False
    uniform_mean = False
    nearest = False

    def __init__(self, stratified: bool = False) -> None:
        self.stratified = stratified

    @abstractmethod
    def times(self, schedule: Schedule, u: Float64[Tensor, " b"]) -> Float64[Tensor, " b"]:
        """Return t ∈ [0, 1] for u ∈ (0, 1); increasing in u."""

    def stratify(
        self, u: Float64[Tensor, " b"], position: Int64[Tensor, " b"], batch_size: int
    ) -> Float64[Tensor, " b"]:
        """Return u ∈ (0, 1) of each example, moved into the part of (0, 1] of its position if stratified.

        Args:
            u: independent uniform numbers in (0, 1).
            position: position of each example in the global batch.
            batch_size: size of the global batch.
        """
        return (position + u) / batch_size if self.stratified else u

    def __call__(
        self, schedule: Schedule, position: Int64[Tensor, " b"], batch_size: int, *, seed: int, step: int
    ) -> Float64[Tensor, " b"]:
        """Return the times of the examples at `position`, each in [0, batch_size), in the global batch of `step`.

        They are in [schedule.t_train_min, 1]: a uniform distribution is that of the interval, others are clipped to it.
        """
        u = uniform((), seed=seed, index=position, draw=step, stream=Stream.TIME)
        lowest = max(schedule.t_eps, schedule.t_train_min)
        t = self.times(schedule, self.stratify(u, position, batch_size)).clamp(lowest, 1)
        if schedule.steps is None:
            return t
        node = (t * schedule.steps).round() if self.nearest else (t * schedule.steps).floor() + 1
        return node.clamp(1, schedule.steps) / schedule.steps

    def weight(self, schedule: Schedule, t: Float[Tensor, " b"]) -> Float64[Tensor, " b"]:
        """Return the importance weight of the loss at times t.

        It is 1 where the distribution of t is part of the training method (uniform, log-normal, logit-normal).
        """
        return torch.ones_like(t, dtype=torch.float64)

    def update(  # noqa: B027 most distributions are fixed
        self, schedule: Schedule, t: Float[Tensor, " b"], loss: Float[Tensor, " b"]
    ) -> None:
        """Adapt the distribution to the losses of one global batch.

        Args:
            schedule: the curve.
            t: times in the order of their positions.
            loss: loss of each example, without `weight`.
        """

    def state(self) -> dict[str, Tensor]:
        """Return the state that `update` changes, for a checkpoint."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027 most distributions are fixed
        """Restore a state returned by `state`."""


class Uniform(TimeSampler):
    """Independent uniform times (Ho et al. 2020, algorithm 1)."""

    uniform_mean = True

    def __init__(self) -> None:
        super().__init__(stratified=False)

    def times(self, schedule: Schedule, u: Float64[Tensor, " b"]) -> Float64[Tensor, " b"]:
        return _uniform(schedule, u)


class Stratified(TimeSampler):
    """Uniform times, one in each of B equal parts of (0, 1], B the size of the global batch."""

    uniform_mean = True

    def __init__(self) -> None:
        super().__init__(stratified=True)

    def times(self, schedule: Schedule, u: Float64[Tensor, " b"]) -> Float64[Tensor, " b"]:
        return _uniform(schedule, u)


class LogNormal(TimeSampler):
    """ln(σ/α) ~ N(mean, std²), clipped to the curve (Karras et al. 2022, table 1, "noise distribution").

    Args:
        mean: mean of ln(σ/α), in [-20, 20].
        std: standard deviation of ln(σ/α), in (0, 20].
        stratified: see `TimeSampler`.

    Raises:
        ConfigError: an argument is out of range.
    """

    nearest = True

    def __init__(self, mean: float = -1.2, std: float = 1.2, stratified: bool = True) -> None:
        super().__init__(stratified)
        self.mean, self.std = _normal(mean, std)

    def times(self, schedule: Schedule, u: Float64[Tensor, " b"]) -> Float64[Tensor, " b"]:
        return schedule.time(-(self.mean + self.std * torch.special.ndtri(u)))


class LogitNormal(TimeSampler):
    """ln(t/(1 − t)) ~ N(mean, std²), designed for the curve `flow` (Esser et al. 2024, eq. 19).

    Args:
        mean: mean of the logit of t, in [-20, 20]; above 0 it favors noise.
        std: standard deviation of the logit of t, in (0, 20].
        stratified: see `TimeSampler`.

    Raises:
        ConfigError: an argument is out of range.
    """

    nearest = True

    def __init__(self, mean: float = 0.0, std: float = 1.0, stratified: bool = True) -> None:
        super().__init__(stratified)
        self.mean, self.std = _normal(mean, std)

    def times(self, schedule: Schedule, u: Float64[Tensor, " b"]) -> Float64[Tensor, " b"]:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


class Importance(TimeSampler):
    """p(t) ∝ √E[L_t²] with the loss weight 1/p(t), L_t the loss at t (Nichol & Dhariwal 2021, section 3.3).

    (0, 1] is divided into bins: one for each of the T nodes of a table, or `bins` equal ones on a continuous curve, with a
    uniform density inside each. E[L²] is the mean over the last `history` losses of a bin, of all processes. p is uniform until
    every bin has that many. The history takes 8 · history bytes a bin (320 kB for T = 4000) in every checkpoint.

    Args:
        history: number of losses kept for each bin, in [1, 1000]; the published value is 10.
        uniform_prob: fraction of uniform times, in [0, 1], which bounds every weight by 1/uniform_prob; the published value is
            0.001.
        bins: number of bins on a continuous curve, in [1, 10000].
        stratified: see `TimeSampler`.

    Raises:
        ConfigError: an argument is out of range.
    """

    learns = uniform_mean = True

    def __init__(
        self, history: int = 10, uniform_prob: float = 0.001, bins: int = 100, stratified: bool = True
    ) -> None:
        super().__init__(stratified)
        check_number("time_sampler.history", history, "[1, 1000]", "the published value is 10", whole=True)
        check_number("time_sampler.uniform_prob", uniform_prob, "[0, 1]", "the published value is 0.001")
        check_number("time_sampler.bins", bins, "[1, 10000]", whole=True)
        self.history, self.uniform_prob, self.bins = history, uniform_prob, bins
        self._losses = torch.zeros(0, history, dtype=torch.float64)  # ring buffer of the last losses of each bin
        self._counts = torch.zeros(0, dtype=torch.int64)  # number of losses that each bin has received

    def _bins(self, schedule: Schedule) -> int:
        """Return the number of bins; allocate the history on the first call.

        Raises:
            ConfigError: a history loaded from a checkpoint has another shape.
        """
        n = schedule.steps or self.bins
        if len(self._counts) == 0:
            self._losses = torch.zeros(n, self.history, dtype=torch.float64)
            self._counts = torch.zeros(n, dtype=torch.int64)
        if self._losses.shape != (n, self.history):
            raise ConfigError(
                f"the checkpoint's loss history has the shape {tuple(self._losses.shape)} (bins, history), and this run needs "
                f"({n}, {self.history}): keep schedule.steps, time_sampler.bins and time_sampler.history, or write "
                "time_sampler=stratified"
            )
        return n

    def probabilities(self, schedule: Schedule) -> Float64[Tensor, " bins"]:
        """Return p of each bin, with sum 1."""
        n = self._bins(schedule)
        root = self._losses.square().mean(1).sqrt()
        total = root.sum()
        if bool((self._counts < self.history).any()) or not 0 < float(total) < math.inf:
            return torch.full((n,), 1 / n, dtype=torch.float64)
        return (1 - self.uniform_prob) * root / total + self.uniform_prob / n

    def times(self, schedule: Schedule, u: Float64[Tensor, " b"]) -> Float64[Tensor, " b"]:
        p = self.probabilities(schedule)
        upper = p.cumsum(0)
        i = torch.searchsorted(upper, u).clamp(max=len(p) - 1)
        # strictly inside the bin, so that rounding moves no time into the neighboring one
        fraction = ((u - (upper - p)[i]) / p[i]).clamp(1e-9, 1 - 1e-9)
        t = (i + fraction) / len(p)
        lowest = schedule.t_train_min  # the first bin is uniform in [lowest, 1/n]
        return torch.where(i == 0, lowest + (1 - lowest * len(p)) * t, t) if lowest * len(p) < 1 else t

    def weight(self, schedule: Schedule, t: Float[Tensor, " b"]) -> Float64[Tensor, " b"]:
        """Return 1/(n p), n the number of bins: the mean of the weighted loss is the mean over uniform times."""
        p = self.probabilities(schedule)
        return 1 / (len(p) * p[self._bin(schedule, t)])

    def _bin(self, schedule: Schedule, t: Float[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """Return the bin of each time; a time on the edge of two bins belongs to the lower one."""
        n = self._bins(schedule)
        position = t.double() * n
        return (position.round() if schedule.steps else position.ceil()).long().clamp(1, n) - 1

    def update(self, schedule: Schedule, t: Float[Tensor, " b"], loss: Float[Tensor, " b"]) -> None:
        """Append the finite losses to the histories of their bins. Arguments as in `TimeSampler.update`."""
        finite = loss.isfinite()
        bins, loss = self._bin(schedule, t[finite]), loss[finite].double()
        order = bins.argsort(stable=True)
        bins, loss = bins[order], loss[order]
        counts = bins.bincount(minlength=len(self._counts))
        rank = torch.arange(len(bins)) - (counts.cumsum(0) - counts)[bins]  # within its bin in this batch
        kept = rank >= counts[bins] - self.history  # no two of these have the same slot of the ring buffer
        self._losses[bins[kept], (self._counts[bins] + rank)[kept] % self.history] = loss[kept]
        self._counts += counts

    def state(self) -> dict[str, Tensor]:
        return {"losses": self._losses.clone(), "counts": self._counts.clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._losses, self._counts = state["losses"].clone(), state["counts"].clone()


def _uniform(schedule: Schedule, u: Float64[Tensor, " b"]) -> Float64[Tensor, " b"]:
    """Return the times in [t_train_min, 1] for u ∈ (0, 1)."""
    return schedule.t_train_min + (1 - schedule.t_train_min) * u


def _normal(mean: float, std: float) -> tuple[float, float]:
    """Return (mean, std) of a normal distribution. Raises ConfigError: one of them is out of range."""
    check_number("time_sampler.mean", mean, "[-20, 20]")
    check_number("time_sampler.std", std, "(0, 20]")
    return mean, std
