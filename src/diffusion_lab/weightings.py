"""Loss weightings: w_t on the squared error of ε, stated once and valid for every objective.

An error Δy of the network's output is Δε = (α/D) Δy, so the weight on the error of y is w (α/D)². Each class below gives
α²w, which is finite on (0, 1] where w itself is not (SNR = (α/σ)² vanishes with α); the formula for w stands beside it.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffusion_lab.errors import ConfigError
from diffusion_lab.objectives import Objective
from diffusion_lab.schedules import Scalars, Schedule, cast_like


class Weighting(ABC):
    """weighting(schedule, objective, t): the weight on the squared error of y, t's shape, finite on (0, 1]."""

    @abstractmethod
    def __call__(self, schedule: Schedule, objective: Objective, t: Scalars) -> Scalars: ...


class Native(Weighting):
    """1 on the error of y, whatever y is: "L_simple" of the chosen objective."""

    def __call__(self, schedule: Schedule, objective: Objective, t: Scalars) -> Scalars:
        return cast_like(torch.ones_like(t), t)


class OnNoise(Weighting):
    """A weight w that is stated on the error of ε. What a new one must give: α²w."""

    @abstractmethod
    def alpha2w(self, schedule: Schedule, t: Scalars, alpha2: Tensor, sigma2: Tensor) -> Tensor:
        """α²w at times t, from α² and σ² in float64, all of one shape."""

    def __call__(self, schedule: Schedule, objective: Objective, t: Scalars) -> Scalars:
        wide = t.double()
        alpha, sigma = schedule.alpha_sigma(wide)
        weight = self.alpha2w(schedule, wide, alpha.square(), sigma.square())
        return cast_like(weight / objective.determinant(schedule, wide).square(), t)


class Eps(OnNoise):
    """w = 1: L_simple of Ho et al. 2020, eq. 14, whatever the network predicts. As a weight on x_0 this is SNR."""

    def alpha2w(self, schedule: Schedule, t: Scalars, alpha2: Tensor, sigma2: Tensor) -> Tensor:
        return alpha2


class X0(OnNoise):
    """w = 1/SNR: 1 on the error of x_0."""

    def alpha2w(self, schedule: Schedule, t: Scalars, alpha2: Tensor, sigma2: Tensor) -> Tensor:
        return sigma2


class TruncatedSNR(OnNoise):
    """w = max(SNR, 1)/SNR (Salimans & Ho 2022, section 4)."""

    def alpha2w(self, schedule: Schedule, t: Scalars, alpha2: Tensor, sigma2: Tensor) -> Tensor:
        return torch.maximum(alpha2, sigma2)


class MinSNR(OnNoise):
    """w = min(SNR, γ)/SNR (Hang et al. 2023, eq. 7–8).

    Args:
        gamma: γ > 0.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        self.gamma = _positive("min_snr", "gamma", gamma)

    def alpha2w(self, schedule: Schedule, t: Scalars, alpha2: Tensor, sigma2: Tensor) -> Tensor:
        return torch.minimum(alpha2, self.gamma * sigma2)


class SoftMinSNR(OnNoise):
    """w = γ/(SNR + γ), the smooth form of MinSNR (Crowson et al. 2024, section 3.3).

    Args:
        gamma: γ > 0.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        self.gamma = _positive("soft_min_snr", "gamma", gamma)

    def alpha2w(self, schedule: Schedule, t: Scalars, alpha2: Tensor, sigma2: Tensor) -> Tensor:
        return alpha2 * (self.gamma * sigma2) / (alpha2 + self.gamma * sigma2)


class P2(OnNoise):
    """w = (k + SNR)^−γ (Choi et al. 2022, eq. 8).

    Args:
        k: k > 0.
        gamma: γ ≥ 0; 0 is w = 1.
    """

    def __init__(self, k: float = 1.0, gamma: float = 1.0) -> None:
        self.k = _positive("p2", "k", k)
        if gamma < 0:
            raise ConfigError(f"weighting p2 needs gamma >= 0, not gamma={gamma}")
        self.gamma = gamma

    def alpha2w(self, schedule: Schedule, t: Scalars, alpha2: Tensor, sigma2: Tensor) -> Tensor:
        return alpha2 * (self.k + alpha2 / sigma2) ** -self.gamma


class VLB(OnNoise):
    """w = ½ (SNR_s − SNR_t)/SNR_t, s = t − 1/T: the KL terms of the variational bound in nats (Ho et al. 2020, eq. 12).

    It is infinite at s = 0, where the decoder term L_0 takes its place; there it is the next step's value. On a curve without
    steps it is the limit per unit of time, −dλ/dt (Kingma et al. 2021, eq. 17).
    """

    def alpha2w(self, schedule: Schedule, t: Scalars, alpha2: Tensor, sigma2: Tensor) -> Tensor:
        if schedule.steps is None:
            alpha, sigma = alpha2.sqrt(), sigma2.sqrt()
            d_alpha, d_sigma = schedule.derivatives(t)
            return alpha2 * d_sigma / sigma - alpha * d_alpha
        step = 1 / schedule.steps
        first = t < 1.5 * step
        later = torch.where(first, 2 * step, t)
        alpha_t, sigma_t = schedule.alpha_sigma(later)
        alpha_s, sigma_s = schedule.alpha_sigma(later - step)
        # α² w = ½ (SNR_s σ_t² − α_t²) α²/α_t², and α = α_t but for the first step: no division by an α_t that may be 0
        full = 0.5 * ((alpha_s * sigma_t / sigma_s).square() - alpha_t.square())
        return torch.where(first, full * alpha2 / alpha_t.square(), full)


class Sigmoid(OnNoise):
    """w = e^b/(e^b + SNR) (Kingma & Gao 2023; Hoogeboom et al. 2024), without the published factor −d ln SNR/dt.

    Args:
        bias: b.
    """

    def __init__(self, bias: float = 0.0) -> None:
        self.bias = bias

    def alpha2w(self, schedule: Schedule, t: Scalars, alpha2: Tensor, sigma2: Tensor) -> Tensor:
        scale = torch.tensor(self.bias, dtype=torch.float64).exp()
        return alpha2 * scale / (scale + alpha2 / sigma2)


class EDM(OnNoise):
    """(s² + σ_d²)/(sσ_d)² on the error of x_0, s = σ/α (Karras et al. 2022, table 1): w = (s² + σ_d²)/σ_d².

    It is 1 on the output of objectives.EDM with the same σ_d: that is what c_out is for.

    Args:
        sigma_data: σ_d > 0.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        self.sigma_data = _positive("edm", "sigma_data", sigma_data)

    def alpha2w(self, schedule: Schedule, t: Scalars, alpha2: Tensor, sigma2: Tensor) -> Tensor:
        return alpha2 + sigma2 / self.sigma_data**2


def _positive(name: str, argument: str, value: float) -> float:
    if value <= 0:
        raise ConfigError(f"weighting {name} needs {argument} > 0, not {argument}={value}")
    return value
