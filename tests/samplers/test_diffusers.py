"""DDPM and DDIM step by step against diffusers on the same states and network outputs, and documented differences.

Our sampler runs the chain, and each of its states is stepped once by diffusers. The generator of diffusers' noise is seeded, so
that its noise can be exchanged for ours. In diffusers' float32 tables 1 − ᾱ has three digits at the first steps, so its steps
use a float64 table of the same β and must agree to 1e-9; with the float32 tables they agree to 1e-5.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from oracle import Mixture, oracle

from diffusion_lab.denoiser import Prediction
from diffusion_lab.noise import normal
from diffusion_lab.objectives import Objective, PredNoise, PredV, PredX0
from diffusion_lab.samplers import DDIM, DDPM
from diffusion_lab.samplers.base import Sampler
from diffusion_lab.schedules import Cosine, Linear, Schedule
from diffusion_lab.variances import FixedLarge, FixedSmall

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of diffusers

D = torch.float64
SHAPE = (2, 3, 3)
DATA = Mixture(torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.5]))
SCHEDULES: dict[str, tuple[Schedule, dict[str, Any]]] = {
    "linear": (Linear(), {"beta_schedule": "linear"}),
    "cosine": (Cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
    "zero": (Linear(zero_terminal_snr=True), {"beta_schedule": "linear", "rescale_betas_zero_snr": True}),
}
OBJECTIVES: dict[str, Objective] = {"epsilon": PredNoise(), "sample": PredX0(), "v_prediction": PredV()}
Step = tuple[float, torch.Tensor, Prediction]


def run(
    sampler: Sampler, schedule: Schedule, objective: Objective, clip: float | None
) -> tuple[list[Step], torch.Tensor]:
    """Run our sampler from keyed noise; return the reports of every step and the result."""
    seen: list[Step] = []
    x = normal(SHAPE, seed=1, index=torch.arange(2), dtype=D)
    den = oracle(DATA, schedule, objective, clip=clip)
    return seen, sampler(den, x, seed=1, callback=lambda i, t, x, p: seen.append((t, x, p))).x


def ours(step: int) -> torch.Tensor:
    return normal(SHAPE, seed=1, index=torch.arange(2), draw=step + 1, dtype=D)


def agree(got: torch.Tensor, expected: torch.Tensor, step: int, margin: float = 1e-9) -> None:
    size = max(1.0, float(got.abs().max()))
    assert float((got - expected).abs().max()) < margin * size, f"step {step}"


def theirs_in_float64(scheduler: Any) -> Any:
    """Replace the tables by float64 ones, computed from the same formulas of β."""
    config = scheduler.config
    if config.beta_schedule == "linear":
        beta = torch.linspace(1e-4, 0.02, 1000, dtype=D)
    else:
        bar = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
        beta = torch.tensor([min(1 - after / before, 0.999) for before, after in itertools.pairwise(bar)], dtype=D)
    if config.rescale_betas_zero_snr:
        beta = diffusers.schedulers.scheduling_ddim.rescale_zero_terminal_snr(beta)
    torch.testing.assert_close(scheduler.betas.double(), beta, rtol=1e-3, atol=1e-6)
    scheduler.alphas_cumprod = (1 - beta).cumprod(0)
    return scheduler


def states(seen: list[Step], end: torch.Tensor) -> list[torch.Tensor]:
    """Return the state after each step."""
    return [x for _, x, _ in seen[1:]] + [end]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_tables_are_the_same(schedule: str) -> None:
    curve, theirs = SCHEDULES[schedule]
    expected = diffusers.DDPMScheduler(**theirs).alphas_cumprod.double()
    got = curve.alpha_sigma(torch.arange(1, 1001, dtype=D) / 1000)[0].square()
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=0)


def ddpm_case(schedule: str, prediction: str, variance: str, clip: bool, spacing: str, n: int) -> None:
    curve, options = SCHEDULES[schedule]
    theirs = theirs_in_float64(
        diffusers.DDPMScheduler(
            **options, prediction_type=prediction, variance_type=variance, clip_sample=clip, timestep_spacing=spacing
        )
    )
    theirs.set_timesteps(n)
    sampler = DDPM(n, FixedLarge() if variance == "fixed_large" else FixedSmall(), grid=spacing)
    seen, end = run(sampler, curve, OBJECTIVES[prediction], 1.0 if clip else None)
    assert [round(t * 1000) - 1 for t, _, _ in seen] == theirs.timesteps.tolist()
    for k, ((t, x, p), reached) in enumerate(zip(seen, states(seen, end), strict=True)):
        i = round(t * 1000) - 1
        expected = theirs.step(p.output, i, x, generator=torch.Generator().manual_seed(k)).prev_sample
        if i > 0:
            z = torch.randn(x.shape, generator=torch.Generator().manual_seed(k), dtype=D)
            std = theirs._get_variance(i).double().sqrt()
            last = k == len(seen) - 1  # diffusers adds noise to data there unless i = 0; see the test below
            expected = expected - std * z + (0 if last else std * ours(k))
        agree(reached, expected, k)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", list(OBJECTIVES))
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("spacing", "n"), [("leading", 10), ("trailing", 10), ("trailing", 7), ("leading", 7)])
def test_ddpm(schedule: str, prediction: str, variance: str, clip: bool, spacing: str, n: int) -> None:
    ddpm_case(schedule, prediction, variance, clip, spacing, n)


def test_ddpm_over_every_other_step() -> None:
    ddpm_case("linear", "epsilon", "fixed_small", True, "leading", 500)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_with_zero_terminal_snr(variance: str) -> None:
    ddpm_case("zero", "v_prediction", variance, False, "trailing", 50)


def ddim_case(
    schedule: str, prediction: str, eta: float, clip: bool, spacing: str, n: int, float32: bool = False
) -> None:
    curve, options = SCHEDULES[schedule]
    theirs = diffusers.DDIMScheduler(**options, prediction_type=prediction, clip_sample=clip, timestep_spacing=spacing)
    theirs = theirs if float32 else theirs_in_float64(theirs)
    theirs.set_timesteps(n)
    seen, end = run(DDIM(n, eta=eta, grid=spacing), curve, OBJECTIVES[prediction], 1.0 if clip else None)
    assert [round(t * 1000) - 1 for t, _, _ in seen] == theirs.timesteps.tolist()
    for k, ((t, x, p), reached) in enumerate(zip(seen, states(seen, end), strict=True)):
        expected = theirs.step(
            p.output,
            round(t * 1000) - 1,
            x,
            eta=eta,
            use_clipped_model_output=clip,
            variance_noise=ours(k) if eta else None,
        ).prev_sample
        agree(reached, expected, k, 1e-5 if float32 else 1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", list(OBJECTIVES))
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim(schedule: str, prediction: str, eta: float, clip: bool, spacing: str) -> None:
    ddim_case(schedule, prediction, eta, clip, spacing, 10)


def test_ddim_over_every_other_step() -> None:
    ddim_case("cosine", "epsilon", 0.7, False, "leading", 500)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_on_their_own_float32_tables(schedule: str, eta: float) -> None:
    ddim_case(schedule, "v_prediction", eta, True, "trailing", 50, float32=True)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_with_zero_terminal_snr(prediction: str, eta: float) -> None:
    ddim_case("zero", prediction, eta, False, "trailing", 50)


# ------------------------------------------------------------------------------------------------ differences from diffusers


def test_diffusers_keeps_the_noise_of_the_unclipped_prediction() -> None:
    """Without use_clipped_model_output diffusers' ε̂ is not that of the clipped x̂_0; ours is: α x̂_0 + σ ε̂ = x_t."""
    theirs = theirs_in_float64(diffusers.DDIMScheduler(clip_sample=True, timestep_spacing="trailing"))
    theirs.set_timesteps(40)
    seen, end = run(DDIM(40), Linear(), PredNoise(), 1.0)
    t, x, p = seen[0]
    alpha, sigma = Linear().alpha_sigma(torch.tensor(t, dtype=D))
    torch.testing.assert_close(alpha * p.x0 + sigma * p.noise, x, rtol=0, atol=1e-12)
    differences = [
        float((theirs.step(p.output, round(t * 1000) - 1, x).prev_sample - reached).abs().max())
        for (t, x, p), reached in zip(seen, states(seen, end), strict=True)
    ]
    assert max(differences) > 1e-3


def test_diffusers_computes_s_as_t_minus_a_stride() -> None:
    """30 trailing steps: T // n = 33, but the times fall by 33 or 34, so diffusers' state belongs to another time than the next
    evaluation. The steps of 33 agree, the others do not."""
    theirs = theirs_in_float64(diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    theirs.set_timesteps(30)
    seen, end = run(DDIM(30), Linear(), PredNoise(), None)
    nodes = [round(t * 1000) for t, _, _ in seen] + [0]
    wrong = 0
    for k, ((_, x, p), reached) in enumerate(zip(seen, states(seen, end), strict=True)):
        expected = theirs.step(p.output, nodes[k] - 1, x).prev_sample
        if nodes[k] - nodes[k + 1] == 33:
            agree(reached, expected, k)
        elif k < 29:
            wrong += 1
            assert float((reached - expected).abs().max()) > 1e-4
    assert wrong == 10


def test_diffusers_adds_noise_to_data_if_the_last_time_is_not_the_first_node() -> None:
    """The last of 40 trailing steps starts at node 25: diffusers tests i > 0 and adds noise of variance σ²_{t|0},
    ours adds none."""
    theirs = theirs_in_float64(
        diffusers.DDPMScheduler(variance_type="fixed_large", timestep_spacing="trailing", clip_sample=False)
    )
    theirs.set_timesteps(40)
    seen, end = run(DDPM(40, FixedLarge(), grid="trailing"), Linear(), PredNoise(), None)
    t, x, p = seen[-1]
    assert round(t * 1000) == 25
    noisy = theirs.step(p.output, 24, x, generator=torch.Generator().manual_seed(0)).prev_sample
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=D)
    sigma = float(Linear().alpha_sigma(torch.tensor(t, dtype=D))[1])
    agree(noisy - end, sigma * z, 39)
    assert torch.equal(end, p.x0)


def test_diffusers_clamps_the_variance_of_the_first_step() -> None:
    """diffusers replaces β̃_1 = 0 by 1e-20, as a lower bound of a learned variance 16 orders of magnitude below improved
    DDPM's β̃_2."""
    from diffusion_lab.gaussian import posterior

    assert float(diffusers.DDPMScheduler()._get_variance(0)) == pytest.approx(1e-20)
    first = posterior(Linear(), torch.tensor(0.001, dtype=D), torch.tensor(0.0, dtype=D)).variance
    second = posterior(Linear(), torch.tensor(0.002, dtype=D), torch.tensor(0.001, dtype=D)).variance
    assert float(first) == 0
    assert float(second) == pytest.approx(5.5e-5, rel=0.02)
