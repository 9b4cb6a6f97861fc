"""The density that the probability-flow ODE gives to data (Song et al. 2021, appendix D.2)."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import ConfigError
from diffusion_lab.likelihood.base import keys, ready
from diffusion_lab.noise import Stream, uniform, words
from diffusion_lab.samplers.dormand_prince import integrate
from diffusion_lab.samplers.time_parametrization import TimeParametrization
from diffusion_lab.schedules import append_dims_like

DIVERGENCES = ("hutchinson", "exact")
LARGEST = 1024  # dimensions that the exact divergence takes: it costs one backward pass for each
START = 1e-5  # where the published integration begins
OFFSET = math.log2(127.5)  # a density over [−1, 1] counts per unit, a probability per level: 127.5 levels are one unit

ROWS = 128  # copies of the images, each for another dimension, that share a pass of the exact divergence


class Density(NamedTuple):
    """−log p(x_0) and its parts, float64."""

    bpd: Tensor  # (B,) bits per dimension, for 256 levels: −log p/(N ln 2) + log₂ 127.5
    nfe: int  # network evaluations: the most of an image; each has a backward pass, the exact divergence N of them
    terms: dict[str, Tensor]  # "prior" −log p_1(x_1), "divergence" −∫ div: (B,), bits per dimension without the offset
    log_density: Tensor  # (B,) log p(x) in nats, x being x_0 or, dequantized, x_0 + u/127.5
    latent: Tensor  # (B, C, H, W) the state at t = 1
    evaluations: Tensor  # int64 (B,) of each image
    start: float  # where the integration began


def ode(
    denoiser: Denoiser,
    x0: Tensor,
    divergence: str = "hutchinson",
    dequantize: bool = True,
    condition: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    index: Tensor | None = None,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    start: float | None = None,
    dequantise: object = None,
) -> Density:
    """log p(x) = log p_1(x_1) + ∫ ∇·(dx/dt) dt along dx/dt = α̇ x̂_0 + σ̇ ε̂ from `start` to 1, p_1 = N(0, σ_1² I).

    The published approximations are made: x is taken as the state at `start`, and p_1 for the distribution of x_1 also where
    α(1) > 0. Step size and error are controlled for each image (samplers/dormand_prince.py), so a value does not
    depend on the batch. x̂_0 is never clipped: the divergence of a clamped function is no density's.

    Args:
        denoiser: its clipping is dropped, its guidance kept.
        x0: float (B, C, H, W) in [−1, 1], on the grid k/127.5 − 1 where it is dequantized.
        divergence: "hutchinson", zᵀ(∂f/∂x)z with one z of random signs for the whole solve (Hutchinson 1990), unbiased; or
            "exact", the trace itself, for images of at most 1024 dimensions: as many backward passes for each image.
        dequantize: add u/127.5, u uniform in (−½, ½), so that the mean of `bpd` bounds the bits of the discrete data from
            above (Theis et al. 2016). False takes x0 as continuous; `bpd` keeps its unit and with it the offset.
        condition: keyword arguments for the network, each with B rows.
        seed: with `index` the key of u and z.
        index: int64 (B,), which image each row is; default 0 … B − 1.
        rtol: relative tolerance of the solver.
        atol: absolute tolerance of the solver.
        start: in (0, 1); default 1e-5, and 1/T for a table, below which no network was trained and σ̇ grows to infinity.
        dequantise: the spelling of `dequantize` before; refused.

    Raises:
        ConfigError: an unknown divergence, more dimensions than the exact one takes, a start out of range, NaN from the
            network (t named), a self-conditioning network, known pixels (`on_x0`).
    """
    if dequantise is not None:
        raise ConfigError(f"dequantise={dequantise} was renamed: write dequantize={dequantise}")
    if divergence not in DIVERGENCES:
        raise ConfigError(f"unknown divergence {divergence!r}: write one of {', '.join(DIVERGENCES)}")
    size = x0[0].numel()
    if divergence == "exact" and size > LARGEST:
        raise ConfigError(
            f"divergence=exact takes one backward pass for each dimension, at most {LARGEST}, and these images have {size}: "
            "write divergence=hutchinson"
        )
    denoiser, x0 = ready(denoiser, x0)
    schedule = denoiser.schedule
    if start is None:
        start = START if schedule.steps is None else schedule.t_min
    if not 0 < start < 1:
        raise ConfigError(f"start={start} is outside (0, 1): the published value is 1e-5")
    with torch.inference_mode(False), torch.no_grad():
        shape, key = tuple(x0.shape[1:]), keys(x0, index)
        x = x0.double().clone()
        if dequantize:
            x += (uniform(shape, seed=seed, index=key, draw=0, stream=Stream.LIKELIHOOD) - 0.5) / 127.5
        probe = None
        if divergence == "hutchinson":
            bit = words(size, seed=seed, index=key, draw=1, stream=Stream.LIKELIHOOD) >> 31
            probe = (bit.to(x) * 2 - 1).reshape(x.shape)
        clock = TimeParametrization(schedule)
        field = _Field(denoiser, clock, probe, condition or {}, shape)
        state = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], 1)
        solution = integrate(field, state, clock.at(start), clock.at(1.0), rtol=rtol, atol=atol)
    end, change = solution.y[:, :-1], solution.y[:, -1]
    sigma = float(schedule.alpha_sigma(torch.ones((), dtype=torch.float64))[1])
    prior = -0.5 * ((end / sigma).square().sum(1) + size * math.log(2 * math.pi * sigma**2))
    scale = -1 / (size * math.log(2))
    return Density(
        bpd=scale * (prior + change) + OFFSET,
        nfe=solution.calls,
        terms={"prior": scale * prior, "divergence": scale * change},
        log_density=prior + change,
        latent=end.reshape(x0.shape),
        evaluations=solution.evaluations,
        start=start,
    )


class _Field:
    """f(u, y, rows) → dy/du for y = (x, ∫ div), (R, N + 1); `probe` (B, …) of ±1, or None for the exact divergence."""

    def __init__(
        self,
        denoiser: Denoiser,
        clock: TimeParametrization,
        probe: Tensor | None,
        condition: Mapping[str, Tensor],
        shape: tuple[int, ...],
    ) -> None:
        self.denoiser, self.clock, self.probe, self.condition, self.shape = denoiser, clock, probe, condition, shape

    def __call__(self, u: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        copies = 1 if self.probe is not None else max(1, min(ROWS // len(y), y.shape[1] - 1))
        t, d_alpha, d_sigma = (value.repeat(copies) for value in (self.clock.time(u), *self.clock.tangent(u)))
        repeated = rows.repeat(copies)
        with torch.enable_grad():
            x = y[:, :-1].repeat(copies, 1).reshape(-1, *self.shape).requires_grad_()
            condition = {name: value[repeated.to(value.device)] for name, value in self.condition.items()}
            prediction = self.denoiser(x, t, **condition)
            velocity = append_dims_like(d_alpha, x) * prediction.x0 + append_dims_like(d_sigma, x) * prediction.noise
            _refuse_nan(velocity, t)
            if self.probe is not None:
                (pulled,) = torch.autograd.grad(velocity, x, self.probe[rows])
                change = (pulled * self.probe[rows]).flatten(1).sum(1)
            else:
                change = _trace(velocity, x, copies)
        return torch.cat([velocity.detach()[: len(y)].flatten(1), change[:, None]], 1)


def _trace(velocity: Tensor, x: Tensor, copies: int) -> Tensor:
    """Σ_n ∂f_n/∂x_n of each image, float64 (R,), from `copies` blocks of the same R rows: a backward pass serves as many n."""
    size = x[0].numel()
    total = x.new_zeros(len(x) // copies)
    for first in range(0, size, copies):
        chosen = torch.zeros_like(velocity).reshape(copies, -1, size)
        for block in range(min(copies, size - first)):
            chosen[block, :, first + block] = 1
        (pulled,) = torch.autograd.grad(velocity, x, chosen.reshape(velocity.shape), retain_graph=True)
        total += (pulled.reshape(chosen.shape) * chosen).sum((0, 2))
    return total


def _refuse_nan(velocity: Tensor, t: Tensor) -> None:
    """Raise ConfigError, naming the time, where dx/dt is not finite."""
    finite = velocity.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        bad = float(t[int((~finite).nonzero()[0])])
        raise ConfigError(
            f"the network gave NaN or infinity at t={bad:.6g}: evaluate in float32, or take a checkpoint from before the "
            "training diverged"
        )
