"""diffusion-lab: denoising diffusion models as four independent choices (schedule, objective, variance, sampler)."""

__version__ = "0.1.0"
