"""What a curve is, and the arithmetic that all of them share."""

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion_lab.errors import ConfigError

Scalars = Float[Tensor, "*shape"]


def cast_like(value: Tensor, t: Tensor) -> Tensor:
    """`value` in t's dtype, float32 at least."""
    return value.to(torch.promote_types(t.dtype, torch.float32))


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """`value` on `device`, without waiting for what the device still has to do where it comes from the host."""
    return value.to(device, non_blocking=value.device.type == "cpu")


def append_dims_like(value: Tensor, x: Tensor) -> Tensor:
    """A per-example value (0-d or (B,)) in the dtype of x, shaped to multiply x (B, …). The one broadcast of the package."""
    value = value.to(x.dtype)
    return value if value.ndim == 0 else to_device(value, x.device).reshape(-1, *[1] * (x.ndim - 1))


class Schedule(ABC):
    """A curve (α_t, σ_t) with λ(t) = ln(α/σ) strictly decreasing. What a new curve must give: the first four methods."""

    steps: int | None = None  # T of a table; None for a continuous curve
    t_min: float = 1e-3  # the smallest time at which samplers ask the network; 1/T of a table
    t_eps: float = 1e-12  # t = 0+, where limits towards data are read: σ is not 0 there, on VE and EDM it is σ_min

    @abstractmethod
    def alpha_sigma(self, t: Scalars) -> tuple[Scalars, Scalars]:
        """(α, σ) at times t ∈ [0, 1] of any shape, in t's dtype or float32, whichever is wider. t = 0 is (1, 0)."""

    @abstractmethod
    def derivatives(self, t: Scalars) -> tuple[Scalars, Scalars]:
        """(dα/dt, dσ/dt), same shapes."""

    @abstractmethod
    def time(self, lam: Scalars) -> Scalars:
        """The inverse of λ: the time t ∈ [0, 1] at which ln(α/σ) = lam; beyond the curve's ends, the end."""

    @abstractmethod
    def conditioning(self, t: Scalars) -> Scalars:
        """What the network is told of the time."""

    def lam(self, t: Scalars) -> Scalars:
        """λ = ln(α/σ) = ½ ln SNR; +∞ at t = 0, −∞ where α = 0."""
        alpha, sigma = self.alpha_sigma(t.double())
        return cast_like(alpha.log() - sigma.log(), t)

    def drift_diffusion(self, t: Scalars) -> tuple[Scalars, Scalars]:
        """(f, g²) of the forward SDE dx = f x dt + g dw whose marginals are this curve's, same shapes.

        f = d ln α/dt and g² = dσ²/dt − 2fσ² (Song et al. 2021; Kingma et al. 2021, section 2). At t = 0 the limit from
        above; where α = 0 they are −∞ and +∞.
        """
        wide = self.off_data(t)
        alpha, sigma = self.alpha_sigma(wide)
        d_alpha, d_sigma = self.derivatives(wide)
        f = d_alpha / alpha
        return cast_like(f, t), cast_like(2 * sigma * (d_sigma - f * sigma), t)

    def corrupt(self, x0: Tensor, noise: Tensor, t: Scalars) -> Tensor:
        """The forward process x_t = α_t x_0 + σ_t ε (Ho et al. 2020, eq. 4), (B, …) in noise's dtype.

        Args:
            x0: images, (B, …) or what broadcasts to noise.
            noise: ε, (B, …).
            t: times in [0, 1], (B,) or one for all.
        """
        alpha, sigma = self.alpha_sigma(t.double())
        return append_dims_like(alpha, noise) * x0 + append_dims_like(sigma, noise) * noise

    def off_data(self, t: Scalars) -> Scalars:
        """t in float64, with 0+ for what is below it."""
        return t.double().clamp(min=self.t_eps)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether α(1) = 0 exactly (zero terminal SNR, flow): then ε says nothing of x_0 at t = 1."""
        return bool(self.alpha_sigma(torch.ones((), dtype=torch.float64))[0] == 0)


def noise_level(schedule: Schedule, t: Scalars) -> Scalars:
    """ln(σ/α)/4, what EDM's networks are told (Karras et al. 2022, table 1); at t = 0 that of 0+, so that it is finite."""
    return cast_like(-schedule.lam(schedule.off_data(t)) / 4, t)


def checked_shift(name: str, shift: float) -> float:
    """`shift` if it is a factor; ValueError if not."""
    if not 0 < shift < math.inf:
        raise ConfigError(
            f"schedule {name} needs a finite shift > 0, the factor on sigma/alpha (1 is none), not shift={shift}"
        )
    return shift


def shifted(alpha: Tensor, sigma: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """α² + σ² = 1 kept, σ/α multiplied by `shift`: λ' = λ − ln shift (Hoogeboom et al. 2023, section 3.1)."""
    norm = (alpha.square() + (shift * sigma).square()).sqrt()
    return alpha / norm, shift * sigma / norm
