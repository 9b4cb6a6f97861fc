"""What the bound and the density share."""

import copy
import math

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
    """The denoiser, without its clipping unless `clip`, and x_0 in float32 or wider; ValueError where either is unfit."""
    if denoiser.self_conditioning:
        raise ConfigError(
            "a likelihood cannot carry the previous estimate that this self-conditioning network takes: train with "
            "model.self_conditioning=false"
        )
    if not x0.is_floating_point():
        raise ConfigError(f"x0 is {x0.dtype}: give float images in [-1, 1], level k as k/127.5 - 1")
    if denoiser.clip is not None and not clip:
        denoiser = copy.copy(denoiser)
        denoiser.clip = None
    return denoiser, x0.to(torch.promote_types(x0.dtype, torch.float32))


def keys(x0: Tensor, index: Tensor | None) -> Tensor:
    """Which image each row of x0 is, int64 (B,) on its device."""
    return torch.arange(len(x0), device=x0.device) if index is None else index.to(x0.device)
