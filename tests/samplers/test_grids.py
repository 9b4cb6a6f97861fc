"""Time grids: the contract of every grid for every n, then each grid against its published formula in exact arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from contracts import SCHEDULES
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_lab.samplers.grids import GRIDS, NAMES, WARPS, make_grid
from diffusion_lab.schedules import EDM, VE, VP, Cosine, Flow, Linear, Schedule

D = torch.float64
REVERSIBLE = [name for name in NAMES if name != "leading"]  # grids that contain both ends
CONTINUOUS = [(name, s) for name in NAMES for s, curve in SCHEDULES.items() if curve.steps is None]
NO_FINITE_LAMBDA = [(name, s) for name, s in CONTINUOUS if name in WARPS and SCHEDULES[s].zero_terminal_snr]


def node(grid: torch.Tensor, steps: int = 1000) -> list[int]:
    """Return the nodes of a grid; fails if a time is not a node."""
    at = (grid * steps).round()
    assert ((grid * steps - at).abs() < 1e-9).all()
    return at.long().tolist()


@pytest.mark.parametrize("name", NAMES)
def test_every_number_of_steps(name: str) -> None:
    """n + 1 strictly decreasing times that end at exactly 0, for all n ≤ T = 1000; all but `leading` start at exactly 1."""
    s = Linear()
    for n in range(1, 1001):
        grid = make_grid(name, s, n)
        assert grid.shape == (n + 1,)
        assert grid.dtype == D
        assert bool((grid.diff() < 0).all()), n
        assert float(grid[-1]) == 0
        assert float(grid[0]) == 1 or name == "leading", n
        if name in GRIDS:
            node(grid)


@pytest.mark.parametrize("name", WARPS)
def test_all_steps_of_a_grid_in_lambda(name: str) -> None:
    assert len(make_grid(name, Linear(), None)) == 1001


@pytest.mark.parametrize("name", GRIDS)
def test_all_steps_are_all_nodes(name: str) -> None:
    assert node(make_grid(name, Linear(), None)) == list(range(1000, -1, -1))
    assert node(make_grid(name, Linear(), 1000)) == list(range(1000, -1, -1))


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=150)
@given(
    ends=st.tuples(*2 * [st.one_of(st.floats(0, 1), st.integers(0, 1000).map(lambda i: i / 1000))]),
    steps=st.one_of(st.none(), st.integers(1, 60)),
    schedule=st.sampled_from(["Linear", "Cosine-40", "Linear-zero"]),
)
def test_any_interval(name: str, ends: tuple[float, float], steps: int | None, schedule: str) -> None:
    """A strictly decreasing grid from exactly start (for leading at most start) to exactly stop, or a refusal with a remedy."""
    stop, start = sorted(ends)
    grid = refusal = None
    try:
        grid = make_grid(name, SCHEDULES[schedule], steps, start, stop)
    except ValueError as error:
        refusal = str(error)
    if grid is not None:
        assert (grid.diff() < 0).all()
        assert float(grid[-1]) == stop
        assert float(grid[0]) == start or (name == "leading" and float(grid[0]) < start)
        assert steps is None or len(grid) == steps + 1
    else:
        assert any(word in str(refusal) for word in ("fewer", "different times", "trailing"))
        if steps is None and name in {"trailing", "linspace"}:
            nodes = SCHEDULES[schedule].steps or 0
            assert (start - stop) * nodes < 1.01e-3, "all steps between two different times are always possible"


def test_the_start_is_exact_despite_rounding() -> None:
    """193.3·59²/59² is not 193.3 in float64, but the grid starts at exactly `start`."""
    assert float(make_grid("quadratic", Linear(), 59, 0.25, 0.0566997629788797)[0]) == 0.25


def test_leading_is_not_reversible() -> None:
    """It omits its largest time, so an encoding would end before `stop`."""
    with pytest.raises(ValueError, match="grid=trailing"):
        make_grid("leading", Cosine(), 7, 0.0, 1.0)


@pytest.mark.parametrize("name", REVERSIBLE)
def test_a_grid_towards_noise_is_the_reversed_grid(name: str) -> None:
    for start, stop in ((0.0, 1.0), (0.2, 0.8), (0.0, 0.3)):
        assert torch.equal(make_grid(name, Cosine(), 7, start, stop), make_grid(name, Cosine(), 7, stop, start).flip(0))


@pytest.mark.parametrize("name", ["trailing", "linspace"])
def test_a_start_between_nodes_is_kept(name: str) -> None:
    """`task=edit strength=0.3337` with every step: 0.3337, then the nodes 333 … 0."""
    for steps in (None, 334):
        grid = make_grid(name, Linear(), steps, 0.3337, 0.0)
        assert float(grid[0]) == 0.3337
        assert node(grid[1:]) == list(range(333, -1, -1))
    assert make_grid(name, Linear(), None, 0.0004, 0.0).tolist() == [0.0004, 0.0]


@pytest.mark.parametrize("name", NAMES)
def test_sub_intervals_of_nodes(name: str) -> None:
    for n in (1, 3, 10, 50):
        grid = make_grid(name, Cosine(), n, 0.6, 0.1)
        assert len(grid) == n + 1
        assert float(grid[-1]) == 0.1
        assert ((grid >= 0.1) & (grid <= 0.6)).all()
        if name != "leading":
            assert float(grid[0]) == 0.6


# --------------------------------------------------------------------------------------------------- published formulas


def half_even(value: Fraction) -> int:
    return round(value)  # exact: Python rounds a Fraction half to even


def test_leading_matches_ddim() -> None:
    """range(0, T, T // n)[:n], with steps counted from 0 (DDIM's code; diffusers' "leading")."""
    for n in range(1, 1001):
        expected = [1 + i for i in range(0, 1000, 1000 // n)][:n]
        assert node(make_grid("leading", Linear(), n)) == [*expected[::-1], 0]


def test_trailing_matches_lin_et_al() -> None:
    """round(T − iT/n), i < n (Lin et al. 2023, table 2), in exact arithmetic."""
    for n in [*range(1, 1001, 7), 16, 48, 64, 80, 400, 625, 1000]:
        expected = [half_even(1000 - Fraction(i * 1000, n)) for i in range(n)]
        assert node(make_grid("trailing", Linear(), n)) == [*expected, 0], n


def test_an_arange_has_the_wrong_length() -> None:
    """np.arange(T, 0, −T/n) has a wrong length for 62 of n ≤ 1000, so `trailing` counts its steps."""
    wrong = [n for n in range(1, 1001) if len(np.round(np.arange(1000, 0, -1000 / n))) != n]
    assert len(wrong) == 62


def test_linspace_rounds_exact_fractions() -> None:
    """round(1 + (T−1)k/(K−1)), k < K (improved DDPM, Analytic-DPM)."""
    for n in [*range(2, 1001, 7), 3, 4, 334, 500, 667, 1000]:
        exact = [1 + Fraction(999 * k, n - 1) for k in range(n)]
        got = node(make_grid("linspace", Linear(), n))[::-1][1:]
        for g, e in zip(got, exact, strict=True):
            assert g == half_even(e), (n, g, e)
    assert node(make_grid("linspace", Linear(), 1)) == [1000, 0]


def test_quadratic_rounds_exact_fractions_without_duplicates() -> None:
    """T(k/n)² rounded; near data duplicates are raised to the next node."""
    for n in (2, 5, 10, 20):
        got = node(make_grid("quadratic", Linear(), n))[::-1][1:]
        for k, g in enumerate(got, start=1):
            assert g == max(half_even(Fraction(1000 * k * k, n * n)), k)
    assert node(make_grid("quadratic", Linear(), 1000)) == list(range(1000, -1, -1))


@pytest.mark.parametrize("schedule", ["Linear", "Cosine", "Sigmoid", "Linear-40"])
@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_uniform_lambda_has_equal_distances(schedule: str, n: int) -> None:
    """n − 1 equal steps from t = 1 to the first node and one into data; between two noisy times all n steps are equal."""
    s = SCHEDULES[schedule]
    assert s.steps is not None
    grid = make_grid("uniform_lambda", s, n)
    h = s.lam(grid)[:-1].diff()
    torch.testing.assert_close(h, h.mean().expand_as(h) if n > 1 else h, rtol=1e-9, atol=1e-9)
    if n > 1:
        assert float(grid[-2]) == pytest.approx(1 / s.steps, rel=1e-9)
    inner = make_grid("uniform_lambda", s, n, 0.9, 0.2)
    h = s.lam(inner).diff()
    torch.testing.assert_close(h, ((s.lam(inner[-1:]) - s.lam(inner[:1])) / n).expand_as(h), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), VP(), VE(), EDM()])
@pytest.mark.parametrize("n", [2, 5, 18])
def test_karras_is_the_published_ramp(schedule: Schedule, n: int) -> None:
    """(σ_max^(1/ρ) + i/(N−1) (σ_min^(1/ρ) − σ_max^(1/ρ)))^ρ of σ/α, ρ = 7 (Karras et al. 2022, eq. 5), then data."""
    least = 1 / schedule.steps if schedule.steps else schedule.t_min
    alpha, sigma = schedule.alpha_sigma(torch.tensor([1.0, least], dtype=D))
    high, low = (float(v) for v in (sigma / alpha) ** (1 / 7))
    expected = torch.tensor([(high + i / (n - 1) * (low - high)) ** 7 for i in range(n)], dtype=D)
    grid = make_grid("karras", schedule, n)
    alpha, sigma = schedule.alpha_sigma(grid)
    torch.testing.assert_close((sigma / alpha)[:-1], expected, rtol=1e-9, atol=0)
    assert float(grid[-1]) == 0
    inner = make_grid("karras", schedule, n, 0.9, 0.2)
    alpha, sigma = schedule.alpha_sigma(inner)
    step = ((sigma / alpha) ** (1 / 7)).diff()
    torch.testing.assert_close(step, step.mean().expand_as(step), rtol=1e-7, atol=0)


@pytest.mark.parametrize("n", [2, 5, 18, 40])
def test_on_edms_curve_karras_is_linspace(n: int) -> None:
    """EDM's curve is linear in σ^(1/ρ), so both are its published time steps, to 1e-6 of σ because t_min is 1e-9."""
    (_, karras), (_, line) = (EDM().alpha_sigma(make_grid(name, EDM(), n)) for name in ("karras", "linspace"))
    torch.testing.assert_close(karras, line, rtol=1e-6, atol=0)
    expected = [(80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(n)]
    torch.testing.assert_close(karras, torch.tensor([*expected, 0.0], dtype=D), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "schedule"), NO_FINITE_LAMBDA)
def test_a_grid_in_lambda_is_refused_at_alpha_0(name: str, schedule: str) -> None:
    with pytest.raises(ValueError, match="grid=trailing"):
        make_grid(name, SCHEDULES[schedule], 10)


@pytest.mark.parametrize(("name", "schedule"), [pair for pair in CONTINUOUS if pair not in NO_FINITE_LAMBDA])
def test_continuous_curves(name: str, schedule: str) -> None:
    s = SCHEDULES[schedule]
    for n in (1, 2, 10, 250):
        grid = make_grid(name, s, n)
        assert len(grid) == n + 1
        assert (grid.diff() < 0).all()
        assert float(grid[-1]) == 0
        assert float(grid[0]) == 1 or name == "leading"
    with pytest.raises(ValueError, match=r"sampler\.steps"):
        make_grid(name, s, None)


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (("nonesuch", Linear(), 10), "write one of"),
        (("trailing", Linear(), 1001), "fewer"),
        (("trailing", Linear(), 501, 0.5, 0.0), "fewer"),
        (("trailing", Linear(), 0), "sampler.steps=0: write null, or an integer in"),
        (("trailing", Linear(), 10, 0.5, 0.5), "two different times"),
        (("trailing", Linear(), 10, 1.5, 0.0), "in \\[0, 1\\]"),
        (("trailing", Linear(), 10, math.nan, 0.0), "in \\[0, 1\\]"),
        (("uniform_lambda", Linear(zero_terminal_snr=True), 10), "grid=trailing"),
        (("karras", Flow(), 10), "grid=trailing"),
        (("uniform_lambda", Linear(), 3, 0.0005, 0.0), "different times"),
    ],
)
def test_refusals(arguments: tuple[object, ...], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        make_grid(*arguments)  # type: ignore[arg-type]


def test_uniform_lambda_starts_below_zero_terminal_snr() -> None:
    assert len(make_grid("uniform_lambda", Linear(zero_terminal_snr=True), 10, 0.999, 0.0)) == 11
