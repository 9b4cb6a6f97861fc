"""UniPC, a unified predictor-corrector of any order (Zhao et al. 2023)."""

import math
from collections.abc import Sequence

import torch

from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.samplers.multistep import Multistep, Weights, phi


class UniPC(Multistep):
    """UniPC-p for x̂_0. One evaluation a step: the corrector uses the evaluation of the next step.

    With h̃ = −(λ_s − λ_t), p − 1 earlier estimates at r_j = Δλ/(λ_s − λ_t) < 0, the estimate at s with r_p = 1, D_j the difference
    of an estimate and the one at t, divided by r_j, and B = h̃ (bh1) or e^h̃ − 1 (bh2):

        x_s = DDIM − α_s B Σ_j ρ_j D_j,   Σ_j ρ_j r_j^(k−1) = k! g_k/B,   g_1 = (e^h̃ − 1)/h̃ − 1,   g_{k+1} = g_k/h̃ − 1/(k+1)!

    The predictor solves for k, j < p, the corrector for k, j ≤ p; the smallest systems use the published ρ = 1/2. The last step
    has no corrector, and the estimates are evaluated at the predicted states. Between times with σ > 0 order p + 1 is measured
    from an exact start, and order 2 with `lower_last`.

    Args:
        steps: number of steps, at least `order`; None: every step of the schedule.
        order: p in [1, 10]; 2 and 3 are published.
        b: B, bh1 or bh2.
        lower_last: lower the order of the last steps.
        grid: the time grid.
        budget: maximal number of network evaluations, one a step; replaces `steps`.

    Raises:
        ConfigError: an unknown B, an order below 1, fewer steps than `order`.
    """

    def __init__(
        self,
        steps: int | None = 10,
        order: int = 2,
        b: str = "bh2",
        lower_last: bool = True,
        grid: str = "trailing",
        budget: int | None = None,
    ) -> None:
        if b not in ("bh1", "bh2"):
            raise ConfigError(f"sampler=unipc needs b=bh1 or b=bh2, not b={b}")
        check_number("sampler.order", order, "[1, 10]", "the published values are 2 and 3", whole=True)
        super().__init__(steps, grid, budget, order=order, lower_below=math.inf if lower_last else 0)
        self.b = b

    def weights(self, h: float, r: Sequence[float]) -> Weights:
        scale = -h if self.b == "bh1" else math.expm1(-h)
        p = len(r) + 1
        predictor = [0.5] if p == 2 else self._rho(h, r, scale)
        *corrector, last = [0.5] if p == 1 else self._rho(h, [*r, 1.0], scale)
        return Weights(
            [-scale * rho / r_j for rho, r_j in zip(predictor, r, strict=True)],
            [-scale * last, *(-scale * rho / r_j for rho, r_j in zip(corrector, r, strict=True))],
        )

    @staticmethod
    def _rho(h: float, r: Sequence[float], scale: float) -> list[float]:
        """Solve Σ_j ρ_j r_j^(k−1) = k! g_k/B, k = 1 … len(r), for ρ; g_k = h̃ φ_{k+1}(h̃)."""
        powers = torch.tensor([[r_j**k for r_j in r] for k in range(len(r))], dtype=torch.float64).reshape(
            len(r), len(r)
        )
        right = [math.factorial(k) * -h * phi(k + 1, -h) / scale for k in range(1, len(r) + 1)]
        rho: list[float] = torch.linalg.solve(powers, torch.tensor(right, dtype=torch.float64)).tolist()
        return rho
