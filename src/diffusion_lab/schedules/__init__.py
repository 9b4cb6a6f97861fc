"""Noise schedules: curves (α_t, σ_t) for t ∈ [0, 1], with x_t = α_t x_0 + σ_t ε; t = 0 is data.

All arithmetic is float64, because σ recomputed from a rounded ᾱ = α² vanishes for the first steps. Results have the dtype of
t, float32 at least.
"""

from diffusion_lab.schedules.base import (
    PerExample,
    Scalars,
    Schedule,
    append_dims_like,
    cast_like,
    check_float32,
    noise_level,
    to_device,
)
from diffusion_lab.schedules.curves import EDM, VE, VP, Flow, SubVP
from diffusion_lab.schedules.tables import NODE_TOLERANCE, Cosine, Linear, ScaledLinear, Sigmoid, Table

__all__ = [
    "EDM",
    "NODE_TOLERANCE",
    "VE",
    "VP",
    "Cosine",
    "Flow",
    "Linear",
    "PerExample",
    "Scalars",
    "ScaledLinear",
    "Schedule",
    "Sigmoid",
    "SubVP",
    "Table",
    "append_dims_like",
    "cast_like",
    "check_float32",
    "noise_level",
    "to_device",
]
