"""Shared by the bound and the density: units, means, and the preparation of the arguments."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import ConfigError


def bits(nats: Tensor) -> Tensor:
    """Nats of each element (B, …) → bits per dimension of each image, float64 (B,)."""
    return nats.double().flatten(1).mean(1) / math.log(2)


def average(values: Tensor) -> tuple[float, float | None]:
    """(mean, its standard error) of independent values (N,); the error is None for a single one."""
    wide = values.double()
    return float(wide.mean()), float(wide.std() / math.sqrt(len(wide))) if len(wide) > 1 else None


def ready(denoiser: Denoiser, x0: Tensor, clip: bool = False) -> tuple[Denoiser, Tensor]:
    """Return the denoiser without its clipping, unless `clip`, and x_0 in float32 or wider. Guidance is kept.

    Raises:
        ConfigError: a self-conditioning network, known pixels (`on_x0`), or x_0 that is not floating point.
    """
    if denoiser.self_conditioning:
        raise ConfigError(
            "a likelihood cannot carry the previous estimate that this self-conditioning network takes: train with "
            "model.self_conditioning=false"
        )
    if denoiser.on_x0:
        raise ConfigError(
            f"this denoiser has {len(denoiser.on_x0)} transforms on_x0 (known pixels), under which no density is defined: "
            "write dataclasses.replace(denoiser, on_x0=())"
        )
    if not x0.is_floating_point():
        raise ConfigError(f"x0 is {x0.dtype}: give float images in [-1, 1], level k as k/127.5 - 1")
    if not clip:
        denoiser = replace(denoiser, clip=None)
    return denoiser, x0.to(torch.promote_types(x0.dtype, torch.float32))


def keys(x0: Tensor, index: Tensor | None) -> Tensor:
    """Return the index of the image in each row of x0, int64 (B,) on its device."""
    return torch.arange(len(x0), device=x0.device) if index is None else index.to(x0.device)
