"""Time grids: the times of a sampler from `start` to `stop`.

A grid maps (schedule, steps, start, stop) to steps + 1 strictly decreasing times, float64 on the CPU, that end in `stop`.
On a table the times are rounded (not truncated) to nodes i/T; grids uniform in a function of λ are not rounded.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float64
from torch import Tensor

from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.schedules import NODE_TOLERANCE, Schedule


def leading(n: int, cells: float) -> Float64[Tensor, " n"]:
    """Return 1 + k·⌊cells/n⌋, k = n − 1 … 0: every ⌊T/n⌋-th node from data on (DDIM's code). `start` is not included."""
    return 1 + torch.arange(n - 1, -1, -1, dtype=torch.float64) * (cells // n)


def trailing(n: int, cells: float) -> Float64[Tensor, " n"]:
    """Return cells·(1 − k/n), k = 0 … n − 1: equal strides from `start` on (Lin et al. 2023, table 2)."""
    return cells - torch.arange(n, dtype=torch.float64) * cells / n


def linspace(n: int, cells: float) -> Float64[Tensor, " n"]:
    """Return n equidistant times from `start` to the first node, ends included (improved DDPM's strided chain)."""
    return cells - torch.arange(n, dtype=torch.float64) * (cells - 1) / max(n - 1, 1)


def quadratic(n: int, cells: float) -> Float64[Tensor, " n"]:
    """Return cells·(k/n)², k = n … 1: dense near data (Song et al. 2021, DDIM, appendix D.2)."""
    return cells * torch.arange(n, 0, -1, dtype=torch.float64).square() / n**2


GRIDS: dict[str, Callable[[int, float], Tensor]] = {
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
    "quadratic": quadratic,
}
# Functions of λ in which a grid is uniform, and their inverses. karras: (σ/α)^(1/ρ), ρ = 7 (Karras et al. 2022, eq. 5), equal to
# linspace on EDM's curve. uniform_lambda: λ itself (Lu et al. 2022, DPM-Solver, section 3.3).
WARPS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "uniform_lambda": (torch.clone, torch.clone),
    "karras": (lambda lam: (-lam / 7).exp(), lambda root: -7 * root.log()),
}
NAMES = (*GRIDS, *WARPS)


def make_grid(
    name: str, schedule: Schedule, steps: int | None, start: float = 1.0, stop: float = 0.0
) -> Float64[Tensor, " n_plus_1"]:
    """Return the steps + 1 times of grid `name` from `start` to `stop`, on the CPU; reversed if start < stop.

    Args:
        name: one of `NAMES`.
        schedule: the curve.
        steps: number of steps; None: every step of a table.
        start: the first time, in [0, 1].
        stop: the last time, in [0, 1].

    Raises:
        ConfigError: an unknown name, more steps than nodes, no `steps` on a continuous curve, a grid uniform in λ that starts at
            α = 0 or below the first node, or `leading` with start < stop.
    """
    if name not in NAMES:
        raise ConfigError(f"unknown time grid {name!r}: write one of {', '.join(NAMES)}")
    check_number("sampler.steps", steps, "[1, 100000]", whole=True, optional=True)
    count = schedule.steps or 1 / schedule.t_min  # the cell size of a continuous curve is its smallest time
    cells = round(abs(start - stop) * count, 6)
    if not (0 <= start <= 1 and 0 <= stop <= 1 and cells > NODE_TOLERANCE):
        raise ConfigError(f"a sampler needs two different times in [0, 1], not start={start} and stop={stop}")
    if start < stop:
        if name == "leading":
            raise ConfigError(
                "grid=leading omits its largest time, so it cannot encode (start < stop): write grid=trailing"
            )
        return make_grid(name, schedule, steps, stop, start).flip(0)
    if steps is None and schedule.steps is None:
        raise ConfigError("this schedule is continuous and has no default number of steps: write e.g. sampler.steps=50")
    n = math.ceil(cells) if steps is None else steps
    if schedule.steps is not None and name not in WARPS and n > math.ceil(cells):
        raise ConfigError(
            f"steps={n} exceeds the {cells:g} steps of the schedule between t={start} and t={stop}: write fewer steps"
        )
    if name in WARPS:
        grid = _warped(name, n, schedule, start, stop, 1 / count)
    else:
        offsets = GRIDS[name](n, cells)
        begins = float(offsets[0]) > cells - NODE_TOLERANCE  # true for all grids but `leading`, up to rounding
        if schedule.steps is not None:
            offsets = _distinct(offsets.round())
        grid = stop + offsets / count
        if begins or offsets[0] > cells:
            grid[0] = start  # exact, also between two nodes
    grid = torch.cat([grid, torch.tensor([stop], dtype=torch.float64)])
    if not bool((grid.diff() < 0).all() and grid[0] <= start):
        raise ConfigError(
            f"grid={name} has fewer than {n} different times between t={start} and t={stop}: write fewer steps, or grid=trailing"
        )
    return grid


def _distinct(nodes: Tensor) -> Tensor:
    """Return `nodes`, decreasing integers, without duplicates: a duplicate is raised to the next free integer above.

    The k-th smallest is at least k.
    """
    increasing = nodes.flip(0)
    rank = torch.arange(1, len(nodes) + 1, dtype=nodes.dtype)
    return (torch.cummax(torch.maximum(increasing, rank) - rank, 0).values + rank).flip(0)


def _warped(name: str, n: int, schedule: Schedule, start: float, stop: float, t_min: float) -> Tensor:
    """Return n times from `start` on, uniform in a function of λ; the (n + 1)-st is `stop`, or 0 after `t_min`."""
    if start == 1 and schedule.zero_terminal_snr:
        raise ConfigError(
            f"grid={name} needs a finite λ at its start, but this schedule ends in alpha = 0: write grid=trailing"
        )
    warp, inverse = WARPS[name]
    ends = warp(schedule.lam(torch.tensor([start, stop or t_min], dtype=torch.float64)))
    ramp = torch.linspace(float(ends[0]), float(ends[1]), n + 1 if stop else max(n, 2), dtype=torch.float64)[:n]
    grid = schedule.time(inverse(ramp))
    grid[0] = start  # exact, without the round trip through λ
    return grid
