"""The variational bound on −log p(x_0) of a chain of any stride, step variance and η, term by term."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import ConfigError
from diffusion_lab.gaussian import discretized_log_likelihood, kl, posterior
from diffusion_lab.likelihood.base import bits, keys, ready
from diffusion_lab.noise import Stream, normal
from diffusion_lab.samplers import grids
from diffusion_lab.schedules import Schedule, append_dims_like, to_device
from diffusion_lab.variances import FixedSmall, Variance

DECODERS = ("discretized", "gaussian")
LAST = ("strided", "full")
FIRST_DRAW = 2  # 0 and 1 are density.py's


class Bound(NamedTuple):
    """The bound and its terms, float64, in bits per dimension; bpd = L_T + Σ_k L[:, k] + L_0."""

    bpd: Tensor  # (B,)
    nfe: int  # network evaluations: K + 1, one a term
    terms: dict[str, Tensor]  # "L_T": (B,), "L": (B, K) with the terms of times[1:], "L_0": (B,)
    times: Tensor  # (K + 1,) ascending, on the CPU: that of L_0, then those of L
    decoder: str
    last: str
    clipped: bool  # whether x̂_0 was


@torch.no_grad()
def vlb(
    denoiser: Denoiser,
    x0: Tensor,
    steps: int | None = None,
    variance: Variance | None = None,
    decoder: str = "discretized",
    condition: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    index: Tensor | None = None,
    *,
    grid: str = "linspace",
    times: Tensor | None = None,
    last: str = "strided",
    eta: float = 1.0,
    clip: bool = False,
    progress: bool = False,
) -> Bound:
    """−log p(x_0) ≤ L_T + Σ L_{t−1} + L_0, each term from one draw of x_t (Ho et al. 2020, eq. 5; Nichol & Dhariwal 2021).

    With t_1 < … < t_{K+1} the times of the chain, up to 1, and p(x_T) = N(0, σ_1² I), where sampling begins,

        L_T     = KL(q(x_T | x_0) ‖ p(x_T))
        L_{t−1} = KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)) for neighbours s = t_k, t = t_{k+1}
        L_0     = −log p(x_0 | x_t) for t = t_1.

    p(x_s | x_t) has the mean of q with x̂_0 for x_0, and the step variance. The two decoders p(x_0 | x_t), both of mean x̂_0:

    - discretized: the probability of x_0's level (gaussian.discretized_log_likelihood). Its variance is the step
      variance of the pair (t_1, 0) where σ̃² = 0 is replaced by that of another pair, see `last`: every variance but the
      learned one then is just that σ̃².
    - gaussian: the density N(x̂_0, (σ/α)² I) at t = t_1, for data that is continuous; (σ/α)² is the most that Cov[x_0 | x_t]
      can be on average, and its limit for t_1 → 0. With the best x̂_0 and ever more steps between t_1 and 1 the mean of the
      bound then falls to the entropy of x_0, but for the prior's mismatch and a gap of order (σ/α)⁴ at t_1.

    Args:
        denoiser: its clipping is dropped unless `clip`; its guidance is kept.
        x0: float (B, C, H, W) in [−1, 1], on the grid k/127.5 − 1 for the discretized decoder.
        steps: K + 1, network evaluations; None is every step of a table.
        variance: of a step; default fixed_small.
        decoder: "discretized" or "gaussian".
        condition: keyword arguments for the network, each with B rows.
        seed: with `index` the key of the noise.
        index: int64 (B,), which image each row is; default 0 … B − 1.
        grid: the time grid (samplers/grids.py); linspace is improved DDPM's strided chain.
        times: instead of `steps` and `grid` the times themselves, those of a sampler's `time_grid`: falling to 0, (K + 2,).
        last: which pair gives the discretized decoder its variance σ̃²: "strided", (t_2, t_1) of this chain (improved DDPM),
            or "full", (2/T, 1/T) of the table (Analytic-DPM).
        eta: η in (0, 1] of DDIM's chain, whose q(x_s | x_t, x_0) has the variance η²σ̃²; 1 is the ancestral one.
        clip: keep the denoiser's clipping of x̂_0, as improved DDPM's evaluation does. The bound holds for that model too.
        progress: show a bar.

    Raises:
        ConfigError: an unknown name, a grid, η or number of steps out of range; a step variance of 0 (no finite bound); NaN
            from the network; a self-conditioning network; known pixels (`on_x0`).
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
            "times must fall from 1, or below it, to 0: give those of a sampler, sampler.time_grid(denoiser)"
        )
    if decoder == "discretized" and last == "strided" and len(chain) < 3:
        raise ConfigError("steps=1 leaves no pair of times whose variance L_0 could take: write steps=2 or last=full")

    alpha, sigma = schedule.alpha_sigma(chain)
    least, pull = _step(schedule, chain[2:], chain[1:-1], eta)
    floor = _data_floor(schedule, chain, last)

    terms, sound = [], []
    for k, t in enumerate(_bar(chain[1:], progress)):
        noise = normal(shape, seed=seed, index=key, draw=k + FIRST_DRAW, stream=Stream.LIKELIHOOD, dtype=x0.dtype)
        x_t = append_dims_like(alpha[k + 1], x0) * x0 + append_dims_like(sigma[k + 1], x0) * noise
        prediction = denoiser(x_t, t, **(condition or {}))
        data, estimate = x0.double(), prediction.x0.double()
        if k > 0:
            low, factor = append_dims_like(least[k - 1], data), append_dims_like(pull[k - 1], data)
            spread = variance(schedule, t, chain[k], prediction, floor=least[k - 1]).double()
            nats = kl(factor * data, low.log(), factor * estimate, spread.log())
        elif decoder == "discretized":
            spread = variance(schedule, t, chain[0], prediction, floor=floor).double()
            nats = -discretized_log_likelihood(data, estimate, spread.log())
        else:
            spread = append_dims_like((sigma[1] / alpha[1]).square(), data)
            nats = 0.5 * ((data - estimate).square() / spread + (2 * math.pi * spread).log())
        terms.append(bits(nats))
        # whether x̂_0 is finite and the variance a positive number; stays on the device and is read once, at the end
        usable = ((spread > 0) & (spread < math.inf)).all()
        sound.append(torch.stack([estimate.isfinite().all(), to_device(usable, x0.device)]))
    _refuse_unsound(torch.stack(sound), chain[1:])

    prior = _prior(x0, alpha[-1], sigma[-1], schedule.alpha_sigma(torch.ones_like(chain[-1]))[1])
    found = {"L_T": prior, "L": torch.stack(terms, 1)[:, 1:], "L_0": terms[0]}
    return Bound(prior + found["L"].sum(1) + terms[0], len(terms), found, chain[1:], decoder, last, clipped)


def _step(schedule: Schedule, t: Tensor, s: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Of q(x_s | x_t, x_0): its variance λ² = η²σ̃², and the factor of x_0 in its mean, by which those of q and p differ times
    x_0 − x̂_0. The mean is α_s x_0 + √(σ_s² − λ²)(x_t − α_t x_0)/σ_t (Song et al. 2021, DDIM, eq. 7); at η = 1 that is c_0."""
    q = posterior(schedule, t, s)
    if eta == 1:
        return q.variance, q.c0
    (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
    least = eta**2 * q.variance
    return least, alpha_s - (sigma_s.square() - least).sqrt() * alpha_t / sigma_t


def _data_floor(schedule: Schedule, chain: Tensor, last: str) -> Tensor:
    """The σ̃² that stands for that of the step into data, which is 0; chain 0, t_1, t_2, … Of a chain without t_2 it is 0."""
    if last == "full":
        chain = torch.arange(3, dtype=torch.float64) / (schedule.steps or 1)
    return posterior(schedule, chain[2], chain[1]).variance if len(chain) > 2 else torch.zeros_like(chain[0])


def _prior(x0: Tensor, alpha: Tensor, sigma: Tensor, end: Tensor) -> Tensor:
    """KL(N(α x_0, σ² I) ‖ N(0, end² I)) in bits per dimension, (B,)."""
    wide = x0.double()
    zero = torch.zeros_like(wide)
    return bits(
        kl(
            append_dims_like(alpha, wide) * wide,
            append_dims_like(2 * sigma.log(), wide),
            zero,
            append_dims_like(2 * end.log(), wide),
        )
    )


def _check(schedule: Schedule, variance: Variance, decoder: str, last: str, eta: float) -> None:
    if decoder == "discretised":
        raise ConfigError("decoder='discretised' was renamed: write decoder='discretized'")
    if decoder not in DECODERS:
        raise ConfigError(f"unknown decoder {decoder!r}: write one of {', '.join(DECODERS)}")
    if last not in LAST:
        raise ConfigError(f"unknown last={last!r}: write one of {', '.join(LAST)}")
    if last == "full" and schedule.steps is None:
        raise ConfigError(
            "last=full takes a pair of neighbours in a table, and this schedule is a curve: write last=strided"
        )
    if not 0 < eta <= 1:
        raise ConfigError(
            f"eta={eta} has no finite bound: it needs eta in (0, 1], since steps without noise (sampler=ddim with eta=0) give "
            "x_s no density; write eta=1, or take likelihood.ode"
        )
    if eta < 1 and variance.ancestral_only:
        raise ConfigError(
            f"variance {type(variance).__name__} is for ancestral steps only: write eta=1 or variance=fixed_small"
        )


def _refuse_unsound(sound: Tensor, times: Tensor) -> None:
    """Raise ConfigError for the first evaluation that was not sound, bool (K + 1, 2)."""
    bad = (~sound).nonzero()
    if not len(bad):
        return
    i, which = bad[0].tolist()
    at = f"at t={float(times[i]):.4g}"
    if which == 0:
        raise ConfigError(
            f"the network gave NaN or infinity {at}: evaluate in float32, or take a checkpoint from before the training diverged"
        )
    raise ConfigError(f"the variance is 0, infinite or NaN {at}, so no bound is finite: write variance=fixed_small")


def _bar(times: Tensor, progress: bool) -> Iterable[Tensor]:
    if not progress:
        return times
    from tqdm import tqdm

    bar: Iterable[Tensor] = tqdm(times, desc="likelihood", unit="term", leave=False)
    return bar
