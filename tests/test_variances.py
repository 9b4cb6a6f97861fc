"""Reverse variances: closed forms, strided pairs and shapes; learned, analytic and second heads; the optimal trajectory."""

import itertools
import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from contracts import SCHEDULES, VARIANCES
from oracle import Mixture, WithHead

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.gaussian import posterior
from diffusion_lab.objectives import Objective, PredNoise, PredV, PredX0
from diffusion_lab.schedules import Cosine, Linear, Schedule
from diffusion_lab.variances import NPR, SN, Analytic, FixedLarge, FixedSmall, Learned
from diffusion_lab.variances.trajectory import costs, shortest

D = torch.float64
PLAIN = sorted(n for n, c in VARIANCES.items() if not c.extra_channels and n in {"FixedSmall", "FixedLarge"})


def prediction(batch: int = 2, dtype: torch.dtype = D) -> Prediction:
    x = torch.randn(batch, 3, 4, 5, dtype=dtype)
    return Prediction(x, x, x)


def test_fixed_variances() -> None:
    assert {"FixedSmall", "FixedLarge"} <= set(VARIANCES)
    assert VARIANCES["FixedLarge"].ancestral_only
    assert not VARIANCES["FixedSmall"].ancestral_only


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("shape", [(), (2,)])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_broadcastable_to_the_state(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """With one time for all images or one for each, the result is broadcastable to x_t, in its dtype."""
    p = prediction(dtype=dtype)
    t, s = torch.full(shape, 0.5, dtype=D), torch.full(shape, 0.25, dtype=D)
    got = VARIANCES[name]()(Linear(), t, s, p, floor=posterior(Linear(), t, s).variance)
    assert (got * p.x0).shape == p.x0.shape
    assert got.dtype == dtype
    assert (torch.as_tensor(got) > 0).all()


def test_floor_as_a_number() -> None:
    p, t, s = prediction(), torch.tensor(0.5), torch.tensor(0.25)
    assert float(FixedSmall()(Linear(), t, s, p)) == 0
    assert float(FixedSmall()(Linear(), t, s, p, floor=0.25)) == 0.25


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("stride", [(1.0, 0.975), (1.0, 0.5), (0.5, 0.25), (0.05, 0.025)])
def test_fixed_large_is_the_forward_variance_of_the_pair(schedule: str, stride: tuple[float, float]) -> None:
    curve, p = SCHEDULES[schedule], prediction()
    t, s = (torch.tensor(v, dtype=D) for v in stride)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = curve.alpha_sigma(t), curve.alpha_sigma(s)
    want = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
    large = FixedLarge()(curve, t, s, p)
    assert float(large) == pytest.approx(float(want), rel=1e-12)
    assert float(posterior(curve, t, s).variance) < float(large)


@pytest.mark.parametrize("n", [10, 25, 50, 100])
def test_strided_pairs_are_those_of_the_respaced_chain(n: int) -> None:
    """The variances are those of the chain built from β' = 1 − ᾱ_t/ᾱ_s of the kept times (Nichol & Dhariwal 2021)."""
    kept = torch.linspace(1, 1000, n).round().long()
    bar = torch.cat([torch.ones(1, dtype=D), (1 - torch.linspace(1e-4, 0.02, 1000, dtype=D)).cumprod(0)[kept - 1]])
    beta = 1 - bar[1:] / bar[:-1]
    small = (1 - bar[:-1]) / (1 - bar[1:]) * beta
    t, s = kept.double() / 1000, torch.cat([torch.zeros(1, dtype=D), kept[:-1].double() / 1000])
    p = prediction(batch=n)

    def flat(v: Any) -> torch.Tensor:
        return torch.as_tensor(v).flatten()

    torch.testing.assert_close(flat(FixedLarge()(Linear(), t, s, p)), beta, rtol=1e-9, atol=0)
    floor = posterior(Linear(), t, s).variance
    torch.testing.assert_close(flat(FixedSmall()(Linear(), t, s, p, floor=floor)), small, rtol=1e-9, atol=0)


def test_fixed_variances_are_exact_for_constant_and_standard_normal_data() -> None:
    """x_0 ~ N(0, v): Var[x_s|x_t] = σ̃² + c_0² v σ_t²/(α_t²v + σ_t²) is σ̃² at v = 0 and σ²_{t|s} at v = 1 (Ho 2020, 3.2)."""
    t, s = torch.tensor(0.6, dtype=D), torch.tensor(0.5, dtype=D)
    (alpha, sigma), q, p = Cosine().alpha_sigma(t), posterior(Cosine(), t, s), prediction()
    for v, variance in ((0.0, FixedSmall()), (1.0, FixedLarge())):
        right = q.variance + q.c0**2 * v * sigma**2 / (alpha**2 * v + sigma**2)
        assert float(variance(Cosine(), t, s, p, floor=q.variance)) == pytest.approx(float(right), rel=1e-10)


# ------------------------------------------------------------------------------------------------ learned


def learned(v: Any, dtype: torch.dtype = D) -> Prediction:
    """Return a prediction with the extra channels v, a tensor or a constant."""
    v = v if isinstance(v, torch.Tensor) else torch.full((2, 3, 4, 5), float(v), dtype=dtype)
    return Prediction(torch.zeros_like(v), torch.zeros_like(v), torch.zeros_like(v), v)


@pytest.mark.parametrize("pair", [(1000, 999), (1000, 900), (500, 499), (40, 1), (3, 2), (2, 1)])
@pytest.mark.parametrize("v", [-3.0, -1.0, 0.0, 0.3, 1.0, 2.0])
def test_learned_against_the_published_formula(pair: tuple[int, int], v: float) -> None:
    """exp(f log β' + (1 − f) log β̃') with f = (v + 1)/2 in NumPy from β (Nichol & Dhariwal 2021, eq. 15); for strided pairs from
    the respaced chain."""
    beta = np.linspace(1e-4, 0.02, 1000)
    bar = np.cumprod(1 - beta)
    i, j = pair
    large = 1 - bar[i - 1] / bar[j - 1]
    small = large * (1 - bar[j - 1]) / (1 - bar[i - 1])
    f = (v + 1) / 2
    want = np.exp(f * np.log(large) + (1 - f) * np.log(small))
    t, s = torch.tensor(i / 1000, dtype=D), torch.tensor(j / 1000, dtype=D)
    floor = posterior(Linear(), t, s).variance
    got = Learned()(Linear(), t, s, learned(v), floor)
    assert got.shape == (2, 3, 4, 5)
    assert got.flatten()[0].item() == pytest.approx(want, rel=1e-9)
    single = Learned()(Linear(), t, s, learned(v, torch.float32), floor)
    assert single.dtype == torch.float32
    assert single.flatten()[0].item() == pytest.approx(want, rel=2e-6)


def test_learned_bounds_are_the_fixed_variances() -> None:
    t, s = torch.tensor([0.4, 0.9], dtype=D), torch.tensor([0.3, 0.5], dtype=D)  # one pair for each image
    for curve in SCHEDULES.values():
        floor, p = posterior(curve, t, s).variance, prediction()
        low, high = (Learned()(curve, t, s, learned(v), floor) for v in (-1, 1))
        torch.testing.assert_close(low, FixedSmall()(curve, t, s, p, floor).expand_as(low), rtol=1e-12, atol=0)
        torch.testing.assert_close(high, FixedLarge()(curve, t, s, p, floor).expand_as(high), rtol=1e-9, atol=0)


def test_the_step_into_data() -> None:
    """At s = 0 the learned variance lies between σ̃² of the pair (2, 1) and σ²_{1|0} = 1 − ᾱ_1; all others equal the floor."""
    one, two, zero = (torch.tensor(k / 1000, dtype=D) for k in (1, 2, 0))
    floor = posterior(Linear(), two, one).variance
    assert float(Learned()(Linear(), one, zero, learned(1.0), floor).max()) == pytest.approx(1e-4, rel=1e-9)
    assert float(Learned()(Linear(), one, zero, learned(-1.0), floor).max()) == pytest.approx(float(floor), rel=1e-12)
    for variance, p in (
        (FixedLarge(), prediction()), (Analytic([1.0], [0.3]), prediction()), (SN(), learned(0.9)), (NPR(), learned(0.9)),
    ):  # fmt: skip
        got = variance(Linear(), one, zero, p, floor)
        torch.testing.assert_close(got, floor.expand_as(got), rtol=1e-12, atol=0)


def test_the_log_variance_is_exact_where_the_variance_underflows() -> None:
    """1e-60 underflows in float32; its logarithm is exact to 7 digits."""
    t, s = torch.tensor(0.002, dtype=D), torch.tensor(0.001, dtype=D)
    tiny, p = torch.tensor(1e-60, dtype=D), learned(-1.0, torch.float32)
    assert float(Learned().log(Linear(), t, s, p, tiny).mean()) == pytest.approx(-60 * math.log(10), rel=1e-6)
    v = torch.tensor([-1.0, 0.2, 4.0]).reshape(1, 3, 1, 1)
    floor = posterior(Linear(), t, s).variance
    log, value = (f(Linear(), t, s, learned(v), floor) for f in (Learned().log, Learned()))
    torch.testing.assert_close(log.exp(), value, rtol=2e-6, atol=0)


def test_gradient_of_the_learned_log_variance() -> None:
    """∂ ln σ²/∂v = ½ ln(σ²_{t|s}/σ̃²)."""
    t, s = torch.tensor(0.5, dtype=D), torch.tensor(0.4, dtype=D)
    v = torch.zeros(1, 1, 2, 2, dtype=D, requires_grad=True)
    floor = posterior(Linear(), t, s).variance
    (slope,) = torch.autograd.grad(Learned().log(Linear(), t, s, learned(v), floor).sum(), v)
    large = FixedLarge()(Linear(), t, s, learned(v), floor)
    torch.testing.assert_close(slope, (0.5 * (large / floor).log()).expand_as(slope), rtol=1e-9, atol=0)


def test_learned_errors() -> None:
    t, s = torch.tensor(0.5, dtype=D), torch.tensor(0.4, dtype=D)
    with pytest.raises(ValueError, match="train with variance=learned"):
        Learned()(Linear(), t, s, prediction(), 0.1)
    with pytest.raises(ValueError, match=r"gives 1 of them for images of 3"):
        Learned()(Linear(), t, s, prediction()._replace(extra=torch.zeros(2, 1, 4, 5, dtype=D)), 0.1)
    with pytest.raises(ValueError, match="that of the next pair"):
        Learned()(Linear(), t, s, learned(0.0))
    with pytest.raises(ValueError, match="hybrid, vlb"):
        Learned(loss="mse")
    for variance, kinds in (
        (Learned(), ("sn", None)),
        (SN(), ("npr", "learned", None)),
        (NPR(), ("sn", "learned", None)),
    ):
        variance.check(object())  # without the attribute `extra` the check is left to the first call
        variance.check(type("Net", (), {"extra": variance.kind}))
        for kind in kinds:
            with pytest.raises(ValueError, match=f"variance={variance.kind} needs extra channels"):
                variance.check(type("Net", (), {"extra": kind}))


# ------------------------------------------------------------------------------------------------ analytic and second heads

MIXTURE = Mixture(torch.tensor([-0.6, 0.5]).reshape(2, 1, 1, 1), torch.tensor([0.1, 0.3]), torch.tensor([0.3, 0.7]))


def gaussian_moment(curve: Schedule, t: torch.Tensor, var: float) -> torch.Tensor:
    """Return E ε̂² of the optimal network for N(m, var): σ²/(α² var + σ²)."""
    alpha, sigma = curve.alpha_sigma(t)
    return sigma**2 / (alpha**2 * var + sigma**2)


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_analytic_is_the_covariance_of_the_step_for_gaussian_data(schedule: str, eta: float) -> None:
    """Var[x_s | x_t] for x_s = α_s x_0 + √(σ_s² − η²σ̃²) (x_t − α_t x_0)/σ_t + noise by regression, from the joint second moments
    of (x_0, x_t), independently of the formula for c."""
    curve, var = SCHEDULES[schedule], 0.3
    fit = torch.arange(1, 41, dtype=D) / 40
    analytic = Analytic(fit, gaussian_moment(curve, fit, var))
    for a, b in ((1.0, 0.975), (0.9, 0.3), (0.5, 0.475), (0.05, 0.025)):
        t, s = torch.tensor(a, dtype=D), torch.tensor(b, dtype=D)
        (alpha, sigma), (alpha_s, sigma_s) = curve.alpha_sigma(t), curve.alpha_sigma(s)
        floor = eta**2 * posterior(curve, t, s).variance
        slope = alpha_s - (sigma_s**2 - floor).sqrt() * alpha / sigma
        residual = var - (alpha * var) ** 2 / (alpha**2 * var + sigma**2)
        got = analytic(curve, t, s, prediction(), floor)
        end = curve.zero_terminal_snr and a == 1  # at α = 0 c is that of the previous fitted time
        assert float(got) == pytest.approx(float(floor + slope**2 * residual), rel=0.06 if end else 1e-7)
        if eta == 1:
            total = alpha**2 * var + sigma**2  # at η = 1 also from the marginal of x_s
            cross = alpha_s * alpha * var + alpha / alpha_s * sigma_s**2
            want = alpha_s**2 * var + sigma_s**2 - cross**2 / total
            assert float(got) == pytest.approx(float(want), rel=0.06 if end else 1e-6)


def test_analytic_between_and_beyond_its_times() -> None:
    """c is exact at the fitted times and linear between them; below the first the moment is constant, above the last c is."""
    curve, fit = Cosine(), torch.tensor([0.2, 0.4, 0.8], dtype=D)
    moments = gaussian_moment(curve, fit, 0.3)
    analytic = Analytic(fit, moments)
    alpha, sigma = curve.alpha_sigma(fit)
    at = (sigma / alpha) ** 2 * (1 - moments)
    torch.testing.assert_close(analytic.covariance(curve, fit), at, rtol=1e-12, atol=0)
    t = torch.tensor([[0.25, 0.6], [0.8, 1.0]], dtype=D)
    want = torch.stack([0.75 * at[0] + 0.25 * at[1], 0.5 * at[1] + 0.5 * at[2], at[2], at[2]]).reshape(2, 2)
    torch.testing.assert_close(analytic.covariance(curve, t), want, rtol=1e-9, atol=0)
    low = torch.tensor(0.05, dtype=D)
    alpha, sigma = curve.alpha_sigma(low)
    assert float(analytic.covariance(curve, low)) == pytest.approx(
        float((sigma / alpha) ** 2 * (1 - moments[0])), rel=1e-9
    )
    assert float(Analytic([0.5], [0.2]).covariance(curve, torch.tensor(0.9, dtype=D))) == pytest.approx(
        float(Analytic([0.5], [0.2]).covariance(curve, torch.tensor(0.5, dtype=D))), rel=1e-12
    )


@pytest.mark.parametrize("moments", [[2.0, 2.0], [-5.0, -5.0]])
def test_analytic_clips_c_to_0_and_1(moments: list[float]) -> None:
    c = Analytic([0.5, 1.0], moments).covariance(Linear(), torch.tensor([0.5, 0.7, 1.0], dtype=D))
    assert (c == (0 if moments[0] > 1 else 1)).all()


def test_analytic_errors() -> None:
    for times, moments, remedy in (
        (None, None, "fit_variance.py"), ([0.5], [0.1, 0.2], "as many"), ([], [], "at least one"),
        ([0.0], [1.0], r"times=\[0.0\]"), ([0.5, 0.4], [1.0, 1.0], "increase"), ([0.5, 1.2], [1.0, 1.0], r"in \(0, 1\]"),
        ([0.5], [math.nan], r"moments=\[nan\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=remedy):
            Analytic(times, moments)


@pytest.mark.parametrize("objective", [PredNoise(), PredX0(), PredV()])
@pytest.mark.parametrize("kind", ["sn", "npr"])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_second_heads_recover_the_true_covariance(objective: Objective, kind: str, clip: float | None) -> None:
    """With a closed-form head on mixture data σ² = floor + (…)² Var[x_0 | x_t] of each element, to 1e-9, for every objective, and
    with clipping too, because SN uses the unclipped ε̂."""
    curve, variance = Cosine(), {"sn": SN(), "npr": NPR()}[kind]
    den = Denoiser(WithHead(MIXTURE, curve, objective, kind), curve, objective, clip=clip)
    x = torch.linspace(-2, 2, 9, dtype=D).reshape(-1, 1, 1, 1)
    for a, b in ((0.9, 0.8), (0.6, 0.2), (0.1, 0.05)):
        t, s = torch.tensor(a, dtype=D), torch.tensor(b, dtype=D)
        (alpha, sigma), (alpha_s, sigma_s) = curve.alpha_sigma(t), curve.alpha_sigma(s)
        p, true = den(x, t), MIXTURE.spread(x, alpha, sigma)
        assert clip is None or not torch.equal(p.noise, p.unclipped)
        for eta in (0.0, 0.5, 1.0):
            floor = eta**2 * posterior(curve, t, s).variance
            want = floor + (alpha_s - (sigma_s**2 - floor).sqrt() * alpha / sigma) ** 2 * true
            torch.testing.assert_close(variance(curve, t, s, p, floor), want, rtol=1e-9, atol=0)


def test_second_heads_clip_each_element() -> None:
    """c is clipped to [0, 1]: a head out of range gives the floor, or floor + gain."""
    t, s = torch.tensor(0.6, dtype=D), torch.tensor(0.5, dtype=D)
    v = torch.tensor([-1.0, 0.0, 0.01, 50.0], dtype=D).reshape(1, 4, 1, 1)
    (alpha, sigma), floor = Linear().alpha_sigma(t), posterior(Linear(), t, s).variance
    got = NPR()(Linear(), t, s, learned(v), floor).flatten()
    gain = posterior(Linear(), t, s).c0 ** 2
    want = floor + gain * torch.stack([floor * 0, floor * 0, 0.01 * sigma**2 / alpha**2, floor * 0 + 1])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("name", sorted(VARIANCES))
def test_every_variance_is_finite_at_alpha_0_and_at_the_first_node(name: str, dtype: torch.dtype) -> None:
    """At α(1) = 0 and with a head of 0 the variance is finite and at least the floor."""
    arguments = {"Analytic": ([0.001, 0.5, 1.0], [0.999, 0.5, 1.0])}.get(name, ())
    variance, zero = VARIANCES[name](*arguments), torch.zeros(2, 3, 4, 5, dtype=dtype)
    for curve in SCHEDULES.values():
        for a, b in ((1.0, 0.975), (1.0, 0.025), (0.05, 0.025)):
            t, s = torch.tensor(a, dtype=D), torch.tensor(b, dtype=D)
            floor = posterior(curve, t, s).variance
            got = variance(curve, t, s, Prediction(zero, zero, zero, zero), floor)
            assert got.dtype == dtype
            assert (got * zero).shape == zero.shape
            assert got.isfinite().all()
            assert (got >= floor.to(dtype) * (1 - 1e-6)).all()


# ------------------------------------------------------------------------------------------------ trajectory


def fitted(curve: Schedule, var: float = 0.3, count: int = 20) -> Analytic:
    fit = torch.arange(1, count + 1, dtype=D) / count
    return Analytic(fit, gaussian_moment(curve, fit, var))


def test_the_shortest_path_against_brute_force() -> None:
    """Over every subset of 9 nodes, with the costs of a fit and with random costs."""
    nodes = torch.arange(1, 10, dtype=D) / 9
    random = torch.rand(9, 9, dtype=D, generator=torch.Generator().manual_seed(1)).triu(1)
    random = random.masked_fill(~torch.ones(9, 9).triu(1).bool(), torch.inf)
    for table in (costs(fitted(Cosine(9), count=9), Cosine(9), nodes), random):
        for edges in range(1, 9):
            every = {
                (0, *inner, 8): sum(float(table[a, b]) for a, b in itertools.pairwise((0, *inner, 8)))
                for inner in itertools.combinations(range(1, 8), edges - 1)
            }
            path = tuple(shortest(table, edges).tolist())
            assert every[path] == pytest.approx(min(every.values()), rel=1e-12)


def test_the_cost_of_a_step_is_its_term_of_the_bound() -> None:
    """½ ln(σ²/σ̃²) is E KL(q(x_s|x_t,x_0) ‖ p) for the optimal network and variance. For N(0, v) the expected squared distance of
    the means is c_0² v σ²/(α²v + σ²)."""
    curve, nodes, var = Linear(40), torch.arange(1, 41, dtype=D) / 40, 0.3
    table = costs(fitted(curve, var, 40), curve, nodes)
    assert table.isinf().sum() == 40 * 41 / 2
    for i, j in ((0, 1), (0, 39), (10, 30), (38, 39)):
        q = posterior(curve, nodes[j], nodes[i])
        alpha, sigma = curve.alpha_sigma(nodes[j])
        gap = q.c0**2 * var * sigma**2 / (alpha**2 * var + sigma**2)

        def divergence(v: float, small: float = float(q.variance), gap: float = float(gap)) -> float:
            return 0.5 * (math.log(v / small) - 1 + (small + gap) / v)

        best = float(q.variance + gap)
        assert float(table[i, j]) == pytest.approx(divergence(best), rel=1e-7)
        assert divergence(best) < min(divergence(0.99 * best), divergence(1.01 * best))


def test_costs_against_the_published_form() -> None:
    """The authors sum ln(1 − (1 − ᾱ_t/ᾱ_s) m_t/(1 − ᾱ_t)) over a path. This differs from the sum of ln(σ²/σ̃²) by terms of the two
    ends only, so differences between paths with the same ends agree."""
    curve, fit = Linear(40), fitted(Linear(40), 0.3, 40)
    table = costs(fit, curve, fit.times)
    bar = curve.alpha_sigma(fit.times)[0] ** 2

    def theirs(path: list[int]) -> float:
        return sum(
            math.log(1 - (1 - float(bar[j] / bar[i])) * float(fit.moments[j] / (1 - bar[j])))
            for i, j in itertools.pairwise(path)
        )

    def ours(path: list[int]) -> float:
        return sum(2 * float(table[i, j]) for i, j in itertools.pairwise(path))

    base = [0, 39]
    for path in ([0, 3, 39], [0, 10, 20, 39], list(range(40))):
        assert ours(path) - ours(base) == pytest.approx(theirs(path) - theirs(base), abs=1e-8)


def test_the_trajectory_of_1000_nodes_is_fast() -> None:
    """50 of 1,000 nodes take a fraction of a second; 60 s would mean that the search is not vectorized."""
    curve, begin = Linear(), time.process_time()
    fit = fitted(curve, count=1000)
    path = shortest(costs(fit, curve, fit.times), 49)
    assert time.process_time() - begin < 60
    assert len(path) == 50
    assert (path.diff() > 0).all()
    assert (int(path[0]), int(path[-1])) == (0, 999)
