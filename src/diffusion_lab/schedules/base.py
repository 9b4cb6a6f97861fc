"""The base class of all noise schedules, and the arithmetic they share."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from diffusion_lab.errors import ConfigError, check_number

Scalars = Float[Tensor, "*shape"]  # the tensors of one signature have one shape
PerExample = Float[Tensor, ""] | Float[Tensor, " b"]  # one value for the whole batch, or one for each example


def cast_like(value: Scalars, t: Float[Tensor, "..."]) -> Scalars:
    """Return `value` in the dtype of t, float32 at least."""
    return value.to(torch.promote_types(t.dtype, torch.float32))


def to_device(value: Shaped[Tensor, "*shape"], device: torch.device) -> Shaped[Tensor, "*shape"]:
    """Return `value` on `device`; a copy from the CPU does not wait for work queued on the device."""
    return value.to(device, non_blocking=value.device.type == "cpu")


def append_dims_like(
    value: Shaped[Tensor, ""] | Shaped[Tensor, " b"], x: Float[Tensor, "..."]
) -> Float[Tensor, ""] | Float[Tensor, "b ..."]:
    """Return a per-example value, 0-d or (B,), in the dtype of x, shaped to multiply x (B, …).

    Every broadcast of times to images in the package goes through this function.
    """
    value = value.to(x.dtype)
    return value if value.ndim == 0 else to_device(value, x.device).reshape(-1, *[1] * (x.ndim - 1))


class Schedule(ABC):
    """A curve (α_t, σ_t) with λ(t) = ln(α/σ) strictly decreasing. A subclass implements the four abstract methods."""

    steps: int | None = None  # T of a table; None for a continuous curve
    t_min: float = 1e-3  # smallest time at which the network is evaluated; 1/T for a table
    t_train_min: float = 0.0  # smallest time in training; below `t_eps` without effect
    t_eps: float = 1e-12  # t = 0+, where limits towards data are evaluated: on VE and EDM σ is σ_min there, not 0

    @abstractmethod
    def alpha_sigma(self, t: Scalars) -> tuple[Scalars, Scalars]:
        """Return (α, σ) at times t ∈ [0, 1] of any shape, in t's dtype, float32 at least. t = 0 gives (1, 0)."""

    @abstractmethod
    def derivatives(self, t: Scalars) -> tuple[Scalars, Scalars]:
        """Return (dα/dt, dσ/dt) at times t; shapes and dtype as `alpha_sigma`."""

    @abstractmethod
    def time(self, lam: Scalars) -> Scalars:
        """Return the time t ∈ [0, 1] at which ln(α/σ) = lam, the inverse of λ; beyond an end of the curve, that end."""

    @abstractmethod
    def conditioning(self, t: Scalars) -> Scalars:
        """Return the time-conditioning input of the network at times t."""

    def lam(self, t: Scalars) -> Scalars:
        """Return λ = ln(α/σ) = ½ ln SNR; +∞ at t = 0, −∞ where α = 0."""
        alpha, sigma = self.alpha_sigma(t.double())
        return cast_like(alpha.log() - sigma.log(), t)

    def drift_diffusion(self, t: Scalars) -> tuple[Scalars, Scalars]:
        """Return (f, g²) of the forward SDE dx = f x dt + g dw that has the marginals of this curve.

        f = d ln α/dt and g² = dσ²/dt − 2fσ² (Song et al. 2021; Kingma et al. 2021, section 2). At t = 0 they are the limits
        from above; where α = 0 they are −∞ and +∞.
        """
        t64 = self.off_data(t)
        alpha, sigma = self.alpha_sigma(t64)
        d_alpha, d_sigma = self.derivatives(t64)
        f = d_alpha / alpha
        return cast_like(f, t), cast_like(2 * sigma * (d_sigma - f * sigma), t)

    def corrupt(
        self, x0: Float[Tensor, "#b *#chw"], noise: Float[Tensor, "b *chw"], t: PerExample
    ) -> Float[Tensor, "b *chw"]:
        """Return x_t = α_t x_0 + σ_t ε, the forward process (Ho et al. 2020, eq. 4).

        Args:
            x0: images, (B, …) or broadcastable to noise.
            noise: ε, (B, …).
            t: times in [0, 1], one for the batch or one for each image.

        Returns:
            x_t, (B, …) in the dtype of noise.
        """
        alpha, sigma = self.alpha_sigma(t.double())
        return append_dims_like(alpha, noise) * x0 + append_dims_like(sigma, noise) * noise

    def off_data(self, t: Scalars) -> Scalars:
        """Return t in float64, with `t_eps` in place of smaller values."""
        return t.double().clamp(min=self.t_eps)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether α(1) = 0 exactly (zero terminal SNR, flow), so that x_t at t = 1 is independent of x_0."""
        return bool(self.alpha_sigma(torch.ones((), dtype=torch.float64))[0] == 0)


def check_float32(schedule: Schedule) -> None:
    """Raise ConfigError if α(1) > 0 underflows float32, the dtype of states: 1/α is infinite there, and x̂_0 NaN."""
    alpha = float(schedule.alpha_sigma(torch.ones((), dtype=torch.float64))[0])
    if 0 < alpha < torch.finfo(torch.float32).tiny:
        raise ConfigError(
            f"the schedule {type(schedule).__name__} ends in alpha = {alpha:.2g}, which is 0 in float32: lower its noise "
            "(schedule.beta_end, schedule.beta_max), or write schedule.zero_terminal_snr=true objective=pred_v"
        )


def checked_t_train_min(t: float) -> float:
    """Return `t_train_min`. Raises ConfigError: it is outside [0, 0.1]."""
    check_number("schedule.t_train_min", t, "[0, 0.1]", "the published value of the score SDEs is 1e-5")
    return float(t)


def noise_level(schedule: Schedule, t: Scalars) -> Scalars:
    """Return ln(σ/α)/4, the time-conditioning input of EDM (Karras et al. 2022, table 1); at t = 0 its finite limit at 0+."""
    return cast_like(-schedule.lam(schedule.off_data(t)) / 4, t)


def checked_shift(shift: float) -> float:
    """Return `shift`. Raises ConfigError: it is outside [0.001, 1000]."""
    check_number("schedule.shift", shift, "[0.001, 1000]", "the factor on sigma/alpha, 1 leaves the curve unchanged")
    return shift


def shifted(alpha: Scalars, sigma: Scalars, shift: float) -> tuple[Scalars, Scalars]:
    """Multiply σ/α by `shift` on α² + σ² = 1: λ' = λ − ln shift (Hoogeboom et al. 2023, section 3.1)."""
    norm = (alpha.square() + (shift * sigma).square()).sqrt()
    return alpha / norm, shift * sigma / norm
