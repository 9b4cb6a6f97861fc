"""Dormand and Prince's adaptive Runge–Kutta pair 5(4), with step size and error control for each row of a batch by itself.

A library's solver takes one step for the whole batch, so a result depends on its neighbours. Here every row has its own time,
step and error norm, and rows that have arrived are no longer evaluated. The tableau is that of Dormand & Prince 1980
(J. Comput. Appl. Math. 6, table 2), the first step and the step control those of Hairer, Nørsett & Wanner 1993 (section II.4)
with the constants of SciPy's RK45, so that one row goes the very steps that `scipy.integrate.solve_ivp` goes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
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
B = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)  # order 5; its end is the next step's first stage
E = (-71 / 57600, 0.0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)  # order 4 minus order 5
STAGES = 6  # evaluations of a step
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0
POWER = -1 / 5  # the error of a step is of order 5


class Solution(NamedTuple):
    """The end of an integration."""

    y: Tensor  # float64 (R, …), the state at `stop`
    evaluations: Tensor  # int64 (R,) on the CPU: how often f was evaluated for each row
    calls: int  # how often f was called, that is the most evaluations of a row


def integrate(
    f: Slope,
    y: Tensor,
    start: float,
    stop: float,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    limit: int = 10_000,
    watch: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None,
) -> Solution:
    """Solves dy/dt = f(t, y) from `start` to `stop`, in either direction, each row by itself.

    A step is accepted where the root mean square over the row of (order 5 − order 4)/(atol + rtol max(|y|, |y_new|)) is below
    1. At most 8 states live at a time, besides what f needs itself. One thing is read from the device each step, the norms (R,);
    all control of steps is on the CPU.

    Args:
        f: f(t, y, rows) → dy/dt of y's shape. Rows that have arrived are left out: t float64 (R',) on the CPU, y float64
            (R', …), rows int64 (R',) on y's device, their indices among the R.
        y: the state at `start`, (R, …); float64 from here on.
        start: where it begins.
        stop: where it ends.
        rtol: relative tolerance, > 0.
        atol: absolute tolerance, > 0.
        limit: evaluations of a row at most.
        watch: watch(rows, t, y, dy/dt) at the start and after every step that brought a row forward; arguments as f's, rows
            that arrive in this step included.

    Raises:
        ConfigError: tolerances out of range, more than `limit` evaluations, a state or derivative that is not finite, a step
            below the resolution of t.
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
    arrived: list[tuple[Tensor, Tensor]] = []
    calls = 2
    if watch is not None:
        watch(rows, t, y, slope)
    while True:
        if calls + STAGES > limit:
            raise ConfigError(
                f"{calls} evaluations came {_way(t, start, stop)}, and the {STAGES} of another step are too many: raise the "
                f"budget, or loosen rtol={rtol:g} and atol={atol:g}"
            )
        least = 10 * (torch.nextafter(t, torch.full_like(t, sign * torch.inf)) - t).abs()
        size = torch.where(retry, size, torch.maximum(size, least))
        if bool((size < least).any()):
            raise ConfigError(
                f"{_way(t[size < least], start, stop)} the step fell below the resolution of float64, since the solution is not "
                f"smooth there: loosen rtol={rtol:g} and atol={atol:g}"
            )
        goal = t + sign * size
        goal = torch.where(sign * (goal - stop) > 0, stop, goal)
        new, new_slope, norm = _step(f, t, goal, y, slope, rows, tolerances)
        calls += STAGES
        good, factor = norm < 1, (SAFETY * norm**POWER).clamp(SHRINK, GROW)
        size = (goal - t).abs() * torch.where(good & retry, factor.clamp(max=1), factor)
        t, retry = torch.where(good, goal, t), ~good
        if bool(good.any()):
            mask = append_dims_like(good, y) > 0
            y, slope = torch.where(mask, new, y), torch.where(mask, new_slope, slope)
            if watch is not None:
                watch(rows, t, y, slope)
        del new, new_slope
        ended = t == stop
        if not bool(ended.any()):
            continue
        there, on = ended.nonzero()[:, 0], (~ended).nonzero()[:, 0]
        evaluations[rows.cpu()[there]] = calls
        arrived.append((rows[there.to(y.device)], y[there.to(y.device)]))
        if not len(on):
            break
        t, size, retry = t[on], size[on], retry[on]
        rows, y, slope = (value[on.to(y.device)] for value in (rows, y, slope))
    order = torch.cat([rows for rows, _ in arrived]).argsort()
    return Solution(torch.cat([y for _, y in arrived])[order], evaluations, calls)


def _step(
    f: Slope, t: Tensor, goal: Tensor, y: Tensor, slope: Tensor, rows: Tensor, tolerances: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of every row from its t to its goal: the state and slope there, and the norm of the error, (R,) on the CPU."""
    h = append_dims_like(goal - t, y)
    slopes = [slope]
    for c, row in zip(C, A, strict=True):
        slopes.append(_evaluate(f, t + c * (goal - t), _combine(row, slopes, h).add_(y), rows))
    slopes[1] = torch.empty(0)  # neither the new state nor the error has a part in the second
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
    """|h| of the first step of every row, (R,) on the CPU (Hairer, Nørsett & Wanner 1993, section II.4). One evaluation."""
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
        raise ConfigError(f"f must give dy/dt in the shape of y, {tuple(y.shape)}, not {tuple(slope.shape)}")
    return slope


def _combine(weights: tuple[float, ...], slopes: list[Tensor], h: Tensor) -> Tensor:
    """h Σ w_j k_j as a new tensor; f's results may be anyone's and stay as they are."""
    total = (h * weights[0]) * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=True):
        if weight:
            total.addcmul_(h * weight, slope)
    return total


def _norm(value: Tensor, size: Tensor, tolerances: tuple[float, float]) -> Tensor:
    """Root mean square of value/(atol + rtol size) over each row, (R,)."""
    rtol, atol = tolerances
    scaled = value / (size * rtol + atol)
    return scaled.reshape(len(scaled), -1).square().mean(1).sqrt()


def _refuse_infinite(norm: Tensor, t: Tensor, goal: Tensor) -> None:
    """Raise ConfigError where a norm is not finite, naming the times between which it arose."""
    bad = (~norm.isfinite()).nonzero()
    if len(bad):
        i = int(bad[0])
        raise ConfigError(
            f"the state or its derivative is NaN or infinite between t={float(t[i]):.6g} and t={float(goal[i]):.6g}: begin and "
            "end where f is finite"
        )


def _way(t: Tensor, start: float, stop: float) -> str:
    """How far the row is that is farthest behind."""
    return f"{float(((t - start) / (stop - start)).min()):.1%} of the way"
