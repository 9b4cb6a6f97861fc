"""Data-independent lower and upper bounds of the optimal variance (Ho et al. 2020)."""

import torch

from diffusion_lab.gaussian import transition
from diffusion_lab.objectives import Prediction
from diffusion_lab.schedules import PerExample, Schedule, append_dims_like
from diffusion_lab.variances.base import StepVariance, Variance, floor_is_variance, to_float64


class FixedSmall(Variance):
    """The floor, c = 0: σ̃² for ancestral steps, the exact variance if x_0 is a constant (Ho et al. 2020, section 3.2)."""

    def __call__(
        self, schedule: Schedule, t: PerExample, s: PerExample, prediction: Prediction, floor: PerExample | float = 0.0
    ) -> StepVariance:
        return append_dims_like(torch.as_tensor(floor), prediction.x0)


class FixedLarge(Variance):
    """σ²_{t|s}, β_t at s = t − 1/T: the exact variance if x_0 ~ N(0, I) (Ho et al. 2020, section 3.2). Ancestral steps only."""

    ancestral_only = True

    def __call__(
        self, schedule: Schedule, t: PerExample, s: PerExample, prediction: Prediction, floor: PerExample | float = 0.0
    ) -> StepVariance:
        floor64 = to_float64(floor, s)
        variance = transition(schedule, t.double(), s.double()).variance
        return append_dims_like(torch.where(floor_is_variance(s, floor64), floor64, variance), prediction.x0)
