"""Objectives are equivalent parametrizations: for the same prediction all have the same x̂_0, ε̂ and loss."""

import math
from collections.abc import Callable

import pytest
import torch
from contracts import OBJECTIVES, PAIRS, SCHEDULES
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_lab import weightings
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.objectives import EDM, Objective, PredMean, PredNoise, PredV, PredX0
from diffusion_lab.schedules import EDM as EDMCurve
from diffusion_lab.schedules import VE, Cosine, Flow, Linear, Schedule
from diffusion_lab.weightings import Eps

D = torch.float64
every = pytest.mark.parametrize(("schedule", "objective"), PAIRS)


def times(schedule: Schedule, most: int = 60) -> torch.Tensor:
    """Return the first and last nodes, nodes between them, and times off the nodes."""
    steps = schedule.steps or 1000
    i = torch.cat([torch.tensor([1, 2, steps - 1, steps]), torch.linspace(3, steps - 2, most).round().long()])
    off = torch.tensor([1.5, steps / 2 + 0.25, steps - 0.4], dtype=D)
    return torch.cat([i.double(), off]) / steps


def example(schedule: Schedule, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return x_t, its true pair (x_0, ε), and an imperfect pair (x̂_0, ε̂) with the same x_t."""
    alpha, sigma = (v[:, None, None, None] for v in schedule.alpha_sigma(t))
    x0 = torch.rand(len(t), 2, 3, 3, dtype=D) * 2 - 1
    noise = torch.randn_like(x0)
    x_t = alpha * x0 + sigma * noise
    x0_hat = x0 + 0.3 * torch.randn_like(x0)
    return x_t, x0, noise, x0_hat, (x_t - alpha * x0_hat) / sigma


@every
def test_the_denoiser_returns_the_predicted_pair(schedule: str, objective: str) -> None:
    """For the output y of an imperfect pair (x̂_0, ε̂) the denoiser returns that pair, for every objective."""
    s, o = SCHEDULES[schedule], OBJECTIVES[objective]
    t = times(s)
    x_t, _, _, x0, noise = example(s, t)
    a, b = (v[:, None, None, None] for v in o.coefficients(s, t))
    got = Denoiser(lambda scaled, c: a * x0 + b * noise, s, o)(x_t, t)
    # conversions amplify rounding errors by at most σ/α (noise) or 1/c_0 (mean)
    torch.testing.assert_close(got.x0, x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.noise, noise, rtol=1e-6, atol=1e-6)


@every
def test_the_loss_on_noise_is_the_same(schedule: str, objective: str) -> None:
    """w_y (y − ŷ)² = (ε − ε̂)² for the weighting eps."""
    s, o = SCHEDULES[schedule], OBJECTIVES[objective]
    t = times(s)
    _, x0, noise, x0_hat, noise_hat = example(s, t)
    error = o.target(s, t, x0, noise) - o.target(s, t, x0_hat, noise_hat)
    got = Eps()(s, o, t)[:, None, None, None] * error.square()
    torch.testing.assert_close(got, (noise - noise_hat).square(), rtol=1e-6, atol=1e-12)


@every
@settings(deadline=None, max_examples=10)
@given(fraction=st.floats(0.001, 1.0), seed=st.integers(0, 1000))
def test_the_solve_inverts_the_coefficients(schedule: str, objective: str, fraction: float, seed: int) -> None:
    s, o = SCHEDULES[schedule], OBJECTIVES[objective]
    t = torch.tensor(fraction, dtype=D)
    x0, noise = torch.randn(2, 1, 1, 2, 2, dtype=D, generator=torch.Generator().manual_seed(seed))
    alpha, sigma = s.alpha_sigma(t)
    got_x0, got_noise = o.solve(s, t, alpha * x0 + sigma * noise, o.target(s, t, x0, noise))
    torch.testing.assert_close(got_x0, x0, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got_noise, noise, rtol=1e-6, atol=1e-6)


@every
def test_errors_scale_with_the_determinant(schedule: str, objective: str) -> None:
    """Δε = (α/D) Δy and Δx_0 = −(σ/D) Δy, D = αb − σa."""
    s, o = SCHEDULES[schedule], OBJECTIVES[objective]
    t = times(s)
    x_t, x0, noise, *_ = example(s, t)
    y = o.target(s, t, x0, noise)
    shifted, exact = o.solve(s, t, x_t, y + 1), o.solve(s, t, x_t, y)
    alpha, sigma = s.alpha_sigma(t)
    a, b = o.coefficients(s, t)
    d = o.determinant(s, t)
    assert (d != 0).all()
    size = (alpha * b).abs() + (sigma * a).abs()
    assert ((alpha * b - sigma * a - d).abs() <= 1e-14 * size).all()
    for got, want in ((shifted[1] - exact[1], alpha / d), (shifted[0] - exact[0], -sigma / d)):
        torch.testing.assert_close(got[:, 0, 0, 0], want, rtol=1e-6, atol=1e-6)


@every
def test_dtypes_and_shapes(schedule: str, objective: str) -> None:
    s, o = SCHEDULES[schedule], OBJECTIVES[objective]
    for t in (torch.tensor(0.5), torch.full((2, 3), 0.5, dtype=D), torch.full((1,), 0.5, dtype=torch.float16)):
        result_dtype = torch.promote_types(t.dtype, torch.float32)
        outs = (*o.coefficients(s, t), o.determinant(s, t), o.input_scale(s, t), o.conditioning(s, t))
        assert all(v.shape == t.shape and v.dtype == result_dtype and v.isfinite().all() for v in outs)


REFUSED_AT_ALPHA_0 = {"PredNoise", "EDM"}


def test_refused_pairs() -> None:
    """pred_noise and edm are refused where α(1) = 0, pred_mean on continuous curves; every other pair works."""
    want = {
        (s, o)
        for s, curve in SCHEDULES.items()
        for o in OBJECTIVES
        if (o in REFUSED_AT_ALPHA_0 and curve.zero_terminal_snr) or (o == "PredMean" and curve.steps is None)
    }
    assert {(s, o) for s in SCHEDULES for o in OBJECTIVES} - set(PAIRS) == want
    assert len(PAIRS) > len(want)


@pytest.mark.parametrize(("schedule", "objective"), [(Linear(zero_terminal_snr=True), PredNoise()), (Flow(), EDM())])
def test_the_error_names_the_remedy(schedule: Schedule, objective: Objective) -> None:
    with pytest.raises(ValueError, match=r"objective=pred_v or objective=pred_flow"):
        Denoiser(lambda x, c: x, schedule, objective)


@pytest.mark.parametrize(
    "make", [lambda: EDM(0.0), lambda: PredV(sigma_data=-1.0), lambda: PredX0(sigma_data=math.inf)]
)
def test_sigma_data_must_be_positive(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="sigma_data"):
        make()


# --------------------------------------------------------------------------------------- published coefficients


def test_coefficients_of_noise_x0_and_v() -> None:
    t = times(Cosine())
    alpha, sigma = Cosine().alpha_sigma(t)
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    for o, want in ((PredNoise(), (zero, one)), (PredX0(), (one, zero)), (PredV(), (-sigma, alpha))):
        for got, w in zip(o.coefficients(Cosine(), t), want, strict=True):
            assert torch.equal(got, w)


@pytest.mark.parametrize("zero", [False, True])
def test_mean_is_the_posterior_mean_of_ho_eq_7(zero: bool) -> None:
    """μ̃ = √ᾱ_{i−1} β_i/(1−ᾱ_i) x_0 + √α_i (1−ᾱ_{i−1})/(1−ᾱ_i) x_i, computed from β."""
    s = Linear(zero_terminal_snr=zero)
    bar = torch.cat([torch.ones(1, dtype=D), s.alpha_sigma(torch.arange(1, 1001, dtype=D) / 1000)[0].square()])
    for i in (1, 2, 500, 999, 1000):
        beta = 1 - bar[i] / bar[i - 1]
        c0 = bar[i - 1].sqrt() * beta / (1 - bar[i])
        c1 = (1 - beta).sqrt() * (1 - bar[i - 1]) / (1 - bar[i])
        a, b = PredMean().coefficients(s, torch.tensor(i / 1000, dtype=D))
        assert float(a) == pytest.approx(float(c0 + c1 * bar[i].sqrt()), rel=1e-9)
        assert float(b) == pytest.approx(float(c1 * (1 - bar[i]).sqrt()), rel=1e-9, abs=1e-12)


def test_mean_amplifies_as_published() -> None:
    """1/c_0 = 7,800 at t = 1 on the linear schedule."""
    d = PredMean().determinant(Linear(), torch.ones((), dtype=D))
    sigma = Linear().alpha_sigma(torch.ones((), dtype=D))[1]
    assert float(-sigma / d) == pytest.approx(7800, rel=2e-3)


def test_mean_in_float32_times() -> None:
    """s = t − 1/T of a float32 t is exactly the next node below."""
    i = torch.arange(1, 1001)
    for got, want in zip(
        PredMean().coefficients(Linear(), i / 1000), PredMean().coefficients(Linear(), i.double() / 1000), strict=True
    ):
        torch.testing.assert_close(got, want.float(), rtol=0, atol=0)


def test_float32_states_keep_float32_precision() -> None:
    """The coefficients of the solve are float64, so the float32 error is a few rounding errors of the inputs."""
    s, t = Cosine(), times(Cosine())
    x_t, x0, noise, *_ = example(s, t)
    got = PredV().solve(s, t.float(), x_t.float(), PredV().target(s, t, x0, noise).float())
    assert got[0].dtype == torch.float32
    for g, w in zip(got, (x0, noise), strict=True):
        assert (g.double() - w).abs().max() < 1e-6


# ------------------------------------------------------------------------------------------- EDM and flow matching


@pytest.mark.parametrize("schedule", [s for s, o in PAIRS if o == "EDM"])
def test_edm_is_karras_preconditioning(schedule: str) -> None:
    """In x/α = x_0 + s ε: D(x) = c_skip x + c_out F(c_in x), c_skip = σ_d²/(s²+σ_d²), c_out = sσ_d/√(s²+σ_d²)."""
    s, o = SCHEDULES[schedule], OBJECTIVES.get("EDM")
    assert o is not None
    t = times(s)
    alpha, sigma = s.alpha_sigma(t)
    ratio, sd = sigma / alpha, getattr(o, "sigma_data", 0.5)
    x = torch.randn(len(t), 1, 1, 1, dtype=D)
    f = torch.randn_like(x)

    def shaped(v: torch.Tensor) -> torch.Tensor:
        return v[:, None, None, None]

    root = (ratio.square() + sd**2).sqrt()
    want = shaped(sd**2 / root**2) * x / shaped(alpha) + shaped(ratio * sd / root) * f
    torch.testing.assert_close(o.solve(s, t, x, f)[0], want, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(o.input_scale(s, t), 1 / (alpha * root), rtol=1e-10, atol=0)
    torch.testing.assert_close(o.conditioning(s, t), ratio.log() / 4, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", [s for s, o in PAIRS if o == "PredFlow"])
def test_flow_is_noise_minus_data(schedule: str) -> None:
    o, t = OBJECTIVES.get("PredFlow"), times(SCHEDULES[schedule])
    assert o is not None
    a, b = o.coefficients(SCHEDULES[schedule], t)
    assert torch.equal(a, -torch.ones_like(t))
    assert torch.equal(b, torch.ones_like(t))


def test_all_published_objectives_are_found() -> None:
    assert {type(o).__name__ for o in OBJECTIVES.values()} >= {
        "PredNoise",
        "PredX0",
        "PredV",
        "PredMean",
        "PredFlow",
        "EDM",
    }


@pytest.mark.parametrize("schedule", [s for s, o in PAIRS if o == "EDM"])
def test_edm_has_input_and_target_of_variance_1(schedule: str) -> None:
    """Karras et al. 2022, appendix B.6: E y² = a²σ_d² + b² = 1 and E (scale · x_t)² = 1 at every t, also at 0+. For
    σ_d = 1 y is −v/√(α² + σ²). The weighting EDM is 1 on y."""
    s = SCHEDULES[schedule]
    t = torch.cat([torch.tensor([s.t_eps], dtype=D), times(s)])
    one = torch.ones_like(t)
    alpha, sigma = s.alpha_sigma(t)
    for sigma_data in (0.5, 1.0, 3.0):
        o = EDM(sigma_data)
        a, b = o.coefficients(s, t)
        torch.testing.assert_close((a * sigma_data).square() + b.square(), one, rtol=1e-14, atol=0)
        x_t = (alpha * sigma_data).square() + sigma.square()
        torch.testing.assert_close(o.input_scale(s, t).square() * x_t, one, rtol=1e-14, atol=0)
        torch.testing.assert_close(weightings.EDM(sigma_data)(s, o, t), one, rtol=1e-14, atol=0)
    a, b = EDM(1.0).coefficients(s, t)
    v = PredV().coefficients(s, t)
    root = (alpha.square() + sigma.square()).sqrt()
    torch.testing.assert_close(torch.stack([a, b]), -torch.stack(v) / root, rtol=1e-14, atol=0)


def test_edm_is_that_of_diffusers() -> None:
    peer = pytest.importorskip("diffusers").EDMEulerScheduler()
    o, x, f = EDM(), torch.randn(2, 1, 2, 2, dtype=D), torch.randn(2, 1, 2, 2, dtype=D)
    for t in torch.tensor([1e-9, 0.1, 0.6, 1.0], dtype=D):
        sigma = EDMCurve().alpha_sigma(t)[1]
        want = peer.precondition_outputs(x, f, sigma)
        torch.testing.assert_close(o.solve(EDMCurve(), t, x, f)[0], want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            x * o.input_scale(EDMCurve(), t), peer.precondition_inputs(x, sigma), rtol=1e-12, atol=0
        )
        torch.testing.assert_close(o.conditioning(EDMCurve(), t), peer.precondition_noise(sigma), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", [o for o in OBJECTIVES if o != "EDM"])
@pytest.mark.parametrize("schedule", [VE(), Cosine(), Flow()])
def test_any_objective_may_scale_its_input(name: str, schedule: Schedule) -> None:
    """The network's input is scaled by 1/√(α²σ_d² + σ²); coefficients and conditioning are unchanged."""
    cls, t = type(OBJECTIVES[name]), times(schedule)
    plain, scaled = cls(), cls(scale_input=True, sigma_data=0.3)
    if name == "PredMean" and schedule.steps is None:
        return
    alpha, sigma = schedule.alpha_sigma(t)
    assert torch.equal(plain.input_scale(schedule, t), torch.ones_like(t))
    want = ((0.3 * alpha).square() + sigma.square()).rsqrt()
    torch.testing.assert_close(scaled.input_scale(schedule, t), want, rtol=1e-14, atol=0)
    assert torch.equal(plain.conditioning(schedule, t), scaled.conditioning(schedule, t))
    for a, b in zip(plain.coefficients(schedule, t), scaled.coefficients(schedule, t), strict=True):
        assert torch.equal(a, b)
    if not schedule.zero_terminal_snr:
        inputs: list[torch.Tensor] = []
        x_t = torch.ones(len(t), 1, 1, 1, dtype=D)
        Denoiser(lambda x, c: inputs.append(x) or x, schedule, scaled)(x_t, t)
        torch.testing.assert_close(inputs[0].flatten(), want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", [n for n, s in SCHEDULES.items() if s.steps is None])
def test_from_t_eps_to_1(name: str) -> None:
    """For t = 1e-12 … 1 in float64 all coefficients are finite, and the solve recovers x_0 and σε to 1e-6. (An error of x̂_0 is
    amplified by α/σ in ε̂, which diverges for t → 0.)"""
    s = SCHEDULES[name]
    t = torch.tensor([s.t_eps, 1e-9, 1e-5, 1e-3, 1.0], dtype=D)
    alpha, sigma = (v[:, None, None, None] for v in s.alpha_sigma(t))
    x0, noise = torch.randn(2, len(t), 1, 4, 4, dtype=D)
    x_t = alpha * x0 + sigma * noise
    for o in (o for n, o in OBJECTIVES.items() if (name, n) in PAIRS):
        assert all(v.isfinite().all() for v in (*o.coefficients(s, t), o.conditioning(s, t), o.input_scale(s, t)))
        got_x0, got_noise = o.solve(s, t, x_t, o.target(s, t, x0, noise))
        torch.testing.assert_close(got_x0, x0, rtol=0, atol=1e-6)
        torch.testing.assert_close(sigma * got_noise, sigma * noise, rtol=0, atol=1e-6)


def test_target_with_a_time_for_each_image() -> None:
    """target = a x_0 + b ε with (B,) times, against an explicit loop."""
    s, o = Cosine(), PredV()
    t = torch.tensor([0.1, 0.9], dtype=D)
    x0, noise = torch.randn(2, 2, 1, 2, 2, dtype=D)
    got = o.target(s, t, x0, noise)
    for k in range(2):
        bar = float(s.alpha_sigma(t[k])[0]) ** 2
        torch.testing.assert_close(got[k], math.sqrt(bar) * noise[k] - math.sqrt(1 - bar) * x0[k], rtol=1e-9, atol=1e-9)
