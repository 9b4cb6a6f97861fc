"""Unit conversion, averaging and argument checks of the variational bound and of the ODE likelihood."""

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import ConfigError


def bits(nats: Float[Tensor, "b *chw"]) -> Float64[Tensor, " b"]:
    """Return bits per dimension of each image from nats of each element."""
    return nats.double().flatten(1).mean(1) / math.log(2)


def average(values: Float[Tensor, " n"]) -> tuple[float, float | None]:
    """Return (mean, standard error of the mean) of independent values; the error is None for a single value."""
    values64 = values.double()
    error = float(values64.std() / math.sqrt(len(values64))) if len(values64) > 1 else None
    return float(values64.mean()), error


def ready(
    denoiser: Denoiser, x0: Shaped[Tensor, "b c h w"], clip: bool = False
) -> tuple[Denoiser, Float[Tensor, "b c h w"]]:
    """Return the denoiser, without its clipping unless `clip` is true, and x_0 in float32 or a wider type. Guidance is kept.

    Raises:
        ConfigError: if the network is self-conditioning, the denoiser has `on_x0` transforms (known pixels), or x_0 is not of a
            floating-point type.
    """
    if denoiser.self_conditioning:
        raise ConfigError(
            "a self-conditioning network has no likelihood, since there is no estimate of a previous step: train with "
            "model.self_conditioning=false"
        )
    if denoiser.on_x0:
        raise ConfigError(
            f"this denoiser has {len(denoiser.on_x0)} transforms on_x0 (known pixels), for which no density is defined: write "
            "dataclasses.replace(denoiser, on_x0=())"
        )
    if not x0.is_floating_point():
        raise ConfigError(f"x0 has dtype {x0.dtype}: pass float images in [-1, 1], level k as k/127.5 - 1")
    if not clip:
        denoiser = replace(denoiser, clip=None)
    return denoiser, x0.to(torch.promote_types(x0.dtype, torch.float32))


def keys(x0: Float[Tensor, "b c h w"], index: Int64[Tensor, " b"] | None) -> Int64[Tensor, " b"]:
    """Return `index` on the device of x0; 0, …, B − 1 if it is None."""
    return torch.arange(len(x0), device=x0.device) if index is None else index.to(x0.device)
