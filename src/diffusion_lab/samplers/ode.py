"""The probability-flow ODE by an adaptive solver."""

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.errors import ConfigError
from diffusion_lab.samplers import grids
from diffusion_lab.samplers.base import EvaluationContext, Sampler
from diffusion_lab.samplers.dormand_prince import integrate
from diffusion_lab.samplers.time_parametrization import TimeParametrization
from diffusion_lab.schedules import append_dims_like

LIMIT = 100_000  # evaluations of an image where no budget is given: to end what does not converge


class ODE(Sampler):
    """dx/dt = α̇ x̂_0 + σ̇ ε̂ by Dormand and Prince's method, with step and error control for each image by itself.

    On a table the solver runs over the angle arctan(σ/α) in place of t, because t has kinks (see time_parametrization.py).

    Sampling runs from `start` to the curve's least time, 1e-3 for vp and sub_vp, 1e-5 for ve (Song et al. 2021, appendix C),
    the first node of a table; the step into data is x̂_0 there. Encoding begins with the same step turned round. Images that
    have arrived are no longer evaluated, so a batch costs what its slowest image needs in calls, and less in work. Published
    codes control one step by a norm over the whole batch, so that their images depend on their neighbours.

    The state is float64. One thing is read from the device each step, the error norms (B,).

    The callback sees the state after every round in which some image moved: each image is at a time of its own, t is the one
    farthest behind, and the prediction is solved from x and dx/dt (so `output` belongs to the clipped x̂_0, and `extra` is None).
    It keeps two states more.

    Args:
        rtol: relative tolerance, > 0.
        atol: absolute tolerance, > 0, in units of the images' range [−1, 1].
        budget: the most network evaluations of an image; a call that needs more is refused.

    A call returns the evaluations of each image, and as `nfe` those of the image that needed most.

    Raises:
        ConfigError: tolerances that are not positive, no budget.
    """

    deterministic = True
    uses_previous = False

    def __init__(self, rtol: float = 1e-5, atol: float = 1e-5, budget: int | None = None) -> None:
        super().__init__(None, "trailing")
        if not (rtol > 0 and atol > 0):
            raise ConfigError(
                f"sampler=ode needs rtol > 0 and atol > 0, not rtol={rtol} and atol={atol}: published is 1e-5"
            )
        if budget is not None and budget < 1:
            raise ConfigError(f"sampler.budget={budget} allows no evaluation: allow more")
        self.rtol, self.atol, self.budget = rtol, atol, budget

    def time_grid(self, denoiser: Denoiser, start: float = 1.0, stop: float = 0.0) -> Tensor:
        """Return (start, stop), float64 (2,), between which each image has times of its own. Errors as of make_grid."""
        return grids.make_grid("trailing", denoiser.schedule, 1, start, stop)

    def integrate(self, x: Tensor, times: Tensor, context: EvaluationContext, steps: Iterable[int]) -> Tensor:
        schedule, (start, stop), given = context.schedule, times.tolist(), x.dtype
        begin, end = start or min(schedule.t_min, stop), stop or min(schedule.t_min, start)
        ends = (start == 0) + (stop == 0)  # evaluations in addition to the solver's
        clock, reports = TimeParametrization(schedule), itertools.count()

        def slope(u: Tensor, y: Tensor, rows: Tensor) -> Tensor:
            prediction = context(y, clock.time(u), rows)
            d_alpha, d_sigma = clock.tangent(u)
            return append_dims_like(d_alpha, y) * prediction.x0 + append_dims_like(d_sigma, y) * prediction.noise

        for _ in steps:  # one, the whole way
            if start == 0:
                first = context.predict(next(reports), x, times[0], times.new_tensor(begin))
                alpha, sigma = schedule.alpha_sigma(times.new_tensor(begin))
                x = append_dims_like(alpha, x) * x + append_dims_like(sigma, x) * first.noise
            try:
                solution = integrate(
                    slope,
                    x,
                    clock.at(begin),
                    clock.at(end),
                    rtol=self.rtol,
                    atol=self.atol,
                    limit=LIMIT if self.budget is None else self.budget - ends,
                    watch=_Watch(context, clock, x, (begin, end), reports) if context.callback else None,
                )
            except ConfigError:
                context.refuse_nan()  # names the evaluation, where that was the reason
                raise
            x, context.evaluations = solution.y, solution.evaluations + ends
            if stop == 0:
                x = context.predict(next(reports), x, times.new_tensor(end), times[1]).x0
        return x.to(given)


class _Watch:
    """Report the state of the whole batch to the callback after the solver has moved some of its rows."""

    def __init__(
        self,
        context: EvaluationContext,
        clock: TimeParametrization,
        x: Tensor,
        ends: tuple[float, float],
        reports: Iterator[int],
    ) -> None:
        self.context, self.clock, self.reports, self.dtype = context, clock, reports, x.dtype
        self.first, self.last = clock.at(ends[0]), clock.at(ends[1])
        self.u = torch.full((len(x),), self.first, dtype=torch.float64)
        self.x = x.double()
        self.slope = torch.zeros_like(self.x)

    def __call__(self, rows: Tensor, u: Tensor, y: Tensor, slope: Tensor) -> None:
        self.u = self.u.index_copy(0, rows.cpu(), u)
        self.x, self.slope = self.x.index_copy(0, rows, y), self.slope.index_copy(0, rows, slope)
        if bool((self.u == self.last).all()):
            return  # this is the result, or what the step into data reports
        behind = self.u.max() if self.first > self.last else self.u.min()
        prediction = Prediction(*(value.to(self.dtype) for value in self._solved()))
        self.context.report(next(self.reports), self.clock.time(behind), self.x.to(self.dtype), prediction)

    def _solved(self) -> tuple[Tensor, Tensor, Tensor]:
        """(x̂_0, ε̂, y) of every image from x = α x̂_0 + σ ε̂ and dx/du = dα/du x̂_0 + dσ/du ε̂."""
        schedule, x, t = self.context.schedule, self.x, self.clock.time(self.u)
        (alpha, sigma), (d_alpha, d_sigma) = schedule.alpha_sigma(t), self.clock.tangent(self.u)
        d = sigma * d_alpha - alpha * d_sigma
        x0 = append_dims_like(sigma / d, x) * self.slope - append_dims_like(d_sigma / d, x) * x
        noise = append_dims_like(d_alpha / d, x) * x - append_dims_like(alpha / d, x) * self.slope
        return x0, noise, self.context.denoiser.objective.target(schedule, t, x0, noise)
