"""Time grids: the times of a sampler from `start` to `stop`.

A grid maps (schedule, steps, start, stop) to steps + 1 strictly decreasing times, float64 on the CPU, the last of them `stop`.
On a table the times are nodes i/T, rounded and never truncated; but grids that are even in a function of λ lie between them.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lab.errors import ConfigError
from diffusion_lab.schedules import NODE_TOLERANCE, Schedule


def leading(n: int, cells: float) -> Tensor:
    """1 + k·⌊cells/n⌋, k = n − 1 … 0: every ⌊T/n⌋-th step counted from data. Does not begin at `start` (DDIM's code)."""
    return 1 + torch.arange(n - 1, -1, -1, dtype=torch.float64) * (cells // n)


def trailing(n: int, cells: float) -> Tensor:
    """cells·(1 − k/n), k = 0 … n − 1: equal strides that begin at `start` (Lin et al. 2023, table 2)."""
    return cells - torch.arange(n, dtype=torch.float64) * cells / n


def linspace(n: int, cells: float) -> Tensor:
    """n times from `start` down to the first node, ends included (improved DDPM's strided chain)."""
    return cells - torch.arange(n, dtype=torch.float64) * (cells - 1) / max(n - 1, 1)


def quadratic(n: int, cells: float) -> Tensor:
    """cells·(k/n)², k = n … 1: dense near data (Song et al. 2021, DDIM, appendix D.2)."""
    return cells * torch.arange(n, 0, -1, dtype=torch.float64).square() / n**2


GRIDS: dict[str, Callable[[int, float], Tensor]] = {
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
    "quadratic": quadratic,
}
# Functions of λ in which the steps are equal, and their inverses. karras: (σ/α)^(1/ρ), ρ = 7 (Karras et al. 2022, eq. 5), which
# on EDM's curve is linspace; λ itself: Lu et al. 2022, DPM-Solver, section 3.3.
WARPS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "uniform_lambda": (torch.clone, torch.clone),
    "karras": (lambda lam: (-lam / 7).exp(), lambda root: -7 * root.log()),
}
NAMES = (*GRIDS, *WARPS)


def make_grid(name: str, schedule: Schedule, steps: int | None, start: float = 1.0, stop: float = 0.0) -> Tensor:
    """Return the grid `name` between `start` and `stop`, float64 (steps + 1,); reversed if start < stop.

    Args:
        name: one of `NAMES`.
        schedule: the curve; a table's nodes are where the times lie.
        steps: how many; None for every step of a table.
        start: the first time, in [0, 1].
        stop: the last time, in [0, 1].

    Raises:
        ConfigError: unknown name, more steps than nodes, no steps on a continuous curve, a grid even in λ from α = 0 or from
            below the first node, or `leading` with start < stop.
    """
    if name not in NAMES:
        raise ConfigError(f"unknown time grid {name!r}: write one of {', '.join(NAMES)}")
    count = schedule.steps or 1 / schedule.t_min  # a cell of a continuous curve is its smallest time
    cells = round(abs(start - stop) * count, 6)
    if not (0 <= start <= 1 and 0 <= stop <= 1 and cells > NODE_TOLERANCE):
        raise ConfigError(f"a sampler runs between two different times in [0, 1], not from {start} to {stop}")
    if start < stop:
        if name == "leading":
            raise ConfigError(
                "grid leading ends short of its far end, so the state there is never reached: to encode write grid=trailing"
            )
        return make_grid(name, schedule, steps, stop, start).flip(0)
    if steps is None and schedule.steps is None:
        raise ConfigError(
            "this schedule is a continuous curve: give the sampler a number of steps, e.g. sampler.steps=50"
        )
    n = math.ceil(cells) if steps is None else steps
    if n < 1:
        raise ConfigError(f"a sampler needs steps >= 1, not steps={n}")
    if schedule.steps is not None and name not in WARPS and n > math.ceil(cells):
        raise ConfigError(
            f"steps={n} exceeds the {cells:g} steps of the schedule between t={start} and t={stop}: write fewer steps"
        )
    if name in WARPS:
        grid = _warped(name, n, schedule, start, stop, 1 / count)
    else:
        offsets = GRIDS[name](n, cells)
        begins = float(offsets[0]) > cells - NODE_TOLERANCE  # but for rounding, all save `leading` do
        if schedule.steps is not None:
            offsets = _distinct(offsets.round())
        grid = stop + offsets / count
        if begins or offsets[0] > cells:
            grid[0] = start  # as given, also where it is no node
    grid = torch.cat([grid, torch.tensor([stop], dtype=torch.float64)])
    if not bool((grid.diff() < 0).all() and grid[0] <= start):
        raise ConfigError(
            f"grid {name} has no {n} different times between t={start} and t={stop}: write fewer steps, or grid=trailing"
        )
    return grid


def _distinct(nodes: Tensor) -> Tensor:
    """Decreasing whole numbers, pushed up where rounding made two of them meet, so that the k-th from below is at least k."""
    up = nodes.flip(0)
    rank = torch.arange(1, len(nodes) + 1, dtype=nodes.dtype)
    return (torch.cummax(torch.maximum(up, rank) - rank, 0).values + rank).flip(0)


def _warped(name: str, n: int, schedule: Schedule, start: float, stop: float, least: float) -> Tensor:
    """n times from `start` on at equal distances in a function of λ; the (n + 1)-st is `stop`, or data after the least time."""
    if start == 1 and schedule.zero_terminal_snr:
        raise ConfigError(
            f"grid {name} needs a finite λ at its start, but this schedule ends in alpha = 0: write grid=trailing"
        )
    warp, back = WARPS[name]
    ends = warp(schedule.lam(torch.tensor([start, stop or least], dtype=torch.float64)))
    ramp = torch.linspace(float(ends[0]), float(ends[1]), n + 1 if stop else max(n, 2), dtype=torch.float64)[:n]
    grid = schedule.time(back(ramp))
    grid[0] = start  # as given, not through λ and back
    return grid
