"""The density of the probability-flow ODE: closed forms on Gaussian and mixture data, SciPy, errors."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from contracts import OBJECTIVES, SCHEDULES, accepts
from oracle import Gaussian, Mixture, oracle
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from diffusion_lab import likelihood
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.noise import normal
from diffusion_lab.objectives import PredNoise, PredV
from diffusion_lab.schedules import VP, Cosine, Flow, Linear, Schedule

D, LN2 = torch.float64, math.log(2)
MEAN, STD, SHAPE = 0.3, 0.5, (2, 3, 3)
SIZE = math.prod(SHAPE)
OFFSET = math.log2(127.5)
DATA = Gaussian(torch.full(SHAPE, MEAN), STD)
MIXTURE = Mixture(
    torch.stack([torch.linspace(-0.8, 0.4, 4), torch.tensor([0.5, 0.5, -0.5, 0.1])]).reshape(2, 1, 2, 2),
    torch.tensor([0.2, 0.3]),
    torch.tensor([0.3, 0.7]),
)


def images(count: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return MEAN + STD * normal(shape, seed=5, index=torch.arange(count), dtype=D)


def log_normal(x: Tensor, mean: Tensor | float, variance: Tensor | float) -> Tensor:
    """Return log N(x; mean, variance I) of each image (B, …), in nats."""
    variance = torch.as_tensor(variance, dtype=D)
    return -0.5 * ((x - mean).square() / variance + (2 * math.pi * variance).log()).flatten(1).sum(1)


def log_mixture(x: Tensor) -> Tensor:
    parts = [log_normal(x, m, s**2) for m, s in zip(MIXTURE.means, MIXTURE.stds, strict=True)]
    return (torch.stack(parts, 1) + MIXTURE.weights.log()).logsumexp(1)


def bpd(log_p: Tensor, size: int = SIZE) -> Tensor:
    return -log_p / (size * LN2) + OFFSET


def exact_log_density(x: Tensor, schedule: Schedule, start: float) -> Tensor:
    """Return the exact result of the integration: the flow from `start` to 1 is x_1 − α_1 m = r (x − α_s m), so that
    log p = log N(x_1; 0, σ_1²) + N ln r."""
    (alpha_s, sigma_s), (alpha_1, sigma_1) = (schedule.alpha_sigma(torch.tensor(t, dtype=D)) for t in (start, 1.0))
    ratio = (((alpha_1 * STD) ** 2 + sigma_1**2) / ((alpha_s * STD) ** 2 + sigma_s**2)).sqrt()
    end = alpha_1 * MEAN + ratio * (x - alpha_s * MEAN)
    return log_normal(end, 0.0, sigma_1**2) + SIZE * ratio.log()


@pytest.mark.parametrize("curve", SCHEDULES)
def test_gaussian_density_on_every_curve(curve: str) -> None:
    """Each image is within 1e-4 bits/dim of the exact result of the integration (the tolerances are 1e-5). With the published
    approximations, x_0 as the state at `start` and N(0, σ_1²) at t = 1, the mean over 60 images is within 1e-3 of the density
    of the data on the curves published with them, and on flow, where the one at t = 1 is exact. The start is 1e-5, or 1/T."""
    schedule, x0 = SCHEDULES[curve], images(60)
    got = likelihood.ode(oracle(DATA, schedule, PredV()), x0, dequantize=False)
    assert got.start == (1e-5 if schedule.steps is None else 1 / schedule.steps)
    torch.testing.assert_close(got.bpd, bpd(exact_log_density(x0, schedule, got.start)), rtol=0, atol=1e-4)
    torch.testing.assert_close(got.bpd, bpd(got.log_density), rtol=1e-12, atol=0)
    torch.testing.assert_close(got.bpd, got.terms["prior"] + got.terms["divergence"] + OFFSET, rtol=1e-12, atol=0)
    if curve in ("VP", "SubVP", "VE", "EDM", "Flow", "Linear", "Cosine"):
        assert abs(float((got.bpd - bpd(log_normal(x0, MEAN, STD**2))).mean())) < 1e-3
    if curve == "Flow":
        torch.testing.assert_close(got.bpd, bpd(log_normal(x0, MEAN, STD**2)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if accepts(OBJECTIVES[n], Cosine())])
def test_every_objective_has_the_same_density(name: str) -> None:
    x0, schedule = images(2), Cosine()
    got = likelihood.ode(oracle(DATA, schedule, OBJECTIVES[name]), x0, dequantize=False)
    torch.testing.assert_close(got.bpd, bpd(exact_log_density(x0, schedule, got.start)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("curve", ["Flow", "VP", "Cosine"])
def test_mixture_density_and_its_two_divergences(curve: str) -> None:
    """With a Jacobian that is not a multiple of the identity. The exact divergence gives the density of the mixture to 1e-4
    bits/dim on flow, which has no approximation at t = 1, and to 2e-3 on the other curves. Hutchinson's estimate has the same
    mean, to 4 standard errors of 100 probes."""
    schedule = SCHEDULES[curve]
    den = oracle(MIXTURE, schedule, PredV())
    x0 = torch.cat([MIXTURE.means + 0.15 * torch.ones_like(MIXTURE.means), torch.zeros(1, 1, 2, 2)])
    exact = likelihood.ode(den, x0, "exact", dequantize=False)
    torch.testing.assert_close(exact.bpd, bpd(log_mixture(x0), 4), rtol=0, atol=1e-4 if curve == "Flow" else 2e-3)
    one = x0[1:2].expand(100, -1, -1, -1)
    mean, error = likelihood.average(likelihood.ode(den, one, dequantize=False, rtol=1e-4, atol=1e-4).bpd)
    assert error is not None
    assert 1e-4 < error < 0.1
    assert abs(mean - float(exact.bpd[1])) < 4 * error


def test_against_scipy() -> None:
    """ε̂ = tanh(W x) on VP with its analytic Jacobian, by SciPy's DOP853, both at tolerance 1e-8: log p and x_1 to 1e-5."""
    size, schedule = 4, VP()
    w = torch.tensor(np.random.default_rng(0).normal(size=(size, size)) * 0.5)

    def net(x: Tensor, c: Tensor) -> Tensor:
        return (x.flatten(1) @ w.T).tanh().reshape(x.shape)

    def slope(t: float, y: np.ndarray) -> np.ndarray:
        beta, m = 0.1 + 19.9 * t, 0.1 * t / 2 + 19.9 * t**2 / 4
        sigma = np.sqrt(-np.expm1(-2 * m))
        rate = np.tanh(w.numpy() @ y[:-1])
        drift = -0.5 * beta * y[:-1] + 0.5 * beta / sigma * rate  # f x − ½g² score, score = −ε̂/σ
        div = -0.5 * beta * size + 0.5 * beta / sigma * float(((1 - rate**2) * np.diag(w.numpy())).sum())
        return np.append(drift, div)

    assert float(schedule.alpha_sigma(torch.tensor(0.3, dtype=D))[0]) == pytest.approx(np.exp(-0.015 - 19.9 * 0.0225))
    x0 = normal((1, 2, 2), seed=3, index=torch.arange(2), dtype=D)
    got = likelihood.ode(Denoiser(net, schedule, PredNoise()), x0, "exact", False, rtol=1e-8, atol=1e-8)
    for i in range(2):
        y = solve_ivp(
            slope, (1e-5, 1), np.append(x0[i].flatten().numpy(), 0.0), rtol=1e-8, atol=1e-8, method="DOP853"
        ).y[:, -1]
        sigma2 = -np.expm1(-2 * (0.05 + 19.9 / 4))
        want = -0.5 * (y[:-1] ** 2 / sigma2 + np.log(2 * np.pi * sigma2)).sum() + y[-1]
        assert float(got.log_density[i]) == pytest.approx(want, abs=1e-5)
        np.testing.assert_allclose(got.latent[i].flatten().numpy(), y[:-1], rtol=0, atol=1e-5)


def test_dequantized_bits_are_the_entropy_of_the_levels() -> None:
    """12,000 discretized samples of N(0.1, 0.2²) under the density of N(0.1, 0.2²): bits/dim within 4 standard errors of the
    entropy of the 256 probabilities (the density is constant within a bin to 1e-4). u/127.5 is uniform over one bin and
    keyed."""
    grid = (torch.arange(256, dtype=D) * 2 - 255) / 255
    x0 = 0.1 + 0.2 * normal((4, 5, 5), seed=2, index=torch.arange(120), dtype=D)
    x0 = grid[((x0 + 1) * 127.5).round().long().clamp(0, 255)]
    den = oracle(Gaussian(torch.full((4, 5, 5), 0.1), 0.2), Flow(), PredV())
    mean, error = likelihood.average(likelihood.ode(den, x0, rtol=1e-4, atol=1e-4).bpd)
    edges = torch.distributions.Normal(torch.tensor(0.1, dtype=D), 0.2).cdf(grid[:-1] + 1 / 255)
    mass = torch.cat([edges[:1], edges.diff(), 1 - edges[-1:]])
    want = float(-torch.special.xlogy(mass, mass).sum() / LN2)
    assert error is not None
    assert abs(mean - want) < 4 * error < 0.1
    with_u = likelihood.ode(den, x0[:2], seed=1)
    plain = likelihood.ode(den, x0[:2], dequantize=False)
    moved = (with_u.latent - plain.latent) * 0.2 * 127.5  # x_1 − x_1' = (x − x')/0.2 on flow
    assert moved.abs().max() < 0.5 + 1e-3
    assert moved.std() == pytest.approx(12**-0.5, abs=0.06)


def test_an_image_is_independent_of_its_batch() -> None:
    """Alone, repeated and in another order: to 1e-10, because kernels differ by batch size, with the same steps."""
    den, x0 = oracle(MIXTURE, Flow(), PredV()), images(4, (1, 2, 2))
    want = likelihood.ode(den, x0, seed=3)
    for rows in ([3], [1, 1, 0]):
        index = torch.tensor(rows)
        got = likelihood.ode(den, x0[index], seed=3, index=index)
        torch.testing.assert_close(got.bpd, want.bpd[index], rtol=0, atol=1e-10)
        assert torch.equal(got.evaluations, want.evaluations[index])
    assert want.nfe == int(want.evaluations.max())
    assert not torch.equal(likelihood.ode(den, x0, seed=4).bpd, want.bpd)
    assert not torch.equal(likelihood.ode(den, x0, seed=3, index=torch.arange(4) + 9).bpd, want.bpd)


class Convolution(nn.Module):
    """A labeled network with float32 parameters, frozen in the test; counts the images it evaluates."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1))
        self.table = nn.Embedding(3, 1)
        self.evaluated = 0

    def forward(self, x: Tensor, c: Tensor, label: Tensor) -> Tensor:
        self.evaluated += len(x)
        assert x.dtype == torch.float32
        assert len(x) == len(c) == len(label)
        return self.body(x) + self.table(label)[..., None, None]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_frozen_networks_and_conditions(mode: Any) -> None:
    """The divergence is computed in every gradient mode of the caller and the result has no graph; labels follow their images;
    `evaluations` counts the calls of the network."""
    net = Convolution().eval().requires_grad_(False)
    den, x0 = Denoiser(net, Cosine(), PredV(), clip=1.0), images(3, (1, 4, 4)).float()
    with mode():
        label = torch.tensor([2, 0, 1])
        likelihood.ode(den, x0, condition={"label": label}, rtol=1e-3, atol=1e-3)
        got = likelihood.ode(den, x0, condition={"label": label}, rtol=1e-3, atol=1e-3)
        assert 2 * int(got.evaluations.sum()) == net.evaluated
        alone = likelihood.ode(
            den, x0[1:2], condition={"label": label[1:2]}, index=torch.tensor([1]), rtol=1e-3, atol=1e-3
        )
    assert not got.bpd.requires_grad
    assert got.bpd.dtype == D
    assert den.clip == 1.0
    torch.testing.assert_close(alone.bpd, got.bpd[1:2], rtol=0, atol=1e-4)
    free = likelihood.ode(Denoiser(net, Cosine(), PredV()), x0, condition={"label": label}, rtol=1e-3, atol=1e-3)
    assert torch.equal(free.bpd, got.bpd)  # x̂_0 was not clipped


def refused(match: str, den: Denoiser, x0: Tensor, *args: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        likelihood.ode(den, x0, *args, **options)
    assert "\n" not in str(caught.value)


def test_errors() -> None:
    """Each message is one line and names the remedy."""
    den, x0 = Denoiser(lambda x, c: x.tanh(), Linear(), PredNoise()), images(2)
    refused("write one of hutchinson, exact", den, x0, "nonesuch")
    refused("divergence=hutchinson", den, torch.zeros(1, 3, 32, 32), "exact")
    refused("float images", den, x0.to(torch.uint8))
    refused(r"start=0.0: write a number in \(0, 1\)", den, x0, start=0.0)
    refused("start=1.0", den, x0, start=1.0)
    refused(r"rtol=0.0: write a number in", den, x0, rtol=0.0)

    class SelfConditioned(nn.Module):
        self_conditioning = True

    refused("self-conditioning", Denoiser(SelfConditioned(), Linear(), PredNoise()), x0)

    def diverging(x: Tensor, c: Tensor) -> Tensor:
        return x * torch.where(c > 500, torch.nan, 1.0).reshape(-1, 1, 1, 1)

    refused(r"NaN or infinity at t=0\.[5-9]", Denoiser(diverging, VP(), PredNoise()), x0)
    refused(r"NaN or infinity at t=0\.[5-9]", Denoiser(diverging, Linear(), PredNoise()), x0)
