"""Likelihood in bits per dimension: the variational bound of the chain and its terms, and the density of the ODE."""

from diffusion_lab.likelihood.base import average
from diffusion_lab.likelihood.bound import Bound, vlb
from diffusion_lab.likelihood.density import Density, ode

__all__ = ["Bound", "Density", "average", "ode", "vlb"]
