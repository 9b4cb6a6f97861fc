"""Samplers: integrators over a grid of times t_N > … > t_0. One signature (`base.Sampler`), one file a family."""

from diffusion_lab.samplers.ancestral import DDIM, DDPM
from diffusion_lab.samplers.base import Sampler, prior

__all__ = ["DDIM", "DDPM", "Sampler", "prior"]
