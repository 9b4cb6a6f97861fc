"""Losses in closed form, their gradients, and one training step by hand."""

import pytest
import torch
from contracts import OBJECTIVES, PAIRS, SCHEDULES
from oracle import Gaussian, oracle
from torch import Tensor
from torch.nn import functional as F

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.losses import L1, L2, Error, Huber, corrupt, diffusion_loss
from diffusion_lab.objectives import PredNoise, PredV
from diffusion_lab.schedules import Cosine, Linear
from diffusion_lab.weightings import VLB, Eps, MinSNR, Native

D = torch.float64


def test_closed_forms() -> None:
    output = torch.tensor([[0.0, 3.0], [0.5, -0.5]]).reshape(2, 1, 1, 2)
    target = torch.zeros_like(output)
    for error, want in (
        (L2(), [4.5, 0.25]),
        (L1(), [1.5, 0.5]),
        (Huber(1.0), [(0 + 2.5) / 2, 0.125]),
        (Huber(0.25), [0.25 * (3 - 0.125) / 2, 0.25 * (0.5 - 0.125)]),
    ):
        torch.testing.assert_close(error(output, target), torch.tensor(want))


@pytest.mark.parametrize("error", [L1(), L2(), Huber(0.5)])
def test_one_mean_for_each_image(error: Error) -> None:
    a, b = torch.randn(2, 3, 2, 4, 4)
    got = error(a, b)
    assert got.shape == (3,)
    for k in range(3):
        torch.testing.assert_close(got[k : k + 1], error(a[k : k + 1], b[k : k + 1]))
    assert (error(a, a) == 0).all()


def test_huber_refuses_a_delta_of_nought() -> None:
    with pytest.raises(ValueError, match="delta > 0"):
        Huber(0)


def test_corrupt_is_the_forward_process() -> None:
    x0, noise = torch.randn(2, 2, 1, 2, 2, dtype=D)
    t = torch.tensor([0.25, 1.0], dtype=D)
    got = corrupt(Denoiser(lambda x, c: x, Linear(), PredNoise()), x0, noise, t)
    bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=D)).cumprod(0)[[249, 999]]
    want = bar.sqrt()[:, None, None, None] * x0 + (1 - bar).sqrt()[:, None, None, None] * noise
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_one_step_is_ho_algorithm_1() -> None:
    """‖ε − ε_θ(√ᾱ x_0 + √(1−ᾱ) ε, i − 1)‖², mean over elements."""
    x0, noise = torch.randn(2, 3, 1, 4, 4, dtype=D)
    i = torch.tensor([1, 400, 1000])
    bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=D)).cumprod(0)[i - 1][:, None, None, None]

    def network(x: Tensor, c: Tensor) -> Tensor:
        return x.tanh() * (1 + c[:, None, None, None] / 1000)

    step = diffusion_loss(Denoiser(network, Linear(), PredNoise()), Native(), L2(), x0, noise, i.double() / 1000)
    guess = network(bar.sqrt() * x0 + (1 - bar).sqrt() * noise, i.double() - 1)
    want = (guess - noise).square().flatten(1).mean(1)
    torch.testing.assert_close(step.weighted, want, rtol=1e-9, atol=1e-12)
    assert torch.equal(step.weight, torch.ones(3, dtype=D))


@pytest.mark.parametrize("weighting", [Eps(), MinSNR(), VLB()])
def test_the_weighted_loss_does_not_depend_on_the_objective(weighting: object) -> None:
    """One oracle network in every coordinate of one schedule: the same number, 1e-6 relative."""
    data = Gaussian(torch.full((1, 2, 2), 0.2), 0.5)
    for schedule in SCHEDULES:
        s, losses = SCHEDULES[schedule], []
        t = torch.full((4,), 0.5, dtype=D)
        x0, noise = torch.randn(2, 4, 1, 2, 2, dtype=D, generator=torch.Generator().manual_seed(1))
        for objective in (o for c, o in PAIRS if c == schedule):
            den = oracle(data, s, OBJECTIVES[objective])
            losses.append(diffusion_loss(den, weighting, L2(), x0, noise, t).weighted)  # type: ignore[arg-type]
        assert len(losses) >= 2
        for other in losses[1:]:
            torch.testing.assert_close(other, losses[0], rtol=1e-6, atol=0)


def test_the_oracle_has_the_least_loss() -> None:
    """E[(ε − ε̂)²] of the best denoiser of N(m, s²) is α²s²/(α²s² + σ²): 4 standard errors with 40,000 elements."""
    data, s = Gaussian(torch.full((1, 1, 1), 0.2), 0.5), Cosine()
    x0, noise = 0.2 + 0.5 * torch.randn(40000, 1, 1, 1, dtype=D), torch.randn(40000, 1, 1, 1, dtype=D)
    t = torch.full((40000,), 0.4, dtype=D)
    got = diffusion_loss(oracle(data, s, PredV()), Eps(), L2(), x0, noise, t).weighted
    alpha, sigma = (float(v[0]) for v in s.alpha_sigma(t))
    want = (alpha * 0.5) ** 2 / ((alpha * 0.5) ** 2 + sigma**2)
    assert float(got.mean()) == pytest.approx(want, abs=4 * want * (2 / 40000) ** 0.5)


def test_gradient() -> None:
    """∂/∂θ of w ‖y − θ x_t‖² is −2w mean((y − θ x_t) x_t): nothing is detached, nothing is added."""
    theta = torch.tensor(0.3, dtype=D, requires_grad=True)
    x0, noise = torch.randn(2, 5, 1, 3, 3, dtype=D)
    t = torch.tensor([0.001, 0.2, 0.5, 0.9, 1.0], dtype=D)
    s = Cosine()
    step = diffusion_loss(Denoiser(lambda x, c: theta * x, s, PredV()), MinSNR(), L2(), x0, noise, t)
    assert not step.weight.requires_grad
    (got,) = torch.autograd.grad(step.weighted.mean(), theta)
    alpha, sigma = (v[:, None, None, None] for v in s.alpha_sigma(t))
    x_t, y = alpha * x0 + sigma * noise, alpha * noise - sigma * x0
    want = (-2 * step.weight * ((y - 0.3 * x_t) * x_t).flatten(1).mean(1)).mean()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_clipping_and_extra_channels_play_no_part() -> None:
    x0, noise = torch.randn(2, 2, 1, 2, 2)
    t = torch.tensor([0.5, 0.9])

    def wide(x: Tensor, c: Tensor) -> Tensor:
        return torch.cat([x, x], 1)

    bare = diffusion_loss(Denoiser(lambda x, c: x, Cosine(), PredV()), Native(), L2(), x0, noise, t)
    clipped = diffusion_loss(Denoiser(wide, Cosine(), PredV(), clip=0.1), Native(), L2(), x0, noise, t)
    assert torch.equal(bare.weighted, clipped.weighted)


def test_float32_images_give_a_float32_loss() -> None:
    x0, noise = torch.randn(2, 2, 1, 2, 2)
    step = diffusion_loss(
        Denoiser(lambda x, c: x, Cosine(), PredV()), VLB(), Huber(), x0, noise, torch.tensor([0.5, 0.9], dtype=D)
    )
    assert all(v.dtype == torch.float32 and v.shape == (2,) for v in step)
    assert torch.equal(step.weighted, step.weight * step.error)
    x_t = corrupt(Denoiser(lambda x, c: x, Cosine(), PredV()), x0, noise, torch.tensor([0.5, 0.9], dtype=D))
    want = F.huber_loss(x_t, PredV().target(Cosine(), torch.tensor([0.5, 0.9]), x0, noise), reduction="none")
    torch.testing.assert_close(step.error, want.flatten(1).mean(1))
