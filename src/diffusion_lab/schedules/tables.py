"""Discrete schedules: tables of T steps, t = i/T exact on the grid and interpolated in λ = ln(α/σ) off it."""

import math

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.schedules.base import Scalars, Schedule, cast_like, checked_shift, shifted

NODE_TOLERANCE = 1e-3  # in cells: a time this close to a node counts as that node, because float32 rounds i/T


class Table(Schedule):
    """A discrete schedule given by ln ᾱ_i, i = 1 … T. The subclasses are formulas for β_i.

    Between nodes λ is linear in t. In (0, 1/T) σ² is linear, and in a last cell that ends in α = 0, α is.

    Args:
        log_alpha_bar: (T,), ln Π(1 − β_i), strictly decreasing and negative; converted to float64.
        zero_terminal_snr: shift and scale √ᾱ so that ᾱ_T = 0 and ᾱ_1 is unchanged (Lin et al. 2023, algorithm 1).
        shift: factor on σ/α, λ' = λ − ln shift with α² + σ² = 1. For images of d×d pixels, shift = d/64 preserves the SNR of the
            coarse structure at each step as at 64×64 (Hoogeboom et al. 2023, section 3.1).

    Raises:
        ConfigError: fewer than two steps, a table that does not strictly decrease in (0, 1), or a shift out of range.
    """

    steps: int

    def __init__(self, log_alpha_bar: Float[Tensor, " T"], zero_terminal_snr: bool = False, shift: float = 1.0) -> None:
        checked_shift(shift)
        alpha = (log_alpha_bar.double() / 2).exp()
        sigma = (-torch.expm1(log_alpha_bar.double())).sqrt()
        if len(alpha) < 2 or not bool((alpha.diff() < 0).all() and 0 < alpha[0] < 1):
            raise ConfigError("a schedule table needs at least 2 steps, with ᾱ strictly decreasing inside (0, 1)")
        if zero_terminal_snr:
            alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
            sigma = torch.cat([sigma[:1], ((1 - alpha[1:]) * (1 + alpha[1:])).sqrt()])
        if shift != 1:
            alpha, sigma = shifted(alpha, sigma, shift)
        self.steps, self.t_min, self.t_eps = len(alpha), 1 / len(alpha), 2 * NODE_TOLERANCE / len(alpha)
        start = torch.tensor([1.0, 0.0], dtype=torch.float64)
        self._alpha, self._sigma = torch.cat([start[:1], alpha]), torch.cat([start[1:], sigma])
        self._lam = self._alpha.log() - self._sigma.log()  # +∞ at i = 0
        self._ends_in_zero = bool(alpha[-1] == 0)
        self._last_finite = self.steps - self._ends_in_zero  # the last node with a finite λ
        self._on_device: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def _tables(
        self, device: torch.device
    ) -> tuple[Float64[Tensor, " nodes"], Float64[Tensor, " nodes"], Float64[Tensor, " nodes"]]:
        """Return α, σ, λ at i = 0 … T on `device`; each device is copied to once."""
        if device not in self._on_device:
            self._on_device[device] = (self._alpha.to(device), self._sigma.to(device), self._lam.to(device))
        return self._on_device[device]

    def _position(self, t: Scalars) -> Float64[Tensor, "*shape"]:
        """Return T·t in float64, rounded to a node within `NODE_TOLERANCE` of it."""
        position = t.double() * self.steps
        node = position.round()
        return torch.where((position - node).abs() <= NODE_TOLERANCE, node, position)

    @property
    def zero_terminal_snr(self) -> bool:
        return self._ends_in_zero

    def _cell(
        self, position: Scalars
    ) -> tuple[Int64[Tensor, "*shape"], Bool[Tensor, "*shape"], Bool[Tensor, "*shape"], Int64[Tensor, "*shape"]]:
        """Return the cell (i, i + 1] of each position.

        Returns:
            i; whether the cell is the first; whether it ends in α = 0; and the nearest cell with a finite λ at both ends, whose
            interpolation is computed everywhere and used where neither flag is set.
        """
        lower = (position.ceil().long() - 1).clamp(0, self.steps - 1)
        into_zero = (lower == self.steps - 1) & self._ends_in_zero
        return lower, lower == 0, into_zero, lower.clamp(1, self._last_finite - 1)

    def alpha_sigma(self, t: Scalars) -> tuple[Scalars, Scalars]:
        if t.ndim == 0 and t.device.type == "cpu":  # the case of samplers: Python floats cost a third of 0-d tensors
            exact_position = float(t) * self.steps
            if abs(exact_position - (i := round(exact_position))) <= NODE_TOLERANCE:
                return cast_like(self._alpha[i], t), cast_like(self._sigma[i], t)
        position = self._position(t)
        alphas, sigmas, lams = self._tables(t.device)
        node = position.round().long()
        exact = position == node
        if t.device.type == "cpu" and bool(exact.all()):  # the case of training; on a GPU the test would synchronize
            return cast_like(alphas[node], t), cast_like(sigmas[node], t)
        lower, first, into_zero, inner = self._cell(position)
        fraction = position - lower
        lam = lams[inner] + fraction * (lams[inner + 1] - lams[inner])
        first_sigma = sigmas[1] * fraction.clamp(0, 1).sqrt()
        last_alpha = alphas[-2] * (1 - fraction)
        alpha = torch.where(first, (1 - first_sigma.square()).sqrt(), torch.sigmoid(2 * lam).sqrt())
        sigma = torch.where(first, first_sigma, torch.sigmoid(-2 * lam).sqrt())
        alpha = torch.where(into_zero, last_alpha, alpha)
        sigma = torch.where(into_zero, ((1 - last_alpha) * (1 + last_alpha)).sqrt(), sigma)
        return cast_like(torch.where(exact, alphas[node], alpha), t), cast_like(
            torch.where(exact, sigmas[node], sigma), t
        )

    def derivatives(self, t: Scalars) -> tuple[Scalars, Scalars]:
        """Return (dα/dt, dσ/dt) of the interpolation; at a node, of the cell below it. dσ/dt is infinite at t = 0."""
        position = self._position(t)
        alphas, sigmas, lams = self._tables(t.device)
        _, first, into_zero, inner = self._cell(position)
        alpha, sigma = self.alpha_sigma(position / self.steps)
        rate = (lams[inner + 1] - lams[inner]) * self.steps  # dλ/dt; α̇ = ασ²λ̇, σ̇ = −σα²λ̇ because α² + σ² = 1
        half = 0.5 * sigmas[1].square() * self.steps  # ½ dσ²/dt in the first cell
        d_alpha = torch.where(first, -half / alpha, alpha * sigma.square() * rate)
        d_sigma = torch.where(first, half / sigma, -sigma * alpha.square() * rate)
        slope = -alphas[-2] * self.steps
        d_alpha = torch.where(into_zero, slope, d_alpha)
        d_sigma = torch.where(into_zero, -alpha * slope / sigma, d_sigma)
        return cast_like(d_alpha, t), cast_like(d_sigma, t)

    def time(self, lam: Scalars) -> Scalars:
        lam64 = lam.double()
        alphas, sigmas, lams = self._tables(lam.device)
        # λ[upper − 1] > lam ≥ λ[upper]
        upper = torch.searchsorted(-lams[1:], -lam64.contiguous()).clamp(max=self.steps - 1) + 1
        inner = upper.clamp(2, self._last_finite)
        position = inner - 1 + ((lam64 - lams[inner - 1]) / (lams[inner] - lams[inner - 1])).clamp(0, 1)
        first = torch.sigmoid(-2 * lam64) / sigmas[1].square()
        position = torch.where(upper == 1, first.clamp(max=1), position)
        if self._ends_in_zero:
            last = self.steps - (torch.sigmoid(2 * lam64).sqrt() / alphas[-2]).clamp(max=1)
            position = torch.where(upper == self.steps, last, position)
        return cast_like(position / self.steps, lam)

    def conditioning(self, t: Scalars) -> Scalars:
        """Return max(T·t − 1, 0), the step index from 0 that conditions DDPM's networks."""
        return cast_like((self._position(t) - 1).clamp(min=0), t)


class Linear(Table):
    """β linear from `beta_start` to `beta_end`, stated for T = 1000 (Ho et al. 2020, section 4).

    For another T both ends scale by 1000/T (Nichol & Dhariwal 2021), which leaves the curve ᾱ(t) nearly unchanged.

    Args:
        steps: T in [2, 100000]; at least 21 with the default ends, since β_T = 20/T must be below 1.
        beta_start: β_1 at T = 1000, in [1e-7, 100].
        beta_end: β_T at T = 1000, at least β_1.
        zero_terminal_snr: see `Table`.
        shift: see `Table`.

    Raises:
        ConfigError: an argument is out of range, or β_T ≥ 1.
    """

    def __init__(
        self,
        steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        zero_terminal_snr: bool = False,
        shift: float = 1.0,
    ) -> None:
        first, last = _scaled_ends("linear", steps, beta_start, beta_end)
        beta = torch.linspace(first, last, steps, dtype=torch.float64)
        super().__init__(torch.log1p(-beta).cumsum(0), zero_terminal_snr, shift)


class ScaledLinear(Table):
    """√β linear (Rombach et al. 2022, the latent-diffusion code): β_i = linspace(√β_1, √β_T)². Arguments as in `Linear`."""

    def __init__(
        self,
        steps: int = 1000,
        beta_start: float = 8.5e-4,
        beta_end: float = 0.012,
        zero_terminal_snr: bool = False,
        shift: float = 1.0,
    ) -> None:
        first, last = _scaled_ends("scaled_linear", steps, beta_start, beta_end)
        beta = torch.linspace(math.sqrt(first), math.sqrt(last), steps, dtype=torch.float64).square()
        super().__init__(torch.log1p(-beta).cumsum(0), zero_terminal_snr, shift)


class Cosine(Table):
    """ᾱ = f(t)/f(0), f(t) = cos²((t + s)/(1 + s)·π/2), with β ≤ `beta_max` (Nichol & Dhariwal 2021, eq. 17).

    Args:
        steps: T in [2, 100000].
        offset: s in [0, 1], which keeps β_1 away from 0.
        beta_max: upper limit of β in [1e-4, 1), which affects the last step.
        zero_terminal_snr: see `Table`.
        shift: see `Table`.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        steps: int = 1000,
        offset: float = 0.008,
        beta_max: float = 0.999,
        zero_terminal_snr: bool = False,
        shift: float = 1.0,
    ) -> None:
        t = _nodes(steps)
        check_number("schedule.offset", offset, "[0, 1]", "the published value is 0.008")
        alpha_bar = ((t + offset) / (1 + offset) * (math.pi / 2)).cos().square()
        super().__init__(_clip_beta(alpha_bar / alpha_bar[0], beta_max), zero_terminal_snr, shift)


class Sigmoid(Table):
    """ᾱ from a sigmoid between `start` and `end`, normalized to [0, 1] (Jabri et al. 2022; Chen 2023, algorithm 1).

    ᾱ(t) = (S(end) − S(start + t(end − start))) / (S(end) − S(start)), S(u) = sigmoid(u/τ); then β ≤ `beta_max`.
    diffusers' `sigmoid` schedule is a sigmoid in β instead.

    Args:
        steps: T in [2, 100000].
        start: argument of the sigmoid at t = 0, in [-100, 100].
        end: argument of the sigmoid at t = 1, above `start` and at most 100.
        tau: temperature τ in [0.01, 100].
        beta_max: upper limit of β in [1e-4, 1), which affects the last step.
        zero_terminal_snr: see `Table`.
        shift: see `Table`.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        steps: int = 1000,
        start: float = -3.0,
        end: float = 3.0,
        tau: float = 1.0,
        beta_max: float = 0.999,
        zero_terminal_snr: bool = False,
        shift: float = 1.0,
    ) -> None:
        check_number("schedule.start", start, "[-100, 100]")
        check_number("schedule.end", end, "[-100, 100]")
        check_number("schedule.tau", tau, "[0.01, 100]")
        if start >= end:
            raise ConfigError(f"schedule=sigmoid needs start < end, not start={start}, end={end}")
        s = torch.sigmoid((start + _nodes(steps) * (end - start)) / tau)
        super().__init__(_clip_beta((s[-1] - s) / (s[-1] - s[0]), beta_max), zero_terminal_snr, shift)


def _nodes(steps: int) -> Float64[Tensor, " nodes"]:
    """Return i/T for i = 0 … T. Raises ConfigError: T outside [2, 100000]."""
    check_number("schedule.steps", steps, "[2, 100000]", "the published values are 1000 and 4000", whole=True)
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


def _scaled_ends(name: str, steps: int, beta_start: float, beta_end: float) -> tuple[float, float]:
    """Return β_1 and β_T for T = `steps` from the ends stated for T = 1000."""
    _nodes(steps)
    for key, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        check_number(f"schedule.{key}", value, "[1e-7, 100]", "of 1000 steps, published: 1e-4 and 0.02")
    if beta_start > beta_end:
        raise ConfigError(
            f"schedule={name} needs beta_start <= beta_end, not beta_start={beta_start}, beta_end={beta_end}"
        )
    if beta_end * 1000 / steps >= 1:
        min_steps = math.floor(beta_end * 1000) + 1
        raise ConfigError(
            f"schedule={name} with steps={steps} has beta >= 1, because beta_end={beta_end} is stated for 1000 steps and "
            f"scales by 1000/steps: write schedule.steps={min_steps} or more, or schedule=cosine"
        )
    return beta_start * 1000 / steps, beta_end * 1000 / steps


def _clip_beta(alpha_bar: Float64[Tensor, " nodes"], beta_max: float) -> Float64[Tensor, " nodes-1"]:
    """Return ln ᾱ_i, i = 1 … T, with β_i = 1 − ᾱ_i/ᾱ_{i−1} limited to `beta_max`; `alpha_bar` starts at ᾱ_0 = 1."""
    check_number("schedule.beta_max", beta_max, "[1e-4, 1)", "the published value is 0.999")
    return torch.log1p(-(1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=beta_max)).cumsum(0)
