"""The denoiser: the network's inputs, the prediction, clipping, extra channels, dtypes."""

from typing import Any

import pytest
import torch
from contracts import OBJECTIVES, PAIRS, SCHEDULES
from oracle import Gaussian, Mixture, oracle
from torch import Tensor, nn

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.errors import ConfigError
from diffusion_lab.objectives import Objective, PredNoise, PredV, PredX0
from diffusion_lab.schedules import Cosine, Linear
from diffusion_lab.variances import NPR, SN

D = torch.float64
DATA = Mixture(
    torch.tensor([[[[-0.8]], [[0.1]]], [[[0.6]], [[0.7]]]]), torch.tensor([0.05, 0.2]), torch.tensor([0.3, 0.7])
)


@pytest.mark.parametrize(("schedule", "objective"), PAIRS)
@pytest.mark.parametrize("fraction", [0.025, 0.5, 0.975, 1.0])
def test_the_oracle_is_the_posterior_mean(schedule: str, objective: str, fraction: float) -> None:
    """Every objective gives the same E[x_0|x_t], and α x̂_0 + σ ε̂ = x_t."""
    s = SCHEDULES[schedule]
    t = torch.tensor(fraction, dtype=D)
    alpha, sigma = s.alpha_sigma(t)
    x = torch.randn(3, 2, 1, 1, dtype=D) * (alpha + sigma)
    p = oracle(DATA, s, OBJECTIVES[objective])(x, t)
    torch.testing.assert_close(p.x0, DATA.denoise(x, alpha, sigma), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(alpha * p.x0 + sigma * p.noise, x, rtol=1e-9, atol=1e-9)


def test_the_closed_form_of_the_oracle_against_quadrature() -> None:
    """E[x_0|x_t] of a mixture in one dimension, by summation over a fine grid of x_0."""
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
    """A network that records its arguments and returns its input, with more channels if requested."""

    def __init__(self, channels: int = 0, **attributes: Any) -> None:
        self.channels = channels
        self.calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
        self.__dict__.update(attributes)

    def __call__(self, x: Tensor, c: Tensor, **condition: Any) -> Tensor:
        self.calls.append((x, c, condition))
        return torch.cat([x, x[:, :1].expand(-1, self.channels, -1, -1) + 7], 1)


@pytest.mark.parametrize("t", [0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=D), torch.full((3,), 0.5)])
def test_arguments_of_the_network(t: Any) -> None:
    """c = T·t − 1, float (B,), for t a number, 0-d or (B,); conditions are passed on."""
    spy, label = Spy(), torch.tensor([1, 2, 3])
    x = torch.randn(3, 1, 2, 2)
    p = Denoiser(spy, Cosine(), PredV())(x, t, label=label)
    (scaled, c, condition) = spy.calls[0]
    assert torch.equal(c, torch.full((3,), 499.0))
    assert c.dtype == x.dtype
    assert torch.equal(scaled, x)
    assert condition == {"label": label}
    assert p.extra is None
    assert p.x0.dtype == p.noise.dtype == p.output.dtype == torch.float32


def test_one_time_for_each_image() -> None:
    x, t = torch.randn(3, 1, 2, 2, dtype=D), torch.tensor([0.001, 0.3, 1.0], dtype=D)
    den = Denoiser(lambda x, c: x.tanh() + c[:, None, None, None] / 1000, Linear(), PredNoise())
    batch = den(x, t)
    for k in range(3):
        for got, want in zip(den(x[k : k + 1], t[k])[:3], batch[:3], strict=True):
            torch.testing.assert_close(got[0], want[k], rtol=1e-12, atol=1e-12)


def test_channels_beyond_the_image_are_extra() -> None:
    x = torch.randn(2, 3, 2, 2)
    p = Denoiser(Spy(channels=3), Cosine(), PredNoise())(x, 0.5)
    assert p.extra is not None
    assert torch.equal(p.extra, (x[:, :1] + 7).expand(-1, 3, -1, -1))
    assert torch.equal(p.output, x)


@pytest.mark.parametrize("objective", [PredNoise(), PredX0(), PredV()])
def test_clipping_recomputes_the_noise(objective: Any) -> None:
    """x̂_0 is clipped, ε̂ = (x_t − α x̂_0)/σ is recomputed, and y is unchanged."""
    x, t = torch.randn(2, 1, 4, 4, dtype=D) * 3, torch.tensor(0.7, dtype=D)
    alpha, sigma = Cosine().alpha_sigma(t)
    bare = Denoiser(Spy(), Cosine(), objective)(x, t)
    for clip in (0.5, lambda x0: x0.clamp(-0.5, 0.5)):
        p = Denoiser(Spy(), Cosine(), objective, clip=clip)(x, t)
        assert bare.x0.abs().max() > 0.5
        assert torch.equal(p.x0, bare.x0.clamp(-0.5, 0.5))
        torch.testing.assert_close(p.noise, (x - alpha * p.x0) / sigma, rtol=0, atol=1e-13)
        assert torch.equal(p.output, bare.output)


def test_only_a_self_conditioning_network_gets_the_previous_estimate() -> None:
    x, previous = torch.randn(2, 2, 1, 2, 2)
    plain, self_conditioning = Spy(), Spy(self_conditioning=True)
    Denoiser(plain, Cosine(), PredV())(x, 0.5, previous=previous)
    Denoiser(self_conditioning, Cosine(), PredV())(x, 0.5, previous=previous)
    Denoiser(self_conditioning, Cosine(), PredV())(x, 0.5)
    assert plain.calls[0][2] == {}
    assert torch.equal(self_conditioning.calls[0][2]["previous"], previous)
    assert self_conditioning.calls[1][2] == {"previous": None}


class Float32Network(nn.Module):
    """A network with float32 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        assert x.dtype == c.dtype == torch.float32
        return x * self.scale


def test_a_float64_state_with_a_float32_network() -> None:
    """The network's input is cast to the dtype of its weights; the prediction has the dtype of the state."""
    x = torch.randn(2, 1, 2, 2, dtype=D)
    p = Denoiser(Float32Network(), Cosine(), PredV())(x, torch.tensor(0.5))
    assert p.x0.dtype == p.noise.dtype == p.output.dtype == D


def test_the_exact_flow_of_the_oracle_solves_the_ode() -> None:
    """dx/dt = α̇ x̂_0 + σ̇ ε̂, by central differences."""
    data, s = Gaussian(torch.full((1, 1, 1), 0.3), 0.4), Cosine()
    x = torch.tensor([-1.0, 0.5], dtype=D).reshape(2, 1, 1, 1)
    t, h = 0.5005, 1e-7
    p = oracle(data, s, PredV())(x, torch.tensor(t, dtype=D))
    d_alpha, d_sigma = s.derivatives(torch.tensor(t, dtype=D))
    slope = (data.flow(x, s, t, t + h) - data.flow(x, s, t, t - h)) / (2 * h)
    torch.testing.assert_close(d_alpha * p.x0 + d_sigma * p.noise, slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", [PredNoise(), PredV()])
def test_an_alpha_that_underflows_float32_is_the_schedule_s_fault(objective: Objective) -> None:
    """α(1) = 2e-67 is 0 in float32: refused before any step, with the remedy. 2e-34 is a float32 number, and x̂_0 is finite
    with it; α(1) = 0 exactly is another case, which pred_v solves."""
    network = lambda x, c: torch.zeros_like(x)  # noqa: E731
    with pytest.raises(ConfigError, match=r"Linear ends in alpha = .*zero_terminal_snr=true"):
        Denoiser(network, Linear(beta_end=0.5), objective)
    schedule = Linear(beta_end=0.28)
    x = torch.ones(1, 1, 1, 1)
    assert 1e-37 < float(schedule.alpha_sigma(torch.ones((), dtype=torch.float64))[0]) < 1e-33
    assert Denoiser(network, schedule, objective)(x, 1.0).x0.isfinite().all()
    Denoiser(network, Linear(beta_end=0.5, zero_terminal_snr=True), PredV())


@pytest.mark.parametrize("variance", [SN(), NPR()])
def test_a_second_head_of_zero_at_a_tiny_alpha_gives_the_floor(variance: SN) -> None:
    """(σ/α)² overflows float32 at α = 2e-34, where σ/α does not: c = 0, not NaN, and 1 for a positive head."""
    schedule, zero = Linear(beta_end=0.28), torch.zeros(1, 1, 1, 1)
    t, s = torch.ones((), dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    for head, c in ((0.0, 0.0), (0.5, 1.0)):
        got = variance(schedule, t, s, Prediction(zero, zero, zero, zero + head), 0.0)
        alpha_s = float(schedule.alpha_sigma(s)[0])
        assert float(got) == pytest.approx(c * alpha_s**2, rel=1e-6)
