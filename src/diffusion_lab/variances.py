"""Reverse variances: the spread of one step from t to s, from an estimate c of Cov[x_0 | x_t].

    σ² = floor + (α_s − √(σ_s² − floor) α_t/σ_t)² c

The floor is what a sampler injects anyway: σ̃² of the posterior for ancestral steps, η²σ̃² for DDIM. The formula is the
covariance of q(x_s | x_t) for a Gaussian x_0 given x_t (Bao et al. 2022, "Analytic-DPM", theorem 1).
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffusion_lab.gaussian import transition
from diffusion_lab.objectives import Prediction
from diffusion_lab.schedules import Schedule, Times, match


class Variance(ABC):
    """variance(schedule, t, s, prediction, floor) → σ² ≥ 0, broadcastable to x_t; t > s and the floor 0-d or (B,)."""

    ancestral_only = False  # whether DDIM must refuse it, because it does not know of a floor
    extra_channels = False  # whether the network must output more than C channels

    @abstractmethod
    def __call__(
        self, schedule: Schedule, t: Times, s: Times, prediction: Prediction, floor: Tensor | float = 0.0
    ) -> Tensor: ...


class FixedSmall(Variance):
    """c = 0: the floor itself, that is σ̃² for ancestral steps, the right variance if x_0 were known (Ho et al. 2020, 3.2)."""

    def __call__(
        self, schedule: Schedule, t: Times, s: Times, prediction: Prediction, floor: Tensor | float = 0.0
    ) -> Tensor:
        return match(torch.as_tensor(floor), prediction.x0)


class FixedLarge(Variance):
    """σ²_{t|s}, β_t for neighbours: the right variance if x_0 were white noise (Ho et al. 2020, 3.2). Ancestral steps only."""

    ancestral_only = True

    def __call__(
        self, schedule: Schedule, t: Times, s: Times, prediction: Prediction, floor: Tensor | float = 0.0
    ) -> Tensor:
        return match(transition(schedule, t, s).variance, prediction.x0)
