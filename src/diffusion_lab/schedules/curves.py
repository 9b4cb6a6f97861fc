"""Continuous curves: the score SDEs (VP, sub-VP, VE), EDM and flow matching."""

import math
from abc import abstractmethod
from functools import cached_property

import torch

from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.schedules.base import (
    Scalars,
    Schedule,
    cast_like,
    checked_shift,
    checked_t_train_min,
    noise_level,
    shifted,
)


class _Curve(Schedule):
    """A closed form for t ∈ (0, 1] whose inverse has a closed form too."""

    @abstractmethod
    def _inverse(self, lam: Scalars) -> Scalars:
        """Return the time at which ln(α/σ) is `lam`, float64; beyond an end of the curve any value below 0 or above 1."""

    @cached_property
    def _lam_end(self) -> float:
        """λ(1)."""
        return float(self.lam(torch.ones((), dtype=torch.float64)))

    def time(self, lam: Scalars) -> Scalars:
        """Return the time at which ln(α/σ) = lam: 1 for lam ≤ λ(1), 0 for +∞ only, otherwise at least `t_eps`."""
        lam64 = lam.double()
        t = torch.where(lam64 <= self._lam_end, 1, self._inverse(lam64).clamp(self.t_eps, 1))
        return cast_like(torch.where(lam64 == math.inf, 0, t), lam)


class _Exponential(_Curve):
    """α = e^−M, M(t) = t²(β_max − β_min)/4 + tβ_min/2 = ½∫β, common to VP and sub-VP (Song et al. 2021, appendix B)."""

    def __init__(self, name: str, beta_min: float, beta_max: float, t_train_min: float) -> None:
        self.t_train_min = checked_t_train_min(t_train_min)
        for key, value in (("beta_min", beta_min), ("beta_max", beta_max)):
            check_number(f"schedule.{key}", value, "(0, 100]", "the published values are 0.1 and 20")
        if beta_min > beta_max:
            raise ConfigError(
                f"schedule={name} needs beta_min <= beta_max, not beta_min={beta_min}, beta_max={beta_max}"
            )
        self.beta_min, self.beta_max = beta_min, beta_max

    def _exponent(self, t: Scalars) -> tuple[Scalars, Scalars]:
        """Return (M, dM/dt = β/2) in float64."""
        t = t.double()
        slope = (self.beta_max - self.beta_min) / 2
        return t * (t * slope + self.beta_min) / 2, (t * 2 * slope + self.beta_min) / 2

    def _root(self, m: Scalars) -> Scalars:
        """Return the time at which M is `m` ≥ 0: the root of the quadratic in a form without cancellation; NaN for m = ∞."""
        half = self.beta_min / 2
        return 2 * m / (half + (half**2 + (self.beta_max - self.beta_min) * m).sqrt())

    def conditioning(self, t: Scalars) -> Scalars:
        """Return 999·t, the time-conditioning input of the score SDE's networks."""
        return cast_like(999 * t.double(), t)


class VP(_Exponential):
    """α = e^−M, σ² = 1 − e^−2M, the limit of DDPM's chain for T → ∞ (Song et al. 2021, eq. 29 and appendix C).

    Args:
        beta_min: β(0), in (0, 100].
        beta_max: β(1), in [β(0), 100].
        shift: factor on σ/α, λ' = λ − ln shift with α² + σ² = 1. For images of d×d pixels, shift = d/64 preserves the SNR of the
            coarse structure at each t as at 64×64 (Hoogeboom et al. 2023).
        t_train_min: smallest time in training, in [0, 0.1]: 1e-5 is that of the score SDEs (Song et al. 2021, their code).

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self, beta_min: float = 0.1, beta_max: float = 20.0, shift: float = 1.0, t_train_min: float = 1e-5
    ) -> None:
        super().__init__("vp", beta_min, beta_max, t_train_min)
        self.shift = checked_shift(shift)

    def _unshifted(self, m: Scalars) -> tuple[Scalars, Scalars]:
        return (-m).exp(), (-torch.expm1(-2 * m)).sqrt()

    def alpha_sigma(self, t: Scalars) -> tuple[Scalars, Scalars]:
        alpha, sigma = shifted(*self._unshifted(self._exponent(t)[0]), self.shift)
        return cast_like(alpha, t), cast_like(sigma, t)

    def derivatives(self, t: Scalars) -> tuple[Scalars, Scalars]:
        """Return (dα/dt, dσ/dt); dσ/dt is ∞ at t = 0.

        α̇ = ασ²λ̇ and σ̇ = −σα²λ̇ because α² + σ² = 1, and λ̇ = −Ṁ/σ² does not depend on the shift.
        """
        m, rate = self._exponent(t)
        alpha, sigma = self._unshifted(m)
        norm2 = alpha.square() + (self.shift * sigma).square()
        d_alpha = -alpha * self.shift**2 * rate / norm2**1.5
        d_sigma = self.shift * alpha.square() * rate / (sigma * norm2**1.5)
        return cast_like(d_alpha, t), cast_like(d_sigma, t)

    def _inverse(self, lam: Scalars) -> Scalars:
        # e^2M = 1 + (σ/α)²
        return self._root(torch.log1p((-2 * (lam + math.log(self.shift))).exp()) / 2)


class SubVP(_Exponential):
    """α = e^−M, σ = 1 − e^−2M: less noise than VP at every t, and α² + σ² < 1 (Song et al. 2021, eq. 29).

    Args:
        beta_min: β(0), in (0, 100].
        beta_max: β(1), in [β(0), 100].
        t_train_min: smallest time in training, in [0, 0.1]: 1e-5 is that of the score SDEs (Song et al. 2021, their code).

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_train_min: float = 1e-5) -> None:
        super().__init__("sub_vp", beta_min, beta_max, t_train_min)

    def alpha_sigma(self, t: Scalars) -> tuple[Scalars, Scalars]:
        m, _ = self._exponent(t)
        return cast_like((-m).exp(), t), cast_like(-torch.expm1(-2 * m), t)

    def derivatives(self, t: Scalars) -> tuple[Scalars, Scalars]:
        m, rate = self._exponent(t)
        return cast_like(-rate * (-m).exp(), t), cast_like(2 * rate * (-2 * m).exp(), t)

    def _inverse(self, lam: Scalars) -> Scalars:
        # σ/α = e^M − e^−M = 2 sinh M
        return self._root(torch.asinh((-lam).exp() / 2))


class _Exploding(_Curve):
    """α = 1, and σ rises from σ_min at 0+ to σ_max. At t = 0, which is data, σ jumps to 0. Time-conditioning input: ln(σ)/4."""

    def __init__(self, name: str, sigma_min: float, sigma_max: float, t_train_min: float) -> None:
        self.t_train_min = checked_t_train_min(t_train_min)
        for key, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
            check_number(f"schedule.{key}", value, "[1e-6, 1e6]", "in units of the images' range [-1, 1]")
        if sigma_min >= sigma_max:
            raise ConfigError(
                f"schedule={name} needs sigma_min < sigma_max, not sigma_min={sigma_min}, sigma_max={sigma_max}"
            )
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    @abstractmethod
    def _sigma(self, t: Scalars) -> tuple[Scalars, Scalars]:
        """Return (σ, dσ/dt) in float64; at t = 0 their values at 0+."""

    def alpha_sigma(self, t: Scalars) -> tuple[Scalars, Scalars]:
        sigma = torch.where(t > 0, self._sigma(t.double())[0], 0)
        return cast_like(torch.ones_like(sigma), t), cast_like(sigma, t)

    def derivatives(self, t: Scalars) -> tuple[Scalars, Scalars]:
        """Return (0, dσ/dt); at t = 0 the value at 0+."""
        slope = self._sigma(t.double())[1]
        return cast_like(torch.zeros_like(slope), t), cast_like(slope, t)

    def conditioning(self, t: Scalars) -> Scalars:
        """Return ln(σ)/4 (Karras et al. 2022, table 1); at t = 0 ln(σ_min)/4."""
        return noise_level(self, t)


class VE(_Exploding):
    """α = 1, σ = σ_min (σ_max/σ_min)^t, a geometric progression (Song et al. 2021, appendix C). At t = 0 σ is 0, not σ_min.

    It has no shift: for a higher resolution raise `sigma_max`, which must exceed the distances between images.

    Args:
        sigma_min: σ(0+), in [1e-6, 1e6].
        sigma_max: σ(1), above σ_min and at most 1e6; 50 for CIFAR-10.
        t_train_min: smallest time in training, in [0, 0.1]; σ_min bounds every weight. σ of the published 1e-5 is σ_min too.

    Raises:
        ConfigError: an argument is out of range.
    """

    t_min = 1e-5

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0, t_train_min: float = 0.0) -> None:
        super().__init__("ve", sigma_min, sigma_max, t_train_min)
        self._ends = math.log(sigma_min), math.log(sigma_max)

    def _sigma(self, t: Scalars) -> tuple[Scalars, Scalars]:
        low, high = self._ends
        sigma = self.sigma_min ** (1 - t) * self.sigma_max**t
        return sigma, sigma * (high - low)

    def _inverse(self, lam: Scalars) -> Scalars:
        low, high = self._ends
        return -(lam + low) / (high - low)


class EDM(_Exploding):
    """α = 1, σ = (σ_min^(1/ρ) + t(σ_max^(1/ρ) − σ_min^(1/ρ)))^ρ (Karras et al. 2022, eq. 5, with t from data to noise).

    Equal steps in t are the published time steps. It has no shift: for a higher resolution raise `sigma_max`.

    Args:
        sigma_min: σ(0+), in [1e-6, 1e6].
        sigma_max: σ(1), above σ_min and at most 1e6.
        rho: ρ, in [0.1, 100]; a larger value allots more of [0, 1] to small σ.
        t_train_min: smallest time in training, in [0, 0.1]; σ_min bounds every weight.

    Raises:
        ConfigError: an argument is out of range.
    """

    t_min = 1e-9  # 0+: σ equals σ_min there to a relative 1e-7

    def __init__(
        self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, t_train_min: float = 0.0
    ) -> None:
        super().__init__("edm", sigma_min, sigma_max, t_train_min)
        check_number("schedule.rho", rho, "[0.1, 100]", "the published value is 7")
        self.rho = rho
        self._ends = math.pow(sigma_min, 1 / rho), math.pow(sigma_max, 1 / rho)

    def _sigma(self, t: Scalars) -> tuple[Scalars, Scalars]:
        low, high = self._ends
        root = (1 - t) * low + t * high
        return root**self.rho, self.rho * (high - low) * root ** (self.rho - 1)

    def _inverse(self, lam: Scalars) -> Scalars:
        low, high = self._ends
        return ((-lam / self.rho).exp() - low) / (high - low)


class Flow(_Curve):
    """α = 1 − t, σ = t: the straight line from data to noise (Liu et al. 2022; Lipman et al. 2022).

    Several papers reverse the direction of t. At t = 1 α is 0, so the objective must determine x_0 there (`pred_flow`).

    Args:
        shift: factor s on σ/α, giving σ = t' = st/(1 + (s − 1)t) (Esser et al. 2024, eq. 23, who use 3 for 1024×1024).
        t_train_min: smallest time in training, in [0, 0.1]. A weight on the error of ε or λ grows without bound towards t = 0, as
            SNR for objective=pred_x0 with weighting=eps.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(self, shift: float = 1.0, t_train_min: float = 1e-5) -> None:
        self.shift, self.t_train_min = checked_shift(shift), checked_t_train_min(t_train_min)

    def _scale(self, t: Scalars) -> tuple[Scalars, Scalars]:
        """Return (t, 1 + (s − 1)t) in float64."""
        t = t.double()
        return t, (1 - t) + self.shift * t

    def alpha_sigma(self, t: Scalars) -> tuple[Scalars, Scalars]:
        t64, scale = self._scale(t)
        return cast_like((1 - t64) / scale, t), cast_like(self.shift * t64 / scale, t)

    def derivatives(self, t: Scalars) -> tuple[Scalars, Scalars]:
        _, scale = self._scale(t)
        slope = self.shift / scale.square()
        return cast_like(-slope, t), cast_like(slope, t)

    def _inverse(self, lam: Scalars) -> Scalars:
        return torch.sigmoid(-lam - math.log(self.shift))

    def conditioning(self, t: Scalars) -> Scalars:
        """Return 999·σ, which is 999·t of the unshifted line, so that one network works for every shift."""
        return cast_like(999 * self.alpha_sigma(t.double())[1], t)
