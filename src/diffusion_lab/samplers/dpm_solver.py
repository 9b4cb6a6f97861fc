"""Multistep DPM-Solver++ for the probability-flow ODE and the reverse SDE (Lu et al. 2022, "DPM-Solver++")."""

from collections.abc import Sequence

from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.samplers.multistep import Multistep, Weights, phi


class DPMSolverPP(Multistep):
    """DPM-Solver++. Order 1 is DDIM, order 2 the method 2M, order 3 the method 3M. One evaluation a step.

    With h = λ_s − λ_t (2h for the SDE), D_0 the estimate of x_0 at λ_t, D_1 and D_2 the two before it, and r = Δλ/h:

        2M: x_s = DDIM − α_s φ_1/2 · (D_0 − D_1)/r_0,       φ_1 = e^−h − 1
        3M: x_s = DDIM + α_s φ_2 D' − α_s φ_3 D″,           φ_2 = φ_1/h + 1, φ_3 = φ_2/h − 1/2

    D' and D″ are the derivatives at λ_t, in units of h, of the parabola through D_0, D_1, D_2. Published code uses half of D″,
    for which order 2 is measured. `corrected` uses all of D″ and makes the first step second order: x is corrected with the
    estimate at its end, which costs no evaluation. With it order 3 is measured between times with σ > 0. The noise of the SDE
    has the variance of the posterior; at order 1 the SDE is DDIM with η = 1.

    Args:
        steps: number of steps, at least `order`; None: every step of the schedule.
        order: 1, 2 or 3.
        sde: solve the reverse SDE instead of the probability-flow ODE.
        corrected: see above. At order 2 it affects only the first step.
        lower_last: with fewer than 10 steps, lower the order of the last ones (the authors' code; diffusers: fewer than 15).
        grid: the time grid.
        budget: maximal number of network evaluations, one a step; replaces `steps`.

    Raises:
        ConfigError: an unknown order, fewer steps than `order`, `corrected` at order 1.
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
        check_number("sampler.order", order, "[1, 3]", whole=True)
        if corrected and order == 1:
            raise ConfigError("sampler=dpm_solver_pp has no correction at order=1: write order=3 or corrected=false")
        super().__init__(steps, grid, budget, order=order, lower_below=10 if lower_last else 0, sde=sde)
        self.corrected = corrected

    def weights(self, h: float, r: Sequence[float]) -> Weights:
        h = 2 * h if self.sde else h
        level, slope, bend = (h * phi(k, -h) for k in (1, 2, 3))  # −φ_1, φ_2 and −φ_3 in the docstring
        if not r:
            return Weights(corrector=[level / 2] if self.corrected else ())
        if len(r) == 1:
            return Weights([level / (2 * r[0])])
        # divided differences: D' = f[0, near] − near · f[0, near, far], D″ = 2 f[0, near, far]
        near, far = r
        curve = ((2 if self.corrected else 1) * bend - slope * near) / (far - near)
        return Weights([(slope - curve) / near, curve / far])
