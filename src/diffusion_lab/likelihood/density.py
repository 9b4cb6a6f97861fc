"""The density of data under the probability-flow ODE (Song et al. 2021, appendix D.2)."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float64, Int64, Shaped
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.likelihood.base import keys, ready
from diffusion_lab.noise import Stream, uniform, words
from diffusion_lab.samplers.dormand_prince import integrate
from diffusion_lab.samplers.time_parametrization import TimeParametrization
from diffusion_lab.schedules import append_dims_like

DIVERGENCES = ("hutchinson", "exact")
MAX_EXACT_DIMENSIONS = 1024  # the exact divergence costs one backward pass for each dimension
START = 1e-5  # the published start of the integration
OFFSET = math.log2(127.5)  # from a density over [−1, 1] to a probability for each level: one unit holds 127.5 levels
ROWS = 128  # copies of the images, each for another dimension, in one backward pass of the exact divergence


class Density(NamedTuple):
    """−log p(x_0) and its parts, float64."""

    bpd: Float64[Tensor, " b"]  # bits per dimension for 256 levels: −log p/(N ln 2) + log₂ 127.5
    nfe: int  # network evaluations, the maximum over the images; each has one backward pass, or N for the exact divergence
    terms: dict[str, Tensor]  # (B,) bits per dimension without the offset: "prior" −log p_1(x_1), "divergence" −∫ div
    log_density: Float64[Tensor, " b"]  # log p(x) in nats; x is x_0 or, dequantized, x_0 + u/127.5
    latent: Float64[Tensor, "b c h w"]  # the state at t = 1
    evaluations: Int64[Tensor, " b"]  # network evaluations of each image
    start: float  # time at which the integration started


def ode(
    denoiser: Denoiser,
    x0: Shaped[Tensor, "b c h w"],
    divergence: str = "hutchinson",
    dequantize: bool = True,
    condition: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    index: Int64[Tensor, " b"] | None = None,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    start: float | None = None,
    dequantise: object = None,
) -> Density:
    """Return log p(x) = log p_1(x_1) + ∫ ∇·(dx/dt) dt along dx/dt = α̇ x̂_0 + σ̇ ε̂ from `start` to 1, p_1 = N(0, σ_1² I).

    The published approximations apply: x is the state at `start`, and p_1 replaces the distribution of x_1 even where
    α(1) > 0. Step size and error are controlled for each image (samplers/dormand_prince.py), so a value does not depend on the
    batch. x̂_0 is never clipped, because a clamped velocity field does not transport a density.

    Args:
        denoiser: its clipping is removed; its guidance is kept.
        x0: float images in [−1, 1], on the grid k/127.5 − 1 if dequantized.
        divergence: "hutchinson", the unbiased estimate zᵀ(∂f/∂x)z with one z of random signs for all steps (Hutchinson
            1990); or "exact", the trace, one backward pass for each of at most 1024 dimensions.
        dequantize: add u/127.5, u uniform in (−½, ½), so that the mean of `bpd` is an upper bound of the bits of the discrete
            data (Theis et al. 2016). False treats x0 as continuous; `bpd` keeps its unit and therefore the offset.
        condition: keyword arguments for the network, each with B rows.
        seed: with `index` the key of u and z.
        index: index of the image in each row; default 0 … B − 1.
        rtol: relative tolerance of the solver, in [1e-14, 1].
        atol: absolute tolerance of the solver, in [1e-14, 1].
        start: in (0, 1); default 1e-5, and for a table 1/T, below which the network is not trained and σ̇ is unbounded.
        dequantise: former spelling of `dequantize`; refused.

    Raises:
        ConfigError: an unknown divergence; too many dimensions for the exact one; a number out of range; NaN or Inf from the
            network; a self-conditioning network; transforms `on_x0` (known pixels).
    """
    if dequantise is not None:
        raise ConfigError(f"dequantise={dequantise} was renamed: write dequantize={dequantise}")
    if divergence not in DIVERGENCES:
        raise ConfigError(f"divergence={divergence!r} is unknown: write one of {', '.join(DIVERGENCES)}")
    size = x0[0].numel()
    if divergence == "exact" and size > MAX_EXACT_DIMENSIONS:
        raise ConfigError(
            f"divergence=exact is limited to {MAX_EXACT_DIMENSIONS} dimensions, one backward pass each, and these images have "
            f"{size}: write divergence=hutchinson"
        )
    denoiser, x0 = ready(denoiser, x0)
    schedule = denoiser.schedule
    if start is None:
        start = START if schedule.steps is None else schedule.t_min
    check_number("start", start, "(0, 1)", "the published value is 1e-5")
    check_number("rtol", rtol, "[1e-14, 1]", "the published value is 1e-5")
    check_number("atol", atol, "[1e-14, 1]", "the published value is 1e-5")
    with torch.inference_mode(False), torch.no_grad():
        shape, key = tuple(x0.shape[1:]), keys(x0, index)
        x = x0.double().clone()
        if dequantize:
            x += (uniform(shape, seed=seed, index=key, draw=0, stream=Stream.LIKELIHOOD) - 0.5) / 127.5
        probe = None
        if divergence == "hutchinson":
            sign_bits = words(size, seed=seed, index=key, draw=1, stream=Stream.LIKELIHOOD) >> 31
            probe = (sign_bits.to(x) * 2 - 1).reshape(x.shape)
        parametrization = TimeParametrization(schedule)
        field = _Field(denoiser, parametrization, probe, condition or {}, shape)
        state = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], 1)
        u_start, u_end = parametrization.at(start), parametrization.at(1.0)
        solution = integrate(field, state, u_start, u_end, rtol=rtol, atol=atol)
    x1, divergence_integral = solution.y[:, :-1], solution.y[:, -1]
    sigma = float(schedule.alpha_sigma(torch.ones((), dtype=torch.float64))[1])
    prior = -0.5 * ((x1 / sigma).square().sum(1) + size * math.log(2 * math.pi * sigma**2))
    scale = -1 / (size * math.log(2))
    return Density(
        bpd=scale * (prior + divergence_integral) + OFFSET,
        nfe=solution.calls,
        terms={"prior": scale * prior, "divergence": scale * divergence_integral},
        log_density=prior + divergence_integral,
        latent=x1.reshape(x0.shape),
        evaluations=solution.evaluations,
        start=start,
    )


class _Field:
    """f(u, y, rows) → dy/du for the state y = (x, ∫ div) of shape (R, N + 1), R rows of the batch with N dimensions each.

    Args:
        denoiser: without clipping.
        parametrization: from the integration variable u to t.
        probe: random signs ±1 for Hutchinson's estimate; None for the exact divergence.
        condition: keyword arguments for the network, each with B rows.
        shape: (C, H, W) of an image.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        parametrization: TimeParametrization,
        probe: Float64[Tensor, "b c h w"] | None,
        condition: Mapping[str, Tensor],
        shape: tuple[int, ...],
    ) -> None:
        self.denoiser, self.parametrization, self.probe = denoiser, parametrization, probe
        self.condition, self.shape = condition, shape

    def __call__(
        self, u: Float64[Tensor, " r"], y: Float64[Tensor, "r dims"], rows: Int64[Tensor, " r"]
    ) -> Float64[Tensor, "r dims"]:
        """Return dy/du at u, one value for each row, and the states y of the images `rows`."""
        copies = 1 if self.probe is not None else max(1, min(ROWS // len(y), y.shape[1] - 1))
        times = self.parametrization.time(u), *self.parametrization.tangent(u)
        t, d_alpha, d_sigma = (value.repeat(copies) for value in times)
        repeated = rows.repeat(copies)
        with torch.enable_grad():
            x = y[:, :-1].repeat(copies, 1).reshape(-1, *self.shape).requires_grad_()
            condition = {name: value[repeated.to(value.device)] for name, value in self.condition.items()}
            prediction = self.denoiser(x, t, **condition)
            velocity = append_dims_like(d_alpha, x) * prediction.x0 + append_dims_like(d_sigma, x) * prediction.noise
            _refuse_nan(velocity, t)
            if self.probe is not None:
                (vjp,) = torch.autograd.grad(velocity, x, self.probe[rows])
                divergence = (vjp * self.probe[rows]).flatten(1).sum(1)
            else:
                divergence = _trace(velocity, x, copies)
        return torch.cat([velocity.detach()[: len(y)].flatten(1), divergence[:, None]], 1)


def _trace(
    velocity: Float64[Tensor, "rows c h w"], x: Float64[Tensor, "rows c h w"], copies: int
) -> Float64[Tensor, " r"]:
    """Return Σ_n ∂f_n/∂x_n of each image.

    `velocity` and `x` hold `copies` blocks of the same images, so that one backward pass yields `copies` of the terms.
    """
    size = x[0].numel()
    total = x.new_zeros(len(x) // copies)
    for first in range(0, size, copies):
        unit = torch.zeros_like(velocity).reshape(copies, -1, size)
        for block in range(min(copies, size - first)):
            unit[block, :, first + block] = 1
        (vjp,) = torch.autograd.grad(velocity, x, unit.reshape(velocity.shape), retain_graph=True)
        total += (vjp.reshape(unit.shape) * unit).sum((0, 2))
    return total


def _refuse_nan(velocity: Float64[Tensor, "rows c h w"], t: Float64[Tensor, " rows"]) -> None:
    """Raise ConfigError where dx/dt is not finite, with the time."""
    finite = velocity.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        time = float(t[int((~finite).nonzero()[0])])
        raise ConfigError(
            f"the network output is NaN or infinity at t={time:.6g}: evaluate in float32, or use a checkpoint from before the "
            "training diverged"
        )
