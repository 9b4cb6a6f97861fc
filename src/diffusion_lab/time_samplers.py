"""How training draws t. Keyed as all noise is: the time of an example depends on (seed, step, its position) alone.

Importance sampling alone also depends on the losses before, whose history is therefore part of a checkpoint.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from diffusion_lab.errors import ConfigError
from diffusion_lab.noise import Stream, uniform
from diffusion_lab.schedules import Schedule


class TimeSampler(ABC):
    """times(schedule, position, batch_size, seed=…, step=…) → t in (0, 1], float64, the shape of `position`.

    A new one gives the map from u ∈ (0, 1) to t: the inverse of its distribution function. On a table t is then a node, the
    upper end of the cell that it falls in.

    Args:
        stratified: one u in each of B equal parts of (0, 1], B the global batch, so that the loss of a step has less variance
            at no cost: the low-variance sampler of Kingma et al. 2021 (VDM, appendix I.1), with an own offset in each part.

    Attributes:
        learns: whether `update` wants the losses.
    """

    learns = False

    def __init__(self, stratified: bool = False) -> None:
        self.stratified = stratified

    @abstractmethod
    def times(self, schedule: Schedule, u: Tensor) -> Tensor:
        """t ∈ [0, 1] for u ∈ (0, 1), both float64 (B,); increasing."""

    def place(self, u: Tensor, position: Tensor, batch_size: int) -> Tensor:
        """u ∈ (0, 1) of each example from its own uniform number, its position in the global batch and that batch's size."""
        return (position + u) / batch_size if self.stratified else u

    def __call__(self, schedule: Schedule, position: Tensor, batch_size: int, *, seed: int, step: int) -> Tensor:
        """Times for the examples at `position`, int64 (B,), each in [0, batch_size), of the global batch of `step`."""
        own = uniform((), seed=seed, index=position, draw=step, stream=Stream.TIME)
        t = self.times(schedule, self.place(own, position, batch_size)).clamp(schedule.t_eps, 1)
        if schedule.steps is None:
            return t
        return ((t * schedule.steps).floor() + 1).clamp(max=schedule.steps) / schedule.steps

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        """What the loss at times t (B,) is multiplied by, float64 (B,), so that its mean is that over the times it is meant
        for. The distributions that are part of a method (log-normal, logit-normal) are what it is meant for: 1."""
        return torch.ones_like(t, dtype=torch.float64)

    def update(self, schedule: Schedule, t: Tensor, loss: Tensor) -> None:  # noqa: B027 most have nothing to learn
        """Learn from the losses (B,) at times t (B,), without `weight`, of one global batch in the order of its positions."""

    def state(self) -> dict[str, Tensor]:
        """What was learned, for a checkpoint."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Continue from what `state` gave."""


class Uniform(TimeSampler):
    """Independent uniform times (Ho et al. 2020, algorithm 1)."""

    def __init__(self) -> None:
        super().__init__(stratified=False)

    def times(self, schedule: Schedule, u: Tensor) -> Tensor:
        return u


class Stratified(TimeSampler):
    """Uniform times, one in each of B equal parts of (0, 1], B the global batch."""

    def __init__(self) -> None:
        super().__init__(stratified=True)

    def times(self, schedule: Schedule, u: Tensor) -> Tensor:
        return u


class LogNormal(TimeSampler):
    """ln(σ/α) ~ N(mean, std²), clipped to the curve (Karras et al. 2022, table 1, "noise distribution").

    Args:
        mean: of ln(σ/α).
        std: of ln(σ/α), above 0.
        stratified: see `TimeSampler`.

    Raises:
        ValueError: `std` not positive, or `mean` no number.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2, stratified: bool = True) -> None:
        super().__init__(stratified)
        self.mean, self.std = _normal("log_normal", mean, std)

    def times(self, schedule: Schedule, u: Tensor) -> Tensor:
        return schedule.time(-(self.mean + self.std * torch.special.ndtri(u)))


class LogitNormal(TimeSampler):
    """ln(t/(1 − t)) ~ N(mean, std²), for the curve `flow` (Esser et al. 2024, eq. 19).

    Args:
        mean: of the logit of t; above 0 more noise.
        std: of the logit of t, above 0.
        stratified: see `TimeSampler`.

    Raises:
        ValueError: `std` not positive, or `mean` no number.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0, stratified: bool = True) -> None:
        super().__init__(stratified)
        self.mean, self.std = _normal("logit_normal", mean, std)

    def times(self, schedule: Schedule, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))


class Importance(TimeSampler):
    """p(t) ∝ √E[L_t²], L_t the loss at t, and the weight 1/p(t) beside it (Nichol & Dhariwal 2021, section 3.3).

    (0, 1] is divided into bins: on a table one for each of its T nodes, on a continuous curve `bins` equal ones with a uniform
    density inside. E[L²] is that of the last `history` losses of a bin, of all processes; p is uniform until every bin has as
    many. The history is float64, 8 · history bytes a bin (320 kB for T = 4000), and part of every checkpoint.

    Args:
        history: losses remembered for each bin; 10 published.
        uniform_prob: the share of uniform times, in [0, 1], which keeps every weight below 1/uniform_prob; 0.001 in the
            published code.
        bins: on a continuous curve.
        stratified: see `TimeSampler`.

    Raises:
        ValueError: an argument outside its range.
    """

    learns = True

    def __init__(
        self, history: int = 10, uniform_prob: float = 0.001, bins: int = 100, stratified: bool = True
    ) -> None:
        super().__init__(stratified)
        if history < 1 or bins < 1 or not 0 <= uniform_prob <= 1:
            raise ConfigError(
                f"times importance needs history >= 1, bins >= 1 and uniform_prob in [0, 1] (published: 10 and 0.001), not "
                f"history={history}, bins={bins}, uniform_prob={uniform_prob}"
            )
        self.history, self.uniform_prob, self.bins = history, uniform_prob, bins
        self._losses = torch.zeros(0, history, dtype=torch.float64)  # the last ones of each bin, a ring
        self._counts = torch.zeros(0, dtype=torch.int64)  # how many each bin has had

    def _bins(self, schedule: Schedule) -> int:
        """How many bins there are, with the memory for them."""
        n = schedule.steps or self.bins
        if len(self._counts) == 0:
            self._losses = torch.zeros(n, self.history, dtype=torch.float64)
            self._counts = torch.zeros(n, dtype=torch.int64)
        if self._losses.shape != (n, self.history):
            raise ConfigError(
                f"the checkpoint's history of losses is {tuple(self._losses.shape)} (bins, history) and this run's is "
                f"({n}, {self.history}): keep schedule.steps, times.bins and times.history, or write time_sampler=stratified"
            )
        return n

    def probabilities(self, schedule: Schedule) -> Tensor:
        """p of each bin, float64, sum 1."""
        n = self._bins(schedule)
        root = self._losses.square().mean(1).sqrt()
        total = root.sum()
        if bool((self._counts < self.history).any()) or not 0 < float(total) < math.inf:
            return torch.full((n,), 1 / n, dtype=torch.float64)
        return (1 - self.uniform_prob) * root / total + self.uniform_prob / n

    def times(self, schedule: Schedule, u: Tensor) -> Tensor:
        p = self.probabilities(schedule)
        upper = p.cumsum(0)
        found = torch.searchsorted(upper, u).clamp(max=len(p) - 1)
        # strictly inside the bin, so that rounding moves no time to its neighbour
        inside = ((u - (upper - p)[found]) / p[found]).clamp(1e-9, 1 - 1e-9)
        return (found + inside) / len(p)

    def weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        """1/(n p), n the number of bins: the mean of the weighted loss is that over uniform times."""
        p = self.probabilities(schedule)
        return 1 / (len(p) * p[self._bin(schedule, t)])

    def _bin(self, schedule: Schedule, t: Tensor) -> Tensor:
        n = self._bins(schedule)
        at = t.double() * n
        return (at.round() if schedule.steps else at.ceil()).long().clamp(1, n) - 1

    def update(self, schedule: Schedule, t: Tensor, loss: Tensor) -> None:
        finite = loss.isfinite()
        at, loss = self._bin(schedule, t[finite]), loss[finite].double()
        order = at.argsort(stable=True)
        at, loss = at[order], loss[order]
        here = at.bincount(minlength=len(self._counts))
        rank = torch.arange(len(at)) - (here.cumsum(0) - here)[at]  # among those of its bin in this batch
        kept = rank >= here[at] - self.history  # no two of these share a place in the ring
        self._losses[at[kept], (self._counts[at] + rank)[kept] % self.history] = loss[kept]
        self._counts += here

    def state(self) -> dict[str, Tensor]:
        return {"losses": self._losses.clone(), "counts": self._counts.clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._losses, self._counts = state["losses"].clone(), state["counts"].clone()


def _normal(name: str, mean: float, std: float) -> tuple[float, float]:
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise ConfigError(f"times {name} needs a number mean and std > 0, not mean={mean}, std={std}")
    return mean, std
