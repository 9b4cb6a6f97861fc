"""How training draws t. Keyed as all noise is: the time of an example depends on (seed, step, its position) alone."""

from abc import ABC, abstractmethod

from torch import Tensor

from diffusion_lab.noise import Stream, uniform
from diffusion_lab.schedules import Schedule


class TimeSampler(ABC):
    """times(schedule, position, batch_size, seed=…, step=…) → t in (0, 1], float64, the shape of `position`.

    A new one gives the map from a keyed uniform number to u ∈ (0, 1). A table is then sampled at its nodes, each with
    probability 1/T for uniform u; a continuous curve at u itself.
    """

    @abstractmethod
    def place(self, u: Tensor, position: Tensor, batch_size: int) -> Tensor:
        """u ∈ (0, 1) of each example from its own uniform number, its position in the global batch and that batch's size."""

    def __call__(self, schedule: Schedule, position: Tensor, batch_size: int, *, seed: int, step: int) -> Tensor:
        """Times for the examples at `position`, int64 (B,), each in [0, batch_size), of the global batch of `step`."""
        u = self.place(uniform((), seed=seed, index=position, draw=step, stream=Stream.TIME), position, batch_size)
        return (
            u
            if schedule.steps is None
            else ((u * schedule.steps).floor() + 1).clamp(max=schedule.steps) / schedule.steps
        )


class Uniform(TimeSampler):
    """Independent uniform times (Ho et al. 2020, algorithm 1)."""

    def place(self, u: Tensor, position: Tensor, batch_size: int) -> Tensor:
        return u


class Stratified(TimeSampler):
    """One time in each of B equal parts of (0, 1], B the global batch: the loss of a step has less variance at no cost.

    The low-variance sampler of Kingma et al. 2021 (VDM, appendix I.1), with an own offset in each part.
    """

    def place(self, u: Tensor, position: Tensor, batch_size: int) -> Tensor:
        return (position + u) / batch_size
