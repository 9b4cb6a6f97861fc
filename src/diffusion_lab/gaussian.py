"""Gaussians of the chain: forward transition and posterior for any times s < t, their KL, and the discretized decoder."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_lab.schedules import Scalars, Schedule, append_dims_like, cast_like


class Transition(NamedTuple):
    """q(x_t | x_s) = N(alpha x_s, variance I)."""

    alpha: Scalars  # α_{t|s} = α_t/α_s
    variance: Scalars  # σ²_{t|s} = σ_t² − α²_{t|s} σ_s²


class Posterior(NamedTuple):
    """q(x_s | x_t, x_0) = N(c1 x_t + c0 x_0, variance I)."""

    c1: Scalars  # α_{t|s} σ_s²/σ_t²
    c0: Scalars  # α_s σ²_{t|s}/σ_t²
    variance: Scalars  # σ̃² = σ²_{t|s} σ_s²/σ_t²

    def mean(self, x_t: Float[Tensor, "b *chw"], x0: Float[Tensor, "b *chw"]) -> Float[Tensor, "b *chw"]:
        """Return c_1 x_t + c_0 x_0; requires coefficients of shape () or (B,)."""
        return append_dims_like(self.c1, x_t) * x_t + append_dims_like(self.c0, x_t) * x0


def transition(schedule: Schedule, t: Scalars, s: Scalars) -> Transition:
    """Return the forward step from s to t for 0 ≤ s < t ≤ 1, tensors of one shape, in t's dtype, float32 at least.

    For s = t − 1/T the variance is β_t (Ho et al. 2020, eq. 2).
    """
    alpha_t, sigma_t = schedule.alpha_sigma(t.double())
    alpha_s, sigma_s = schedule.alpha_sigma(s.double())
    alpha = alpha_t / alpha_s
    return Transition(cast_like(alpha, t), cast_like(sigma_t.square() - (alpha * sigma_s).square(), t))


def posterior(schedule: Schedule, t: Scalars, s: Scalars) -> Posterior:
    """Return the reverse step from t to s given x_0, 0 ≤ s < t ≤ 1 (Ho et al. 2020, eq. 6–7, for any pair of times).

    It is finite at both ends: s = 0 gives c_1 = 0, c_0 = 1 and variance 0; α_t = 0 gives c_1 = 0.
    """
    _, sigma_t = schedule.alpha_sigma(t.double())
    alpha_s, sigma_s = schedule.alpha_sigma(s.double())
    alpha, variance = transition(schedule, t.double(), s.double())
    shrink = (sigma_s / sigma_t).square()
    return Posterior(
        cast_like(alpha * shrink, t),
        cast_like(alpha_s * variance / sigma_t.square(), t),
        cast_like(variance * shrink, t),
    )


HALF_BIN = 1 / 255  # half the distance between neighboring levels k/127.5 − 1
EDGE = 0.999  # the levels beyond ±EDGE, −1 and 1, have open bins
# Floor of the published code: a single pixel of probability 0 leaves the bound finite
MIN_LOG_PROBABILITY = math.log(1e-12)


def kl(
    mean1: Float[Tensor, "*#shape"],
    log_variance1: Float[Tensor, "*#shape"],
    mean2: Float[Tensor, "*#shape"],
    log_variance2: Float[Tensor, "*#shape"],
) -> Float[Tensor, "*#shape"]:
    """Return KL(N(mean1, e^log_variance1) ‖ N(mean2, e^log_variance2)) of each element in nats; shapes broadcast."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (torch.expm1(ratio) - ratio + (mean1 - mean2).square() * torch.exp(-log_variance2))


def discretized_log_likelihood(
    x0: Float[Tensor, "*#shape"], mean: Float[Tensor, "*#shape"], log_variance: Float[Tensor, "*#shape"]
) -> Float[Tensor, "*#shape"]:
    """Return log P(level of x_0) under N(μ, σ²) divided into 256 bins, of each element in nats (Ho et al. 2020, eq. 13).

    log[Φ((x_0 − μ + 1/255)/σ) − Φ((x_0 − μ − 1/255)/σ)], with open bins for levels 0 and 255 and a floor of ln 1e-12. A
    difference of two Φ near 1 cancels, so the bin is mirrored into the lower tail and evaluated in logarithms.

    Args:
        x0: on the grid k/127.5 − 1.
        mean: μ, broadcastable to x0.
        log_variance: ln σ², broadcastable to x0.
    """
    gap, rate = x0 - mean, torch.exp(-0.5 * log_variance)
    # the limits keep gradients finite for tiny σ; Φ(−8) < 1e-15, so they change no value above the floor
    near = ((HALF_BIN - gap.abs()) * rate).clamp(-30, 30)
    far = ((-HALF_BIN - gap.abs()) * rate).clamp(min=-40)
    log_near = torch.special.log_ndtr(near)
    ratio = (torch.special.log_ndtr(far) - log_near).clamp(max=-torch.finfo(near.dtype).tiny)
    inner = log_near + torch.log(-torch.expm1(ratio))
    upper = torch.special.log_ndtr(((gap - HALF_BIN) * -rate).clamp(-30, 30))
    lower = torch.special.log_ndtr(((gap + HALF_BIN) * rate).clamp(-30, 30))
    return torch.where(x0 > EDGE, upper, torch.where(x0 < -EDGE, lower, inner)).clamp(min=MIN_LOG_PROBABILITY)
