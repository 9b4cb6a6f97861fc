"""Edits that need no training: great circles between latents, images noised half the way, pixels that are known."""

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.errors import ConfigError
from diffusion_lab.gaussian import transition
from diffusion_lab.noise import Draws, normal
from diffusion_lab.samplers.base import Sampler, bar, prior
from diffusion_lab.schedules import Schedule, Times, match, move
from diffusion_lab.variances import FixedSmall, Variance

PARALLEL = 1e-6  # sin of an angle below which the great circle is the chord, or is not determined
PASS = 2**16  # draws of a pass of `inpaint`: the first for the state it begins from, one for each noise of its steps


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation sin((1 − w)Ω)/sin Ω · a + sin(wΩ)/sin Ω · b (Shoemake 1985; Song et al. 2021, DDIM, appendix D.5).

    Between two draws of noise it keeps the norm that noise has, which a chord does not. w = 0 is a and w = 1 is b, bit for bit.
    Parallel vectors are interpolated linearly, and so are opposite ones and zero, for which no great circle is determined.

    Args:
        a: one end, of any shape.
        b: the other end, of that shape.
        weights: w, float (n,).

    Returns:
        (n, *shape of a), in its dtype.
    """
    u, v = (end.double().flatten() for end in (a, b))
    w = weights.double().to(a.device)[:, None]
    p, q = (end / end.norm().clamp(min=torch.finfo(end.dtype).tiny) for end in (u, v))
    angle = 2 * torch.atan2((p - q).norm(), (p + q).norm())  # Kahan's: arccos loses half the digits of small angles
    if angle.sin() < PARALLEL or u.norm() * v.norm() == 0:
        between = (1 - w) * u + w * v
    else:
        between = (((1 - w) * angle).sin() * u + (w * angle).sin() * v) / angle.sin()
    between = torch.where(w == 0, u, torch.where(w == 1, v, between))
    return between.to(a.dtype).reshape(len(weights), *a.shape)


class Known(Denoiser):
    """A denoiser that is told some pixels: x̂_0 ← m x̂_0 + (1 − m) known, after clipping and guidance, and ε̂ to match.

    Args:
        denoiser: any.
        known: the image, (1 or B, C, H, W) in [−1, 1]; its values where the mask is 1 do not matter.
        mask: m, 1 where pixels are to be generated and 0 where they are known; broadcasts to `known`.
    """

    def __init__(self, denoiser: Denoiser, known: Tensor, mask: Tensor) -> None:
        self.__dict__.update(denoiser.__dict__)  # what samplers ask of a denoiser, whatever wraps it already
        self.denoiser, self.known, self.unknown = denoiser, known, mask.expand_as(known) > 0

    def __call__(
        self, x_t: Tensor, t: Tensor | float, previous: Tensor | None = None, **condition: Tensor
    ) -> Prediction:
        prediction = self.denoiser(x_t, t, previous, **condition)
        x0 = torch.where(self.unknown, prediction.x0, self.known.to(prediction.x0))
        alpha, sigma = self.schedule.alpha_sigma(torch.as_tensor(t).double())
        noise = (x_t - match(alpha, x_t) * x0) / match(sigma, x_t)
        gradient = None if prediction.gradient is None else torch.where(self.unknown, prediction.gradient, 0.0)
        return prediction._replace(x0=x0, noise=torch.where(self.unknown, prediction.noise, noise), gradient=gradient)

    def output(
        self, x_t: Tensor, t: Tensor | float, previous: Tensor | None = None, **condition: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        return self.denoiser.output(x_t, t, previous, **condition)


class Certain(Variance):
    """Another variance where pixels are unknown, and the floor where they are known: there Cov[x_0 given x_t] is 0."""

    def __init__(self, variance: Variance, unknown: Tensor) -> None:
        self.variance, self.unknown = variance, unknown

    def __call__(
        self, schedule: Schedule, t: Times, s: Times, prediction: Prediction, floor: Tensor | float = 0.0
    ) -> Tensor:
        variance = self.variance(schedule, t, s, prediction, floor)
        return torch.where(self.unknown, variance, match(torch.as_tensor(floor), prediction.x0).to(variance))


class Pass(NamedTuple):
    """A part of the grid, walked once: from times[begin] to times[end]."""

    begin: int
    end: int
    again: bool  # begins by going up from times[end], where the pass before left


def passes(steps: int, jump_length: int, resample: int) -> list[Pass]:
    """The way over `steps` steps: jump_length down, and resample − 1 times up and down again, then on (RePaint, figure 3).

    Parts are counted from data, and the first, which may be shorter, is walked once: it begins in pure noise, so that a way back
    would lead to another draw of the same.

    Raises:
        ValueError: jump_length or resample below 1.
    """
    if jump_length < 1 or resample < 1:
        raise ConfigError(
            f"inpaint.jump_length={jump_length} and inpaint.resample={resample} must be at least 1; resample=1 goes down once"
        )
    if resample == 1 or steps <= jump_length:
        return [Pass(0, steps, False)]
    first = (steps - 1) % jump_length + 1
    parts = [(0, first), *((a, a + jump_length) for a in range(first, steps, jump_length))]
    return [Pass(a, b, r > 0) for a, b in parts for r in range(resample if a else 1)]


@torch.no_grad()
def inpaint(
    sampler: Sampler,
    denoiser: Denoiser,
    known: Tensor,
    mask: Tensor,
    *,
    seed: int = 0,
    index: Tensor,
    condition: Mapping[str, Tensor] | None = None,
    jump_length: int = 5,
    resample: int = 10,
    progress: bool = False,
) -> Tensor:
    """Images that agree with `known` where the mask is 0, by any sampler.

    Known pixels enter through x̂_0 (`Known`), the projection of DDNM for a mask (Wang et al. 2023, eq. 13). Then they follow their
    exact chain q(x_s | x_t, x_0) under ancestral and DDIM steps, x_t = α_t x_0 + σ_t ε with one ε under deterministic
    solvers, and end in x_0 itself. RePaint (Lugmayr et al. 2022, eq. 8) instead draws x_s ~ q(x_s | x_0) anew at every step:
    the same law at each time, but only between ancestral steps. Neither alone gives the conditional distribution, however many
    the steps: x_t of the known pixels tells the network less than their x_0 does. For two Gaussian pixels of correlation 0.9
    and 50 ancestral steps the mean of the unknown one stays 0.96 (projection) and 0.94 (RePaint's) of its conditional
    deviations behind. What removes this is resampling, for both alike: going back up by q(x_t | x_s) and down again lets
    the unknown pixels answer (0.14 and 0.16 behind with jump_length 5, resample 10). So it is the projection here, for all
    samplers, and resampling on top. The bias vanishes as resamplings get many, jumps short in time, and steps in each jump
    many: every repetition repeats the error of its steps as well, so that few steps resampled often come out too narrow.

    Args:
        sampler: any; its grid is cut into parts of `jump_length` steps.
        denoiser: that is sampled from.
        known: float (1 or B, C, H, W) in [−1, 1].
        mask: 1 where pixels are generated, 0 where `known` is kept; broadcasts to `known`.
        seed: with `index` the key of all noise. Pass k has the draws k · 2¹⁶ …, so that none is used twice and one pass draws
            what the sampler alone does.
        index: int64 (B,), which image each row is.
        condition: keyword arguments for the network, each with B rows.
        jump_length: steps of a part.
        resample: how often each part but the first is walked.
        progress: show a bar.

    Returns:
        (B, C, H, W); equal to `known` where the mask is 0. `sampler.nfe` counts all passes.

    Raises:
        ValueError: sampler and denoiser do not go together, several known images where the sampler steps each by itself, and
            as `passes`.
    """
    sampler.check(denoiser)
    if len(known) > 1 and not sampler.uses_previous:
        raise ConfigError(
            f"sampler {type(sampler).__name__} steps each image by itself: inpaint one image at a time, or write sampler=heun"
        )
    times, shape = sampler.times(denoiser), tuple(known.shape[1:])
    way = passes(len(times) - 1, jump_length, resample)
    told = Known(denoiser, known, mask)
    walker = copy.copy(sampler)
    variance = getattr(sampler, "variance", None)
    if variance is not None and not isinstance(variance, FixedSmall):
        walker.variance = Certain(variance, told.unknown)  # type: ignore[attr-defined]
    x, sampler.nfe = prior(denoiser.schedule, normal(shape, seed=seed, index=index, dtype=known.dtype)), 0
    for k in bar(len(way), progress and len(way) > 1):
        part = way[k]
        noise = Draws(shape, seed, index, known.dtype, first=k * PASS + 1)
        if part.again:
            up = transition(denoiser.schedule, times[part.begin], times[part.end])
            x = match(up.alpha, x) * x + match(up.variance.sqrt(), x) * noise(-1)
        x = walker.walk(
            told,
            x,
            times[part.begin : part.end + 1],
            noise=noise,
            condition=condition,
            progress=progress and len(way) == 1,
        )
        sampler.nfe += walker.nfe
    return torch.where(told.unknown, x, move(known, x.device).to(x))
