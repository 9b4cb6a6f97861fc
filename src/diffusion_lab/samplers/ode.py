"""The probability-flow ODE with an adaptive solver."""

import itertools
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.samplers import grids
from diffusion_lab.samplers.base import EvaluationContext, Sampler
from diffusion_lab.samplers.dormand_prince import integrate
from diffusion_lab.samplers.time_parametrization import TimeParametrization
from diffusion_lab.schedules import append_dims_like

LIMIT = 100_000  # evaluations of an image without a budget; ends a run that does not converge


class ODE(Sampler):
    """dx/dt = α̇ x̂_0 + σ̇ ε̂ by Dormand and Prince's method, with step size and error control per image.

    On a table the integration variable is the angle arctan(σ/α), because α̇ and σ̇ jump at the nodes (see
    time_parametrization.py).

    Sampling integrates from `start` to the smallest time of the curve: 1e-3 for vp and sub_vp, 1e-5 for ve (Song et al. 2021,
    appendix C), the first node of a table. The step into data returns x̂_0 there; encoding begins with the reverse of this step.
    Images that have reached the end are no longer evaluated, so the number of calls is that of the slowest image. Published code
    controls one step size by a norm over the whole batch, so its images depend on the rest of the batch.

    The state is float64. Each step reads the error norms (B,) from the device and nothing else.

    The callback is invoked after every step in which an image moved. The images are at different times; t is the time of the
    image farthest behind. The prediction is solved from x and dx/dt (so `output` belongs to the clipped x̂_0, and `extra` is
    None). A callback costs the memory of two more states.

    A call returns the evaluations of each image; `nfe` is the largest of them.

    Args:
        rtol: relative tolerance, in [1e-14, 1].
        atol: absolute tolerance, in [1e-14, 1], in units of the images' range [−1, 1].
        budget: maximal number of network evaluations of an image; a call that needs more raises ConfigError.

    Raises:
        ConfigError: an argument is out of range.
    """

    deterministic = True
    uses_previous = False

    def __init__(self, rtol: float = 1e-5, atol: float = 1e-5, budget: int | None = None) -> None:
        super().__init__(None, "trailing")
        check_number("sampler.rtol", rtol, "[1e-14, 1]", "the published value is 1e-5")
        check_number("sampler.atol", atol, "[1e-14, 1]", "the published value is 1e-5")
        check_number("sampler.budget", budget, "[1, 1000000]", "network evaluations", whole=True, optional=True)
        self.rtol, self.atol, self.budget = rtol, atol, budget

    def time_grid(self, denoiser: Denoiser, start: float = 1.0, stop: float = 0.0) -> Float64[Tensor, " n_plus_1"]:
        """Return (start, stop), between which the solver chooses the times. Raises ConfigError as `grids.make_grid`."""
        return grids.make_grid("trailing", denoiser.schedule, 1, start, stop)

    def integrate(
        self,
        x: Float[Tensor, "b c h w"],
        times: Float64[Tensor, " n_plus_1"],
        context: EvaluationContext,
        steps: Iterable[int],
    ) -> Float[Tensor, "b c h w"]:
        schedule, (start, stop), dtype = context.schedule, times.tolist(), x.dtype
        begin, end = start or min(schedule.t_min, stop), stop or min(schedule.t_min, start)
        extra = (start == 0) + (stop == 0)  # evaluations outside the solver
        parametrization, reports = TimeParametrization(schedule), itertools.count()

        def slope(u: Tensor, y: Tensor, rows: Tensor) -> Tensor:
            prediction = context(y, parametrization.time(u), rows)
            d_alpha, d_sigma = parametrization.tangent(u)
            return append_dims_like(d_alpha, y) * prediction.x0 + append_dims_like(d_sigma, y) * prediction.noise

        for _ in steps:  # a single step: the whole interval
            if start == 0:
                first = context.predict(next(reports), x, times[0], times.new_tensor(begin))
                alpha, sigma = schedule.alpha_sigma(times.new_tensor(begin))
                x = append_dims_like(alpha, x) * x + append_dims_like(sigma, x) * first.noise
            try:
                solution = integrate(
                    slope,
                    x,
                    parametrization.at(begin),
                    parametrization.at(end),
                    rtol=self.rtol,
                    atol=self.atol,
                    limit=LIMIT if self.budget is None else self.budget - extra,
                    on_step=_BatchReporter(context, parametrization, x, (begin, end), reports)
                    if context.callback
                    else None,
                )
            except ConfigError:
                context.refuse_nan()  # if the network returned NaN, raise the error that names the evaluation
                raise
            x, context.evaluations = solution.y, solution.evaluations + extra
            if stop == 0:
                x = context.predict(next(reports), x, times.new_tensor(end), times[1]).x0
        return x.to(dtype)


class _BatchReporter:
    """Report the state of the whole batch to the callback after the solver has moved some of its rows.

    Args:
        context: receives the reports.
        parametrization: the integration variable.
        x: the initial state.
        ends: the first and the last time.
        reports: counter of the reports.
    """

    def __init__(
        self,
        context: EvaluationContext,
        parametrization: TimeParametrization,
        x: Float[Tensor, "b c h w"],
        ends: tuple[float, float],
        reports: Iterator[int],
    ) -> None:
        self.context, self.parametrization, self.reports, self.dtype = context, parametrization, reports, x.dtype
        self.first, self.last = parametrization.at(ends[0]), parametrization.at(ends[1])
        self.u = torch.full((len(x),), self.first, dtype=torch.float64)
        self.x = x.double()
        self.slope = torch.zeros_like(self.x)

    def __call__(self, rows: Tensor, u: Tensor, y: Tensor, slope: Tensor) -> None:
        self.u = self.u.index_copy(0, rows.cpu(), u)
        self.x, self.slope = self.x.index_copy(0, rows, y), self.slope.index_copy(0, rows, slope)
        if bool((self.u == self.last).all()):
            return  # the final state: returned, or reported by the step into data
        behind = self.u.max() if self.first > self.last else self.u.min()
        prediction = Prediction(*(value.to(self.dtype) for value in self._solved()))
        self.context.report(next(self.reports), self.parametrization.time(behind), self.x.to(self.dtype), prediction)

    def _solved(self) -> tuple[Tensor, Tensor, Tensor]:
        """Solve x = α x̂_0 + σ ε̂ and dx/du = dα/du x̂_0 + dσ/du ε̂ for (x̂_0, ε̂); return them and the output y."""
        schedule, x, t = self.context.schedule, self.x, self.parametrization.time(self.u)
        (alpha, sigma), (d_alpha, d_sigma) = schedule.alpha_sigma(t), self.parametrization.tangent(self.u)
        d = sigma * d_alpha - alpha * d_sigma
        x0 = append_dims_like(sigma / d, x) * self.slope - append_dims_like(d_sigma / d, x) * x
        noise = append_dims_like(d_alpha / d, x) * x - append_dims_like(alpha / d, x) * self.slope
        return x0, noise, self.context.denoiser.objective.target(schedule, t, x0, noise)
