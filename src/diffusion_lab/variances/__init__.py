"""Reverse variances: the variance σ² of one step from t to s, from an estimate c of Cov[x_0 | x_t].

    σ² = floor + (α_s − √(σ_s² − floor) α_t/σ_t)² c

The floor is the variance of the sampler itself: σ̃² of the posterior for ancestral steps, η²σ̃² for DDIM. The formula is the
covariance of q(x_s | x_t) if x_0 given x_t is Gaussian (Bao et al. 2022, "Analytic-DPM", theorem 1).

| class | σ² |
|---|---|
| `FixedSmall` | c = 0 |
| `FixedLarge` | σ²_{t|s} |
| `Learned` | between the floor and σ²_{t|s}, from the network's channels beyond C |
| `Analytic` | c from one number for each t, estimated on the data |
| `SN`, `NPR` | c of each element, from a second head |
"""

from diffusion_lab.variances.base import Variance
from diffusion_lab.variances.fixed import FixedLarge, FixedSmall
from diffusion_lab.variances.learned import Learned
from diffusion_lab.variances.optimal import NPR, SN, Analytic

__all__ = ["NPR", "SN", "Analytic", "FixedLarge", "FixedSmall", "Learned", "Variance"]
