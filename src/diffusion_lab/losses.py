"""Training losses: x_0 → x_t → network output → weighted error, and the terms that train a variance."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.gaussian import discretized_log_likelihood, kl, posterior
from diffusion_lab.schedules import NODE_TOLERANCE, append_dims_like, to_device
from diffusion_lab.time_samplers import TimeSampler
from diffusion_lab.variances import Learned
from diffusion_lab.weightings import Weighting


class PointwiseLoss(ABC):
    """loss(output, target) → the mean error of each image."""

    @abstractmethod
    def elementwise(self, output: Float[Tensor, "b *chw"], target: Float[Tensor, "b *chw"]) -> Float[Tensor, "b *chw"]:
        """Return the error of each element."""

    def __call__(self, output: Float[Tensor, "b *chw"], target: Float[Tensor, "b *chw"]) -> Float[Tensor, " b"]:
        """Return the mean error of each image."""
        return self.elementwise(output, target).flatten(1).mean(1)


class L2(PointwiseLoss):
    """The squared error, for which the weightings are derived."""

    def elementwise(self, output: Float[Tensor, "b *chw"], target: Float[Tensor, "b *chw"]) -> Float[Tensor, "b *chw"]:
        return (output - target).square()


class L1(PointwiseLoss):
    """The absolute error."""

    def elementwise(self, output: Float[Tensor, "b *chw"], target: Float[Tensor, "b *chw"]) -> Float[Tensor, "b *chw"]:
        return (output - target).abs()


class Huber(PointwiseLoss):
    """Quadratic up to `delta`, linear beyond: ½e² or δ(|e| − ½δ) (Huber 1964).

    Args:
        delta: δ in [1e-6, 1e6].

    Raises:
        ConfigError: δ is out of range.
    """

    def __init__(self, delta: float = 1.0) -> None:
        check_number("loss.delta", delta, "[1e-6, 1e6]")
        self.delta = delta

    def elementwise(self, output: Float[Tensor, "b *chw"], target: Float[Tensor, "b *chw"]) -> Float[Tensor, "b *chw"]:
        return F.huber_loss(output, target, reduction="none", delta=self.delta)


class StepLoss(NamedTuple):
    """Training loss of each image of a batch."""

    weighted: Float[Tensor, " b"]  # the quantity to minimize: w_y(t) · error, plus the term of a learned variance
    error: Float[Tensor, " b"]  # the unweighted error of y
    weight: Float[Tensor, " b"]  # w_y(t)


def diffusion_loss(
    denoiser: Denoiser,
    weighting: Weighting,
    error: PointwiseLoss,
    x0: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    t: Float[Tensor, " b"],
    previous: Float[Tensor, "b c h w"] | None = None,
    learned: Learned | None = None,
    **condition: Tensor,
) -> StepLoss:
    """Return w_t ‖y − ŷ‖² of each image, whose mean over (x_0, ε, t) is the training loss.

    A learned variance adds (T/1000) L_t, which is 0.001 of the bound L_vlb = E[T L_t] and has a gradient with respect to the
    variance only. With `learned.loss="vlb"` the loss is only T L_t (Nichol & Dhariwal 2021, section 3.1).

    Args:
        denoiser: network, schedule and objective; its clipping is not used.
        weighting: weight on the error of y.
        error: error in place of ‖·‖², a mean over the elements of an image.
        x0: images in [−1, 1].
        noise: ε.
        t: times in (0, 1].
        previous: x̂_0 for a self-conditioning network.
        learned: a variance to train with the mean.
        condition: keyword arguments for the network.

    Raises:
        ConfigError: `learned` with a continuous curve or a network without extra channels.
    """
    schedule, objective = denoiser.schedule, denoiser.objective
    x_t = denoiser.schedule.corrupt(x0, noise, t)
    output, extra, *_ = denoiser.output(x_t, t, previous, **condition)
    errors = error(output, objective.target(schedule, t, x0, noise))
    weight = to_device(weighting(schedule, objective, t).to(errors.dtype), errors.device)
    weighted = weight * errors
    if learned is not None:
        bound_only, steps = learned.loss == "vlb", chain_steps(denoiser)
        term = bound_term(denoiser, learned, x0, x_t, t, output if bound_only else output.detach(), extra)
        weighted = steps * term if bound_only else weighted + steps / 1000 * term
    return StepLoss(weighted, errors, weight)


def chain_steps(denoiser: Denoiser) -> int:
    """Return T, the number of steps of the schedule and of terms of the bound.

    Raises:
        ConfigError: the schedule is a continuous curve.
    """
    if denoiser.schedule.steps is None:
        raise ConfigError(
            "variance=learned is trained on the terms of a chain, and this schedule is a continuous curve without steps: write "
            "schedule=cosine or schedule=linear, or variance=fixed_small"
        )
    return denoiser.schedule.steps


def check_bound_times(learned: Learned, time_sampler: TimeSampler) -> None:
    """Raise ConfigError if loss="vlb", whose mean is the bound over uniform times, is drawn at others without their weight."""
    if learned.loss == "vlb" and not time_sampler.uniform_mean:
        raise ConfigError(
            "variance.loss=vlb trains on the variational bound, a sum over all steps, and the time sampler "
            f"{type(time_sampler).__name__} draws some more often than others: write time_sampler=stratified or "
            "time_sampler=importance, or variance.loss=hybrid"
        )


def bound_term(
    denoiser: Denoiser,
    learned: Learned,
    x0: Float[Tensor, "b c h w"],
    x_t: Float[Tensor, "b c h w"],
    t: Float[Tensor, " b"],
    output: Float[Tensor, "b c h w"],
    extra: Float[Tensor, "b extra h w"] | None,
) -> Float[Tensor, " b"]:
    """Return L_t of the variational bound for each image, in bits per dimension.

    L_t is the KL of the step from t to s = t − 1/T. At s = 0 it is the decoder's negative discretized log-likelihood, with σ̃²
    of the pair (2/T, 1/T) as lower bound of its variance (Nichol & Dhariwal 2021, their code).

    Args:
        denoiser: its clipping is not used.
        learned: the variance.
        x0: images in [−1, 1], on the grid k/127.5 − 1 for the decoder.
        x_t: the noisy images.
        t: times on the table.
        output: the network's y; detached, the mean gets no gradient.
        extra: the network's v.
    """
    schedule, step, t = denoiser.schedule, 1 / chain_steps(denoiser), t.double()
    into_data = t < step * (1 + NODE_TOLERANCE)
    s = torch.where(into_data, 0.0, t - step)
    q = posterior(schedule, t, s)
    floor = posterior(schedule, torch.where(into_data, 2 * step, t), torch.where(into_data, step, s)).variance
    x0_hat, noise_hat = denoiser.objective.solve(schedule, t, x_t, output)
    log_variance = learned.log(schedule, t, s, Prediction(x0_hat, noise_hat, output, extra), floor)
    gap = append_dims_like(q.c0, x0) * (x0 - x0_hat)  # μ̃ − μ̂; the term c_1 x_t, common to both, cancels
    nats = kl(gap, append_dims_like(floor.log(), x0), torch.zeros_like(gap), log_variance).flatten(1).mean(1)
    # Few batches have any, and the decoder costs more than the KL
    rows = to_device(into_data.nonzero()[:, 0], x0.device)
    if len(rows):
        decoder = -discretized_log_likelihood(x0[rows], x0_hat[rows], log_variance[rows]).flatten(1).mean(1)
        nats = nats.index_copy(0, rows, decoder)
    return nats / math.log(2)


def head_loss(
    denoiser: Denoiser,
    kind: str,
    x0: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    t: Float[Tensor, " b"],
    previous: Float[Tensor, "b c h w"] | None = None,
    **condition: Tensor,
) -> Float[Tensor, " b"]:
    """Return the squared error of a second head for each image.

    The target of sn is ε², that of npr (ε − ε̂)² with ε̂ detached (Bao et al. 2022, "Estimating the optimal covariance with
    imperfect mean in diffusion probabilistic models").

    Args:
        denoiser: without clipping; the channels beyond C of its network are the head's output.
        kind: "sn" or "npr".
        x0, noise, t, previous, condition: as for `diffusion_loss`.
    """
    prediction = denoiser(denoiser.schedule.corrupt(x0, noise, t), t, previous, **condition)
    assert prediction.extra is not None
    target = (noise if kind == "sn" else noise - prediction.noise.detach()).square()
    return (prediction.extra - target).square().flatten(1).mean(1)
