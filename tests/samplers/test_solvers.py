"""Deterministic solvers: measured orders, exact coefficients, identities, ends of the curves, memory, refusals."""

import functools
import gc
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contracts import SCHEDULES
from oracle import Gaussian, Mixture, oracle
from scipy.integrate import quad, solve_ivp

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.noise import Draws, normal
from diffusion_lab.objectives import PredV
from diffusion_lab.samplers import DDIM, DDPM, DPMSolverPP, Euler, Heun, Sampler, UniPC, prior
from diffusion_lab.samplers.base import EvaluationContext
from diffusion_lab.samplers.multistep import phi
from diffusion_lab.schedules import Cosine, Schedule

D = torch.float64
DATA = Gaussian(torch.full((1, 1, 1), 0.3), 0.5)
MIXTURE = Mixture(torch.tensor([-0.8, 0.6]).reshape(2, 1, 1, 1), torch.tensor([0.4, 0.5]), torch.tensor([0.4, 0.6]))
X = torch.linspace(-1.5, 1.5, 7, dtype=D).reshape(-1, 1, 1, 1)
CURVES = ["Cosine", "VP", "EDM", "Flow"]
FAR = (-2.0, 0.7)  # λ at both ends of the interval on which orders are measured
Make = Callable[[int], Sampler]

SOLVERS: dict[str, tuple[float, Make]] = {  # order between noisy times, and a function that builds a solver of n steps
    "ddim": (1, lambda n: DDIM(n, grid="karras")),
    "euler": (1, lambda n: Euler(n, grid="karras")),
    "heun": (2, lambda n: Heun(n, grid="karras")),
    "1": (1, lambda n: DPMSolverPP(n, 1, grid="karras")),
    "2M": (2, lambda n: DPMSolverPP(n, 2, lower_last=False, grid="karras")),
    "2M corrected": (2, lambda n: DPMSolverPP(n, 2, corrected=True, lower_last=False, grid="karras")),
    "3M corrected": (3, lambda n: DPMSolverPP(n, 3, corrected=True, lower_last=False, grid="karras")),
    "UniPC-1": (2, lambda n: UniPC(n, 1, lower_last=False, grid="karras")),
    "UniPC-2": (3, lambda n: UniPC(n, 2, lower_last=False, grid="karras")),
    "UniPC-2 bh1": (3, lambda n: UniPC(n, 2, "bh1", lower_last=False, grid="karras")),
    "UniPC-4": (5, lambda n: UniPC(n, 4, lower_last=False, grid="karras")),
    "UniPC-3 as published": (2, lambda n: UniPC(n, 3, grid="karras")),
}


def interval(schedule: Schedule) -> tuple[float, float]:
    """Return the times at which λ is −2 and 0.7. The problem for x/α between them is the same on every curve."""
    start, stop = (float(schedule.time(torch.tensor(lam, dtype=D))) for lam in FAR)
    assert 0 < stop < start < 1
    return start, stop


class ExactDenoiser(Denoiser):
    """The exact denoiser of MIXTURE, computed without a network, which is faster for long runs."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(lambda x, c: x, schedule, PredV())

    def __call__(self, x_t: Any, t: Any, previous: Any = None, **condition: Any) -> Prediction:
        alpha, sigma = self.schedule.alpha_sigma(t)
        x0 = MIXTURE.denoise(x_t, alpha, sigma)
        return Prediction(x0, (x_t - alpha * x0) / sigma, x0)


def scale(schedule: Schedule, t: float) -> torch.Tensor:
    return schedule.alpha_sigma(torch.tensor(t, dtype=D))[0]


@functools.cache
def exact() -> torch.Tensor:
    """Return x/α at λ = 0.7 of the solution with x/α = X e² at λ = −2, of d(x/σ)/dλ = e^λ x̂_0, by SciPy to 1e-12."""

    def slope(lam: float, y: Any) -> Any:
        sigma = math.exp(-lam)
        x = torch.from_numpy(sigma * y).reshape(X.shape)
        return (MIXTURE.denoise(x, torch.ones((), dtype=D), torch.tensor(sigma, dtype=D)) / sigma).flatten().numpy()

    y = solve_ivp(slope, FAR, X.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    return math.exp(-FAR[1]) * torch.from_numpy(y).reshape(X.shape)


def slopes(errors: list[float]) -> list[float]:
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]


def run(sampler: Sampler, curve: str) -> torch.Tensor:
    """Return x/α at λ = 0.7, with the initial state of `exact`."""
    s = SCHEDULES[curve]
    start, stop = interval(s)
    x = sampler(ExactDenoiser(s), X * math.exp(2) * scale(s, start), start=start, stop=stop).x
    return x / scale(s, stop)


def errors(make: Make, curve: str, counts: tuple[int, ...]) -> list[float]:
    return [float((run(make(n), curve) - exact()).abs().mean()) for n in counts]


# -------------------------------------------------------------------------------------------------------------- orders


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("name", SOLVERS)
def test_measured_order(name: str, curve: str) -> None:
    """The slope of the log error between 40 and 80 steps, λ from −2 to 0.7 on a non-uniform grid, within 0.12 of theory."""
    order, make = SOLVERS[name]
    (slope,) = slopes(errors(make, curve, (40, 80)))
    assert slope == pytest.approx(order, abs=0.12)


def test_the_published_third_order_has_order_two() -> None:
    """With half the second derivative 3M has order 2; its error at 640 steps is larger than that of `corrected` at 400."""
    published = errors(lambda n: DPMSolverPP(n, 3, lower_last=False, grid="uniform_lambda"), "EDM", (320, 640))
    (corrected,) = errors(
        lambda n: DPMSolverPP(n, 3, corrected=True, lower_last=False, grid="uniform_lambda"), "EDM", (400,)
    )
    assert slopes(published) == pytest.approx([2], abs=0.15)
    assert published[-1] > corrected


@pytest.mark.parametrize("p", [2, 3])
@pytest.mark.parametrize("b", ["bh1", "bh2"])
def test_unipc_is_of_order_p_plus_1_from_an_exact_start(p: int, b: str) -> None:
    """The first p − 1 steps have lower order, so the run starts with p − 1 steps of length h³, whose errors are negligible."""
    s, differences = SCHEDULES["EDM"], []
    for n in (20, 40, 80):
        h = (FAR[1] - FAR[0]) / n
        lam = [FAR[0] + k * h**3 for k in range(p)] + [FAR[0] + k * h for k in range(1, n + 1)]
        times = s.time(torch.tensor(lam, dtype=D))
        context = EvaluationContext(ExactDenoiser(s), {}, None, Draws((1, 1, 1), 0, torch.arange(len(X))))
        x = UniPC(order=p, b=b, lower_last=False).integrate(X * math.exp(2), times, context, range(len(lam) - 1))
        differences.append(float((x - exact()).abs().mean()))
    assert slopes(differences)[-1] == pytest.approx(p + 1, abs=0.3), differences


@pytest.mark.parametrize("name", ["2M", "3M corrected", "UniPC-2"])
def test_a_solver_in_lambda_does_not_depend_on_the_curve(name: str) -> None:
    """The equation for x/α in λ is independent of the curve: equal grids in λ give equal results on every curve, to 1e-9."""
    first, *others = (run(SOLVERS[name][1](12), curve) for curve in [*CURVES, "SubVP", "VE", "Linear", "Linear-zero"])
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-9, atol=1e-9)


# -------------------------------------------------------------------------------------------------------- coefficients


@pytest.mark.parametrize("z", [-30.0, -2.0, -1.0, -0.999, -0.1, -1e-7, 1e-9, 0.5, 1.5, 12.0])
def test_phi(z: float) -> None:
    """φ_k(z) = ∫_0^1 e^{(1−u)z} u^{k−1}/(k−1)! du, to 1e-12 on both sides of the switch to the series."""
    assert phi(0, z) == pytest.approx(math.exp(z), rel=1e-14)
    for k in (1, 2, 3, 4):
        expected = quad(lambda u, k=k: math.exp((1 - u) * z) * u ** (k - 1) / math.factorial(k - 1), 0, 1, epsabs=0)[0]
        assert phi(k, z) == pytest.approx(expected, rel=1e-12)


def integral(h: float, power: int) -> float:
    """Return ∫_0^1 h e^{−h(1−u)} u^power du, the contribution of x̂_0 = u^power to x_s/α_s; u is 0 at t and 1 at s."""
    return quad(lambda u: h * math.exp(-h * (1 - u)) * u**power, 0, 1, epsabs=1e-14)[0]


@pytest.mark.parametrize(
    ("h", "sde"),
    [*itertools.product([0.03, 0.7, 2.5], [False, True]), (-0.4, False)],  # the SDE needs h > 0
)
@pytest.mark.parametrize("r", [(-1.0, -2.0), (-0.4, -1.7), (-2.5, -2.8)])
def test_the_corrected_third_order_is_exact_for_parabolas(h: float, r: tuple[float, float], sde: bool) -> None:
    """Against quadrature; the published order 3 is exact for straight lines only. The SDE has 2h instead of h."""
    for corrected, powers in ((True, (1, 2)), (False, (1,))):
        weights = DPMSolverPP(order=3, corrected=corrected, sde=sde).weights(h, r).predictor
        for power in powers:
            got = sum(w * at**power for w, at in zip(weights, r, strict=True))
            assert got == pytest.approx(integral(2 * h if sde else h, power), rel=1e-10, abs=1e-13)


@pytest.mark.parametrize("h", [0.03, 0.7, 2.5, -0.4])
@pytest.mark.parametrize("b", ["bh1", "bh2"])
def test_unipc_is_exact_for_polynomials(h: float, b: str) -> None:
    """The corrector of order p ≥ 2 up to degree p, the predictor of order p ≥ 3 up to degree p − 1, for both B."""
    for r in ([-1.3], [-0.6, -1.7], [-1.0, -2.0, -3.5]):
        weights = UniPC(order=len(r) + 1, b=b).weights(h, r)
        for power in range(1, len(r) + 2):
            expected = pytest.approx(integral(h, power), rel=1e-8, abs=1e-13)
            assert sum(w * at**power for w, at in zip(weights.corrector, [1.0, *r], strict=True)) == expected
            if len(r) > 1 and power <= len(r):
                assert sum(w * at**power for w, at in zip(weights.predictor, r, strict=True)) == expected


# ---------------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("curve", [*CURVES, "SubVP", "VE", "Linear", "Cosine-40-zero"])
def test_first_order_solvers_are_equal(curve: str) -> None:
    """DPM-Solver++ of order 1 and Euler equal DDIM, from noise to data, between noisy times and from data to noise."""
    s = SCHEDULES[curve]
    den = ExactDenoiser(s)
    for start, stop in ((1.0, 0.0), (0.9, 0.2), (0.0, 1.0), (0.1, 1.0)):
        x = X * s.alpha_sigma(torch.tensor(start, dtype=D))[1] if start else X
        expected = DDIM(11)(den, x, start=start, stop=stop).x
        for sampler in (DPMSolverPP(11, 1), Euler(11)):
            torch.testing.assert_close(sampler(den, x, start=start, stop=stop).x, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("curve", [*CURVES, "SubVP", "VE", "Cosine-40-zero"])
def test_the_sde_of_first_order_is_ancestral_sampling(curve: str) -> None:
    """σ_s √(1 − e^−2h) is σ̃ of the posterior: equal to DDPM with fixed_small and the same noise, on every curve."""
    s = SCHEDULES[curve]
    den, x = oracle(MIXTURE, s, PredV()), prior(s, X)
    got = DPMSolverPP(11, 1, sde=True)(den, x, seed=4).x
    torch.testing.assert_close(got, DDPM(11, grid="trailing")(den, x, seed=4).x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got, DDIM(11, eta=1.0)(den, x, seed=4).x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("curve", ["Cosine", "Flow", "EDM"])
@pytest.mark.parametrize("order", [2, 3])
def test_the_sde_returns_the_distribution_of_the_data(curve: str, order: int) -> None:
    """N(0.3, 0.5²) from 4,000 images and 60 steps, with 4 standard errors and a bias of 0.01. Order 1 is tested above."""
    s = SCHEDULES[curve]
    x_T = prior(s, normal((1, 1, 1), seed=3, index=torch.arange(4000), dtype=D))
    x = DPMSolverPP(60, order, sde=True)(oracle(DATA, s, PredV()), x_T, seed=5).x
    assert float(x.mean()) == pytest.approx(0.3, abs=4 * 0.5 / 4000**0.5 + 0.01)
    assert float(x.std()) == pytest.approx(0.5, abs=4 * 0.5 / 8000**0.5 + 0.01)


@pytest.mark.parametrize(
    ("order", "corrected", "measures", "n"),
    [(1, False, 1, 40), (2, False, 2, 40), (3, False, 2, 80), (3, True, 3, 40)],
)
def test_the_order_of_the_sde(order: int, corrected: bool, measures: int, n: int) -> None:
    """If x̂_0 is a function of t alone, the difference of two runs with the same noise is α_s ∫ 2 e^{−2(λ_s − λ)} x̂_0 dλ, known by
    quadrature. Slopes between n and 2n steps, within 0.2."""
    s = SCHEDULES["VP"]
    start, stop = interval(s)

    class KnownEstimate(ExactDenoiser):
        size = 1.0

        def __call__(self, x_t: Any, t: Any, previous: Any = None, **condition: Any) -> Prediction:
            alpha, sigma = self.schedule.alpha_sigma(t)
            x0 = self.size * (2 * self.schedule.lam(t)).sin() * torch.ones_like(x_t)
            return Prediction(x0, (x_t - alpha * x0) / sigma, x0)

    class ZeroEstimate(KnownEstimate):
        size = 0.0

    differences = []
    for steps in (n, 2 * n):
        sampler = DPMSolverPP(steps, order, sde=True, corrected=corrected, grid="uniform_lambda")
        known, zero = (sampler(cls(s), X, start=start, stop=stop).x for cls in (KnownEstimate, ZeroEstimate))
        expected = quad(lambda lam: 2 * math.exp(-2 * (FAR[1] - lam)) * math.sin(2 * lam), *FAR, epsabs=1e-13)[0]
        differences.append(abs(float((known - zero).mean() / scale(s, stop)) - expected))
    assert slopes(differences)[0] == pytest.approx(measures, abs=0.2), differences


# ------------------------------------------------------------------------------------------------------------- the ends


@pytest.mark.parametrize("curve", list(SCHEDULES))
@pytest.mark.parametrize("make", [Euler, Heun, DPMSolverPP, lambda n: DPMSolverPP(n, 3), UniPC, lambda n: UniPC(n, 3)])
def test_the_step_into_data_is_the_last_estimate(curve: str, make: Any) -> None:
    """On every curve, also where σ jumps to 0, and with the minimal number of steps."""
    s, last = SCHEDULES[curve], []
    sampler = make(3)
    x, nfe, _ = sampler(oracle(MIXTURE, s, PredV()), prior(s, X), callback=lambda i, t, x, p: last.append(p.x0))
    assert torch.equal(x, last[-1])
    assert nfe == (5 if isinstance(sampler, Heun) else 3)


@pytest.mark.parametrize("curve", ["Flow", "Cosine-40-zero"])
@pytest.mark.parametrize(
    "make", [DPMSolverPP, lambda n: DPMSolverPP(n, 3, corrected=True), UniPC, lambda n: UniPC(n, 3)]
)
def test_no_step_uses_an_estimate_at_alpha_0(curve: str, make: Any) -> None:
    """The step from α = 0 (h = ∞) is DDIM's, without a corrector, and its estimate is used in no polynomial: a run equals, bit
    for bit, the first step followed by a run that starts after it."""
    s, seen = SCHEDULES[curve], []
    den, x = oracle(MIXTURE, s, PredV()), prior(s, X)
    whole = make(20)(den, x, callback=lambda i, t, x, p: seen.append((t, x, p))).x
    (_, _, first), (t, state, _) = seen[0], seen[1]
    alpha, sigma = s.alpha_sigma(torch.tensor(t, dtype=D))
    assert torch.equal(state, alpha * first.x0 + sigma * first.noise)
    assert torch.equal(make(19)(den, state, start=t).x, whole)
    assert whole.isfinite().all()


@pytest.mark.parametrize("curve", [*CURVES, "SubVP", "VE", "Linear", "Cosine-40-zero"])
@pytest.mark.parametrize("make", [Euler, Heun, DPMSolverPP, lambda n: DPMSolverPP(n, 3, corrected=True), UniPC])
def test_encoding_and_decoding(curve: str, make: Any) -> None:
    """From data to noise and back with 40 steps: finite, of unit standard deviation over σ(1), and within 0.1 of the data."""
    s = SCHEDULES[curve]
    sampler, x = make(40), X / 1.5
    latent = sampler(ExactDenoiser(s), x, start=0.0, stop=1.0).x
    assert latent.isfinite().all()
    size = float(s.alpha_sigma(torch.ones((), dtype=D))[1])
    assert 0.3 < float(latent.std()) / size < 2
    assert (latent.flatten().diff() > 0).all(), "the flow in one dimension is monotone"
    assert (sampler(ExactDenoiser(s), latent).x - x).abs().max() < 0.1


def test_lowering_the_last_steps() -> None:
    """DPM-Solver++ with fewer than 10 steps, UniPC always, as in their authors' code. The step into data is of first order
    anyway, so order 2 does not change."""
    den, x = ExactDenoiser(SCHEDULES["VP"]), X

    def differs(cls: Any, steps: int, order: int, stop: float) -> bool:
        runs = [cls(steps, order, lower_last=lower)(den, x, stop=stop).x for lower in (True, False)]
        return not torch.equal(*runs)

    assert not differs(DPMSolverPP, 9, 2, 0.0)
    assert differs(DPMSolverPP, 9, 2, 0.1)
    assert differs(DPMSolverPP, 9, 3, 0.0)
    assert not differs(DPMSolverPP, 10, 3, 0.0)
    assert not differs(UniPC, 30, 2, 0.0)
    assert differs(UniPC, 30, 2, 0.1)
    assert differs(UniPC, 30, 3, 0.0)


def test_one_step_and_all_steps_are_possible() -> None:
    s = SCHEDULES["Cosine-40"]
    den, x = oracle(DATA, s, PredV()), X
    for cls in (Euler, Heun, DPMSolverPP, UniPC):
        sampler = cls(None)
        end, nfe, _ = sampler(den, x)
        assert nfe == (79 if cls is Heun else 40)
        assert float((end - DATA.flow(x, s, 1.0, 0.0)).abs().max()) < 0.05
    for sampler in (Euler(1), Heun(1), DPMSolverPP(1, 1), UniPC(1, 1)):
        end, nfe, _ = sampler(den, x)
        torch.testing.assert_close(end, den(x, 1.0).x0)
        assert nfe == 1


# ----------------------------------------------------------------------------------------------------- cost and refusals


@pytest.mark.parametrize(("sampler", "states"), [
    (DPMSolverPP(8, 1), 3), (DPMSolverPP(8, 2), 4), (DPMSolverPP(8, 3), 5), (DPMSolverPP(8, 3, corrected=True), 5),
    (DPMSolverPP(8, 3, sde=True), 5), (UniPC(8, 2), 4), (UniPC(8, 3), 5),
])  # fmt: skip
def test_a_multistep_solver_keeps_order_plus_2_states(sampler: Sampler, states: int) -> None:
    """Tensors of the state's shape alive at the fifth evaluation, without x_T, which the caller keeps, and the input."""
    shape, counts = (2, 1, 3, 5), []
    x_T = torch.zeros(shape)

    def network(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        counts.append(0)
        if len(counts) == 5:
            alive = {o.data_ptr() for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == shape}
            counts[-1] = len(alive - {x_T.data_ptr(), x.data_ptr()})
        return 0.5 * x

    sampler(Denoiser(network, Cosine(), PredV()), x_T)
    assert 0 < max(counts) <= states


@pytest.mark.parametrize("stop", [0.0, 0.3])
@pytest.mark.parametrize("budget", [1, 2, 9, 10])
def test_the_budget_of_heun(budget: int, stop: float) -> None:
    """2N − 1 evaluations to data, 2N to a noisy time; an odd budget leaves out the second evaluation of the last step."""
    s = SCHEDULES["VP"]
    den, sampler = oracle(DATA, s, PredV()), Heun(budget=budget)
    nfe = sampler(den, X, stop=stop).nfe
    assert sampler.steps == (budget + 1) // 2
    assert nfe == (2 * sampler.steps - 1 if stop == 0 or budget % 2 else budget)
    free = Heun(sampler.steps)
    assert free(den, X, stop=stop).nfe == 2 * (sampler.steps or 0) - (stop == 0)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: DPMSolverPP(2, 3), "steps >= 3"),
        (lambda: UniPC(1, 2), "steps >= 2"),
        (lambda: UniPC(order=3, budget=2), "steps >= 3"),
        (lambda: DPMSolverPP(order=4), r"order=4: write an integer in \[1, 3\]"),
        (lambda: DPMSolverPP(order=1, corrected=True), "order=3"),
        (lambda: UniPC(order=0), r"order=0: write an integer in \[1, 10\]"),
        (lambda: UniPC(b="bh3"), "bh2"),
        (lambda: Heun(s_churn=-1.0), "0 is deterministic"),
        (lambda: Heun(s_min=2.0, s_max=1.0), "s_min <= s_max"),
        (lambda: Heun(s_noise=math.nan), r"s_noise=nan: write a number in \[0, 10\]"),
    ],
)
def test_refusals(make: Callable[[], Sampler], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy) as refused:
        make()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("sampler", [DPMSolverPP(10, sde=True), Heun(10, s_churn=5.0)])
def test_stochastic_solvers_refuse_to_encode(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match="encode"):
        sampler(oracle(DATA, Cosine(), PredV()), X, start=0.0, stop=1.0)
