"""Learning-rate curves and the choice of a fused optimiser."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import nn

from diffusion_lab.errors import ConfigError


class Rate(ABC):
    """rate(step, max_steps) → the factor on the learning rate in [0, 1] for the update that follows `step` updates.

    Args:
        warmup: updates over which the factor rises linearly from 1/warmup; 0 for none.
    """

    def __init__(self, warmup: int = 0) -> None:
        if warmup < 0:
            raise ConfigError(f"rate.warmup={warmup} is negative: write 0 for none")
        self.warmup = warmup

    @abstractmethod
    def after(self, progress: float) -> float:
        """The factor at `progress` ∈ [0, 1] of the updates after the warm-up."""

    def __call__(self, step: int, max_steps: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        return self.after(min((step - self.warmup) / max(max_steps - self.warmup, 1), 1.0))


class Constant(Rate):
    """1 after the warm-up (Ho et al. 2020, appendix B: 5,000 updates of warm-up)."""

    def after(self, progress: float) -> float:
        return 1.0


class Linear(Rate):
    """From 1 to 0 on a straight line."""

    def after(self, progress: float) -> float:
        return 1.0 - progress


class Cosine(Rate):
    """From 1 to 0 on half a cosine (Loshchilov & Hutter 2017, eq. 5)."""

    def after(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(
    make: Callable[..., torch.optim.Optimizer], parameters: Iterable[nn.Parameter], precision: str, clipping: bool
) -> torch.optim.Optimizer:
    """The optimiser, with one fused kernel an update wherever that works.

    Mixed precision with clipping forbids it: 16-mixed because gradients must be unscaled before they are clipped, and a fused
    optimiser unscales by itself; bf16-mixed, which scales none, because Lightning does not tell the two apart.
    """
    trained = [p for p in parameters if p.requires_grad]
    return make(trained, fused=not (precision.endswith("-mixed") and clipping))
