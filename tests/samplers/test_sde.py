"""Samplers of the reverse SDE against published formulas, exact moments and diffusers; Langevin steps per image."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Gaussian, oracle

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.noise import normal
from diffusion_lab.objectives import PredNoise, PredV
from diffusion_lab.samplers import EulerMaruyama, PredictorCorrector, ReverseDiffusion
from diffusion_lab.samplers.base import Sampler, prior
from diffusion_lab.samplers.grids import make_grid
from diffusion_lab.samplers.sde import ReverseSDE
from diffusion_lab.schedules import EDM, VE, VP, Flow, Linear, Schedule, SubVP

D = torch.float64
SHAPE = (2, 3, 3)
X = normal(SHAPE, seed=1, index=torch.arange(3), dtype=D)
CURVES: dict[str, Schedule] = {
    "vp": VP(),
    "sub_vp": SubVP(),
    "ve": VE(),
    "edm": EDM(),
    "flow": Flow(),
    "linear": Linear(),
}

# Euler–Maruyama is refused on flow, where α(1) = 0
WORK = [(c, n) for c in (EulerMaruyama, ReverseDiffusion) for n in CURVES if (c, n) != (EulerMaruyama, "flow")]


def network(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return an ε̂ of the scale of noise that depends on time."""
    return (x * (0.5 + (c[:, None, None, None] / 7).sin() ** 2)).tanh()


def epsilon(x: np.ndarray, schedule: Schedule, t: float) -> np.ndarray:
    c = schedule.conditioning(torch.tensor(t, dtype=D)).expand(len(x))
    return network(torch.from_numpy(x), c).numpy()


def z(draw: int) -> np.ndarray:
    """Return the keyed noise of noise(i), i = draw, which is draw i + 1 of the key."""
    return normal(SHAPE, seed=4, index=torch.arange(3), draw=draw + 1, dtype=D).numpy()


def agree(got: torch.Tensor, expected: np.ndarray, margin: float = 1e-9) -> None:
    assert float((got - torch.from_numpy(expected)).abs().max()) < margin * max(1.0, float(np.abs(expected).max()))


# ----------------------------------------------------------------------------------------------- published formulas


def test_reverse_diffusion_on_ve_matches_song_et_al() -> None:
    """x ← x + (σ_i² − σ_{i−1}²) score + √(σ_i² − σ_{i−1}²) z, σ_i geometric, σ_0 = 0; the last mean is returned (eq. 47)."""
    n, x = 50, 50 * X.numpy()
    t = np.append(np.linspace(1, 1e-5, n), 0)
    sigma = np.append(0.01 * 5000 ** t[:-1], 0)
    for i in range(n):
        score = -epsilon(x, VE(), t[i]) / sigma[i]
        fall = sigma[i] ** 2 - sigma[i + 1] ** 2
        x = x + fall * score
        if i < n - 1:
            x = x + np.sqrt(fall) * z(i)
    agree(ReverseDiffusion(n)(Denoiser(network, VE(), PredNoise()), 50 * X, seed=4).x, x)


@pytest.mark.parametrize(("first", "last"), [(1000, 900), (100, 0)])
def test_reverse_diffusion_on_ddpms_chain_matches_song_et_al(first: int, last: int) -> None:
    """x ← (2 − √(1−β_i)) x + β_i score + √β_i z, the first and the last 100 of 1000 steps (eq. 46). The last mean is x̂_0
    to β_1²/8 = 1e-9."""
    x, beta = X.numpy(), np.linspace(0.1, 20, 1000) / 1000
    sigma = np.sqrt(1 - np.cumprod(1 - beta))
    for k, i in enumerate(range(first - 1, last - 1, -1)):
        score = -epsilon(x, Linear(), (i + 1) / 1000) / sigma[i]
        x = (2 - np.sqrt(1 - beta[i])) * x + beta[i] * score
        if i:
            x = x + np.sqrt(beta[i]) * z(k)
    den = Denoiser(network, Linear(), PredNoise())
    agree(
        ReverseDiffusion(None)(den, X, seed=4, start=first / 1000, stop=last / 1000).x, x, 1e-6 if last == 0 else 1e-9
    )


def beta(t: float) -> float:
    return 0.1 + t * 19.9


def bar(t: float) -> float:
    """∫β from 0 to t."""
    return 0.1 * t + t**2 * 19.9 / 2


FORWARD: dict[str, Callable[[float], tuple[float, float, float]]] = {  # published f, g², σ of each SDE
    "vp": lambda t: (-beta(t) / 2, beta(t), math.sqrt(1 - math.exp(-bar(t)))),
    "sub_vp": lambda t: (-beta(t) / 2, beta(t) * (1 - math.exp(-2 * bar(t))), 1 - math.exp(-bar(t))),
    "ve": lambda t: (0.0, 2 * (0.01 * 5000**t) ** 2 * math.log(5000), 0.01 * 5000**t),
    "flow": lambda t: (-1 / (1 - t), 2 * t / (1 - t), t),
}


@pytest.mark.parametrize("name", FORWARD)
def test_euler_maruyama_matches_song_et_al(name: str) -> None:
    """x ← x − [f x − g² score] h + g √h z, f and g² from the papers, from 0.9 to 0.3 in 30 steps, all of them stochastic."""
    x, n, schedule = X.numpy(), 30, CURVES[name]
    t = [0.9 - 0.6 * k / n for k in range(n + 1)]
    for k in range(n):
        f, g2, sigma = FORWARD[name](t[k])
        score = -epsilon(x, schedule, t[k]) / sigma
        h = t[k] - t[k + 1]
        x = x - (f * x - g2 * score) * h + math.sqrt(g2 * h) * z(k)
    sampler = EulerMaruyama(n, grid="trailing")
    denoiser = Denoiser(network, schedule, PredNoise() if name != "flow" else _NoiseOnFlow())
    agree(sampler(denoiser, X, seed=4, start=0.9, stop=0.3).x, x)


class _NoiseOnFlow(PredNoise):
    """PredNoise without the refusal of curves that end in α = 0; the test does not reach this end."""

    def check(self, schedule: Schedule) -> None:
        pass


@pytest.mark.parametrize("corrector_steps", [1, 2])
@pytest.mark.parametrize("name", ["ve", "linear", "sub_vp"])
def test_predictor_corrector_by_hand(name: str, corrector_steps: int) -> None:
    """M Langevin steps, κ = 2a(r‖z‖/‖g‖)² per image, then the predictor; no draw is used twice."""
    schedule, n, m = CURVES[name], 20, corrector_steps
    scale = 50 if name == "ve" else 1
    x, t, drawn = scale * X.numpy(), make_grid("trailing", schedule, n).tolist(), []
    curve = [tuple(map(float, schedule.alpha_sigma(torch.tensor(s, dtype=D)))) for s in t]
    for i in range(n):
        (alpha, sigma), (alpha_s, sigma_s) = curve[i], curve[i + 1]
        back = float(schedule.alpha_sigma(torch.tensor(t[i] - 0.001, dtype=D))[0])
        a = (alpha / back) ** 2
        for j in range(m):
            g = -epsilon(x, schedule, t[i]) / sigma
            noise = z(i * (m + 1) + j)
            drawn.append(i * (m + 1) + j)
            for k in range(3):
                kappa = 2 * a * (0.16 * np.linalg.norm(noise[k]) / np.linalg.norm(g[k])) ** 2
                x[k] = x[k] + kappa * g[k] + np.sqrt(2 * kappa) * noise[k]
        ratio = alpha / alpha_s
        fall = sigma**2 - (ratio * sigma_s) ** 2
        eps = epsilon(x, schedule, t[i])
        if i == n - 1:
            x = (x - sigma * eps) / alpha
        else:
            drawn.append(i * (m + 1) + m)
            x = (2 - ratio) * x - fall * eps / sigma + np.sqrt(fall) * z(drawn[-1])
    assert len(set(drawn)) == len(drawn) == n * (m + 1) - 1
    sampler = PredictorCorrector(n, grid="trailing", corrector_steps=m)
    samples = sampler(Denoiser(network, schedule, PredNoise()), scale * X, seed=4)
    agree(samples.x, x)
    assert samples.nfe == n * (m + 1)


def test_the_published_scale_of_a_langevin_step() -> None:
    """1 − β_i on DDPM's chain, 1 on VE and EDM; on sub_vp, for which published code has none, the same as on vp, since their
    drifts are equal. It is 0 at α = 0: pure noise is not corrected."""
    sampler, t = PredictorCorrector(10), torch.tensor([0.001, 0.3, 1.0], dtype=D)
    chain = 1 - torch.linspace(1e-4, 0.02, 1000, dtype=D)[torch.tensor([0, 299, 999])]
    torch.testing.assert_close(sampler.scale(Linear(), t), chain, rtol=1e-12, atol=0)
    for schedule in (VE(), EDM()):
        assert torch.equal(sampler.scale(schedule, t), torch.ones(3, dtype=D))
    torch.testing.assert_close(sampler.scale(SubVP(), t), sampler.scale(VP(), t), rtol=1e-12, atol=0)
    torch.testing.assert_close(sampler.scale(VP(), t), chain, rtol=0, atol=0.02**2 / 2 + 1e-5)  # e^−β for 1 − β
    for schedule in (Flow(), Linear(zero_terminal_snr=True)):
        assert float(sampler.scale(schedule, t)[-1]) == 0


@pytest.mark.parametrize("name", ["reverse_diffusion", "euler_maruyama"])
def test_without_corrector_steps_it_equals_the_predictor(name: str) -> None:
    den = Denoiser(network, VP(), PredNoise())
    alone: Sampler = (ReverseDiffusion if name == "reverse_diffusion" else EulerMaruyama)(15)
    assert torch.equal(
        PredictorCorrector(15, predictor=name, corrector_steps=0)(den, X, seed=4).x, alone(den, X, seed=4).x
    )


# ------------------------------------------------------------------------------------------------------ exact moments


def moments(sampler: ReverseSDE, schedule: Schedule, mean: float, std: float) -> tuple[float, float]:
    """Return the exact mean and standard deviation for Gaussian data: each step is affine, so no sampling is needed."""
    grid = sampler.time_grid(oracle(Gaussian(torch.zeros(1, 1, 1), 1.0), schedule, PredV()))
    alpha, sigma = schedule.alpha_sigma(grid)
    at, var = torch.zeros((), dtype=D), sigma[0] ** 2
    a, b, c = sampler.coefficients(schedule, grid[:-1], grid[1:])
    for i in range(len(grid) - 1):
        spread = (alpha[i] * std) ** 2 + sigma[i] ** 2
        slope, base = alpha[i] * std**2 / spread, mean - (alpha[i] * mean) * alpha[i] * std**2 / spread  # of x̂_0
        if grid[i + 1] == 0:
            return float(base + slope * at), float(slope * var.sqrt())
        turn = (1 - alpha[i] * slope) / sigma[i]  # of ε̂ = (x − α x̂_0)/σ
        at = a[i] * at + b[i] * (turn * at - alpha[i] * base / sigma[i])
        var = (a[i] + b[i] * turn) ** 2 * var + c[i] ** 2
    raise AssertionError("the grid ends in data")


@pytest.mark.parametrize(("cls", "name"), WORK)
def test_moments_converge_at_first_order(cls: type[ReverseSDE], name: str) -> None:
    """Exact mean and standard deviation on N(0.3, 0.5²): the bias at 125, 250, 500 and 1000 steps falls by 1.7 to 2.4 each time,
    until it is below 2e-3, the bias of starting from N(0, σ_1²) and of ending at x̂_0."""
    bias = []
    for n in (125, 250, 500, 1000):
        mean, std = moments(cls(n), CURVES[name], 0.3, 0.5)
        assert abs(mean - 0.3) < 0.03
        bias.append(abs(std - 0.5))
    for coarse, fine in itertools.pairwise(bias):
        assert 1.7 < coarse / fine < 2.4 or fine < 2e-3, bias
    assert bias[-1] < 8e-3


@pytest.mark.parametrize(("cls", "name"), WORK)
def test_samples_have_these_moments(cls: type[ReverseSDE], name: str) -> None:
    """30 steps, 4,000 images of four pixels with four means: mean, variances and covariances within 4.5 standard errors."""
    schedule, means = CURVES[name], torch.tensor([0.3, -0.5, 0.0, 0.8], dtype=D)
    x_T = prior(schedule, normal((1, 2, 2), seed=2, index=torch.arange(4000), dtype=D))
    x = cls(30)(oracle(Gaussian(means.reshape(1, 2, 2), 0.5), schedule, PredV()), x_T, seed=3).x.flatten(1)
    std = moments(cls(30), schedule, 0.0, 0.5)[1]
    expected = torch.tensor([moments(cls(30), schedule, float(m), 0.5)[0] for m in means], dtype=D)
    assert float((x.mean(0) - expected).abs().max()) < 4.5 * std / 4000**0.5
    gap = (x.T.cov() - std**2 * torch.eye(4, dtype=D)).abs()
    assert float(gap.max()) < 4.5 * std**2 * (2 / 4000) ** 0.5


@pytest.mark.parametrize("sampler", [EulerMaruyama(200), ReverseDiffusion(200)])
def test_a_stop_before_data_is_a_noisy_state(sampler: Sampler) -> None:
    """At t = 0.4 on VP the variance is α²0.25 + σ², to 4 standard errors and 0.01: the last step adds noise."""
    den = oracle(Gaussian(torch.zeros(1, 1, 1), 0.5), VP(), PredV())
    x = sampler(den, normal((1, 8, 8), seed=2, index=torch.arange(200), dtype=D), seed=3, stop=0.4).x
    alpha, sigma = (float(v) for v in VP().alpha_sigma(torch.tensor(0.4, dtype=D)))
    expected = alpha**2 / 4 + sigma**2
    assert abs(float(x.var()) - expected) < 4 * expected * (2 / x.numel()) ** 0.5 + 0.01


# ------------------------------------------------------------------------------------------------------------ Langevin


def langevin_chain(shape: tuple[int, ...], std: float, count: int, snr: float) -> torch.Tensor:
    """Return the state, in units of its exact standard deviation, after `count` Langevin steps at t = 0.5 on VE for data N(0, 1),
    starting from `std` in these units."""
    sampler, schedule = PredictorCorrector(10, snr=snr), VE()
    sigma = float(schedule.alpha_sigma(torch.tensor(0.5, dtype=D))[1])
    exact_std = math.sqrt(1 + sigma**2)
    x = std * exact_std * normal(shape, seed=2, index=torch.arange(60), dtype=D)
    for i in range(count):
        eps = sigma * x / exact_std**2
        x = sampler.langevin(x, eps, sigma, 1.0, normal(shape, seed=3, index=torch.arange(60), draw=i, dtype=D))
    return x / exact_std


@pytest.mark.parametrize("std", [0.8, 1.25])
def test_langevin_steps_converge_to_the_exact_distribution(std: float) -> None:
    """Images of 1,024 numbers converge from both sides to the exact standard deviation within 0.02, the bias of the step
    (1.3 % for r = 0.16) plus 2/d for the norms of one image."""
    assert abs(float(langevin_chain((1, 32, 32), std, 150, 0.16).std()) - 1) < 0.02


def test_norms_of_few_pixels_bias_langevin_steps() -> None:
    """With d = 16 numbers per image the variance is too large by (1 + 2/d)²."""
    got = float(langevin_chain((1, 4, 4), 1.0, 400, 0.05).var())
    assert got == pytest.approx((1 + 2 / 16) ** 2, abs=0.1)


def test_a_zero_score_is_no_langevin_step() -> None:
    """A newly initialized network returns ε̂ = 0, for which κ would be infinite."""
    den = Denoiser(lambda x, c: torch.zeros_like(x), VE(), PredNoise())
    sampler = PredictorCorrector(5)
    grid = sampler.time_grid(den)
    spread = sampler.predictor.coefficients(VE(), grid[:-1], grid[1:])[2]
    expected = 50 * X.numpy() + sum(float(spread[i]) * z(2 * i + 1) for i in range(4))
    agree(sampler(den, 50 * X, seed=4).x, expected)


# --------------------------------------------------------------------------------------------------------------- peers


def peer(name: str, n: int) -> Any:
    """Return diffusers' scheduler for n steps."""
    pytest.importorskip("diffusers")
    from diffusers import ScoreSdeVeScheduler
    from diffusers.schedulers.deprecated.scheduling_sde_vp import ScoreSdeVpScheduler

    theirs = ScoreSdeVpScheduler(n) if name == "vp" else ScoreSdeVeScheduler(n, sigma_min=0.01, sigma_max=50.0)
    theirs.set_timesteps(n)
    return theirs


def generated() -> tuple[torch.Generator, torch.Tensor]:
    """Their generator, and the noise that it is about to draw."""
    return torch.Generator().manual_seed(5), torch.randn(X.shape, generator=torch.Generator().manual_seed(5), dtype=D)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("i", [39, 20, 1])
def test_diffusers_predictor_on_ve(i: int) -> None:
    """Reverse diffusion from σ_i to σ_{i−1}, 40 of them: mean and noisy state, to 1e-5, the precision of their float32 table."""
    theirs, (generator, noise) = peer("ve", 40), generated()
    t, s = torch.tensor([i / 39], dtype=D), torch.tensor([max((i - 1) / 39, 1e-12)], dtype=D)
    sigma = VE().alpha_sigma(t)[1]
    x, eps = sigma * X, network(X, t)
    out = theirs.step_pred(-eps / sigma, float(theirs.timesteps[39 - i]), x, generator=generator)
    a, b, c = (float(v) for v in ReverseDiffusion(40).coefficients(VE(), t, s))
    mean = a * x + b * eps
    size = float(x.abs().max())
    assert float((out.prev_sample_mean - mean).abs().max()) < 1e-5 * size
    assert float((out.prev_sample - (mean + c * noise)).abs().max()) < 1e-5 * size


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("t", [1.0, 0.5, 0.025])
def test_diffusers_predictor_on_vp(t: float) -> None:
    """Euler–Maruyama with h = 1/N equals our steps on grid=trailing, to 1e-5, the precision of their float32 coefficients.
    diffusers' times 1 … 1e-3 are (1 − 1e-3)/(N − 1) apart but its step is 1/N, so its SDE ends too early."""
    theirs, (generator, noise) = peer("vp", 40), generated()
    now = torch.tensor([t], dtype=D)
    eps = network(X, now)
    state, mean = theirs.step_pred(eps, X, torch.tensor(t), generator=generator)
    a, b, c = (float(v) for v in EulerMaruyama(40).coefficients(VP(), now, now - 1 / 40))
    assert float((mean - (a * X + b * eps)).abs().max()) < 1e-5
    assert float((state - (a * X + b * eps + c * noise)).abs().max()) < 1e-5
    strides = -theirs.timesteps.diff()
    assert float((strides - 1 / 40).abs().min()) > 6e-4


@pytest.mark.filterwarnings("ignore")
def test_diffusers_corrector_mixes_the_batch() -> None:
    """For one image diffusers' Langevin step equals ours. For two images its step size is computed from mean norms, so an image
    depends on the other one; ours does not."""
    theirs, sampler = peer("ve", 10), PredictorCorrector(10, snr=0.15)  # their default
    x, sigma = 3 * X.float(), 3.0
    eps = network(x, torch.zeros(3)) * torch.tensor([1.0, 0.2, 5.0])[:, None, None, None]

    def both(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(x[rows].shape, generator=torch.Generator().manual_seed(5))
        out = theirs.step_correct(-eps[rows] / sigma, x[rows], generator=torch.Generator().manual_seed(5)).prev_sample
        return out, sampler.langevin(x[rows], eps[rows], sigma, 1.0, noise)

    for i in range(3):
        torch.testing.assert_close(*both([i]), rtol=1e-5, atol=1e-5)
    (first, ours), (second, ours_too) = both([0, 1]), both([0, 2])
    assert torch.equal(ours[:1], ours_too[:1])
    assert float((first[:1] - second[:1]).abs().max()) > 0.1


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("schedule", [Flow(), Linear(zero_terminal_snr=True)])
def test_an_infinite_drift_is_refused(schedule: Schedule) -> None:
    """At α = 0 the message names a sampler that works; from a later time Euler–Maruyama itself works."""
    den = oracle(Gaussian(torch.zeros(1, 1, 1), 0.5), schedule, PredV())
    x = normal((1, 1, 1), seed=1, index=torch.arange(4), dtype=D)
    for sampler in (EulerMaruyama(20), PredictorCorrector(20, predictor="euler_maruyama")):
        with pytest.raises(ValueError, match="write sampler=reverse_diffusion"):
            sampler.check(den)
        with pytest.raises(ValueError, match="write sampler=reverse_diffusion"):
            sampler(den, x)
        assert sampler(den, x, start=0.9).x.isfinite().all()
    for sampler in (ReverseDiffusion(20), PredictorCorrector(20)):
        sampler.check(den)
        assert sampler(den, x).x.isfinite().all()


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"predictor": "ancestral"}, "write one of reverse_diffusion, euler_maruyama"),
        ({"corrector_steps": -1}, r"corrector_steps=-1: write an integer in \[0, 1000\]"),
        ({"snr": 0.0}, r"snr=0.0: write a number in \(0, 10\]"),
        ({"snr": math.nan}, "snr=nan"),
        ({"budget": 1}, "write a larger budget"),
        ({"budget": 3, "corrector_steps": 3}, "write a larger budget"),
        ({"grid": "nonesuch"}, "write one of"),
    ],
)
def test_arguments(options: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        PredictorCorrector(**options)


@pytest.mark.parametrize(("budget", "m", "n"), [(21, 1, 10), (20, 1, 10), (9, 2, 3), (7, 0, 7)])
def test_budget(budget: int, m: int, n: int) -> None:
    """N(M + 1) evaluations at most."""
    sampler = PredictorCorrector(budget=budget, corrector_steps=m)
    assert sampler.steps == n
    nfe = sampler(Denoiser(network, VE(), PredNoise()), 50 * X).nfe
    assert nfe == n * (m + 1) <= budget
