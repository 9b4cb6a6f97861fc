"""DPM-Solver++ in its multistep form, deterministic and as an SDE (Lu et al. 2022, "DPM-Solver++")."""

from collections.abc import Sequence

from diffusion_lab.errors import ConfigError
from diffusion_lab.samplers.multistep import Multistep, Weights, phi


class DPMSolverPP(Multistep):
    """Order 1 is DDIM, order 2 the method 2M, order 3 the method 3M. One evaluation a step.

    With h = λ_s − λ_t, for the SDE 2h, and D the estimates of x_0 at λ_t and at two times before, r = Δλ/h apart:

        2M: x_s = DDIM − α_s φ_1/2 · (D_0 − D_1)/r_0,       φ_1 = e^−h − 1
        3M: x_s = DDIM + α_s φ_2 D' − α_s φ_3 D″,           φ_2 = φ_1/h + 1, φ_3 = φ_2/h − 1/2

    D' and D″ are the derivatives at λ_t, in units of h, of the parabola through D_0, D_1, D_2. Published code takes half of D″
    and measures order 2 for it. `corrected` takes the whole, and makes the first step second order: when the estimate at its
    end is there, x is corrected with it, which costs no evaluation. That measures order 3 between times with σ > 0.
    The SDE adds noise as the posterior does; its order 1 is DDIM with η = 1.

    Args:
        steps: how many, at least `order`; None is every step of the schedule.
        order: 1, 2 or 3.
        sde: solve the reverse SDE in place of the probability-flow ODE.
        corrected: see above; at order 2 the first step alone.
        lower_last: with fewer than 10 steps, lower the order of the last ones (the authors' code; diffusers: fewer than 15).
        grid: the time grid.
        budget: network evaluations, instead of `steps`.

    Raises:
        ConfigError: another order, fewer steps than `order`, `corrected` at order 1.
    """

    def __init__(
        self,
        steps: int | None = 20,
        order: int = 2,
        sde: bool = False,
        corrected: bool = False,
        lower_last: bool = True,
        grid: str = "trailing",
        budget: int | None = None,
    ) -> None:
        if order not in (1, 2, 3):
            raise ConfigError(f"sampler=dpm_solver_pp has orders 1, 2 and 3, not order={order}")
        if corrected and order == 1:
            raise ConfigError(
                "sampler=dpm_solver_pp has nothing to correct at order 1: write order=3 or corrected=false"
            )
        super().__init__(steps, grid, budget, order=order, lower_below=10 if lower_last else 0, sde=sde)
        self.corrected = corrected

    def weights(self, h: float, r: Sequence[float]) -> Weights:
        h = 2 * h if self.sde else h
        level, slope, bend = (h * phi(k, -h) for k in (1, 2, 3))  # −φ_1, φ_2 and −φ_3 of the docstring
        if not r:
            return Weights(corrector=[level / 2] if self.corrected else ())
        if len(r) == 1:
            return Weights([level / (2 * r[0])])
        # Newton's differences: D' = f[0, near] − near · f[0, near, far], D″ = 2 f[0, near, far]
        near, far = r
        curve = ((2 if self.corrected else 1) * bend - slope * near) / (far - near)
        return Weights([(slope - curve) / near, curve / far])
