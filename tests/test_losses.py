"""Losses in closed form, their gradients, and one training step by hand."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from contracts import OBJECTIVES, PAIRS, SCHEDULES
from oracle import Gaussian, oracle
from torch import Tensor
from torch.nn import functional as F

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.errors import ConfigError
from diffusion_lab.gaussian import posterior
from diffusion_lab.losses import L1, L2, Huber, PointwiseLoss, bound_term, check_bound_times, diffusion_loss, head_loss
from diffusion_lab.objectives import Objective, PredFlow, PredNoise, PredV, PredX0
from diffusion_lab.schedules import Cosine, Linear, Schedule
from diffusion_lab.time_samplers import Importance, LogitNormal, LogNormal, Stratified, TimeSampler, Uniform
from diffusion_lab.variances import FixedLarge, Learned
from diffusion_lab.weightings import VLB, Eps, FlowVelocity, MinSNR, Native, V, Weighting

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
def test_the_loss_is_a_mean_for_each_image(error: PointwiseLoss) -> None:
    a, b = torch.randn(2, 3, 2, 4, 4)
    got = error(a, b)
    assert got.shape == (3,)
    for k in range(3):
        torch.testing.assert_close(got[k : k + 1], error(a[k : k + 1], b[k : k + 1]))
    assert (error(a, a) == 0).all()


def test_huber_refuses_a_delta_of_0() -> None:
    with pytest.raises(ValueError, match=r"delta=0: write a number in \[1e-6, 1e6\]"):
        Huber(0)


def test_corrupt_is_the_forward_process() -> None:
    x0, noise = torch.randn(2, 2, 1, 2, 2, dtype=D)
    t = torch.tensor([0.25, 1.0], dtype=D)
    got = Linear().corrupt(x0, noise, t)
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
    noise_hat = network(bar.sqrt() * x0 + (1 - bar).sqrt() * noise, i.double() - 1)
    want = (noise_hat - noise).square().flatten(1).mean(1)
    torch.testing.assert_close(step.weighted, want, rtol=1e-9, atol=1e-12)
    assert torch.equal(step.weight, torch.ones(3, dtype=D))


@pytest.mark.parametrize("weighting", [Eps(), MinSNR(), VLB()])
def test_the_weighted_loss_does_not_depend_on_the_objective(weighting: object) -> None:
    """The optimal network has the same weighted loss for every objective, to a relative 1e-6."""
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


def test_the_loss_of_the_optimal_denoiser() -> None:
    """E[(ε − ε̂)²] of the optimal denoiser of N(m, s²) is α²s²/(α²s² + σ²): 40,000 elements, to 4 standard errors."""
    data, s = Gaussian(torch.full((1, 1, 1), 0.2), 0.5), Cosine()
    x0, noise = 0.2 + 0.5 * torch.randn(40000, 1, 1, 1, dtype=D), torch.randn(40000, 1, 1, 1, dtype=D)
    t = torch.full((40000,), 0.4, dtype=D)
    got = diffusion_loss(oracle(data, s, PredV()), Eps(), L2(), x0, noise, t).weighted
    alpha, sigma = (float(v[0]) for v in s.alpha_sigma(t))
    want = (alpha * 0.5) ** 2 / ((alpha * 0.5) ** 2 + sigma**2)
    assert float(got.mean()) == pytest.approx(want, abs=4 * want * (2 / 40000) ** 0.5)


def test_gradient() -> None:
    """∂/∂θ of w ‖y − θ x_t‖² is −2w mean((y − θ x_t) x_t)."""
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


def test_clipping_and_extra_channels_do_not_change_the_loss() -> None:
    x0, noise = torch.randn(2, 2, 1, 2, 2)
    t = torch.tensor([0.5, 0.9])

    def twice_the_channels(x: Tensor, c: Tensor) -> Tensor:
        return torch.cat([x, x], 1)

    bare = diffusion_loss(Denoiser(lambda x, c: x, Cosine(), PredV()), Native(), L2(), x0, noise, t)
    clipped = diffusion_loss(Denoiser(twice_the_channels, Cosine(), PredV(), clip=0.1), Native(), L2(), x0, noise, t)
    assert torch.equal(bare.weighted, clipped.weighted)


def test_float32_images_give_a_float32_loss() -> None:
    x0, noise = torch.randn(2, 2, 1, 2, 2)
    step = diffusion_loss(
        Denoiser(lambda x, c: x, Cosine(), PredV()), VLB(), Huber(), x0, noise, torch.tensor([0.5, 0.9], dtype=D)
    )
    assert all(v.dtype == torch.float32 and v.shape == (2,) for v in step)
    assert torch.equal(step.weighted, step.weight * step.error)
    x_t = Cosine().corrupt(x0, noise, torch.tensor([0.5, 0.9], dtype=D))
    want = F.huber_loss(x_t, PredV().target(Cosine(), torch.tensor([0.5, 0.9]), x0, noise), reduction="none")
    torch.testing.assert_close(step.error, want.flatten(1).mean(1))


# ------------------------------------------------------------------------------------------------ losses of a variance

BETA = np.linspace(1e-4 * 25, 0.02 * 25, 40)
BAR = np.cumprod(1 - BETA)


def levels(batch: int, seed: int = 0) -> Tensor:
    """Return images on the grid k/127.5 − 1 that contain both ends."""
    k = torch.randint(0, 256, (batch, 1, 3, 3), generator=torch.Generator().manual_seed(seed))
    k[:, 0, 0, :2] = torch.tensor([0, 255])
    return (2 * k.double() - 255) / 255


def noise_and_v(x: Tensor, c: Tensor) -> Tensor:
    """A network whose output is ε̂ and v."""
    time = c[:, None, None, None] / 40
    return torch.cat([(x * (1 + time)).tanh(), 1.3 * (3 * x - time).sin()], dim=1)


def term_in_numpy(x0: np.ndarray, x_t: np.ndarray, out: np.ndarray, i: int) -> float:
    """Return L_t of improved DDPM at node i in bits/dim, from β: means c_1 x_t + c_0 x̂_0, log variances, SciPy's Gaussian; at
    i = 1 the 256-level likelihood around x̂_0 with σ̃² of the pair (2, 1) as lower bound."""
    before = BAR[i - 2] if i > 1 else 1.0
    small = BETA[i - 1] * (1 - before) / (1 - BAR[i - 1]) if i > 1 else BETA[1] * (1 - BAR[0]) / (1 - BAR[1])
    f = (out[1] + 1) / 2
    log = f * np.log(BETA[i - 1]) + (1 - f) * np.log(small)
    x0_hat = (x_t - np.sqrt(1 - BAR[i - 1]) * out[0]) / np.sqrt(BAR[i - 1])
    if i > 1:
        c0, c1 = (
            np.sqrt(before) * BETA[i - 1] / (1 - BAR[i - 1]),
            np.sqrt(1 - BETA[i - 1]) * (1 - before) / (1 - BAR[i - 1]),
        )
        gap = (c1 * x_t + c0 * x0) - (c1 * x_t + c0 * x0_hat)
        nats = 0.5 * (log - np.log(small) - 1 + (small + gap**2) / np.exp(log))
    else:
        std = np.exp(0.5 * log)
        high = np.where(x0 > 0.999, np.inf, (x0 - x0_hat + 1 / 255) / std)
        low = np.where(x0 < -0.999, -np.inf, (x0 - x0_hat - 1 / 255) / std)
        nats = -np.log(np.maximum(scipy.stats.norm.cdf(high) - scipy.stats.norm.cdf(low), 1e-12))
    return float(nats.mean() / np.log(2))


@pytest.mark.parametrize("objective", [PredNoise(), PredX0(), PredV()])
def test_hybrid_and_vlb_losses_against_numpy(objective: Objective) -> None:
    """mean (ε − ε̂)² + (T/1000) L_t, and T L_t, in float64 from β, at the first, inner and last nodes; with weighting=eps, under
    which the weighted error of every objective is that of ε."""
    node = torch.tensor([1, 2, 3, 17, 40])
    x0, noise, t = levels(5), torch.randn(5, 1, 3, 3, dtype=D), node.double() / 40
    schedule = Linear(40)

    def network(scaled: Tensor, c: Tensor) -> Tensor:
        out = noise_and_v(scaled, c)
        at = (c + 1) / 40
        alpha, sigma = (v[:, None, None, None] for v in schedule.alpha_sigma(at))
        x0_hat = (scaled - sigma * out[:, :1]) / alpha
        return torch.cat([objective.target(schedule, at, x0_hat, out[:, :1]), out[:, 1:]], dim=1)

    den = Denoiser(network, schedule, objective, clip=0.1)  # the loss ignores clipping
    x_t = den.schedule.corrupt(x0, noise, t)
    out = noise_and_v(x_t, node.double() - 1)
    want = [term_in_numpy(*(v[k, 0].numpy() for v in (x0, x_t)), out[k].numpy(), int(i)) for k, i in enumerate(node)]
    simple = (out[:, :1] - noise).square().flatten(1).mean(1)
    both = diffusion_loss(den, Eps(), L2(), x0, noise, t, learned=Learned())
    torch.testing.assert_close(both.weighted, simple + 40 / 1000 * torch.tensor(want, dtype=D), rtol=1e-7, atol=1e-9)
    alone = diffusion_loss(den, Eps(), L2(), x0, noise, t, learned=Learned("vlb"))
    torch.testing.assert_close(alone.weighted, 40 * torch.tensor(want, dtype=D), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(both.error, alone.error)
    single = diffusion_loss(den, Eps(), L2(), x0.float(), noise.float(), t.float(), learned=Learned("vlb"))
    assert single.weighted.dtype == torch.float32
    torch.testing.assert_close(single.weighted.double(), alone.weighted, rtol=2e-4, atol=1e-4)


def test_gradients_of_the_hybrid_and_vlb_losses() -> None:
    """hybrid: the mean has the gradient of the error alone, v that of the bound alone. vlb: both have the bound's."""
    t = torch.tensor([1, 2, 20, 40], dtype=D) / 40
    x0, noise, s = levels(4), torch.randn(4, 1, 3, 3, dtype=D), Linear(40)
    mean = torch.randn(4, 1, 3, 3, dtype=D, requires_grad=True)
    v = torch.randn(4, 1, 3, 3, dtype=D, requires_grad=True)
    den = Denoiser(lambda x, c: torch.cat([mean, v], 1), s, PredNoise())

    def gradients(**options: Any) -> tuple[Tensor, Tensor]:
        loss = diffusion_loss(den, Eps(), L2(), x0, noise, t, **options).weighted.sum()
        of_mean, of_v = torch.autograd.grad(loss, [mean, v], allow_unused=True)
        return of_mean, torch.zeros_like(v) if of_v is None else of_v

    simple, hybrid, alone = gradients(), gradients(learned=Learned()), gradients(learned=Learned("vlb"))
    assert torch.equal(hybrid[0], simple[0])
    assert (simple[1] == 0).all()
    assert (hybrid[1] != 0).any(dim=(1, 2, 3)).all()
    torch.testing.assert_close(hybrid[1], alone[1] / 1000, rtol=1e-12, atol=0)
    assert (alone[0] != 0).any(dim=(1, 2, 3)).all()
    with torch.no_grad():  # central differences of the bound, for one element of each image
        for half, got in ((mean, alone[0]), (v, alone[1])):
            sides = []
            for step in (1e-5, -1e-5):
                half[:, 0, 1, 1] += step
                sides.append(diffusion_loss(den, Eps(), L2(), x0, noise, t, learned=Learned("vlb")).weighted)
                half[:, 0, 1, 1] -= step
            torch.testing.assert_close((sides[0] - sides[1]) / 2e-5, got[:, 0, 1, 1], rtol=1e-4, atol=1e-6)


def test_the_expected_term_is_minimal_at_the_optimal_variance() -> None:
    """For N(0.2, 0.25) and the optimal mean, E L_t is minimal where σ² is the covariance of the step (theorem 1 of
    Analytic-DPM), with the value ½ log₂(σ²/σ̃²): 60,000 elements, to 4 standard errors."""
    s, t = Linear(40), torch.full((60000,), 0.5, dtype=D)
    x0, noise = 0.2 + 0.5 * torch.randn(60000, 1, 1, 1, dtype=D), torch.randn(60000, 1, 1, 1, dtype=D)
    q, (alpha, sigma) = posterior(s, t[0], t[0] - 1 / 40), s.alpha_sigma(t[0])
    best = q.variance + q.c0**2 * 0.25 * sigma**2 / (alpha**2 * 0.25 + sigma**2)
    large = FixedLarge()(s, t[0], t[0] - 1 / 40, Prediction(x0, x0, x0))
    v = 2 * float((best / q.variance).log() / (large / q.variance).log()) - 1
    den = oracle(Gaussian(torch.full((1, 1, 1), 0.2), 0.5), s, PredNoise())
    x_t = den.schedule.corrupt(x0, noise, t)
    output, *_ = den.output(x_t, t)

    def term(at: float) -> Tensor:
        return bound_term(den, Learned(), x0, x_t, t, output, torch.full_like(x0, at))

    minimum = term(v)
    want = 0.5 * math.log2(float(best / q.variance))
    assert float(minimum.mean()) == pytest.approx(want, abs=4 * float(minimum.std()) / 60000**0.5)
    for step in (-0.3, 0.3):
        assert float(term(v + step).mean()) > float(minimum.mean())


def test_learned_variance_is_refused_without_steps_or_channels() -> None:
    x0, noise, t = torch.zeros(2, 1, 2, 2), torch.zeros(2, 1, 2, 2), torch.tensor([0.5, 0.9])
    with pytest.raises(ValueError, match="continuous curve without steps: write schedule=cosine"):
        diffusion_loss(
            Denoiser(noise_and_v, SCHEDULES["VP"], PredNoise()), Eps(), L2(), x0, noise, t, learned=Learned()
        )
    with pytest.raises(ValueError, match="train with variance=learned"):
        diffusion_loss(Denoiser(lambda x, c: x, Linear(), PredNoise()), Eps(), L2(), x0, noise, t, learned=Learned())


@pytest.mark.parametrize("kind", ["sn", "npr"])
def test_the_loss_of_a_second_head(kind: str) -> None:
    """(g − ε²)² and (h − (ε − ε̂)²)², without a gradient with respect to ε̂."""
    x0, noise = torch.randn(2, 3, 1, 2, 2, dtype=D)
    t = torch.tensor([0.1, 0.5, 1.0], dtype=D)
    noise_hat, head = (torch.randn(3, 1, 2, 2, dtype=D, requires_grad=True) for _ in range(2))
    den = Denoiser(lambda x, c: torch.cat([noise_hat, head], 1), Linear(), PredNoise())
    got = head_loss(den, kind, x0, noise, t)
    target = noise**2 if kind == "sn" else (noise - noise_hat) ** 2
    torch.testing.assert_close(got, (head - target).square().flatten(1).mean(1))
    noise_grad, head_grad = torch.autograd.grad(got.sum(), [noise_hat, head], allow_unused=True)
    assert noise_grad is None or (noise_grad == 0).all()
    torch.testing.assert_close(head_grad, 2 * (head - target) / 4)


class Half(TimeSampler):
    """A distribution of one's own: it does not state that its weighted mean is uniform."""

    def times(self, schedule: Schedule, u: Tensor) -> Tensor:
        return u / 2


def test_the_bound_alone_is_trained_where_its_mean_is_the_bound() -> None:
    """For f(t) = t² on 40 nodes the mean of weight · f is that of all nodes, Σ (i/T)²/T, for every sampler that is accepted, and
    another number for every one that is refused. The hybrid loss accepts all."""
    schedule, node = Linear(40), torch.arange(1, 41, dtype=D) / 40
    accepted = []
    for sampler in (
        Uniform(),
        Stratified(),
        Importance(),
        Importance(stratified=False),
        LogNormal(),
        LogitNormal(),
        Half(),
    ):
        if isinstance(sampler, Importance):
            for step in range(40):
                t = sampler(schedule, torch.arange(400), 400, seed=0, step=step)
                sampler.update(schedule, t, t)
        check_bound_times(Learned(), sampler)
        t = torch.cat([sampler(schedule, torch.arange(400), 400, seed=1, step=k) for k in range(100)])
        same = float((sampler.weight(schedule, t) * t.square()).mean()) == pytest.approx(
            float(node.square().mean()), rel=0.02
        )
        if same:
            check_bound_times(Learned("vlb"), sampler)
            accepted.append(type(sampler).__name__)
        else:
            with pytest.raises(ConfigError, match="time_sampler=stratified"):
                check_bound_times(Learned("vlb"), sampler)
    assert accepted == ["Uniform", "Stratified", "Importance", "Importance"]


@pytest.mark.parametrize(("schedule", "objective"), PAIRS)
@pytest.mark.parametrize(("weighting", "space"), [(V(), PredV()), (FlowVelocity(), PredFlow())])
def test_a_loss_in_another_space_than_the_output(
    schedule: str, objective: str, weighting: Weighting, space: Objective
) -> None:
    """The same prediction x̂_0 as the output of `space` with weighting=native: equal losses, and gradients with respect to x̂_0."""
    curve, own = SCHEDULES[schedule], OBJECTIVES[objective]
    x0, noise, t = (
        torch.rand(3, 1, 2, 2, dtype=D) - 0.5,
        torch.randn(3, 1, 2, 2, dtype=D),
        torch.tensor([0.1, 0.5, 0.9], dtype=D),
    )
    sides = []
    for o, w in ((own, weighting), (space, Native())):
        estimate = (x0 + 0.1 * torch.sin(7 * x0)).requires_grad_()
        alpha, sigma = (v.reshape(-1, 1, 1, 1) for v in curve.alpha_sigma(t))
        x_t = alpha * x0 + sigma * noise
        y = o.target(curve, t, estimate, (x_t - alpha * estimate) / sigma)
        loss = diffusion_loss(Denoiser(lambda x, c, y=y: y, curve, o), w, L2(), x0, noise, t).weighted
        sides.append((loss, torch.autograd.grad(loss.sum(), estimate)[0]))
    for mine, theirs in zip(*sides, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7 if objective == "PredMean" else 1e-10, atol=1e-12)
