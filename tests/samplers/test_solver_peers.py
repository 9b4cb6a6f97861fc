"""Deterministic solvers step by step against diffusers, on the same network outputs, and documented differences.

Our sampler runs the chain, and each of its states and outputs is stepped once by diffusers. Its σ/α are replaced by ours in
float64, because the comparison would otherwise measure its float32 tables. Several of its steps round the state to float32, so
they agree to 1e-5.
"""

import itertools
from typing import Any

import pytest
import torch
from oracle import Mixture, oracle

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.noise import normal
from diffusion_lab.objectives import EDM as Preconditioned
from diffusion_lab.objectives import Objective, PredFlow, PredNoise, PredV, PredX0
from diffusion_lab.samplers import DPMSolverPP, Euler, Heun, Sampler, UniPC, prior
from diffusion_lab.samplers.grids import make_grid
from diffusion_lab.schedules import EDM, VP, Cosine, Flow, Linear, Schedule

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of diffusers

D = torch.float64
SHAPE = (2, 3, 3)
DATA = Mixture(torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.5]))
CURVES: dict[str, Schedule] = {"linear": Linear(), "cosine": Cosine(), "vp": VP(), "flow": Flow(), "edm": EDM()}
OBJECTIVES: dict[str, Objective] = {
    "epsilon": PredNoise(), "sample": PredX0(), "v_prediction": PredV(), "flow_prediction": PredFlow(), "edm": Preconditioned(),
}  # fmt: skip
Step = tuple[float, torch.Tensor, Prediction]


def ours(step: int) -> torch.Tensor:
    return normal(SHAPE, seed=1, index=torch.arange(2), draw=step + 1, dtype=D)


def run(sampler: Sampler, curve: str, prediction: str, start: float = 1.0) -> tuple[list[Step], torch.Tensor]:
    """Run our sampler from keyed noise; return every evaluation in order (a step may have two) and the result."""
    schedule, seen = CURVES[curve], []
    inner = oracle(DATA, schedule, OBJECTIVES[prediction])

    class Recording(Denoiser):
        def __call__(self, x_t: Any, t: Any, previous: Any = None, **condition: Any) -> Prediction:
            prediction = super().__call__(x_t, t, previous, **condition)
            seen.append((float(t), x_t, prediction))
            return prediction

    x = prior(schedule, normal(SHAPE, seed=1, index=torch.arange(2), dtype=D))
    return seen, sampler(Recording(inner.network, schedule, inner.objective), x, seed=1, start=start).x


def levels(sampler: Sampler, curve: str, start: float = 1.0) -> torch.Tensor:
    """Return diffusers' sigmas at our times: σ/α; for flow σ."""
    alpha, sigma = CURVES[curve].alpha_sigma(make_grid(sampler.grid, CURVES[curve], sampler.steps, start, 0.0))
    return sigma if curve == "flow" else sigma / alpha


def prepared(scheduler: Any, sigmas: torch.Tensor) -> Any:
    """Return diffusers' scheduler, set to the first of these sigmas."""
    n = len(sigmas) - 1
    scheduler.set_timesteps(n)
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)
    return scheduler


def agree(got: torch.Tensor, expected: torch.Tensor, step: int, margin: float = 1e-5) -> None:
    size = max(1.0, float(got.abs().max()))
    assert float((got - expected).abs().max()) < margin * size, f"step {step}"


def compare(theirs: Any, seen: list[Step], end: torch.Tensor, noisy: bool = False, count: int | None = None) -> None:
    """Assert that every step of diffusers from our states and outputs returns our next state."""
    reached = [x for _, x, _ in seen[1:]] + [end]
    for k, ((_, x, p), to) in enumerate(itertools.islice(zip(seen, reached, strict=True), count)):
        extra = {"variance_noise": ours(k)} if noisy else {}
        agree(to, theirs.step(p.output, theirs.timesteps[k], x, **extra).prev_sample, k)


# ----------------------------------------------------------------------------------------------------------- time grids


@pytest.mark.parametrize("n", [5, 20])
@pytest.mark.parametrize("curve", ["linear", "cosine"])
def test_karras_and_uniform_lambda_match_diffusers(n: int, curve: str) -> None:
    """Relative error of σ/α below 1e-4, the precision of their float32 tables (1e-3 for the first of cosine, 2e4)."""
    name = "squaredcos_cap_v2" if curve == "cosine" else "linear"
    for grid, option in (("karras", "use_karras_sigmas"), ("uniform_lambda", "use_lu_lambdas")):
        theirs = diffusers.DPMSolverMultistepScheduler(beta_schedule=name, **{option: True})
        theirs.set_timesteps(n)
        got = levels(DPMSolverPP(n, grid=grid), curve)
        torch.testing.assert_close(got, theirs.sigmas.double(), rtol=2e-3 if curve == "cosine" else 2e-4, atol=0)


# --------------------------------------------------------------------------------------------------------- DPM-Solver++


def multistep(**options: Any) -> Any:
    return diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing", final_sigmas_type="zero", **options)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("steps", "lower"), [(6, True), (6, False), (20, True)])
@pytest.mark.parametrize(
    ("curve", "prediction"), [("linear", "epsilon"), ("cosine", "v_prediction"), ("vp", "sample"), ("vp", "epsilon")]
)
def test_dpm_solver(order: int, steps: int, lower: bool, curve: str, prediction: str) -> None:
    sampler = DPMSolverPP(steps, order, lower_last=lower, grid="trailing")
    theirs = multistep(solver_order=order, prediction_type=prediction, lower_order_final=lower)
    compare(prepared(theirs, levels(sampler, curve)), *run(sampler, curve, prediction))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [6, 20])
@pytest.mark.parametrize("curve", ["linear", "cosine"])
def test_dpm_solver_as_an_sde(order: int, steps: int, curve: str) -> None:
    sampler = DPMSolverPP(steps, order, sde=True)
    theirs = multistep(solver_order=order, prediction_type="v_prediction", algorithm_type="sde-dpmsolver++")
    compare(prepared(theirs, levels(sampler, curve)), *run(sampler, curve, "v_prediction"), noisy=True)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("grid", ["karras", "uniform_lambda"])
def test_dpm_solver_on_grids_in_lambda(order: int, grid: str) -> None:
    sampler = DPMSolverPP(20, order, grid=grid)
    theirs = multistep(solver_order=order, prediction_type="epsilon")
    compare(prepared(theirs, levels(sampler, "linear")), *run(sampler, "linear", "epsilon"))


@pytest.mark.parametrize(("order", "start"), [(1, 1.0), (2, 1.0), (3, 0.98)])
def test_dpm_solver_on_the_straight_line(order: int, start: float) -> None:
    """From α = 0 on, where λ is −∞ for both. At order 3 ours uses no estimate from there; theirs uses one with slope 0."""
    sampler = DPMSolverPP(20, order)
    theirs = multistep(solver_order=order, prediction_type="flow_prediction", use_flow_sigmas=True)
    compare(prepared(theirs, levels(sampler, "flow", start)), *run(sampler, "flow", "flow_prediction", start))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_of_edm(order: int) -> None:
    """With the default grid of diffusers: karras, on our curve linspace."""
    theirs = diffusers.EDMDPMSolverMultistepScheduler(solver_order=order)
    theirs.set_timesteps(20)
    compare(theirs, *run(DPMSolverPP(20, order, grid="linspace"), "edm", "edm"))


def test_diffusers_lowers_the_order_below_15_steps() -> None:
    """12 steps: the second last has order 3 in the authors' code and order 2 in diffusers; the others agree."""
    sampler = DPMSolverPP(12, 3)
    seen, end = run(sampler, "linear", "epsilon")
    theirs = prepared(multistep(solver_order=3), levels(sampler, "linear"))
    compare(theirs, seen, end, count=10)
    _, x, p = seen[10]
    assert float((theirs.step(p.output, theirs.timesteps[10], x).prev_sample - seen[11][1]).abs().max()) > 1e-4


def test_diffusers_has_a_wrong_sign_in_the_third_order_sde() -> None:
    """The coefficient of D2 must vanish with h. (1 − e^−2h − 2h)/(2h)² tends to −1/2, so 1/2 must be added; diffusers subtracts
    it. Its step is ours minus α_s D2, of first order. Ours is the published form."""
    sampler = DPMSolverPP(20, 3, sde=True)
    seen, end = run(sampler, "linear", "epsilon")
    sigmas = levels(sampler, "linear")
    theirs = prepared(multistep(solver_order=3, algorithm_type="sde-dpmsolver++"), sigmas)
    alpha, lam = 1 / (1 + sigmas.square()).sqrt(), -sigmas.log()
    reached = [x for _, x, _ in seen[1:]] + [end]
    for k, ((_, x, p), to) in enumerate(zip(seen, reached, strict=True)):
        got = theirs.step(p.output, theirs.timesteps[k], x, variance_noise=ours(k)).prev_sample
        if 2 <= k < 19:
            h = lam[k + 1] - lam[k]
            r0, r1 = (lam[k] - lam[k - 1]) / h, (lam[k - 1] - lam[k - 2]) / h
            d0, d1, d2 = (seen[j][2].x0 for j in (k, k - 1, k - 2))
            second = ((d0 - d1) / r0 - (d1 - d2) / r1) / (r0 + r1)
            got = got + alpha[k + 1] * second
        agree(to, got, k)


# ---------------------------------------------------------------------------------------------------------------- UniPC


def unipc(**options: Any) -> Any:
    return diffusers.UniPCMultistepScheduler(timestep_spacing="trailing", final_sigmas_type="zero", **options)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("b", ["bh1", "bh2"])
@pytest.mark.parametrize(
    ("curve", "prediction"), [("linear", "epsilon"), ("cosine", "v_prediction"), ("vp", "sample"), ("vp", "epsilon")]
)
@pytest.mark.parametrize("steps", [6, 20])
def test_unipc(order: int, b: str, curve: str, prediction: str, steps: int) -> None:
    """All steps; with bh1 all but the step into data, see below."""
    sampler = UniPC(steps, order, b)
    theirs = unipc(solver_order=order, prediction_type=prediction, solver_type=b)
    count = steps - (b == "bh1")
    compare(prepared(theirs, levels(sampler, curve)), *run(sampler, curve, prediction), count=count)


@pytest.mark.parametrize("order", [2, 3])
def test_unipc_on_the_straight_line(order: int) -> None:
    """From t = 0.98, because diffusers cannot start at α = 0, see below."""
    sampler = UniPC(20, order)
    theirs = unipc(solver_order=order, prediction_type="flow_prediction", use_flow_sigmas=True)
    compare(prepared(theirs, levels(sampler, "flow", 0.98)), *run(sampler, "flow", "flow_prediction", start=0.98))


@pytest.mark.parametrize("options", [{"solver_type": "bh1"}, {"lower_order_final": False}])
def test_diffusers_has_no_step_into_data(options: dict[str, Any]) -> None:
    """With bh1, or without lowering the order, the step into σ = 0 multiplies or divides by h = ∞; ours returns x̂_0."""
    sampler = UniPC(8, 2, options.get("solver_type", "bh2"), lower_last=options.get("lower_order_final", True))
    seen, end = run(sampler, "linear", "epsilon")
    theirs = prepared(unipc(solver_order=2, **options), levels(sampler, "linear"))
    compare(theirs, seen, end, count=7)
    _, x, p = seen[7]
    assert not theirs.step(p.output, theirs.timesteps[7], x).prev_sample.isfinite().any()
    assert torch.equal(end, p.x0)


def test_diffusers_corrects_across_alpha_0() -> None:
    """From σ = 1 on the straight line (diffusers starts at 1 − 1e-6) bh1 returns NaN, and bh2 adds half the change of the
    estimate, whatever the step; ours has no corrector where no slope in λ exists."""
    sampler = UniPC(8, 2)
    seen, end = run(sampler, "flow", "flow_prediction")
    assert end.isfinite().all()
    for b in ("bh1", "bh2"):
        theirs = prepared(
            unipc(solver_order=2, prediction_type="flow_prediction", use_flow_sigmas=True, solver_type=b),
            levels(sampler, "flow"),
        )
        for k, (_, x, p) in enumerate(seen[:2]):
            theirs.step(p.output, theirs.timesteps[k], x)
        moved = theirs.last_sample - seen[1][1]
        if b == "bh1":
            assert not moved.isfinite().all()
        else:
            agree(moved, 0.5 * (1 - seen[1][0]) * (seen[1][2].x0 - seen[0][2].x0), 1)


# -------------------------------------------------------------------------------------------------------- Euler and Heun


def test_euler_of_edm() -> None:
    theirs = diffusers.EDMEulerScheduler()
    theirs.set_timesteps(18)
    theirs.is_scale_input_called = True
    theirs.set_begin_index(0)
    compare(theirs, *run(Euler(18, grid="linspace"), "edm", "edm"))


@pytest.mark.parametrize(("curve", "start"), [("linear", 1.0), ("cosine", 0.95)])
def test_euler_of_tables(curve: str, start: float) -> None:
    """The state of diffusers is x/α, for which Euler in σ/α is the same step. It is rounded to float32, an error of 1e-4 at the
    end of cosine, where it is 2e4; hence the later start."""
    sampler = Euler(20)
    seen, end = run(sampler, curve, "epsilon", start)
    sigmas = levels(sampler, curve, start)
    theirs = prepared(diffusers.EulerDiscreteScheduler(timestep_spacing="trailing"), sigmas)
    theirs.is_scale_input_called = True
    alpha = 1 / (1 + sigmas.square()).sqrt()
    reached = [x for _, x, _ in seen[1:]] + [end]
    for k, ((_, x, p), to) in enumerate(zip(seen, reached, strict=True)):
        expected = theirs.step(p.output, theirs.timesteps[k], x / alpha[k]).prev_sample * alpha[k + 1]
        agree(to, expected, k)


def heun(sigmas: torch.Tensor) -> Any:
    """Return diffusers' Heun scheduler, which takes two calls a step, for these sigmas."""
    theirs = prepared(diffusers.HeunDiscreteScheduler(), sigmas)
    theirs.sigmas = torch.cat([sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]])
    return theirs


def test_heun_on_edms_curve() -> None:
    sampler = Heun(12)
    compare(heun(levels(sampler, "edm")), *run(sampler, "edm", "epsilon"))


def test_diffusers_heun_integrates_x_over_alpha() -> None:
    """If α changes, these are two different second-order rules: the trapezoidal rule for d(x/α) = ε̂ d(σ/α) in diffusers, for
    dx = x̂_0 dα + ε̂ dσ, which includes α = 0, in ours. Their difference falls as 1/N², at least by 3 when N doubles."""
    gaps = []
    for n in (20, 40):
        sampler = Heun(n, grid="karras")
        seen, end = run(sampler, "linear", "epsilon")
        sigmas = levels(sampler, "linear")
        theirs, x = heun(sigmas), seen[0][1] * (1 + sigmas[0] ** 2).sqrt()
        den = oracle(DATA, Linear(), PredNoise())
        for k, (t, _, _) in enumerate(seen):
            alpha = Linear().alpha_sigma(torch.tensor(t, dtype=D))[0]
            x = theirs.step(den(alpha * x, t).output, theirs.timesteps[k], x).prev_sample
        gaps.append(float((x - end).abs().mean()))
    assert gaps[0] / gaps[1] > 3, gaps
