"""Loss weightings: a weight w_t on the squared error of ε, from which the weight for any objective follows.

An error Δy of the network's output is Δε = (α/D) Δy, so the weight on the error of y is w (α/D)². Each class computes α²w,
which is finite on (0, 1] where w itself may not be (SNR = (α/σ)² vanishes with α); its docstring states w.
"""

from abc import ABC, abstractmethod

import torch

from diffusion_lab.errors import check_number
from diffusion_lab.objectives import Objective
from diffusion_lab.schedules import Scalars, Schedule, cast_like


class Weighting(ABC):
    """weighting(schedule, objective, t) → the weight on the squared error of y."""

    @abstractmethod
    def __call__(self, schedule: Schedule, objective: Objective, t: Scalars) -> Scalars:
        """Return the weight at times t of any shape, finite on (0, 1], in t's dtype, float32 at least."""


class Native(Weighting):
    """1 on the error of y, "L_simple" of the chosen objective."""

    def __call__(self, schedule: Schedule, objective: Objective, t: Scalars) -> Scalars:
        return cast_like(torch.ones_like(t), t)


class OnNoise(Weighting):
    """A weight w on the error of ε. A subclass implements `alpha2w`."""

    @abstractmethod
    def alpha2w(self, schedule: Schedule, t: Scalars, alpha2: Scalars, sigma2: Scalars) -> Scalars:
        """Return α²w at times t, from α² and σ²; all float64."""

    def __call__(self, schedule: Schedule, objective: Objective, t: Scalars) -> Scalars:
        t64 = t.double()
        alpha, sigma = schedule.alpha_sigma(t64)
        weight = self.alpha2w(schedule, t64, alpha.square(), sigma.square())
        return cast_like(weight / objective.determinant(schedule, t64).square(), t)


class Eps(OnNoise):
    """w = 1, L_simple of Ho et al. 2020, eq. 14, for every objective. As a weight on the error of x_0 it is SNR."""

    def alpha2w(self, schedule: Schedule, t: Scalars, alpha2: Scalars, sigma2: Scalars) -> Scalars:
        return alpha2


class X0(OnNoise):
    """w = 1/SNR, which is 1 on the error of x_0."""

    def alpha2w(self, schedule: Schedule, t: Scalars, alpha2: Scalars, sigma2: Scalars) -> Scalars:
        return sigma2


class V(OnNoise):
    """w = ((α² + σ²)/α)², which is 1 on the error of v = αε − σx_0: the loss of objective=pred_v for every objective."""

    def alpha2w(self, schedule: Schedule, t: Scalars, alpha2: Scalars, sigma2: Scalars) -> Scalars:
        return (alpha2 + sigma2).square()


class FlowVelocity(OnNoise):
    """w = ((α + σ)/α)², which is 1 on the error of ε − x_0: the loss of objective=pred_flow for every objective.

    Li & He 2025 ("JiT") train pred_x0 with it on the curve `flow`, with σ clipped at 0.05 in its denominator: here
    schedule.t_train_min bounds the weight.
    """

    def alpha2w(self, schedule: Schedule, t: Scalars, alpha2: Scalars, sigma2: Scalars) -> Scalars:
        return (alpha2.sqrt() + sigma2.sqrt()).square()


class TruncatedSNR(OnNoise):
    """w = max(SNR, 1)/SNR (Salimans & Ho 2022, section 4)."""

    def alpha2w(self, schedule: Schedule, t: Scalars, alpha2: Scalars, sigma2: Scalars) -> Scalars:
        return torch.maximum(alpha2, sigma2)


class MinSNR(OnNoise):
    """w = min(SNR, γ)/SNR (Hang et al. 2023, eq. 7–8).

    Args:
        gamma: γ in [0.001, 1e6].

    Raises:
        ConfigError: γ is out of range.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        check_number("weighting.gamma", gamma, "[0.001, 1e6]", "the published value is 5")
        self.gamma = gamma

    def alpha2w(self, schedule: Schedule, t: Scalars, alpha2: Scalars, sigma2: Scalars) -> Scalars:
        return torch.minimum(alpha2, self.gamma * sigma2)


class SoftMinSNR(OnNoise):
    """w = γ/(SNR + γ), the smooth form of MinSNR (Crowson et al. 2024, section 3.3).

    Args:
        gamma: γ in [0.001, 1e6].

    Raises:
        ConfigError: γ is out of range.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        check_number("weighting.gamma", gamma, "[0.001, 1e6]", "the published value is 5")
        self.gamma = gamma

    def alpha2w(self, schedule: Schedule, t: Scalars, alpha2: Scalars, sigma2: Scalars) -> Scalars:
        return alpha2 * (self.gamma * sigma2) / (alpha2 + self.gamma * sigma2)


class P2(OnNoise):
    """w = (k + SNR)^−γ (Choi et al. 2022, eq. 8).

    Args:
        k: in [0.001, 1000].
        gamma: γ in [0, 4]; 0 gives w = 1.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(self, k: float = 1.0, gamma: float = 1.0) -> None:
        check_number("weighting.k", k, "[0.001, 1000]", "the published value is 1")
        check_number("weighting.gamma", gamma, "[0, 4]", "the published values are 0.5 and 1")
        self.k, self.gamma = k, gamma

    def alpha2w(self, schedule: Schedule, t: Scalars, alpha2: Scalars, sigma2: Scalars) -> Scalars:
        return alpha2 * (self.k + alpha2 / sigma2) ** -self.gamma


class VLB(OnNoise):
    """w = ½ (SNR_s − SNR_t)/SNR_t at s = t − 1/T, the KL terms of the variational bound in nats (Ho et al. 2020, eq. 12).

    At s = 0, where w is infinite and the bound has the decoder term L_0 instead, the value of the next step is used. On a
    continuous curve w is the limit per unit of time, −dλ/dt (Kingma et al. 2021, eq. 17).
    """

    def alpha2w(self, schedule: Schedule, t: Scalars, alpha2: Scalars, sigma2: Scalars) -> Scalars:
        if schedule.steps is None:
            alpha, sigma = alpha2.sqrt(), sigma2.sqrt()
            d_alpha, d_sigma = schedule.derivatives(t)
            return alpha2 * d_sigma / sigma - alpha * d_alpha
        step = 1 / schedule.steps
        first = t < 1.5 * step
        later = torch.where(first, 2 * step, t)
        alpha_t, sigma_t = schedule.alpha_sigma(later)
        alpha_s, sigma_s = schedule.alpha_sigma(later - step)
        # α²w = ½ (SNR_s σ_t² − α_t²) α²/α_t², where α = α_t except at the first step, so α_t = 0 causes no division by 0
        full = 0.5 * ((alpha_s * sigma_t / sigma_s).square() - alpha_t.square())
        return torch.where(first, full * alpha2 / alpha_t.square(), full)


class Sigmoid(OnNoise):
    """w = e^b/(e^b + SNR) (Kingma & Gao 2023; Hoogeboom et al. 2024), with or without the published factor −d ln SNR/dt.

    Their λ is ln SNR, twice ours. `rate` multiplies w by −½ d ln SNR/dt = −dλ/dt, the weight `VLB` (on a table its difference
    of one step): the factor ½ of their loss is kept, and w tends to the weight of the bound for large b.

    Args:
        bias: b in [-20, 20], added to −ln SNR.
        rate: multiply by −½ d ln SNR/dt, for uniform t.

    Raises:
        ConfigError: b is out of range.
    """

    def __init__(self, bias: float = 0.0, rate: bool = False) -> None:
        check_number("weighting.bias", bias, "[-20, 20]", "the published values are -3 to 3")
        self.bias, self.rate = bias, rate

    def alpha2w(self, schedule: Schedule, t: Scalars, alpha2: Scalars, sigma2: Scalars) -> Scalars:
        scale = torch.tensor(self.bias, dtype=torch.float64).exp()
        unit = VLB().alpha2w(schedule, t, alpha2, sigma2) if self.rate else alpha2
        return unit * scale / (scale + alpha2 / sigma2)


class EDM(OnNoise):
    """(s² + σ_d²)/(sσ_d)² on the error of x_0, s = σ/α (Karras et al. 2022, table 1): w = (s² + σ_d²)/σ_d².

    It is 1 on the output of objectives.EDM with the same σ_d.

    Args:
        sigma_data: σ_d in [0.001, 1000].

    Raises:
        ConfigError: σ_d is out of range.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        check_number(
            "weighting.sigma_data", sigma_data, "[0.001, 1000]", "the standard deviation of the data (EDM: 0.5)"
        )
        self.sigma_data = sigma_data

    def alpha2w(self, schedule: Schedule, t: Scalars, alpha2: Scalars, sigma2: Scalars) -> Scalars:
        return alpha2 + sigma2 / self.sigma_data**2
