"""Data-independent lower and upper bounds of the optimal variance (Ho et al. 2020)."""

import torch
from torch import Tensor

from diffusion_lab.gaussian import transition
from diffusion_lab.objectives import Prediction
from diffusion_lab.schedules import Scalars, Schedule, append_dims_like
from diffusion_lab.variances.base import Variance, stands_for_all, wide


class FixedSmall(Variance):
    """c = 0: the floor itself, that is σ̃² for ancestral steps, the right variance if x_0 were known (Ho et al. 2020, 3.2)."""

    def __call__(
        self, schedule: Schedule, t: Scalars, s: Scalars, prediction: Prediction, floor: Tensor | float = 0.0
    ) -> Tensor:
        return append_dims_like(torch.as_tensor(floor), prediction.x0)


class FixedLarge(Variance):
    """σ²_{t|s}, β_t for neighbours: the right variance if x_0 were white noise (Ho et al. 2020, 3.2). Ancestral steps only."""

    ancestral_only = True

    def __call__(
        self, schedule: Schedule, t: Scalars, s: Scalars, prediction: Prediction, floor: Tensor | float = 0.0
    ) -> Tensor:
        least = wide(floor, s)
        variance = transition(schedule, t.double(), s.double()).variance
        return append_dims_like(torch.where(stands_for_all(s, least), least, variance), prediction.x0)
