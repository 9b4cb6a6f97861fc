"""One contract for all curves; tables and continuous curves against independent implementations of their formulas."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from contracts import NEEDS_A_TABLE, SCHEDULES, TABLES, members, takes
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_lab.schedules import (
    EDM,
    VE,
    VP,
    Cosine,
    Flow,
    Linear,
    ScaledLinear,
    Schedule,
    Sigmoid,
    SubVP,
    Table,
    append_dims_like,
    noise_level,
)

every = pytest.mark.parametrize("name", SCHEDULES)
table = pytest.mark.parametrize("name", TABLES)
D = torch.float64


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=D)


def nodes(schedule: Table) -> torch.Tensor:
    return torch.arange(schedule.steps + 1, dtype=D) / schedule.steps


def inside_cells(schedule: Schedule, fraction: float, count: int = 1000) -> torch.Tensor:
    """Return one time in every cell, outside the tolerance of the nodes."""
    cells = schedule.steps or count
    return (torch.arange(cells, dtype=D) + fraction) / cells


def test_every_concrete_curve_is_covered() -> None:
    assert {type(s) for s in SCHEDULES.values()} == set(members(Schedule, "schedules"))
    assert {Table} == NEEDS_A_TABLE


# ---------------------------------------------------------------------------------------------- contract of all curves


@every
def test_data_is_one_zero(name: str) -> None:
    alpha, sigma = SCHEDULES[name].alpha_sigma(torch.zeros(()))
    assert (alpha, sigma) == (1, 0)
    assert SCHEDULES[name].lam(torch.zeros(())) == math.inf


@table
def test_variance_preserving(name: str) -> None:
    t = torch.cat([nodes(TABLES[name]), *(inside_cells(TABLES[name], f) for f in (0.01, 0.3, 0.9))])
    alpha, sigma = TABLES[name].alpha_sigma(t)
    # A few rounding errors
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(t), rtol=0, atol=1e-15)


@every
def test_lambda_strictly_decreases(name: str) -> None:
    s = SCHEDULES[name]
    ends = torch.arange(1, (s.steps or 1000) + 1, dtype=D) / (s.steps or 1000)
    t = torch.cat([*(inside_cells(s, f) for f in (0.002, 0.25, 0.5, 0.75, 0.998)), ends]).sort().values
    assert (s.lam(t).diff() < 0).all()
    alpha, sigma = s.alpha_sigma(t)
    assert (alpha >= 0).all()
    assert (sigma > 0).all()
    assert (alpha <= 1).all()
    assert (alpha.diff() <= 0).all()
    assert (sigma.diff() >= 0).all()


@every
@settings(deadline=None, max_examples=15)
@given(fraction=st.floats(0.002, 0.998))
def test_time_inverts_lambda(name: str, fraction: float) -> None:
    s = SCHEDULES[name]
    t = inside_cells(s, fraction)
    torch.testing.assert_close(s.time(s.lam(t)), t, rtol=0, atol=1e-9)


@every
def test_time_inverts_lambda_at_nodes_and_ends(name: str) -> None:
    s = SCHEDULES[name]
    t = torch.arange(1, (s.steps or 1000) + 1, dtype=D) / (s.steps or 1000)
    torch.testing.assert_close(s.time(s.lam(t)), t, rtol=0, atol=1e-9)
    assert s.time(f64(math.inf)) == 0
    assert s.time(f64(-math.inf)) == 1
    assert s.time(s.lam(f64(1.0))) == 1


@every
@settings(deadline=None, max_examples=15)
@given(fraction=st.floats(0.05, 0.95))
def test_derivatives_are_those_of_the_curve(name: str, fraction: float) -> None:
    """Central differences inside the cells; h = 1e-3 of the fraction bounds their own error to about 1e-5."""
    s = SCHEDULES[name]
    t = inside_cells(s, fraction)
    h = 1e-4 / (s.steps or 1000)
    plus, minus = s.alpha_sigma(t + h), s.alpha_sigma(t - h)
    for exact, up, down in zip(s.derivatives(t), plus, minus, strict=True):
        torch.testing.assert_close(exact, (up - down) / (2 * h), rtol=2e-5, atol=2e-8)


@every
def test_derivatives_at_t_1(name: str) -> None:
    """α̇ ≤ 0 and σ̇ ≥ 0 are finite at t = 1, also where α(1) = 0."""
    s = SCHEDULES[name]
    d_alpha, d_sigma = s.derivatives(f64(1.0))
    assert d_alpha.isfinite().all()
    assert d_sigma.isfinite().all()
    assert (d_alpha <= 0).all()
    assert (d_sigma >= 0).all()
    if s.zero_terminal_snr:
        assert d_alpha < 0


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    s = SCHEDULES[name]
    t = torch.tensor([[0.5], [1.0]], dtype=dtype)
    result_dtype = torch.promote_types(dtype, torch.float32)
    outs = (*s.alpha_sigma(t), *s.derivatives(t), s.conditioning(t), s.lam(t), s.time(t))
    assert all(o.dtype == result_dtype and o.shape == t.shape for o in outs)
    # the arithmetic is float64 for every dtype of t: the result is the float64 one, rounded once
    for got, want in zip(s.alpha_sigma(t), s.alpha_sigma(t.double()), strict=True):
        assert torch.equal(got, want.to(result_dtype))


@every
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (2, 3), (2, 1, 1, 1)])
def test_shapes(name: str, shape: tuple[int, ...]) -> None:
    s = SCHEDULES[name]
    t = torch.linspace(0.1, 0.9, max(math.prod(shape), 1))[: math.prod(shape)].reshape(shape)
    for out in (*s.alpha_sigma(t), *s.derivatives(t), s.conditioning(t), s.lam(t), s.time(s.lam(t))):
        assert out.shape == shape
    for k, v in zip(s.alpha_sigma(t.flatten()), s.alpha_sigma(t), strict=True):
        assert torch.equal(k.reshape(shape), v)


@every
def test_zero_terminal_snr_is_alpha_0_at_1(name: str) -> None:
    s = SCHEDULES[name]
    assert s.zero_terminal_snr == (float(s.alpha_sigma(f64(1.0))[0]) == 0)
    assert (s.lam(f64(1.0)) == -math.inf) == s.zero_terminal_snr


@every
def test_drift_and_diffusion_integrate_to_the_curve(name: str) -> None:
    """Between two times the forward SDE multiplies the mean by exp ∫f and adds ∫g² exp(2∫f) to the variance.

    By Gauss–Legendre quadrature with 20 points over intervals that contain no node.
    """
    s = SCHEDULES[name]
    points, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(20))
    cell = 1 / (s.steps or 10)
    for k in (0.0, round(0.5 / cell), round(1 / cell) - 2):  # the first cell, one in the middle, the last but one
        a, b = (k + 0.1) * cell, (k + 0.95) * cell
        f, g2 = s.drift_diffusion(a + (b - a) * (points + 1) / 2)
        (alpha_a, sigma_a), (alpha_b, sigma_b) = s.alpha_sigma(f64(a)), s.alpha_sigma(f64(b))
        alpha = s.alpha_sigma(a + (b - a) * (points + 1) / 2)[0]
        torch.testing.assert_close(
            alpha_a * (weights @ f * (b - a) / 2).exp(), alpha_b, rtol=1e-9, atol=0, check_stride=False
        )
        gained = (weights @ (g2 * (alpha_b / alpha).square())) * (b - a) / 2
        torch.testing.assert_close((sigma_a * alpha_b / alpha_a).square() + gained, sigma_b.square(), rtol=1e-8, atol=0)


@every
def test_drift_and_diffusion_are_finite_where_they_can_be(name: str) -> None:
    """At t = 0 they are the limit from above, in every dtype; they are infinite at α = 0 only."""
    s = SCHEDULES[name]
    for dtype in (torch.float16, torch.float32, D):
        t = torch.tensor([0.0, 0.25, 1.0], dtype=dtype)
        f, g2 = s.drift_diffusion(t)
        assert f.dtype == g2.dtype == torch.promote_types(dtype, torch.float32)
        assert f[:2].isfinite().all()
        assert g2[:2].isfinite().all()
        assert (f <= 0).all()
        assert (g2 >= 0).all()
        assert bool(f[2] == -math.inf) == bool(g2[2] == math.inf) == s.zero_terminal_snr
    near = s.drift_diffusion(f64(1e-2 / (s.steps or 1000)))
    for limit, close in zip(s.drift_diffusion(f64(0.0)), near, strict=True):
        torch.testing.assert_close(limit, close, rtol=2e-3, atol=1e-3)


@every
def test_t_min_and_t_eps(name: str) -> None:
    s = SCHEDULES[name]
    assert 0 < s.t_eps <= s.t_min <= 0.5
    assert (s.alpha_sigma(f64(s.t_min))[1] > 0).all()
    if s.steps is not None:
        assert s.t_min == 1 / s.steps
    assert noise_level(s, f64(0.0)).isfinite().all()
    assert s.conditioning(f64(0.0)).isfinite().all()


# ----------------------------------------------------------------------------------------------------------- all tables


@table
def test_float32_times_are_exact_nodes(name: str) -> None:
    s = TABLES[name]
    i = torch.arange(s.steps + 1)
    for t in (i / s.steps, i.float() * (1 / s.steps), 1 - (s.steps - i) / s.steps):
        assert t.dtype == torch.float32
        for got, want in zip(s.alpha_sigma(t), s.alpha_sigma(nodes(s)), strict=True):
            assert torch.equal(got, want.float())
        assert torch.equal(s.conditioning(t), (i - 1).clamp(min=0).float())


@table
def test_times_within_a_thousandth_of_a_cell_are_the_node(name: str) -> None:
    s = TABLES[name]
    t = nodes(s)[1:-1]
    at = s.alpha_sigma(t)
    for near in (-0.99e-3, 0.99e-3):
        for got, want in zip(s.alpha_sigma(t + near / s.steps), at, strict=True):
            assert torch.equal(got, want)
    for off in (-1.1e-3, 1.1e-3):
        moved = s.alpha_sigma(t + off / s.steps)
        assert ((moved[0] - at[0]) * off < 0).all()
        assert ((moved[1] - at[1]) * off > 0).all()


@table
@settings(deadline=None, max_examples=15)
@given(fraction=st.floats(0.002, 0.998))
def test_interpolation(name: str, fraction: float) -> None:
    """σ² linear in (0, 1/T), α linear in a last cell into α = 0, λ linear in all others."""
    s = TABLES[name]
    at, t = nodes(s), inside_cells(s, fraction)
    alpha, sigma = s.alpha_sigma(at)
    got_alpha, got_sigma = s.alpha_sigma(t)
    assert float(got_sigma[0]) ** 2 == pytest.approx(fraction * float(sigma[1]) ** 2, rel=1e-12)
    last = s.steps - 1 if s.zero_terminal_snr else s.steps
    lam = alpha.log() - sigma.log()
    want = (1 - fraction) * lam[1:last] + fraction * lam[2 : last + 1]
    torch.testing.assert_close((got_alpha.log() - got_sigma.log())[1:last], want, rtol=0, atol=1e-12)
    if s.zero_terminal_snr:
        assert float(got_alpha[-1]) == pytest.approx((1 - fraction) * float(alpha[-2]), rel=1e-10)


@table
def test_conditioning(name: str) -> None:
    s = TABLES[name]
    t = torch.cat([inside_cells(s, 0.37), f64(0.0)])
    torch.testing.assert_close(s.conditioning(t), (s.steps * t - 1).clamp(min=0), rtol=0, atol=1e-9)


@table
def test_every_step_keeps_beta_inside_zero_one(name: str) -> None:
    s = TABLES[name]
    bar = s.alpha_sigma(nodes(s))[0].square()
    beta = 1 - bar[1:] / bar[:-1]
    assert (beta > 0).all()
    assert ((beta < 1) | (bar[1:] == 0)).all()


# ------------------------------------------------------------------------------------------- tables against their formulas


def longdouble_bar(beta: np.ndarray) -> np.ndarray:
    return np.cumprod(1 - beta.astype(np.longdouble)).astype(np.float64)


def bar(schedule: Table) -> np.ndarray:
    return schedule.alpha_sigma(nodes(schedule)[1:])[0].square().numpy()


def sigma2(schedule: Table) -> np.ndarray:
    return schedule.alpha_sigma(nodes(schedule)[1:])[1].square().numpy()


@pytest.mark.parametrize("steps", [21, 100, 1000, 4000])
def test_linear(steps: int) -> None:
    i = np.arange(steps, dtype=np.longdouble)
    beta = (np.longdouble("1e-4") + (np.longdouble("0.02") - np.longdouble("1e-4")) * i / (steps - 1)) * 1000 / steps
    want = np.cumprod(1 - beta)
    np.testing.assert_allclose(bar(Linear(steps)), want.astype(float), rtol=1e-12)
    np.testing.assert_allclose(sigma2(Linear(steps)), (1 - want).astype(float), rtol=1e-12)


@pytest.mark.parametrize("steps", [40, 1000])
def test_scaled_linear(steps: int) -> None:
    scale = 1000 / steps
    beta = np.linspace(np.sqrt(8.5e-4 * scale), np.sqrt(0.012 * scale), steps) ** 2
    np.testing.assert_allclose(bar(ScaledLinear(steps)), longdouble_bar(beta), rtol=1e-11)


@pytest.mark.parametrize("steps", [2, 10, 1000])
def test_cosine(steps: int) -> None:
    """Eq. 17: nothing is clipped before the last step, so ᾱ = f(t)/f(0) there; the last β is 0.999."""

    def f(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    want = [f(i / steps) / f(0) for i in range(1, steps)]
    np.testing.assert_allclose(bar(Cosine(steps))[:-1], want, rtol=1e-10)
    assert bar(Cosine(steps))[-1] == pytest.approx(want[-1] * 0.001, rel=1e-10)


@pytest.mark.parametrize(("start", "end", "tau"), [(-3, 3, 1.0), (0, 3, 0.7), (-3.0, 3.0, 0.9)])
def test_sigmoid(start: float, end: float, tau: float) -> None:
    """Chen 2023, algorithm 1."""

    def S(u: float) -> float:
        return 1 / (1 + math.exp(-u / tau))

    want = [(S(end) - S(start + i / 1000 * (end - start))) / (S(end) - S(start)) for i in range(1, 1000)]
    got = bar(Sigmoid(1000, start=start, end=end, tau=tau))
    np.testing.assert_allclose(got[:-1], want, rtol=1e-9)
    assert got[-1] == pytest.approx(want[-1] * 0.001, rel=1e-9)


def test_published_values() -> None:
    assert bar(Linear())[-1] == pytest.approx(4.0358e-5, rel=1e-5)
    assert bar(Cosine())[-1] == pytest.approx(2.4288e-9, rel=1e-4)
    assert 1 / math.sqrt(bar(Cosine())[-1]) == pytest.approx(2.03e4, rel=1e-3)
    assert sigma2(Linear())[0] == pytest.approx(1e-4, rel=1e-13)


def test_other_step_counts_keep_the_linear_curve() -> None:
    """Both ends scale by 1000/T, so ln ᾱ(t) agrees up to the discretization, O(1/T): 5 % at T = 100, 0.5 % at T = 4000."""
    t = f64(0.25, 0.5, 0.75, 1.0)
    want = Linear().alpha_sigma(t)[0].log()
    for steps, margin in ((100, 0.12), (4000, 0.01)):
        got = Linear(steps).alpha_sigma(t)[0].log()
        assert ((got / want - 1).abs() < margin).all()


def test_sigma_is_not_recomputed_from_a_rounded_alpha_bar() -> None:
    """σ recomputed from a bfloat16 ᾱ vanishes for 10 (linear) and 21 (cosine) steps; the table's does not."""
    for schedule, vanishing in ((Linear(), 10), (Cosine(), 21)):
        i = torch.arange(1, 1001) / 1000
        alpha, sigma = schedule.alpha_sigma(i)
        assert int((1 - alpha.square().bfloat16() == 0).sum()) == vanishing
        assert (sigma > 0).all()
        exact = schedule.alpha_sigma(i.double())[1]
        torch.testing.assert_close(sigma.double(), exact, rtol=6e-8, atol=0)


@pytest.mark.parametrize("cls", [Linear, ScaledLinear, Cosine, Sigmoid])
def test_zero_terminal_snr_is_algorithm_1(cls: type[Table]) -> None:
    """Lin et al. 2023: shift √ᾱ so that the last value is 0, then scale so that the first is unchanged."""
    plain, zero = cls(steps=1000), cls(steps=1000, zero_terminal_snr=True)  # type: ignore[call-arg]
    root = np.sqrt(bar(plain).astype(np.longdouble))
    want = (root - root[-1]) * root[0] / (root[0] - root[-1])
    got = zero.alpha_sigma(nodes(zero)[1:])[0].numpy()
    np.testing.assert_allclose(got, want.astype(float), rtol=1e-11, atol=1e-17)
    assert got[-1] == 0
    assert zero.alpha_sigma(f64(1.0))[1] == 1
    np.testing.assert_allclose(sigma2(zero), (1 - want**2).astype(float), rtol=1e-9)


def test_zero_terminal_snr_agrees_with_diffusers() -> None:
    from_diffusers = pytest.importorskip("diffusers.schedulers.scheduling_ddim").rescale_zero_terminal_snr
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=D)
    theirs = (1 - from_diffusers(beta)).cumprod(0).sqrt()
    ours = Linear(zero_terminal_snr=True).alpha_sigma(nodes(Linear())[1:])[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


# -------------------------------------------------------------------------------------------------------- continuous curves

TIMES = (1e-12, 1e-9, 1e-6, 1e-3, 0.03, 0.3, 0.5, 0.9, 0.999, 1.0)


def exact_vp(t: Decimal, shift: int = 1) -> tuple[Decimal, Decimal]:
    m = t * t * Decimal("19.9") / 4 + t * Decimal("0.1") / 2
    ratio2 = shift * shift * ((2 * m).exp() - 1)  # (σ/α)²
    return 1 / (1 + ratio2).sqrt(), (ratio2 / (1 + ratio2)).sqrt()


def exact_sub_vp(t: Decimal) -> tuple[Decimal, Decimal]:
    alpha, sigma = exact_vp(t)
    return alpha, sigma * sigma


def exact_ve(t: Decimal) -> tuple[Decimal, Decimal]:
    return Decimal(1), Decimal("0.01") * (Decimal(5000).ln() * t).exp()


def exact_edm(t: Decimal) -> tuple[Decimal, Decimal]:
    low, high = ((Decimal(v).ln() / 7).exp() for v in ("0.002", "80"))
    return Decimal(1), (low + t * (high - low)) ** 7


def exact_flow(t: Decimal, shift: int = 1) -> tuple[Decimal, Decimal]:
    moved = shift * t / (1 + (shift - 1) * t)
    return 1 - moved, moved


EXACT = {
    "VP": exact_vp,
    "VP-shift": lambda t: exact_vp(t, 3),
    "SubVP": exact_sub_vp,
    "VE": exact_ve,
    "EDM": exact_edm,
    "Flow": exact_flow,
    "Flow-shift": lambda t: exact_flow(t, 3),
}
continuous = pytest.mark.parametrize("name", EXACT)


def test_formulas_are_of_continuous_curves() -> None:
    assert set(EXACT) <= set(SCHEDULES) - set(TABLES)


@continuous
def test_formulas_in_fifty_digits(name: str) -> None:
    """α, σ and λ to a few roundings of float64, from t = 1e-12, where 1 − α² has lost every digit, to t = 1."""
    with localcontext() as context:
        context.prec = 50
        pairs = [EXACT[name](Decimal(t)) for t in TIMES]
        want = [[float(v) for v in pair] for pair in pairs]
        lam = [float((a / s).ln()) if a else -math.inf for a, s in pairs]
    alpha, sigma = SCHEDULES[name].alpha_sigma(f64(*TIMES))
    np.testing.assert_allclose(torch.stack([alpha, sigma], 1).numpy(), want, rtol=3e-15)
    np.testing.assert_allclose(SCHEDULES[name].lam(f64(*TIMES)).numpy(), lam, rtol=1e-13, atol=1e-13)


@continuous
def test_derivatives_in_fifty_digits(name: str) -> None:
    """Central differences with h = t/10¹² in fifty digits, so that their own error is below 1e-20."""
    at = TIMES[:-1]
    got = torch.stack(SCHEDULES[name].derivatives(f64(*at)), 1).numpy()
    with localcontext() as context:
        context.prec = 50
        for row, t in zip(got, (Decimal(t) for t in at), strict=True):
            h = t / 10**12
            up, down = EXACT[name](t + h), EXACT[name](t - h)
            np.testing.assert_allclose(
                row, [float((u - d) / (2 * h)) for u, d in zip(up, down, strict=True)], rtol=1e-13
            )


def test_drift_and_diffusion_are_those_of_the_papers() -> None:
    """Song et al. 2021, eq. 11 (vp), eq. 10 with σ geometric (ve), eq. 12 (sub_vp); f = −1/(1 − t), g² = 2t/(1 − t) for flow."""
    times = f64(0.0, *TIMES)
    t = times.clamp(min=1e-12)  # t = 0 is evaluated at 0+
    beta = 0.1 + 19.9 * t
    m = -(t.square() * 19.9 / 4 + t * 0.1 / 2)
    sigma = EDM().alpha_sigma(t)[1]
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    growth = 2 * math.log(50 / 0.01) * (0.01 * 5000**t).square()
    for schedule, f, g2 in (
        (VP(), -beta / 2, beta),
        (SubVP(), -beta / 2, beta * -torch.expm1(4 * m)),
        (VE(), torch.zeros_like(t), growth),
        (EDM(), torch.zeros_like(t), 14 * (high - low) * sigma ** (13 / 7)),
        (Flow(), -1 / (1 - t), 2 * t / (1 - t)),
    ):
        got = schedule.drift_diffusion(times)
        torch.testing.assert_close(got[0], f, rtol=1e-11, atol=0)
        torch.testing.assert_close(got[1], g2, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize(("schedule", "sigma_min"), [(VE(), 0.01), (EDM(), 0.002)])
def test_exploding_curves_jump_at_data(schedule: Schedule, sigma_min: float) -> None:
    """σ(0) = 0 and σ(0+) = σ_min. A λ above that of σ_min, which no time has, maps to 0+, and only +∞ maps to data."""
    near = schedule.alpha_sigma(f64(1e-300, schedule.t_eps, 1e-9))[1]
    np.testing.assert_allclose(near.numpy(), sigma_min, rtol=1e-7)
    lam = -math.log(sigma_min)
    t = schedule.time(f64(lam - 1e-9, lam, lam + 1, 1e6, math.inf, -100, -math.inf))
    assert ((t[:4] > 0) & (t[:4] < 1e-8)).all()
    assert t[4:].tolist() == [0, 1, 1]
    assert float(schedule.conditioning(f64(0.0))) == pytest.approx(math.log(sigma_min) / 4, rel=1e-6)
    torch.testing.assert_close(schedule.alpha_sigma(t[:4])[1], torch.full((4,), sigma_min, dtype=D), rtol=1e-8, atol=0)


@pytest.mark.parametrize("schedule", [VP(), VP(shift=3.0), SubVP(), Flow(), Flow(shift=3.0)])
def test_other_curves_reach_data(schedule: Schedule) -> None:
    lam = f64(5.0, 20.0, 300.0, math.inf)
    t = schedule.time(lam)
    assert (t.diff() <= 0).all()
    assert t[-1] == 0
    assert (t[:3] > 0).all()
    assert float(schedule.alpha_sigma(f64(1e-300))[1]) < 1e-140
    torch.testing.assert_close(schedule.lam(t)[0], lam[0], rtol=1e-9, atol=0)


@continuous
def test_conditioning_of_continuous_curves(name: str) -> None:
    s, t = SCHEDULES[name], f64(0.0, *TIMES)
    if name in ("VE", "EDM"):
        want = s.alpha_sigma(t.clamp(min=1e-12))[1].log() / 4
    else:
        want = 999 * (s.alpha_sigma(t)[1] if name == "Flow-shift" else t)
    torch.testing.assert_close(s.conditioning(t), want, rtol=1e-12, atol=1e-12)


def test_vp_is_the_limit_of_ddpms_chain() -> None:
    """β_i = β(i/T)/T, so ln α of the linear table tends to VP's as 1/T: four times the steps, a quarter of the difference."""
    t = f64(0.1, 0.5, 1.0)
    gaps = [(Linear(steps).lam(t) - VP().lam(t)).abs() for steps in (1000, 4000)]
    torch.testing.assert_close(gaps[0] / gaps[1], torch.full((3,), 4.0, dtype=D), rtol=0.05, atol=0)
    assert (gaps[1] < 0.01).all()


def test_a_network_of_linear_works_on_vp_and_back() -> None:
    """At equal t, σ/α of DDPM's 1000 steps and of the continuous curve differ by less than 4 %, and the conditioning by at most
    one of 1000 steps, so that a network trained on one can be sampled on the other with schedule=."""
    t = torch.arange(10, 1001, dtype=D) / 1000
    assert ((Linear().lam(t) - VP().lam(t)).abs() < 0.04).all()
    assert ((Linear().conditioning(t) - VP().conditioning(t)).abs() <= 1).all()


# ---------------------------------------------------------------------------------------------------------------- SNR shift


@pytest.mark.parametrize("cls", [c for c in members(Schedule, "schedules") if takes(c, "shift")])
def test_shift_is_a_factor_on_sigma_over_alpha(cls: type[Schedule]) -> None:
    """λ' = λ − ln s at every time and α² + σ² = 1 is preserved; a shift of 1 changes no bit."""
    plain, same, moved = cls(), cls(shift=1.0), cls(shift=2.5)  # type: ignore[call-arg]
    t = torch.arange(1, 1000, dtype=D) / 1000
    torch.testing.assert_close(moved.lam(t), plain.lam(t) - math.log(2.5), rtol=0, atol=1e-11)
    for a, b in zip(plain.alpha_sigma(t), same.alpha_sigma(t), strict=True):
        assert torch.equal(a, b)
    alpha, sigma = moved.alpha_sigma(t)
    if cls is Flow:
        torch.testing.assert_close(alpha + sigma, torch.ones_like(t), rtol=0, atol=1e-15)
    else:
        torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones_like(t), rtol=0, atol=1e-15)


def test_shift_with_zero_terminal_snr() -> None:
    """α(1) = 0 and σ(1) = 1 are unchanged; λ shifts at all other times."""
    s = Cosine(zero_terminal_snr=True, shift=4.0)
    assert s.zero_terminal_snr
    assert [float(v) for v in s.alpha_sigma(f64(1.0))] == [0, 1]
    torch.testing.assert_close(
        s.lam(f64(0.5)), Cosine(zero_terminal_snr=True).lam(f64(0.5)) - math.log(4), rtol=0, atol=1e-12
    )


def test_shift_is_hoogebooms_on_the_cosine() -> None:
    """log SNR = −2 log tan(πt/2) + 2 log(64/d) for images of d pixels (simple diffusion, section 3.1): shift = d/64."""
    t = torch.arange(1, 1000, dtype=D) / 1000
    for d in (32, 128, 256):
        want = -2 * (math.pi * t / 2).tan().log() + 2 * math.log(64 / d)
        torch.testing.assert_close(2 * Cosine(offset=0.0, shift=d / 64).lam(t), want, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------- diffusers


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_has_the_sigmas_of_diffusers(shift: float) -> None:
    """Their networks are conditioned on 1000·σ, ours on 999·σ, as on the score SDE's curves."""
    peer = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(shift=shift)
    t = torch.arange(1000, 0, -1, dtype=D) / 1000
    ours = Flow(shift)
    torch.testing.assert_close(ours.alpha_sigma(t)[1].float(), peer.sigmas, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.conditioning(t).float() / 0.999, peer.timesteps, rtol=1e-6, atol=0)


def test_edm_has_the_sigmas_of_diffusers() -> None:
    peer = pytest.importorskip("diffusers").EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0)
    peer.set_timesteps(18)
    t = 1 - torch.arange(18, dtype=D) / 17
    t[-1] = EDM().t_min
    torch.testing.assert_close(EDM().alpha_sigma(t)[1].float(), peer.sigmas[:-1], rtol=2e-6, atol=0)
    torch.testing.assert_close(EDM().conditioning(t).float(), peer.timesteps, rtol=2e-6, atol=1e-6)


def test_ve_has_the_sigmas_of_diffusers() -> None:
    """Their `discrete_sigmas`; their `sigmas` are those of t ∈ [1e-5, 1]."""
    peer = pytest.importorskip("diffusers").ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0)
    peer.set_timesteps(100)
    peer.set_sigmas(100)
    t = torch.linspace(0, 1, 100, dtype=D).clamp(min=1e-12)
    torch.testing.assert_close(VE().alpha_sigma(t)[1].float(), peer.discrete_sigmas, rtol=1e-5, atol=0)
    torch.testing.assert_close(VE().alpha_sigma(peer.timesteps.double())[1].float(), peer.sigmas, rtol=1e-5, atol=0)


# -------------------------------------------------------------------------------------------------------- errors, helpers


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: Linear(20), "steps=21"),
        (lambda: Linear(beta_start=0.03), "beta_start"),
        (lambda: Linear(1), r"steps=1: write an integer in \[2, 100000\]"),
        (lambda: ScaledLinear(12), "steps=13"),
        (lambda: Cosine(1), r"steps=1: write an integer in \[2, 100000\]"),
        (lambda: Cosine(beta_max=1.0), "0.999"),
        (lambda: Sigmoid(start=3, end=-3), "start < end"),
        (lambda: Sigmoid(tau=0), r"tau=0: write a number in \[0.01, 100\]"),
        (lambda: Cosine(shift=0.0), r"shift=0.0: write a number in \[0.001, 1000\]"),
        (lambda: Flow(shift=-1.0), "shift=-1.0"),
        (lambda: VP(shift=math.inf), "shift=inf"),
        (lambda: VP(beta_min=0.0), r"beta_min=0.0: write a number in \(0, 100\]"),
        (lambda: SubVP(beta_max=0.01), "beta_min <= beta_max"),
        (lambda: VP(beta_max=math.nan), "0.1 and 20"),
        (lambda: VE(sigma_min=0.0), r"sigma_min=0.0: write a number in \[1e-6, 1e6\]"),
        (lambda: VE(sigma_min=60.0), "sigma_min < sigma_max"),
        (lambda: EDM(sigma_max=math.inf), "sigma_max=inf"),
        (lambda: EDM(rho=0.0), r"rho=0.0: write a number in \[0.1, 100\]"),
        (lambda: Table(torch.tensor([-0.1, -0.1, -0.3])), "decreasing"),
        (lambda: Table(torch.tensor([0.0, -0.3])), "decreasing"),
        (lambda: Table(torch.tensor([-0.3])), "at least 2"),
    ],
)
def test_errors_name_the_remedy(make: object, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        make()  # type: ignore[operator]


def test_the_smallest_number_of_linear_steps() -> None:
    assert Linear(21).steps == 21
    assert ScaledLinear(13).steps == 13


def test_two_steps_with_zero_terminal_snr() -> None:
    """The smallest table has a first and a last cell and no cell with a finite λ at both ends."""
    s = Cosine(2, zero_terminal_snr=True)
    t = f64(0.1, 0.5, 0.6, 0.9, 1.0)
    torch.testing.assert_close(s.time(s.lam(t)), t, rtol=0, atol=1e-9)
    assert (s.lam(t).diff() < 0).all()
    assert all(x.isfinite().all() for x in (*s.alpha_sigma(t), *s.derivatives(t)))


def test_append_dims_like() -> None:
    x = torch.zeros(2, 3, 4, 5)
    assert append_dims_like(torch.tensor(0.5, dtype=D), x).shape == ()
    assert append_dims_like(torch.tensor([0.5, 1.0], dtype=D), x).shape == (2, 1, 1, 1)
    assert append_dims_like(torch.tensor([0.5, 1.0], dtype=D), x).dtype == x.dtype
