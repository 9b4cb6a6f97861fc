"""Reverse variances: the spread of one step from t to s, from an estimate c of Cov[x_0 | x_t].

    σ² = floor + (α_s − √(σ_s² − floor) α_t/σ_t)² c

The floor is what a sampler injects anyway: σ̃² of the posterior for ancestral steps, η²σ̃² for DDIM. The formula is the
covariance of q(x_s | x_t) for a Gaussian x_0 given x_t (Bao et al. 2022, "Analytic-DPM", theorem 1).

| class | σ² |
|---|---|
| `FixedSmall` | c = 0 |
| `FixedLarge` | σ²_{t|s} |
| `Learned` | between the two, by the network's second half |
| `Analytic` | c from one number for each t, measured on the data |
| `SN`, `NPR` | c from a second head, for each element |
"""

from diffusion_lab.variances.base import Variance
from diffusion_lab.variances.fixed import FixedLarge, FixedSmall
from diffusion_lab.variances.learned import Learned
from diffusion_lab.variances.optimal import NPR, SN, Analytic

__all__ = ["NPR", "SN", "Analytic", "FixedLarge", "FixedSmall", "Learned", "Variance"]
