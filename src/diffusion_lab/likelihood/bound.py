"""The variational bound on −log p(x_0) and its terms, for a chain of any stride, step variance and η."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64, Shaped
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.gaussian import discretized_log_likelihood, kl, posterior
from diffusion_lab.io import progress as show_progress
from diffusion_lab.likelihood.base import bits, keys, ready
from diffusion_lab.noise import Stream, normal
from diffusion_lab.samplers import grids
from diffusion_lab.schedules import Schedule, append_dims_like, to_device
from diffusion_lab.variances import FixedSmall, Variance

DECODERS = ("discretized", "gaussian")
LAST = ("strided", "full")
FIRST_DRAW = 2  # density.py uses draws 0 and 1


class Bound(NamedTuple):
    """The bound and its terms in bits per dimension; bpd = L_T + Σ_k L[:, k] + L_0."""

    bpd: Float64[Tensor, " b"]
    nfe: int  # network evaluations, K + 1: one for each term of L and for L_0
    terms: dict[str, Tensor]  # float64: "L_T" (B,); "L" (B, K), the terms of times[1:]; "L_0" (B,)
    times: Float64[Tensor, " k+1"]  # ascending, on the CPU: the time of L_0, then those of L
    decoder: str
    last: str
    clipped: bool  # whether x̂_0 was clipped


@torch.no_grad()
def vlb(
    denoiser: Denoiser,
    x0: Shaped[Tensor, "b c h w"],
    steps: int | None = None,
    variance: Variance | None = None,
    decoder: str = "discretized",
    condition: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    index: Int64[Tensor, " b"] | None = None,
    *,
    grid: str = "linspace",
    times: Float[Tensor, " nodes"] | None = None,
    last: str = "strided",
    eta: float = 1.0,
    clip: bool = False,
    progress: bool = False,
) -> Bound:
    """Return L_T + Σ L_{t−1} + L_0 ≥ −log p(x_0), each term from one draw of x_t (Ho et al. 2020, eq. 5).

    With t_1 < … < t_{K+1} ≤ 1 the times of the chain and p(x_T) = N(0, σ_1² I), the distribution at which sampling starts,

        L_T     = KL(q(x_T | x_0) ‖ p(x_T))
        L_{t−1} = KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)) for neighboring times s = t_k, t = t_{k+1}
        L_0     = −log p(x_0 | x_t) for t = t_1.

    p(x_s | x_t) has the mean of q with x̂_0 in place of x_0, and the step variance. Both decoders p(x_0 | x_t) have mean x̂_0:

    - discretized: the probability of the level of x_0 (gaussian.discretized_log_likelihood). Its variance is the step variance
      of the pair (t_1, 0) with the floor σ̃² = 0 replaced by σ̃² of another pair (see `last`). Every variance except the learned
      one equals that floor.
    - gaussian: the density N(x̂_0, (σ/α)² I) at t = t_1, for continuous data. (σ/α)² is an upper bound of the mean of
      Cov[x_0 | x_t], and its limit for t_1 → 0. With the optimal x̂_0 and increasingly many steps between t_1 and 1 the mean
      bound decreases to the entropy of x_0, up to the mismatch of the prior and a gap of order (σ/α)⁴ at t_1.

    Args:
        denoiser: its clipping is removed unless `clip`; its guidance is kept.
        x0: float images in [−1, 1], on the grid k/127.5 − 1 for the discretized decoder.
        steps: K + 1, the number of network evaluations; None means every step of a table.
        variance: step variance; default FixedSmall.
        decoder: "discretized" or "gaussian".
        condition: keyword arguments for the network, each with B rows.
        seed: with `index` the key of the noise.
        index: index of the image in each row; default 0 … B − 1.
        grid: name of the time grid (samplers/grids.py); linspace is improved DDPM's strided chain.
        times: times of the chain in place of `steps` and `grid`, (K + 2,), decreasing to 0, as from a sampler's `time_grid`.
        last: the pair whose σ̃² is the discretized decoder's floor: "strided", (t_2, t_1) of this chain (improved DDPM), or
            "full", (2/T, 1/T) of the table (Analytic-DPM).
        eta: η in (0, 1] of DDIM's chain, whose q(x_s | x_t, x_0) has the variance η²σ̃²; 1 is the ancestral chain.
        clip: keep the denoiser's clipping of x̂_0, as improved DDPM's evaluation does; the bound remains valid.
        progress: show a progress bar.

    Raises:
        ConfigError: an unknown name; a grid, η or number of steps out of range; a step variance of 0, for which the bound is
            infinite; NaN or Inf from the network; a self-conditioning network; transforms `on_x0` (known pixels).
    """
    variance = variance or FixedSmall()
    variance.check(denoiser.network)
    _check(denoiser.schedule, variance, decoder, last, eta)
    clipped = clip and denoiser.clip is not None
    denoiser, x0 = ready(denoiser, x0, clip)
    schedule, key, shape = denoiser.schedule, keys(x0, index), tuple(x0.shape[1:])
    falling = grids.make_grid(grid, schedule, steps) if times is None else times.double().cpu()
    chain = falling.flip(0)  # 0, t_1, …, t_{K+1}
    if len(chain) < 2 or not bool(chain[0] == 0 and (chain.diff() > 0).all() and chain[-1] <= 1):
        raise ConfigError(
            "times must fall strictly from 1 or less to 0: pass the times of a sampler, sampler.time_grid(denoiser)"
        )
    if decoder == "discretized" and last == "strided" and len(chain) < 3:
        raise ConfigError(
            "steps=1 has no second pair of times, from which last=strided takes the variance of L_0: write steps=2 or last=full"
        )

    alpha, sigma = schedule.alpha_sigma(chain)
    floors, x0_factors = _posterior(schedule, chain[2:], chain[1:-1], eta)
    data_floor = _data_floor(schedule, chain, last)

    terms, valid = [], []
    for k, t in enumerate(show_progress(chain[1:], "likelihood", "term", progress)):
        noise = normal(shape, seed=seed, index=key, draw=k + FIRST_DRAW, stream=Stream.LIKELIHOOD, dtype=x0.dtype)
        x_t = append_dims_like(alpha[k + 1], x0) * x0 + append_dims_like(sigma[k + 1], x0) * noise
        extra_time = variance.extra_time(schedule, t)
        if extra_time is None:
            prediction = denoiser(x_t, t, **(condition or {}))
        else:
            prediction = denoiser.with_extra_at(x_t, t, extra_time, **(condition or {}))
        x0_64, x0_hat = x0.double(), prediction.x0.double()
        if k > 0:
            floor, factor = append_dims_like(floors[k - 1], x0_64), append_dims_like(x0_factors[k - 1], x0_64)
            sigma2 = variance(schedule, t, chain[k], prediction, floor=floors[k - 1]).double()
            nats = kl(factor * x0_64, floor.log(), factor * x0_hat, sigma2.log())
        elif decoder == "discretized":
            sigma2 = variance(schedule, t, chain[0], prediction, floor=data_floor).double()
            nats = -discretized_log_likelihood(x0_64, x0_hat, sigma2.log())
        else:
            sigma2 = append_dims_like((sigma[1] / alpha[1]).square(), x0_64)
            nats = 0.5 * ((x0_64 - x0_hat).square() / sigma2 + (2 * math.pi * sigma2).log())
        terms.append(bits(nats))
        # both flags stay on the device and are read once, after the loop
        positive = ((sigma2 > 0) & (sigma2 < math.inf)).all()
        valid.append(torch.stack([x0_hat.isfinite().all(), to_device(positive, x0.device)]))
    _refuse_invalid(torch.stack(valid), chain[1:])

    prior = _prior(x0, alpha[-1], sigma[-1])
    by_name = {"L_T": prior, "L": torch.stack(terms, 1)[:, 1:], "L_0": terms[0]}
    return Bound(prior + by_name["L"].sum(1) + terms[0], len(terms), by_name, chain[1:], decoder, last, clipped)


def _posterior(
    schedule: Schedule, t: Float64[Tensor, " k"], s: Float64[Tensor, " k"], eta: float
) -> tuple[Float64[Tensor, " k"], Float64[Tensor, " k"]]:
    """Return the variance λ² = η²σ̃² of q(x_s | x_t, x_0) and the factor of x_0 in its mean.

    The mean is α_s x_0 + √(σ_s² − λ²)(x_t − α_t x_0)/σ_t (Song et al. 2021, DDIM, eq. 7), so the means of q and p differ by the
    factor times x_0 − x̂_0. At η = 1 the factor is c_0.
    """
    q = posterior(schedule, t, s)
    if eta == 1:
        return q.variance, q.c0
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    variance = eta**2 * q.variance
    return variance, alpha_s - (sigma_s.square() - variance).sqrt() * alpha_t / sigma_t


def _data_floor(schedule: Schedule, chain: Float64[Tensor, " nodes"], last: str) -> Float64[Tensor, ""]:
    """Return the σ̃² that replaces that of the step into data, which is 0.

    Args:
        schedule: the curve.
        chain: 0, t_1, t_2, …; without t_2 the result is 0.
        last: as in `vlb`.
    """
    if last == "full":
        chain = torch.arange(3, dtype=torch.float64) / (schedule.steps or 1)
    return posterior(schedule, chain[2], chain[1]).variance if len(chain) > 2 else torch.zeros_like(chain[0])


def _prior(
    x0: Float[Tensor, "b c h w"], alpha: Float64[Tensor, ""], sigma: Float64[Tensor, ""]
) -> Float64[Tensor, " b"]:
    """Return KL(N(α x_0, σ² I) ‖ N(0, σ² I)) in bits per dimension: a sampler starts with the σ of its first time."""
    x0_64, log_variance = x0.double(), 2 * sigma.log()
    log_variance = append_dims_like(log_variance, x0_64)
    return bits(kl(append_dims_like(alpha, x0_64) * x0_64, log_variance, torch.zeros_like(x0_64), log_variance))


def _check(schedule: Schedule, variance: Variance, decoder: str, last: str, eta: float) -> None:
    """Raise ConfigError for an unknown name, η out of range, or options that exclude each other."""
    if decoder == "discretised":
        raise ConfigError("decoder='discretised' was renamed: write decoder='discretized'")
    if decoder not in DECODERS:
        raise ConfigError(f"decoder={decoder!r} is unknown: write one of {', '.join(DECODERS)}")
    if last not in LAST:
        raise ConfigError(f"last={last!r} is unknown: write one of {', '.join(LAST)}")
    if last == "full" and schedule.steps is None:
        raise ConfigError(
            "last=full uses a pair of neighboring nodes of a table, and this schedule is a continuous curve: write last=strided"
        )
    hint = "the bound is infinite for steps without noise (sampler=ddim with eta=0); eta=1, or likelihood.ode"
    check_number("eta", eta, "(0, 1]", hint)
    if eta < 1 and variance.ancestral_only:
        raise ConfigError(
            f"variance {type(variance).__name__} works with ancestral steps only, not with eta={eta}: write eta=1 or "
            "variance=fixed_small"
        )


def _refuse_invalid(valid: Bool[Tensor, "nodes 2"], times: Float64[Tensor, " nodes"]) -> None:
    """Raise ConfigError for the first time at which x̂_0 (column 0) or the step variance (column 1) is invalid."""
    invalid = (~valid).nonzero()
    if not len(invalid):
        return
    i, column = invalid[0].tolist()
    time = f"at t={float(times[i]):.4g}"
    if column == 0:
        raise ConfigError(
            f"the network output is NaN or infinity {time}: evaluate in float32, or use a checkpoint from before the training "
            "diverged"
        )
    raise ConfigError(
        f"the variance is 0, infinite or NaN {time}, so the bound is not finite: write variance=fixed_small"
    )
