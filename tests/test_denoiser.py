"""The waist: what the network is told, what comes back, clipping, extra channels, dtypes."""

from typing import Any

import pytest
import torch
from contracts import OBJECTIVES, PAIRS, SCHEDULES
from oracle import Gaussian, Mixture, oracle
from torch import Tensor, nn

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.objectives import PredNoise, PredV, PredX0
from diffusion_lab.schedules import Cosine, Linear

D = torch.float64
DATA = Mixture(
    torch.tensor([[[[-0.8]], [[0.1]]], [[[0.6]], [[0.7]]]]), torch.tensor([0.05, 0.2]), torch.tensor([0.3, 0.7])
)


@pytest.mark.parametrize(("schedule", "objective"), PAIRS)
@pytest.mark.parametrize("fraction", [0.025, 0.5, 0.975, 1.0])
def test_the_oracle_is_the_posterior_mean(schedule: str, objective: str, fraction: float) -> None:
    """The same E[x_0|x_t] through any objective, checked against a numerical integral over x_0 of each component."""
    s = SCHEDULES[schedule]
    t = torch.tensor(fraction, dtype=D)
    alpha, sigma = s.alpha_sigma(t)
    x = torch.randn(3, 2, 1, 1, dtype=D) * (alpha + sigma)
    p = oracle(DATA, s, OBJECTIVES[objective])(x, t)
    torch.testing.assert_close(p.x0, DATA.denoise(x, alpha, sigma), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(alpha * p.x0 + sigma * p.noise, x, rtol=1e-9, atol=1e-9)


def test_the_closed_form_against_quadrature() -> None:
    """The oracle itself: E[x_0|x_t] of a mixture in one dimension, by summing over a fine grid of x_0."""
    data = Mixture(torch.tensor([-0.5, 0.7]).reshape(2, 1, 1, 1), torch.tensor([0.1, 0.3]), torch.tensor([0.25, 0.75]))
    alpha, sigma = torch.tensor(0.8, dtype=D), torch.tensor(0.6, dtype=D)
    x0 = torch.linspace(-4, 4, 80001, dtype=D)
    prior = sum(
        w / s * torch.exp(-0.5 * ((x0 - m) / s) ** 2)
        for w, m, s in zip(data.weights, data.means.flatten(), data.stds, strict=True)
    )
    for x in (-1.0, 0.0, 0.4, 2.0):
        mass = prior * torch.exp(-0.5 * ((x - alpha * x0) / sigma) ** 2)
        got = data.denoise(torch.full((1, 1, 1, 1), x, dtype=D), alpha, sigma)
        assert float(got) == pytest.approx(float((mass * x0).sum() / mass.sum()), rel=1e-7)


class Spy:
    """Remembers what it was called with and answers with its input, or with more channels."""

    def __init__(self, channels: int = 0, **attributes: Any) -> None:
        self.channels = channels
        self.calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
        self.__dict__.update(attributes)

    def __call__(self, x: Tensor, c: Tensor, **condition: Any) -> Tensor:
        self.calls.append((x, c, condition))
        return torch.cat([x, x[:, :1].expand(-1, self.channels, -1, -1) + 7], 1)


@pytest.mark.parametrize("t", [0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=D), torch.full((3,), 0.5)])
def test_what_the_network_is_told(t: Any) -> None:
    """c = T·t − 1 as float (B,), whether t is a number, 0-d or one for each image; conditions go through."""
    spy, label = Spy(), torch.tensor([1, 2, 3])
    x = torch.randn(3, 1, 2, 2)
    p = Denoiser(spy, Cosine(), PredV())(x, t, label=label)
    (seen, c, condition) = spy.calls[0]
    assert torch.equal(c, torch.full((3,), 499.0))
    assert c.dtype == x.dtype
    assert torch.equal(seen, x)
    assert condition == {"label": label}
    assert p.extra is None
    assert p.x0.dtype == p.noise.dtype == p.output.dtype == torch.float32


def test_one_time_for_each_image() -> None:
    x, t = torch.randn(3, 1, 2, 2, dtype=D), torch.tensor([0.001, 0.3, 1.0], dtype=D)
    den = Denoiser(lambda x, c: x.tanh() + c[:, None, None, None] / 1000, Linear(), PredNoise())
    together = den(x, t)
    for k in range(3):
        for got, want in zip(den(x[k : k + 1], t[k])[:3], together[:3], strict=True):
            torch.testing.assert_close(got[0], want[k], rtol=1e-12, atol=1e-12)


def test_channels_beyond_the_image_are_extra() -> None:
    x = torch.randn(2, 3, 2, 2)
    p = Denoiser(Spy(channels=3), Cosine(), PredNoise())(x, 0.5)
    assert p.extra is not None
    assert torch.equal(p.extra, (x[:, :1] + 7).expand(-1, 3, -1, -1))
    assert torch.equal(p.output, x)


@pytest.mark.parametrize("objective", [PredNoise(), PredX0(), PredV()])
def test_clipping_derives_the_noise_again(objective: Any) -> None:
    """x̂_0 is limited, ε̂ is what then remains of x_t; y stays as the network said it."""
    x, t = torch.randn(2, 1, 4, 4, dtype=D) * 3, torch.tensor(0.7, dtype=D)
    alpha, sigma = Cosine().alpha_sigma(t)
    bare = Denoiser(Spy(), Cosine(), objective)(x, t)
    for clip in (0.5, lambda x0: x0.clamp(-0.5, 0.5)):
        p = Denoiser(Spy(), Cosine(), objective, clip=clip)(x, t)
        assert bare.x0.abs().max() > 0.5
        assert torch.equal(p.x0, bare.x0.clamp(-0.5, 0.5))
        torch.testing.assert_close(p.noise, (x - alpha * p.x0) / sigma, rtol=0, atol=1e-13)
        assert torch.equal(p.output, bare.output)


def test_self_conditioning_goes_only_where_it_is_wanted() -> None:
    x, previous = torch.randn(2, 2, 1, 2, 2)
    plain, wants = Spy(), Spy(self_conditioning=True)
    Denoiser(plain, Cosine(), PredV())(x, 0.5, previous=previous)
    Denoiser(wants, Cosine(), PredV())(x, 0.5, previous=previous)
    Denoiser(wants, Cosine(), PredV())(x, 0.5)
    assert plain.calls[0][2] == {}
    assert torch.equal(wants.calls[0][2]["previous"], previous)
    assert wants.calls[1][2] == {"previous": None}


class Half(nn.Module):
    """A network with float32 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        assert x.dtype == c.dtype == torch.float32
        return x * self.scale


def test_a_float64_state_meets_a_float32_network() -> None:
    """Heun keeps float64 states: the network sees its own dtype, the solve stays in the state's."""
    x = torch.randn(2, 1, 2, 2, dtype=D)
    p = Denoiser(Half(), Cosine(), PredV())(x, torch.tensor(0.5))
    assert p.x0.dtype == p.noise.dtype == p.output.dtype == D


def test_gaussian_flow_solves_its_own_ode() -> None:
    """The oracle's exact solution has dx/dt = α̇ x̂_0 + σ̇ ε̂, by central differences."""
    data, s = Gaussian(torch.full((1, 1, 1), 0.3), 0.4), Cosine()
    x = torch.tensor([-1.0, 0.5], dtype=D).reshape(2, 1, 1, 1)
    t, h = 0.5005, 1e-7
    p = oracle(data, s, PredV())(x, torch.tensor(t, dtype=D))
    d_alpha, d_sigma = s.derivatives(torch.tensor(t, dtype=D))
    slope = (data.flow(x, s, t, t + h) - data.flow(x, s, t, t - h)) / (2 * h)
    torch.testing.assert_close(d_alpha * p.x0 + d_sigma * p.noise, slope, rtol=1e-6, atol=1e-6)
