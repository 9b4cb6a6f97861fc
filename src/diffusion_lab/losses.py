"""What one training step computes: x_0 → x_t → network output → weighted error."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.schedules import match, move
from diffusion_lab.weightings import Weighting


class Error(ABC):
    """error(output, target) → the mean error of each image, both (B, …), result float (B,)."""

    @abstractmethod
    def elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        """The error of each element."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return self.elementwise(output, target).flatten(1).mean(1)


class L2(Error):
    """The squared error, the one that the weightings are derived for."""

    def elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square()


class L1(Error):
    """The absolute error."""

    def elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs()


class Huber(Error):
    """Quadratic up to `delta`, linear beyond: ½e² or δ(|e| − ½δ) (Huber 1964).

    Args:
        delta: δ > 0.
    """

    def __init__(self, delta: float = 1.0) -> None:
        if delta <= 0:
            raise ValueError(f"loss huber needs delta > 0, not delta={delta}")
        self.delta = delta

    def elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(output, target, reduction="none", delta=self.delta)


class StepLoss(NamedTuple):
    """The loss of each image of a batch, float (B,)."""

    weighted: Tensor  # w_y(t) · error: what is minimised
    error: Tensor  # the bare error of y
    weight: Tensor  # w_y(t)


def diffusion_loss(
    denoiser: Denoiser,
    weighting: Weighting,
    error: Error,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    previous: Tensor | None = None,
    **condition: Tensor,
) -> StepLoss:
    """E over (x_0, ε, t) of w_t ‖y − ŷ‖²: one batch of it.

    Args:
        denoiser: network, schedule and objective; its clipping plays no part.
        weighting: the weight on the error of y.
        error: what stands for ‖·‖²; a mean over the elements of an image.
        x0: images (B, C, H, W) in [−1, 1].
        noise: ε, the same shape.
        t: times (B,) in (0, 1].
        previous: x̂_0 for a self-conditioning network.
        condition: keyword arguments for the network.
    """
    schedule, objective = denoiser.schedule, denoiser.objective
    x_t = corrupt(denoiser, x0, noise, t)
    output, _ = denoiser.output(x_t, t, previous, **condition)
    each = error(output, objective.target(schedule, t, x0, noise))
    weight = move(weighting(schedule, objective, t).to(each.dtype), each.device)
    return StepLoss(weight * each, each, weight)


def corrupt(denoiser: Denoiser, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = α_t x_0 + σ_t ε for images (B, …) and times (B,)."""
    alpha, sigma = denoiser.schedule.alpha_sigma(t.double())
    return match(alpha, x0) * x0 + match(sigma, x0) * noise
