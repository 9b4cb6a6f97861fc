"""DDPM and DDIM: identities, the order of DDIM, encoding, and split runs."""

import itertools

import pytest
import torch
from contracts import SCHEDULES
from oracle import Gaussian, Mixture, oracle

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.gaussian import posterior
from diffusion_lab.noise import normal
from diffusion_lab.objectives import PredNoise, PredV
from diffusion_lab.samplers import DDIM, DDPM
from diffusion_lab.schedules import Cosine, Linear, Schedule
from diffusion_lab.variances import FixedLarge, FixedSmall

D = torch.float64
DATA = Gaussian(torch.full((1, 1, 1), 0.3), 0.5)
MIXTURE = Mixture(torch.tensor([-0.6, 0.6]).reshape(2, 1, 1, 1), torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.7]))
X = torch.tensor([-2.0, -0.5, 0.3, 1.0, 2.0], dtype=D).reshape(5, 1, 1, 1)


@pytest.mark.parametrize("schedule", ["Linear-40", "Cosine-40", "Cosine-40-zero"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_ddim_with_eta_1_over_all_steps_is_ddpm(schedule: str, clip: float | None) -> None:
    den = oracle(MIXTURE, SCHEDULES[schedule], PredV(), clip=clip)
    torch.testing.assert_close(
        DDIM(None, eta=1.0)(den, X, seed=5).x, DDPM(None)(den, X, seed=5).x, rtol=1e-10, atol=1e-10
    )


def test_ddim_with_eta_1_over_a_long_chain_is_ddpm() -> None:
    den = Denoiser(lambda x, c: x.tanh() * (1 + c[:, None, None, None] / 300), Linear(300), PredNoise(), clip=1.0)
    torch.testing.assert_close(DDIM(None, eta=1.0)(den, X, seed=5).x, DDPM()(den, X, seed=5).x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [10, 37])
def test_ddim_with_eta_1_is_ddpm_on_the_same_strided_grid(n: int) -> None:
    den = oracle(MIXTURE, Cosine(), PredV())
    for grid in ("trailing", "leading", "linspace", "quadratic"):
        got, expected = DDIM(n, eta=1.0, grid=grid)(den, X, seed=5).x, DDPM(n, grid=grid)(den, X, seed=5).x
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("variance", [FixedSmall(), FixedLarge()])
def test_ddpm_matches_the_published_algorithm(variance: FixedSmall | FixedLarge) -> None:
    """Ho et al. 2020, algorithm 2: x_{i−1} = (x − β/√(1−ᾱ) ε)/√α + σ z, computed from β; the noise of step k is draw k + 1."""
    beta = torch.linspace(1e-4 * 25, 0.02 * 25, 40, dtype=D)
    bar = (1 - beta).cumprod(0)

    def network(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return (x * (1 + c[:, None, None, None] / 40)).tanh()

    x = X
    for k, i in enumerate(range(39, -1, -1)):
        eps = network(x, torch.full((5,), i, dtype=D))
        x = (x - beta[i] / (1 - bar[i]).sqrt() * eps) / (1 - beta[i]).sqrt()
        if i > 0:
            large = isinstance(variance, FixedLarge)
            var = beta[i] if large else beta[i] * (1 - bar[i - 1]) / (1 - bar[i])
            x = x + var.sqrt() * normal((1, 1, 1), seed=8, index=torch.arange(5), draw=k + 1, dtype=D)
    got = DDPM(variance=variance)(Denoiser(network, Linear(40), PredNoise()), X, seed=8).x
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_matches_the_published_equations(eta: float) -> None:
    """Song et al. 2021, eq. 12 and 16, over the nodes 40, 30, 20, 10, 0."""
    bar = torch.cat([torch.ones(1, dtype=D), (1 - torch.linspace(1e-4 * 25, 0.02 * 25, 40, dtype=D)).cumprod(0)])

    def network(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return (x * (1 + c[:, None, None, None] / 40)).tanh()

    x = X
    for k, (t, s) in enumerate(((40, 30), (30, 20), (20, 10), (10, 0))):
        eps = network(x, torch.full((5,), t - 1, dtype=D))
        sigma = eta * ((1 - bar[s]) / (1 - bar[t]) * (1 - bar[t] / bar[s])).sqrt()
        x0 = (x - (1 - bar[t]).sqrt() * eps) / bar[t].sqrt()
        x = bar[s].sqrt() * x0 + (1 - bar[s] - sigma**2).sqrt() * eps
        x = x + sigma * normal((1, 1, 1), seed=8, index=torch.arange(5), draw=k + 1, dtype=D)
    got = DDIM(4, eta=eta)(Denoiser(network, Linear(40), PredNoise()), X, seed=8).x
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", ["Linear", "Cosine", "Linear-zero"])
@pytest.mark.parametrize("grid", ["trailing", "linspace", "quadratic", "uniform_lambda"])
def test_ddim_is_first_order(schedule: str, grid: str) -> None:
    """From 0.9 to 0.1 against the exact solution: doubling the steps divides the error by 1.8 to 2.2."""
    s = SCHEDULES[schedule]
    expected = DATA.flow(X, s, 0.9, 0.1)
    den = oracle(DATA, s, PredV())
    error = [float((DDIM(n, grid=grid)(den, X, start=0.9, stop=0.1).x - expected).abs().max()) for n in (20, 40, 80)]
    for coarse, fine in itertools.pairwise(error):
        assert 1.8 < coarse / fine < 2.2, error


@pytest.mark.parametrize("variance", [FixedSmall(), FixedLarge()])
def test_fixed_variances_bracket_the_standard_deviation_of_the_data(variance: FixedSmall | FixedLarge) -> None:
    """For data with a standard deviation in (0, 1) fixed_small is too narrow and fixed_large too wide (Ho et al. 2020, section
    3.2). The expected second moment is exact: each step is affine."""
    s: Schedule = Linear()
    from diffusion_lab.samplers.grids import make_grid

    grid, var = make_grid("linspace", s, 25), torch.ones((), dtype=D)
    for t, r in itertools.pairwise(grid):
        (alpha, sigma), q = s.alpha_sigma(t), posterior(s, t, r)
        slope = q.c1 + q.c0 * alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
        step = q.variance if isinstance(variance, FixedSmall) else s.alpha_sigma(t)[1] ** 2 * 0
        if isinstance(variance, FixedLarge) and r > 0:
            alpha_r, sigma_r = s.alpha_sigma(r)
            step = sigma**2 - (alpha / alpha_r * sigma_r) ** 2
        var = slope**2 * var + step
    x_T = normal((1, 1, 1), seed=3, index=torch.arange(20000), dtype=D)
    x = DDPM(25, variance)(oracle(DATA, s, PredV()), x_T, seed=4).x
    assert float(x.std()) == pytest.approx(float(var.sqrt()), abs=4 * 0.5 / 40000**0.5)
    assert (float(var) < 0.25) == isinstance(variance, FixedSmall)


# ------------------------------------------------------------------------------------------------------ encode and split


@pytest.mark.parametrize("schedule", [Linear(), Cosine()])
def test_round_trip_error_between_noisy_times_is_first_order(schedule: Schedule) -> None:
    """Encode 0.1 → 0.9 and decode on mixture data: doubling the steps divides the error by 1.7 to 2.3."""
    den = oracle(MIXTURE, schedule, PredV())
    x = torch.linspace(-0.9, 1.2, 15, dtype=D).reshape(-1, 1, 1, 1)
    error = []
    for n in (40, 80, 160):
        latent = DDIM(n)(den, x, start=0.1, stop=0.9).x
        assert (latent - x).abs().mean() > 0.2, "the latent should differ from the data"
        error.append(float((DDIM(n)(den, latent, start=0.9, stop=0.1).x - x).abs().mean()))
    for coarse, fine in itertools.pairwise(error):
        assert 1.7 < coarse / fine < 2.3, error


def test_round_trip_error_of_data_falls() -> None:
    """σ̇ is infinite at t = 0, so doubling the steps divides the error by at least 1.25 only."""
    den = oracle(DATA, Cosine(), PredV())
    x = torch.linspace(-0.9, 1.2, 15, dtype=D).reshape(-1, 1, 1, 1)
    error = [float((DDIM(n)(den, DDIM(n)(den, x, start=0.0, stop=1.0).x).x - x).abs().mean()) for n in (50, 100, 200)]
    assert all(coarse > 1.25 * fine for coarse, fine in itertools.pairwise(error)), error
    assert error[-1] < 0.03


def test_encoding_starts_with_the_noise_of_the_next_time() -> None:
    """No network is trained at t = 0: x̂_0 is x_0 there, ε̂ is that of the next time, and the callback receives x_0 at time 0."""
    den, seen = oracle(DATA, Cosine(), PredV()), []
    DDIM(5)(den, X, start=0.0, stop=1.0, callback=lambda i, t, x, p: seen.append((i, t, x, p)))
    assert [round(s[1], 9) for s in seen] == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert torch.equal(seen[0][3].x0, X)
    alpha, sigma = Cosine().alpha_sigma(torch.tensor(0.2, dtype=D))
    torch.testing.assert_close(seen[1][2], alpha * X + sigma * den(X, 0.2).noise, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("at", [0.9, 0.5, 0.1])
def test_a_split_run_equals_the_whole_run(at: float) -> None:
    """Bit-equal on the same grid, in both directions."""
    den, n = oracle(MIXTURE, Cosine(), PredV()), 50
    first = round(n * (1 - at))
    half = DDIM(first)(den, X, start=1.0, stop=at).x
    assert torch.equal(DDIM(n - first)(den, half, start=at, stop=0.0).x, DDIM(n)(den, X).x)
    back = DDIM(n - first)(den, X, start=0.0, stop=at).x
    assert torch.equal(DDIM(first)(den, back, start=at, stop=1.0).x, DDIM(n)(den, X, start=0.0, stop=1.0).x)


@pytest.mark.parametrize("stop", [0.5, 0.25])
def test_the_state_at_stop_has_the_marginal_of_stop(stop: float) -> None:
    """x_stop ~ N(α m, α²s² + σ²). The margin is 4 standard errors of 20,000 images, and 0.01 for the bias of 100 steps."""
    x_T = normal((1, 1, 1), seed=3, index=torch.arange(20000), dtype=D)
    alpha, sigma = (float(v) for v in Cosine().alpha_sigma(torch.tensor(stop, dtype=D)))
    std = (alpha**2 * 0.25 + sigma**2) ** 0.5
    for sampler in (DDIM(100), DDPM(100)):
        x = sampler(oracle(DATA, Cosine(), PredV()), x_T, stop=stop).x
        assert float(x.mean()) == pytest.approx(alpha * 0.3, abs=4 * std / 20000**0.5 + 0.01)
        assert float(x.std()) == pytest.approx(std, abs=4 * std / 40000**0.5 + 0.01)


@pytest.mark.parametrize("sampler", [DDPM(10), DDIM(10), DDIM(10, eta=0.5)])
def test_the_step_into_data_is_the_prediction(sampler: DDPM | DDIM) -> None:
    seen = []
    x = sampler(oracle(MIXTURE, Cosine(), PredV()), X, callback=lambda i, t, x, p: seen.append(p.x0)).x
    torch.testing.assert_close(x, seen[-1], rtol=0, atol=0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"eta=.*: write a number in \[0, 1\]"):
        DDIM(10, eta=1.5)
    with pytest.raises(ValueError, match="sampler=ddpm"):
        DDIM(10, variance=FixedLarge())
    for sampler in (DDIM(10, eta=0.1), DDPM(10)):
        with pytest.raises(ValueError, match="eta=0"):
            sampler(oracle(DATA, Cosine(), PredV()), X, start=0.0, stop=1.0)
