"""What one training step computes: x_0 → x_t → network output → weighted error; and the terms that train a variance."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.errors import ConfigError
from diffusion_lab.gaussian import discretized_log_likelihood, kl, posterior
from diffusion_lab.schedules import NODE_TOLERANCE, append_dims_like, to_device
from diffusion_lab.variances import Learned
from diffusion_lab.weightings import Weighting


class PointwiseLoss(ABC):
    """error(output, target) → the mean error of each image, both (B, …), result float (B,)."""

    @abstractmethod
    def elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        """The error of each element."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return self.elementwise(output, target).flatten(1).mean(1)


class L2(PointwiseLoss):
    """The squared error, the one that the weightings are derived for."""

    def elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square()


class L1(PointwiseLoss):
    """The absolute error."""

    def elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs()


class Huber(PointwiseLoss):
    """Quadratic up to `delta`, linear beyond: ½e² or δ(|e| − ½δ) (Huber 1964).

    Args:
        delta: δ > 0.
    """

    def __init__(self, delta: float = 1.0) -> None:
        if delta <= 0:
            raise ConfigError(f"loss huber needs delta > 0, not delta={delta}")
        self.delta = delta

    def elementwise(self, output: Tensor, target: Tensor) -> Tensor:
        return F.huber_loss(output, target, reduction="none", delta=self.delta)


class StepLoss(NamedTuple):
    """The loss of each image of a batch, float (B,)."""

    weighted: Tensor  # what is minimised: w_y(t) · error, with a learned variance and its term
    error: Tensor  # the bare error of y
    weight: Tensor  # w_y(t)


def diffusion_loss(
    denoiser: Denoiser,
    weighting: Weighting,
    error: PointwiseLoss,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    previous: Tensor | None = None,
    learned: Learned | None = None,
    **condition: Tensor,
) -> StepLoss:
    """E over (x_0, ε, t) of w_t ‖y − ŷ‖²: one batch of it.

    A learned variance adds (T/1000) L_t, which is 0.001 of the whole bound L_vlb = E[T L_t], and moves nothing but itself; or,
    where its loss is `vlb`, T L_t is all that is minimised (Nichol & Dhariwal 2021, section 3.1).

    Args:
        denoiser: network, schedule and objective; its clipping plays no part.
        weighting: the weight on the error of y.
        error: what stands for ‖·‖²; a mean over the elements of an image.
        x0: images (B, C, H, W) in [−1, 1].
        noise: ε, the same shape.
        t: times (B,) in (0, 1].
        previous: x̂_0 for a self-conditioning network.
        learned: the variance that is trained as well.
        condition: keyword arguments for the network.
    """
    schedule, objective = denoiser.schedule, denoiser.objective
    x_t = denoiser.schedule.corrupt(x0, noise, t)
    output, extra, *_ = denoiser.output(x_t, t, previous, **condition)
    each = error(output, objective.target(schedule, t, x0, noise))
    weight = to_device(weighting(schedule, objective, t).to(each.dtype), each.device)
    weighted = weight * each
    if learned is not None:
        alone, steps = learned.loss == "vlb", chain_steps(denoiser)
        term = bound_term(denoiser, learned, x0, x_t, t, output if alone else output.detach(), extra)
        weighted = steps * term if alone else weighted + steps / 1000 * term
    return StepLoss(weighted, each, weight)


def chain_steps(denoiser: Denoiser) -> int:
    """T, each of whose steps is one term of the bound; ConfigError on a curve that has none."""
    if denoiser.schedule.steps is None:
        raise ConfigError(
            "variance=learned is trained on the terms of a chain, and this schedule is a continuous curve without steps: write "
            "schedule=cosine or schedule=linear, or variance=fixed_small"
        )
    return denoiser.schedule.steps


def bound_term(
    denoiser: Denoiser, learned: Learned, x0: Tensor, x_t: Tensor, t: Tensor, output: Tensor, extra: Tensor | None
) -> Tensor:
    """L_t of the variational bound in bits per dimension, float (B,): the KL of the step from t to s = t − 1/T, or at s = 0 the
    decoder's discretized likelihood, whose least variance is that of the step before (Nichol & Dhariwal 2021, their code).

    Args:
        denoiser: its clipping plays no part.
        learned: the variance.
        x0: images (B, C, H, W) in [−1, 1], for the decoder on the grid k/127.5 − 1.
        x_t: the noisy images.
        t: times (B,) on the table.
        output: the network's y, and what gradient reaches the mean through it.
        extra: the network's v.
    """
    schedule, step, t = denoiser.schedule, 1 / chain_steps(denoiser), t.double()
    into_data = t < step * (1 + NODE_TOLERANCE)
    s = torch.where(into_data, 0.0, t - step)
    q = posterior(schedule, t, s)
    floor = posterior(schedule, torch.where(into_data, 2 * step, t), torch.where(into_data, step, s)).variance
    guess, noise = denoiser.objective.solve(schedule, t, x_t, output)
    log_variance = learned.log(schedule, t, s, Prediction(guess, noise, output, extra), floor)
    gap = append_dims_like(q.c0, x0) * (x0 - guess)  # μ̃ − μ̂: what the two have in common is left out
    nats = kl(gap, append_dims_like(floor.log(), x0), torch.zeros_like(gap), log_variance).flatten(1).mean(1)
    rows = to_device(into_data.nonzero()[:, 0], x0.device)  # few steps have any, and a decoder costs more than a KL
    if len(rows):
        decoder = -discretized_log_likelihood(x0[rows], guess[rows], log_variance[rows]).flatten(1).mean(1)
        nats = nats.index_copy(0, rows, decoder)
    return nats / math.log(2)


def head_loss(
    denoiser: Denoiser,
    kind: str,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    previous: Tensor | None = None,
    **condition: Tensor,
) -> Tensor:
    """The squared error of a second head, float (B,): sn learns ε², npr the (ε − ε̂)² of the frozen network, whose gradient goes
    nowhere (Bao et al. 2022, "Estimating the optimal covariance with imperfect mean in diffusion probabilistic models").

    Args:
        denoiser: without clipping, its network one whose channels beyond C are the head's.
        kind: "sn" or "npr".
        x0, noise, t, previous, condition: as for `diffusion_loss`.
    """
    prediction = denoiser(denoiser.schedule.corrupt(x0, noise, t), t, previous, **condition)
    assert prediction.extra is not None
    target = (noise if kind == "sn" else noise - prediction.noise.detach()).square()
    return (prediction.extra - target).square().flatten(1).mean(1)
