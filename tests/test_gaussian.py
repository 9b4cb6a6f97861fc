"""Transitions and posteriors against Bayes' rule on the joint covariance; KL and the discretized decoder."""

import numpy as np
import pytest
import torch
from contracts import SCHEDULES
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from diffusion_lab.gaussian import discretized_log_likelihood, kl, posterior, transition
from diffusion_lab.schedules import Cosine, Linear, Schedule

D = torch.float64
every = pytest.mark.parametrize("name", SCHEDULES)
unit = st.floats(0.003, 1.0)


def ab(schedule: Schedule, t: float) -> tuple[float, float]:
    alpha, sigma = schedule.alpha_sigma(torch.tensor(t, dtype=D))
    return float(alpha), float(sigma)


def f64(t: float) -> torch.Tensor:
    return torch.tensor(t, dtype=D)


@every
@settings(deadline=None, max_examples=15)
@given(a=unit, b=unit)
def test_posterior_is_bayes_rule(name: str, a: float, b: float) -> None:
    """Condition x_s on x_t in the joint covariance of (x_s, x_t | x_0), by linear algebra."""
    schedule = SCHEDULES[name]
    s, t = sorted((a, b))
    if t - s < 1e-3:
        return
    (alpha_s, sigma_s), (alpha_t, sigma_t) = ab(schedule, s), ab(schedule, t)
    step = alpha_t / alpha_s
    root = np.array([[sigma_s, 0.0], [step * sigma_s, np.sqrt(sigma_t**2 - (step * sigma_s) ** 2)]])
    joint = root @ root.T
    gain = np.linalg.solve(joint[1:, 1:], joint[1:, :1])[0, 0]
    q = posterior(schedule, f64(t), f64(s))
    assert float(q.c1) == pytest.approx(gain, rel=1e-9, abs=1e-14)
    # (Σ_ss − gain Σ_st) loses digits where s ≈ t; the determinant of the root does not
    assert float(q.variance) == pytest.approx((root[0, 0] * root[1, 1]) ** 2 / joint[1, 1], rel=1e-7)
    assert float(q.c0) == pytest.approx(alpha_s - gain * alpha_t, rel=1e-7, abs=1e-12)


@every
@settings(deadline=None, max_examples=15)
@given(times=st.lists(st.integers(1, 40), min_size=3, max_size=3, unique=True))
def test_transitions_compose(name: str, times: list[int]) -> None:
    """q(x_t|x_r) is q(x_s|x_r) followed by q(x_t|x_s); in reverse, q(x_r|x_t,x_0) averages q(x_r|x_s,x_0)."""
    schedule = SCHEDULES[name]
    r, s, t = (f64(k / 40) for k in sorted(times))
    one, two, both = transition(schedule, s, r), transition(schedule, t, s), transition(schedule, t, r)
    torch.testing.assert_close(one.alpha * two.alpha, both.alpha, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(two.alpha**2 * one.variance + two.variance, both.variance, rtol=1e-10, atol=1e-15)
    near, far, whole = posterior(schedule, s, r), posterior(schedule, t, s), posterior(schedule, t, r)
    torch.testing.assert_close(near.c1 * far.c1, whole.c1, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(near.c1 * far.c0 + near.c0, whole.c0, rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(near.variance + near.c1**2 * far.variance, whole.variance, rtol=1e-10, atol=1e-15)


@every
def test_marginals_are_those_of_the_curve(name: str) -> None:
    """c_1 x_t + c_0 x_0 + σ̃ z has mean α_s x_0 and variance σ_s²."""
    schedule = SCHEDULES[name]
    for t, s in ((1.0, 0.975), (1.0, 0.025), (0.5, 0.25), (0.05, 0.025), (0.0625, 0.0375)):
        q, (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            posterior(schedule, f64(t), f64(s)),
            ab(schedule, t),
            ab(schedule, s),
        )
        assert float(q.c0 + q.c1 * alpha_t) == pytest.approx(alpha_s, rel=1e-12)
        assert float(q.variance + (q.c1 * sigma_t).square()) == pytest.approx(sigma_s**2, rel=1e-12)
        assert 0 < float(q.variance) <= sigma_s**2 * (1 + 1e-12)


@every
def test_the_step_into_data_returns_x0(name: str) -> None:
    """At s = 0 c_1 = 0, c_0 = 1 and variance 0 exactly, also on VE and EDM, where σ jumps from σ_min to 0."""
    for t in (0.001, 0.025, 0.5, 1.0):
        q = posterior(SCHEDULES[name], f64(t), f64(0.0))
        assert (q.c1, q.c0, q.variance) == (0, 1, 0)


@every
def test_posterior_at_alpha_0(name: str) -> None:
    """At α_t = 0 x_t is independent of x_0 and x_s, so q(x_s|x_t,x_0) is q(x_s|x_0)."""
    schedule = SCHEDULES[name]
    if not schedule.zero_terminal_snr:
        assert posterior(schedule, f64(1.0), f64(0.5)).c1 > 0
        return
    alpha_s, sigma_s = ab(schedule, 0.5)
    q = posterior(schedule, f64(1.0), f64(0.5))
    assert q.c1 == 0
    assert float(q.c0) == pytest.approx(alpha_s, rel=1e-15)
    assert float(q.variance) == pytest.approx(sigma_s**2, rel=1e-15)


def test_neighboring_steps_are_ho_eq_2_and_7() -> None:
    """σ²_{t|s} = β_i and σ̃² = β̃_i for s = t − 1/T, from the β of the paper."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=D)
    bar = (1 - beta).cumprod(0)
    i = torch.arange(1, 1001, dtype=D)
    q = transition(Linear(), i / 1000, (i - 1) / 1000)
    torch.testing.assert_close(q.variance, beta, rtol=1e-10, atol=0)
    torch.testing.assert_close(q.alpha, (1 - beta).sqrt(), rtol=1e-12, atol=0)
    small = posterior(Linear(), i / 1000, (i - 1) / 1000).variance
    before = torch.cat([torch.ones(1, dtype=D), bar[:-1]])
    torch.testing.assert_close(small, (1 - before) / (1 - bar) * beta, rtol=1e-9, atol=0)


def test_float32_times_give_float32_of_the_float64_result() -> None:
    i = torch.arange(1, 1001)
    got = posterior(Cosine(), i / 1000, (i - 1) / 1000)
    want = posterior(Cosine(), i.double() / 1000, (i - 1).double() / 1000)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w.float())


def test_posterior_mean_with_a_time_for_each_image() -> None:
    t, s = torch.tensor([0.5, 1.0], dtype=D), torch.tensor([0.25, 0.0], dtype=D)
    x_t, x0 = torch.randn(2, 2, 1, 2, 2, dtype=D)
    got = posterior(Cosine(), t, s).mean(x_t, x0)
    for k in range(2):
        q = posterior(Cosine(), t[k], s[k])
        torch.testing.assert_close(got[k], q.c1 * x_t[k] + q.c0 * x0[k], rtol=0, atol=0)


LEVELS = (torch.arange(256, dtype=D) * 2 - 255) / 255


def test_kl_is_the_integral() -> None:
    """Against ∫ p ln(p/q) by quadrature."""
    for m1, s1, m2, s2 in (
        (0.0, 1.0, 0.0, 1.0),
        (0.3, 0.1, 0.1, 0.2),
        (-1.0, 2.0, 0.5, 0.7),
        (0.0, 1e-2, 1e-3, 1.1e-2),
    ):
        p, q = stats.norm(m1, s1), stats.norm(m2, s2)

        def density(x: float, p: stats.rv_continuous = p, q: stats.rv_continuous = q) -> float:
            return float(p.pdf(x) * (p.logpdf(x) - q.logpdf(x)))

        want = integrate.quad(density, m1 - 12 * s1, m1 + 12 * s1, points=[m1], limit=200, epsabs=1e-13)[0]
        got = kl(*(f64(v) for v in (m1, 2 * np.log(s1), m2, 2 * np.log(s2))))
        assert float(got) == pytest.approx(want, rel=1e-9, abs=1e-12)


def test_kl_broadcasts_and_vanishes_for_equals() -> None:
    mean, log_variance = torch.randn(2, 3, 4, 5), torch.tensor(-9.3)
    assert torch.equal(kl(mean, log_variance, mean, log_variance), torch.zeros(2, 3, 4, 5))
    near = kl(mean, log_variance, mean, log_variance + torch.linspace(-1e-3, 1e-3, 5))
    assert (near >= 0).all()
    assert float(near[0, 0, 0, 0]) == pytest.approx(0.25e-6, rel=0.05)  # ¼ r² for a ratio e^r of the variances


def naive(x0: torch.Tensor, mean: torch.Tensor, std: float) -> np.ndarray:
    """Return the formula by SciPy in float64, each bin evaluated in its own tail."""
    x, m = x0.double().numpy(), mean.double().numpy()
    low, high = (x - m - 1 / 255) / std, (x - m + 1 / 255) / std
    low = np.where(x < -0.999, -np.inf, low)
    high = np.where(x > 0.999, np.inf, high)
    mass = np.where(low > 0, stats.norm.sf(low) - stats.norm.sf(high), stats.norm.cdf(high) - stats.norm.cdf(low))
    return np.asarray(np.log(np.maximum(mass, 1e-12)))


@pytest.mark.parametrize("std", [1e-20, 1e-4, 3e-3, 0.01, 0.1, 1.0])
def test_discretized_likelihood_is_the_formula(std: float) -> None:
    """Every level, for means inside and outside the range: to 1e-12 nats in float64 and 1e-4 in float32 (2e-3 at σ = 1e-4, where
    one rounding error of the mean is a thousandth of σ)."""
    mean = torch.linspace(-1.4971, 1.5013, 61, dtype=D)[:, None]  # none on the edge of a bin
    for dtype, margin in ((D, 1e-12), (torch.float32, 2e-3 if std == 1e-4 else 1e-4)):
        x, m, log_variance = LEVELS.to(dtype), mean.to(dtype), torch.tensor(2 * np.log(std), dtype=dtype)
        got = discretized_log_likelihood(x, m, log_variance)
        assert got.dtype == dtype
        assert np.abs(got.double().numpy() - naive(x, m, float((log_variance.double() / 2).exp()))).max() < margin


def test_discretized_likelihood_is_a_distribution() -> None:
    """The 256 probabilities sum to 1 for means in the range, up to 256 floors of 1e-12."""
    mean = torch.linspace(-1, 1, 33, dtype=D)[:, None]
    for std in (1e-6, 1e-3, 0.05, 1.0, 30.0):
        total = discretized_log_likelihood(LEVELS, mean, f64(2 * np.log(std))).exp().sum(1)
        torch.testing.assert_close(total, torch.ones(33, dtype=D), rtol=0, atol=3e-10)


def test_gradient_of_the_discretized_likelihood() -> None:
    """Equal to finite differences off the floor, 0 on the floor, finite everywhere."""
    x = LEVELS[[0, 0, 3, 128, 200, 255, 255]]
    mean = (x + torch.tensor([0.01, -0.02, 0.004, 0.0, -0.02, 0.01, -0.02], dtype=D)).requires_grad_()
    log_variance = torch.full((7,), 2 * np.log(0.01), dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, v: discretized_log_likelihood(x, m, v), (mean, log_variance))
    for std in (1e-18, 1e-8, 1e-3, 1.0, 1e6):
        m = torch.linspace(-3, 3, 61)[:, None].requires_grad_()
        v = torch.tensor(2 * np.log(std), dtype=torch.float32).requires_grad_()
        discretized_log_likelihood(LEVELS.float(), m, v).sum().backward()
        assert m.grad is not None
        assert v.grad is not None
        assert bool(m.grad.isfinite().all() and v.grad.isfinite())
        assert std > 0.1 or m.grad[0] == 0  # μ = −3: level 0 has probability 1, all others lie on the floor
