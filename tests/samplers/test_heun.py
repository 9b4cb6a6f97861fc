"""Heun's method with churn against the published algorithm, and the distribution under churn."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from contracts import SCHEDULES
from oracle import Gaussian, Mixture, oracle

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.noise import normal
from diffusion_lab.objectives import EDM as Preconditioned
from diffusion_lab.objectives import PredV
from diffusion_lab.samplers import Euler, Heun, prior
from diffusion_lab.schedules import EDM, Cosine, Flow

D = torch.float64
DATA = Gaussian(torch.full((1, 1, 1), 0.3), 0.5)
MIXTURE = Mixture(torch.tensor([-0.6, 0.6]).reshape(2, 1, 1, 1), torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.7]))
X = torch.tensor([-2.0, -0.5, 0.3, 1.0, 2.0], dtype=D).reshape(5, 1, 1, 1)


def algorithm_2(
    x: torch.Tensor,
    n: int,
    noise: Callable[[int], torch.Tensor],
    s_churn: float,
    s_min: float,
    s_max: float,
    s_noise: float,
) -> torch.Tensor:
    """Karras et al. 2022, algorithm 2, line by line, for MIXTURE: t is σ, D the exact denoiser."""

    def denoise(x: torch.Tensor, t: float) -> torch.Tensor:
        return MIXTURE.denoise(x, torch.ones((), dtype=D), torch.tensor(t, dtype=D))

    t = [(80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(n)] + [0.0]
    for i in range(n):
        gamma = min(s_churn / n, math.sqrt(2) - 1) if s_min <= t[i] <= s_max else 0.0
        t_hat = t[i] + gamma * t[i]
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * s_noise * noise(i)
        d = (x_hat - denoise(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_prime = (x - denoise(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_prime / 2)
    return x


@pytest.mark.parametrize(
    ("n", "churn"),
    [(18, (0.0, 0.0, math.inf, 1.0)), (18, (30.0, 0.01, 1.0, 1.007)), (40, (40.0, 0.05, 50.0, 1.003)), (2, (0.0, 0.0, 9.0, 1.0))],
)  # fmt: skip
def test_the_published_algorithm(n: int, churn: tuple[float, float, float, float]) -> None:
    """On EDM's curve with its preconditioned network, to 1e-6, since the smallest time of the grid has σ = σ_min to 1e-7."""

    def noise(i: int) -> torch.Tensor:
        return normal((1, 1, 1), seed=2, index=torch.arange(5), draw=i + 1, dtype=D)

    names = ("s_churn", "s_min", "s_max", "s_noise")
    sampler = Heun(n, "linspace", **dict(zip(names, churn, strict=True)))  # type: ignore[arg-type]
    got = sampler(oracle(MIXTURE, EDM(), Preconditioned()), prior(EDM(), X), seed=2)
    expected = algorithm_2(80 * X, n, noise, *churn)
    torch.testing.assert_close(got.x, expected, rtol=1e-6, atol=1e-6)
    assert got.nfe == 2 * n - 1


def test_euler_on_edms_curve_matches_karras_et_al() -> None:
    """x_s = x + (σ_s − σ_t)(x − D)/σ_t over the published times."""
    den, x = oracle(MIXTURE, EDM(), Preconditioned()), 80 * X
    t = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)] + [0.0]
    for now, after in itertools.pairwise(t):
        best = MIXTURE.denoise(x, torch.ones((), dtype=D), torch.tensor(now, dtype=D))
        x = x + (after - now) * (x - best) / now
    torch.testing.assert_close(Euler(18, "linspace")(den, 80 * X).x, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", [Euler, Heun])
def test_on_the_straight_line_the_steps_are_those_of_flow_matching(method: type) -> None:
    """dx/dt = v: Euler's and Heun's textbook steps in t, starting at α = 0; the step into data is Euler's for both."""

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        sigma = torch.tensor(t, dtype=D)
        x0 = MIXTURE.denoise(x, 1 - sigma, sigma)
        return (x - x0) / sigma

    x, n = X, 8
    for k in range(n):
        t, s = 1 - k / n, 1 - (k + 1) / n
        v = velocity(x, t)
        step = x + (s - t) * v
        x = step if method is Euler or k == n - 1 else x + (s - t) / 2 * (v + velocity(step, s))
    torch.testing.assert_close(method(n, "trailing")(oracle(MIXTURE, Flow(), PredV()), X).x, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("curve", ["Cosine", "Flow", "EDM"])
def test_churn_keeps_the_distribution(curve: str) -> None:
    """N(0.3, 0.5²) from 4,000 images, 80 steps and maximal churn, with 4 standard errors and a bias of 0.01."""
    s = SCHEDULES[curve]
    x_T = prior(s, normal((1, 1, 1), seed=3, index=torch.arange(4000), dtype=D))
    den = oracle(DATA, s, PredV())
    x = Heun(80, s_churn=100.0)(den, x_T, seed=4).x
    assert float(x.mean()) == pytest.approx(0.3, abs=4 * 0.5 / 4000**0.5 + 0.01)
    assert float(x.std()) == pytest.approx(0.5, abs=4 * 0.5 / 8000**0.5 + 0.01)
    without_churn = Heun(80)(den, x_T).x
    assert abs(float(torch.corrcoef(torch.stack([x.flatten(), without_churn.flatten()]))[0, 1])) < 0.5, (
        "most of the noise is renewed"
    )


@pytest.mark.parametrize("curve", ["Cosine", "Flow", "EDM", "VE", "Cosine-40-zero"])
def test_churn_raises_the_time(curve: str) -> None:
    """To the time at which σ/α is 1 + γ times as large, inside [s_min, s_max] only, and never beyond t = 1."""
    s = SCHEDULES[curve]
    sampler = Heun(10, s_churn=2.0, s_min=0.1, s_max=5.0, grid="trailing")
    times = sampler.time_grid(oracle(DATA, s, PredV()))
    seen: list[float] = []
    sampler(oracle(DATA, s, PredV()), prior(s, X), callback=lambda i, t, x, p: seen.append(t))
    for before, at in zip(times.tolist(), seen, strict=False):
        level, raised = ((-s.lam(torch.tensor(t, dtype=D))).exp() for t in (before, at))
        if 0.1 <= level <= 5:
            assert raised / level == pytest.approx(1.2, rel=1e-9) or at == 1
        else:
            assert at == before
    open_ended = Heun(10, s_churn=2.0)
    seen.clear()
    open_ended(oracle(DATA, s, PredV()), prior(s, X), callback=lambda i, t, x, p: seen.append(t))
    assert seen[0] == 1
    assert max(seen) <= 1


def test_s_noise_scales_the_noise() -> None:
    """s_noise multiplies the noise added at the first raised time, and nothing else."""
    ends = []
    for s_noise in (0.0, 1.0, 3.0):
        states: list[torch.Tensor] = []
        Heun(6, s_churn=1.0, s_noise=s_noise)(
            oracle(DATA, Cosine(), PredV()), X, start=0.6, callback=lambda i, t, x, p, states=states: states.append(x)
        )
        ends.append(states[0])
    torch.testing.assert_close(ends[2] - ends[0], 3 * (ends[1] - ends[0]), rtol=1e-12, atol=1e-12)
    assert (ends[1] != ends[0]).all()


def test_the_state_is_float64() -> None:
    """A float32 run equals the float64 run rounded once at its end."""
    den = Denoiser(lambda x, c: x.tanh(), Cosine(), PredV())
    x = X.float()
    assert torch.equal(Heun(100)(den, x).x, Heun(100)(den, x.double()).x.float())
