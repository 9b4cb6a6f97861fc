"""Samplers: integrators over a grid of times t_N > … > t_0. All have the signature of `base.Sampler`."""

from diffusion_lab.samplers.ancestral import DDIM, DDPM
from diffusion_lab.samplers.base import Sampler, Samples, prior
from diffusion_lab.samplers.ddcm import DDCM
from diffusion_lab.samplers.dpm_solver import DPMSolverPP
from diffusion_lab.samplers.euler import Euler
from diffusion_lab.samplers.heun import Heun
from diffusion_lab.samplers.ode import ODE
from diffusion_lab.samplers.sde import EulerMaruyama, PredictorCorrector, ReverseDiffusion
from diffusion_lab.samplers.unipc import UniPC

__all__ = [
    "DDCM",
    "DDIM",
    "DDPM",
    "ODE",
    "DPMSolverPP",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "PredictorCorrector",
    "ReverseDiffusion",
    "Sampler",
    "Samples",
    "UniPC",
    "prior",
]
