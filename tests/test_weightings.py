"""Weights against the published formulas in SNR, the VLB weight against the KL, and finiteness at α = 0."""

import math
from collections.abc import Callable

import pytest
import torch
from contracts import OBJECTIVES, PAIRS, SCHEDULES, WEIGHTINGS
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_lab.objectives import PredMean, PredNoise, PredV, PredX0
from diffusion_lab.schedules import Cosine, Linear, Schedule
from diffusion_lab.weightings import EDM, P2, VLB, MinSNR, Native, Sigmoid, SoftMinSNR, TruncatedSNR

D = torch.float64


def times(schedule: Schedule) -> torch.Tensor:
    steps = schedule.steps or 1000
    return torch.cat([torch.arange(1, steps + 1, dtype=D), torch.tensor([0.4, 1.7, steps - 0.3], dtype=D)]) / steps


def vlb_noise(s: Schedule, t: torch.Tensor) -> torch.Tensor:
    """Return ½ (SNR_s − SNR_t)/SNR_t at s = t − 1/T, at s = 0 that of the next step; −dλ/dt on continuous curves."""
    if s.steps is None:
        d_alpha, d_sigma = s.derivatives(t)
        alpha, sigma = s.alpha_sigma(t)
        return d_sigma / sigma - d_alpha / alpha
    t = torch.where(t * s.steps < 1.5, torch.full_like(t, 2 / s.steps), t)
    return torch.expm1(2 * (s.lam(t - 1 / s.steps) - s.lam(t))) / 2


# w on the error of ε, as functions of (schedule, t, SNR)
PUBLISHED: dict[str, Callable[[Schedule, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "Eps": lambda s, t, snr: torch.ones_like(snr),
    "X0": lambda s, t, snr: 1 / snr,
    "TruncatedSNR": lambda s, t, snr: snr.clamp(min=1) / snr,
    "MinSNR": lambda s, t, snr: snr.clamp(max=5) / snr,
    "SoftMinSNR": lambda s, t, snr: 5 / (snr + 5),
    "P2": lambda s, t, snr: 1 / (1 + snr),
    "VLB": lambda s, t, snr: vlb_noise(s, t),
    # (s² + σ_d²)/(s σ_d)² on x_0, divided by SNR for the error of ε; s = 1/√SNR, σ_d = ½
    "EDM": lambda s, t, snr: (1 / snr + 0.25) / (0.25 / snr) / snr,
    "Sigmoid": lambda s, t, snr: 1 / (1 + snr),
    # D²/α² of pred_v and of pred_flow
    "V": lambda s, t, snr: (s.alpha_sigma(t)[0] * (1 + 1 / snr)).square(),
    "FlowVelocity": lambda s, t, snr: (1 + snr.rsqrt()).square(),
}


def determinant(s: Schedule, objective: str, t: torch.Tensor) -> torch.Tensor:
    """D = αb − σa; of PredMean −σ c_0, since αb − σa cancels."""
    alpha, sigma = s.alpha_sigma(t)
    if objective == "PredMean":
        before = s.alpha_sigma((t - 1 / (s.steps or 1)).clamp(min=0))
        return -sigma * before[0] * (1 - (alpha / before[0] * before[1] / sigma).square())
    a, b = OBJECTIVES[objective].coefficients(s, t)
    return alpha * b - sigma * a


@pytest.mark.parametrize(("schedule", "objective"), PAIRS)
def test_every_weight_is_finite_and_of_one_error_of_noise(schedule: str, objective: str) -> None:
    """w (α/D)² with the same w for every objective; for PredX0 D = −σ. Native is 1 on every y."""
    s, o = SCHEDULES[schedule], OBJECTIVES[objective]
    t = times(s)
    ratio = (s.alpha_sigma(t)[1] / determinant(s, objective, t)).square()
    for name, weighting in WEIGHTINGS.items():
        got = weighting(s, o, t)
        assert got.shape == t.shape
        assert got.dtype == D
        assert got.isfinite().all(), f"{name} is finite on (0, 1], also where α = 0"
        assert (got >= 0).all(), name
        want = torch.ones_like(t) if name == "Native" else weighting(s, PredX0(), t) * ratio
        torch.testing.assert_close(got, want, rtol=1e-7, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("schedule", "objective"), PAIRS)
def test_the_published_weight_times_alpha_over_d_squared(schedule: str, objective: str) -> None:
    s, t = SCHEDULES[schedule], times(SCHEDULES[schedule])
    t = t[s.alpha_sigma(t)[0] > 0]
    alpha, sigma = s.alpha_sigma(t)
    d = determinant(s, objective, t)
    for name, published in PUBLISHED.items():
        got = WEIGHTINGS[name](s, OBJECTIVES[objective], t)
        want = published(s, t, (alpha / sigma).square()) * (alpha / d).square()
        torch.testing.assert_close(got, want, rtol=1e-7, atol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("schedule", "objective"), PAIRS)
@pytest.mark.parametrize("bias", [-3.0, 0.0, 20.0])
def test_the_rate_of_the_sigmoid_weight(schedule: str, objective: str, bias: float) -> None:
    """Kingma & Gao 2023: ½ sigmoid(b − l) (−dl/dt) with l = ln SNR = 2λ, so −dl/dt = 2 (−dλ/dt) of `VLB`, and ½ is kept."""
    s, t = SCHEDULES[schedule], times(SCHEDULES[schedule])
    t = t[s.alpha_sigma(t)[0] > 0]
    alpha = s.alpha_sigma(t)[0]
    w = 0.5 * torch.sigmoid(bias - 2 * s.lam(t)) * 2 * vlb_noise(s, t)
    got = Sigmoid(bias, rate=True)(s, OBJECTIVES[objective], t)
    torch.testing.assert_close(got, w * (alpha / determinant(s, objective, t)).square(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("weighting", [w for w in WEIGHTINGS if w not in {"Native", "VLB"}])
def test_where_alpha_vanishes_the_weight_is_the_limit(weighting: str) -> None:
    """With zero terminal SNR the value at α = 0 is the limit for t → 1. α is linear there, so w changes by O(1 − t).

    VLB is excluded: its s = t − 1/T crosses a kink of the curve. Its values at the nodes are tested separately.
    """
    s = Cosine(zero_terminal_snr=True)
    w = WEIGHTINGS[weighting](s, PredV(), torch.tensor([1 - 4e-6, 1.0], dtype=D))
    assert float(w[0]) == pytest.approx(float(w[1]), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("schedule", "objective"), [(s, o) for s, o in PAIRS if SCHEDULES[s].steps is None])
def test_finite_down_to_data(schedule: str, objective: str) -> None:
    """On continuous curves weights are finite from t = 0+ on, where SNR exceeds 1e12."""
    s = SCHEDULES[schedule]
    t = torch.tensor([s.t_eps, 1e-9, 1e-5, 1e-3, 0.999, 1.0], dtype=D)
    for name, weighting in WEIGHTINGS.items():
        got = weighting(s, OBJECTIVES[objective], t)
        assert got.isfinite().all(), name
        assert (got >= 0).all(), name


@pytest.mark.parametrize("schedule", ["VP", "SubVP", "VE", "EDM", "Flow-shift"])
def test_vlb_on_a_curve_is_the_limit_of_fine_steps(schedule: str) -> None:
    """T · ½ (SNR_s − SNR_t)/SNR_t at s = t − 1/T for T = 10⁷, by differences of λ (Kingma et al. 2021, eq. 17)."""
    s, t = SCHEDULES[schedule], torch.tensor([0.1, 0.4, 0.9], dtype=D)
    fine = 1e7 * torch.expm1(2 * (s.lam(t - 1e-7) - s.lam(t))) / 2
    alpha, sigma = s.alpha_sigma(t)
    on_noise = VLB()(s, PredX0(), t) * (sigma / alpha).square()
    torch.testing.assert_close(on_noise, fine, rtol=1e-5, atol=0)


@settings(deadline=None, max_examples=50)
@given(t=st.floats(0.002, 1.0), gamma=st.floats(0.1, 50))
def test_min_snr_on_v_and_x0(t: float, gamma: float) -> None:
    """min(SNR, γ)/(SNR + 1) on v and min(SNR, γ) on x_0 (Hang et al. 2023), not min(SNR+1, γ)/(SNR+1)."""
    s, at = Cosine(), torch.tensor(t, dtype=D)
    snr = math.exp(2 * float(s.lam(at)))
    assert float(MinSNR(gamma)(s, PredV(), at)) == pytest.approx(min(snr, gamma) / (snr + 1), rel=1e-9)
    assert float(MinSNR(gamma)(s, PredX0(), at)) == pytest.approx(min(snr, gamma), rel=1e-9)
    assert float(MinSNR(gamma)(s, PredNoise(), at)) == pytest.approx(min(snr, gamma) / snr, rel=1e-9)


@pytest.mark.parametrize("schedule", ["Linear", "Cosine", "Linear-zero", "Sigmoid-40"])
def test_vlb_is_the_kl_between_posteriors(schedule: str) -> None:
    """w (ε − ε̂)² = KL(q(x_s|x_t,x_0) ‖ q(x_s|x_t,x̂_0)) = |μ − μ̂|²/2σ̃² in nats, by conditioning a joint Gaussian."""
    s = SCHEDULES[schedule]
    assert s.steps is not None
    i = torch.arange(2, s.steps + 1, dtype=D)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = s.alpha_sigma(i / s.steps), s.alpha_sigma((i - 1) / s.steps)
    cov = alpha_t / alpha_s * sigma_s.square()  # Cov(x_s, x_t | x_0)
    variance = sigma_s.square() - (cov / sigma_t).square()
    on_x0 = alpha_s - cov / sigma_t.square() * alpha_t  # ∂μ/∂x_0 at fixed x_t
    kl = on_x0.square() / (2 * variance)  # of a unit error of x_0
    weight = VLB()(s, PredX0(), i / s.steps)
    torch.testing.assert_close(weight, kl, rtol=1e-6, atol=0)
    on_mean = VLB()(s, PredMean(), i / s.steps)
    torch.testing.assert_close(on_mean, 1 / (2 * variance), rtol=1e-6, atol=0)


def test_vlb_is_eq_12_of_ho() -> None:
    """β²/(2σ²α(1 − ᾱ)) with σ² = β̃ on the error of ε."""
    i = torch.arange(2, 1001, dtype=D)
    bar, before = (Linear().alpha_sigma(k / 1000)[0].square() for k in (i, i - 1))
    beta = 1 - bar / before
    small = (1 - before) / (1 - bar) * beta
    want = beta.square() / (2 * small * (1 - beta) * (1 - bar))
    torch.testing.assert_close(VLB()(Linear(), PredNoise(), i / 1000), want, rtol=1e-7, atol=0)


def test_vlb_at_the_first_step_is_the_next_one() -> None:
    w = VLB()(Linear(), PredNoise(), torch.tensor([1, 2], dtype=D) / 1000)
    assert float(w[0]) == pytest.approx(float(w[1]), rel=1e-12)


def test_monotone_in_time_and_limits() -> None:
    """On ε these weights increase with t and tend to their limits for SNR → 0 and ∞."""
    s, t = Cosine(), torch.arange(1, 1001, dtype=D) / 1000
    for w in (MinSNR(), SoftMinSNR(), P2(), Sigmoid(), TruncatedSNR()):
        assert (w(s, PredNoise(), t).diff() >= -1e-15).all(), type(w).__name__
    for w in (MinSNR(), SoftMinSNR(), P2(), Sigmoid()):
        assert float(w(s, PredNoise(), t[-1])) == pytest.approx(1, abs=1e-8)
    assert float(TruncatedSNR()(s, PredNoise(), t[0])) == 1
    assert float(P2(k=2.0, gamma=3.0)(s, PredNoise(), t[-1])) == pytest.approx(2**-3, rel=1e-6)
    assert float(Sigmoid(bias=1.5)(s, PredNoise(), s.time(torch.tensor(0.75, dtype=D)))) == pytest.approx(0.5)
    torch.testing.assert_close(P2(gamma=0)(s, PredNoise(), t), torch.ones_like(t), rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_float32_times(weighting: str) -> None:
    """A float32 t gives the float64 weight, rounded once."""
    i = torch.arange(1, 1001)
    got = WEIGHTINGS[weighting](Linear(), PredV(), i / 1000)
    want = WEIGHTINGS[weighting](Linear(), PredV(), i.double() / 1000)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want.float(), rtol=1e-6, atol=0)


def test_native_ignores_the_objective() -> None:
    t = torch.tensor([0.2, 1.0], dtype=torch.float16)
    assert torch.equal(Native()(Cosine(), PredV(), t), torch.ones(2))


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: MinSNR(0), r"gamma=0: write a number in \[0.001, 1e6\]"),
        (lambda: SoftMinSNR(-1), "gamma=-1"),
        (lambda: P2(k=0), r"k=0: write a number in \[0.001, 1000\]"),
        (lambda: P2(gamma=-1), r"gamma=-1: write a number in \[0, 4\]"),
        (lambda: EDM(0), r"sigma_data=0: write a number in \[0.001, 1000\]"),
    ],
)
def test_errors_name_the_remedy(make: Callable[[], object], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        make()
