"""Edits that need no training: great circles between latents, images noised half the way, pixels that are known."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.errors import ConfigError
from diffusion_lab.gaussian import transition
from diffusion_lab.noise import Draws, normal
from diffusion_lab.samplers.base import Sampler, Samples, prior, progress_range
from diffusion_lab.schedules import Scalars, Schedule, append_dims_like, to_device
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


def InpaintingTransform(denoiser: Denoiser, known: Tensor, mask: Tensor) -> Denoiser:
    """Append x̂_0 ← m x̂_0 + (1 − m) known, after clipping and guidance, with ε̂ to match.

    Args:
        denoiser: any, guided or not.
        known: float (1 or B, C, H, W) in [−1, 1].
        mask: m, 1 where pixels are generated, 0 where `known` is kept; broadcasts to `known`.

    Returns:
        The denoiser with this transform appended to `on_x0`. Known pixels have x̂_0 = known exactly, the ε̂ that x_t then
        implies, and no classifier's gradient; the others are unchanged, bit for bit.
    """
    return replace(denoiser, on_x0=(*denoiser.on_x0, KnownPixels(known, mask.expand_as(known) <= 0)))


@dataclass(frozen=True, eq=False)
class KnownPixels:
    """The transform of `InpaintingTransform`: f(x0, x_t, t) → x0.

    Args:
        known: float (1 or B, C, H, W).
        fixed: bool, of known's shape: where its pixels are put into x̂_0.
    """

    known: Tensor
    fixed: Tensor

    def __call__(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Put the known pixels into x0 (B, C, H, W)."""
        return torch.where(self.fixed, self.known.to(x0), x0)


class MaskedVariance(Variance):
    """A variance where pixels are unknown, and the floor where they are known: Cov[x_0 | x_t] is 0 there.

    Args:
        variance: σ² of unknown pixels.
        unknown: bool, broadcastable to x_t.
    """

    def __init__(self, variance: Variance, unknown: Tensor) -> None:
        self.variance, self.unknown = variance, unknown

    def __call__(
        self, schedule: Schedule, t: Scalars, s: Scalars, prediction: Prediction, floor: Tensor | float = 0.0
    ) -> Tensor:
        variance = self.variance(schedule, t, s, prediction, floor)
        return torch.where(self.unknown, variance, append_dims_like(torch.as_tensor(floor), prediction.x0).to(variance))


class GridSegment(NamedTuple):
    """A part of the grid, integrated once: from times[begin] to times[end]."""

    begin: int
    end: int
    again: bool  # repeats the segment before: begins with a step up, from times[end] to times[begin]


def passes(steps: int, jump_length: int, resample: int) -> list[GridSegment]:
    """Return the segments of `steps` steps: jump_length down, resample − 1 times up and down again, and on (RePaint, figure 3).

    Segments are counted from data, and the first, which may be shorter, is integrated once: it begins in pure noise, so that a
    step back up would only draw that noise again.

    Raises:
        ConfigError: jump_length or resample below 1.
    """
    if jump_length < 1 or resample < 1:
        raise ConfigError(
            f"inpaint.jump_length={jump_length} and inpaint.resample={resample} must be at least 1; resample=1 goes down once"
        )
    if resample == 1 or steps <= jump_length:
        return [GridSegment(0, steps, False)]
    first = (steps - 1) % jump_length + 1
    parts = [(0, first), *((a, a + jump_length) for a in range(first, steps, jump_length))]
    return [GridSegment(a, b, r > 0) for a, b in parts for r in range(resample if a else 1)]


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
) -> Samples:
    """Generate images that agree with `known` where the mask is 0, by any sampler.

    Known pixels enter through x̂_0 (`InpaintingTransform`), the projection of DDNM for a mask (Wang et al. 2023, eq. 13).
    Then they follow their exact chain q(x_s | x_t, x_0) under ancestral and DDIM steps, x_t = α_t x_0 + σ_t ε with one ε
    under deterministic solvers, and end in x_0 itself. RePaint (Lugmayr et al. 2022, eq. 8) instead draws x_s ~ q(x_s | x_0)
    at every step, independently of x_t: the same law at each time, but only between ancestral steps. Neither alone gives the
    conditional distribution, however many the steps: x_t of the known pixels holds less information than their x_0. For two
    Gaussian pixels of correlation 0.9 and 50 ancestral steps the mean of the unknown one stays 0.96 (projection) and 0.94
    (RePaint) of its conditional deviations behind. Resampling removes this, for both alike: a step back up by q(x_t | x_s)
    and down again adapts the unknown pixels (0.14 and 0.16 behind with jump_length 5, resample 10). The projection is used
    here because it serves all samplers, with resampling on top. The bias vanishes as resamplings get many, jumps short in
    time, and steps in each jump many: every repetition repeats the error of its steps as well, so that few steps resampled
    often come out too narrow.

    Args:
        sampler: any; its grid is cut into segments of `jump_length` steps.
        denoiser: any; guidance and other transforms are kept.
        known: float (1 or B, C, H, W) in [−1, 1].
        mask: 1 where pixels are generated, 0 where `known` is kept; broadcasts to `known`.
        seed: with `index` the key of all noise. Pass k has the draws k · 2¹⁶ …, so that none is used twice and one pass draws
            what the sampler alone does.
        index: int64 (B,), the image of each row.
        condition: keyword arguments for the network, each with B rows.
        jump_length: steps of a segment.
        resample: how often each segment but the first is integrated.
        progress: show a bar.

    Returns:
        x (B, C, H, W), equal to `known` where the mask is 0, and nfe, which counts all passes.

    Raises:
        ConfigError: sampler and denoiser that do not fit each other, several known images with an adaptive sampler, and
            as `passes`.
    """
    sampler.check(denoiser)
    if len(known) > 1 and not sampler.uses_previous:
        raise ConfigError(
            f"sampler {type(sampler).__name__} steps each image by itself: inpaint one image at a time, or write sampler=heun"
        )
    times, shape = sampler.time_grid(denoiser), tuple(known.shape[1:])
    segments = passes(len(times) - 1, jump_length, resample)
    unknown = mask.expand_as(known) > 0
    inpainting, variance = InpaintingTransform(denoiser, known, mask), getattr(sampler, "variance", None)
    if variance is not None and not isinstance(variance, FixedSmall):  # which is the floor everywhere
        variance = MaskedVariance(variance, unknown)
    x, nfe = prior(denoiser.schedule, normal(shape, seed=seed, index=index, dtype=known.dtype)), 0
    evaluations: Tensor | None = None
    for k in progress_range(len(segments), progress and len(segments) > 1):
        segment = segments[k]
        noise = Draws(shape, seed, index, known.dtype, first=k * PASS + 1)
        if segment.again:
            up = transition(denoiser.schedule, times[segment.begin], times[segment.end])
            x = append_dims_like(up.alpha, x) * x + append_dims_like(up.variance.sqrt(), x) * noise(-1)
        x, used, each = sampler.integrate_grid(
            inpainting,
            x,
            times[segment.begin : segment.end + 1],
            noise=noise,
            condition=condition,
            variance=variance,
            progress=progress and len(segments) == 1,
        )
        nfe += used
        evaluations = each if evaluations is None or each is None else evaluations + each
    return Samples(torch.where(unknown, x, to_device(known, x.device).to(x)), nfe, evaluations)
