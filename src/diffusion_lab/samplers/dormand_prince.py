"""Dormand and Prince's adaptive Runge–Kutta pair 5(4) with step size and error control per row of a batch.

Library solvers take one step size for the whole batch, so a result depends on the other rows. Here every row has its own time,
step size and error norm, and rows that have reached the end are no longer evaluated. Tableau: Dormand & Prince 1980 (J. Comput.
Appl. Math. 6, table 2). First step and step control: Hairer, Nørsett & Wanner 1993 (section II.4) with the constants of SciPy's
RK45, so that a row takes the same steps as `scipy.integrate.solve_ivp`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from diffusion_lab.errors import ConfigError
from diffusion_lab.schedules import append_dims_like

# f(t, y, rows) → dy/dt: see `integrate`
Slope = Callable[[Tensor, Tensor, Tensor], Tensor]

C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0)
A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
B = (
    35 / 384,
    0.0,
    500 / 1113,
    125 / 192,
    -2187 / 6784,
    11 / 84,
)  # order 5; the slope at its end is the next first stage
E = (-71 / 57600, 0.0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)  # order 4 minus order 5
STAGES = 6  # evaluations of a step
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0
POWER = -1 / 5  # the error of a step is of order 5 in its size


class Solution(NamedTuple):
    """The result of an integration."""

    y: Float64[Tensor, "r ..."]  # the state at `stop`
    evaluations: Int[Tensor, " r"]  # number of evaluations of f for each row, int64 on the CPU
    calls: int  # number of calls of f, the largest of `evaluations`


def integrate(
    f: Slope,
    y: Float[Tensor, "r ..."],
    start: float,
    stop: float,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    limit: int = 10_000,
    on_step: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None,
) -> Solution:
    """Solve dy/dt = f(t, y) from `start` to `stop`, in either direction, with step control per row.

    A step of a row is accepted if the root mean square of (order 5 − order 4)/(atol + rtol max(|y|, |y_new|)) over the row is
    below 1. At most 8 states are in memory at a time, not counting those in f. Each step reads the norms (R,) from the device and
    nothing else; step control runs on the CPU.

    Args:
        f: f(t, y, rows) → dy/dt in y's shape, for the R' rows that have not reached `stop`: t float64 (R',) on the CPU, y float64
            (R', …), rows int64 (R',) on y's device, their indices among the R.
        y: the state at `start`; converted to float64.
        start: the initial t.
        stop: the final t.
        rtol: relative tolerance, > 0.
        atol: absolute tolerance, > 0.
        limit: maximal number of evaluations of a row.
        on_step: on_step(rows, t, y, dy/dt), invoked at the start and after every step that moved a row; arguments as f's,
            including rows that reach `stop` in this step.

    Raises:
        ConfigError: a tolerance that is not positive, more than `limit` evaluations, a state or derivative that is NaN or
            infinite, a step below the resolution of t.
    """
    if not (rtol > 0 and atol > 0):
        raise ConfigError(f"an adaptive solver needs rtol > 0 and atol > 0, not rtol={rtol} and atol={atol}")
    y, rows = y.double(), torch.arange(len(y), device=y.device)
    evaluations = torch.zeros(len(y), dtype=torch.int64)
    if start == stop or not len(y):
        return Solution(y.clone(), evaluations, 0)
    sign, tolerances = (1.0 if stop > start else -1.0), (rtol, atol)
    t = torch.full((len(y),), start, dtype=torch.float64)
    slope = _evaluate(f, t, y, rows)
    size = _first_step(f, t, y, slope, rows, stop, tolerances)
    retry = torch.zeros(len(y), dtype=torch.bool)
    finished: list[tuple[Tensor, Tensor]] = []
    calls = 2
    if on_step is not None:
        on_step(rows, t, y, slope)
    while True:
        if calls + STAGES > limit:
            raise ConfigError(
                f"{calls} evaluations reached {_progress(t, start, stop)}, and the {STAGES} of another step exceed the limit of "
                f"{limit}: raise the budget, or loosen rtol={rtol:g} and atol={atol:g}"
            )
        smallest = 10 * (torch.nextafter(t, torch.full_like(t, sign * torch.inf)) - t).abs()
        size = torch.where(retry, size, torch.maximum(size, smallest))
        if bool((size < smallest).any()):
            raise ConfigError(
                f"after {_progress(t[size < smallest], start, stop)} the step size fell below the resolution of float64, because "
                f"the solution is not smooth there: loosen rtol={rtol:g} and atol={atol:g}"
            )
        goal = t + sign * size
        goal = torch.where(sign * (goal - stop) > 0, stop, goal)
        new, new_slope, norm = _step(f, t, goal, y, slope, rows, tolerances)
        calls += STAGES
        accepted, factor = norm < 1, (SAFETY * norm**POWER).clamp(SHRINK, GROW)
        size = (goal - t).abs() * torch.where(accepted & retry, factor.clamp(max=1), factor)
        t, retry = torch.where(accepted, goal, t), ~accepted
        if bool(accepted.any()):
            mask = append_dims_like(accepted, y) > 0
            y, slope = torch.where(mask, new, y), torch.where(mask, new_slope, slope)
            if on_step is not None:
                on_step(rows, t, y, slope)
        del new, new_slope
        ended = t == stop
        if not bool(ended.any()):
            continue
        done, active = ended.nonzero()[:, 0], (~ended).nonzero()[:, 0]
        evaluations[rows.cpu()[done]] = calls
        finished.append((rows[done.to(y.device)], y[done.to(y.device)]))
        if not len(active):
            break
        t, size, retry = t[active], size[active], retry[active]
        rows, y, slope = (value[active.to(y.device)] for value in (rows, y, slope))
    order = torch.cat([rows for rows, _ in finished]).argsort()
    return Solution(torch.cat([y for _, y in finished])[order], evaluations, calls)


def _step(
    f: Slope, t: Tensor, goal: Tensor, y: Tensor, slope: Tensor, rows: Tensor, tolerances: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Step every row from its t to its goal. Return state and slope there, and the norm of the error, (R,) on the CPU."""
    h = append_dims_like(goal - t, y)
    slopes = [slope]
    for c, row in zip(C, A, strict=True):
        slopes.append(_evaluate(f, t + c * (goal - t), _combine(row, slopes, h).add_(y), rows))
    slopes[1] = torch.empty(0)  # its weights in the new state and in the error are 0
    new, error = _combine(B, slopes, h).add_(y), _combine(E[:-1], slopes, h)
    slopes.clear()
    end = _evaluate(f, goal, new, rows)
    error.addcmul_(h * E[-1], end)
    norm = _norm(error, y.abs().maximum(new.abs()), tolerances).cpu()
    _refuse_infinite(norm, t, goal)
    return new, end, norm


def _first_step(
    f: Slope, t: Tensor, y: Tensor, slope: Tensor, rows: Tensor, stop: float, tolerances: tuple[float, float]
) -> Tensor:
    """Return |h| of the first step of every row, (R,) on the CPU (Hairer, Nørsett & Wanner 1993, II.4). One evaluation."""
    length, sign = (stop - t).abs(), torch.sign(stop - t)
    size = y.abs()
    d0, d1 = _norm(y, size, tolerances).cpu(), _norm(slope, size, tolerances).cpu()
    _refuse_infinite(d0 + d1, t, t)
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).minimum(length)
    probe = _evaluate(f, t + sign * h0, append_dims_like(sign * h0, y) * slope + y, rows)
    d2 = _norm(probe - slope, size, tolerances).cpu() / h0
    _refuse_infinite(d2, t, t + sign * h0)
    flat = (d1 <= 1e-15) & (d2 <= 1e-15)
    h1 = torch.where(flat, (h0 * 1e-3).clamp(min=1e-6), (0.01 / d1.maximum(d2)) ** -POWER)
    return (100 * h0).minimum(h1).minimum(length)


def _evaluate(f: Slope, t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    slope = f(t, y, rows).double()
    if slope.shape != y.shape:
        raise ConfigError(f"f must return dy/dt in the shape of y, {tuple(y.shape)}, not {tuple(slope.shape)}")
    return slope


def _combine(weights: tuple[float, ...], slopes: list[Tensor], h: Tensor) -> Tensor:
    """Return h Σ w_j k_j as a new tensor; the slopes, which f may keep a reference to, are not modified."""
    total = (h * weights[0]) * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        if weight:
            total.addcmul_(h * weight, slope)
    return total


def _norm(value: Tensor, size: Tensor, tolerances: tuple[float, float]) -> Tensor:
    """Return the root mean square of value/(atol + rtol size) over each row, (R,)."""
    rtol, atol = tolerances
    scaled = value / (size * rtol + atol)
    return scaled.reshape(len(scaled), -1).square().mean(1).sqrt()


def _refuse_infinite(norm: Tensor, t: Tensor, goal: Tensor) -> None:
    """Raise ConfigError if a norm is NaN or infinite; the message names the times of the step."""
    bad = (~norm.isfinite()).nonzero()
    if len(bad):
        i = int(bad[0])
        raise ConfigError(
            f"the state or its derivative is NaN or infinite between t={float(t[i]):.6g} and t={float(goal[i]):.6g}: choose a "
            "start and a stop between which f is finite"
        )


def _progress(t: Tensor, start: float, stop: float) -> str:
    """Return the progress of the row farthest behind, for messages."""
    return f"{float(((t - start) / (stop - start)).min()):.1%} of the interval"
