"""The variational bound: closed forms on Gaussian data, independent published formulas, errors."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from contracts import OBJECTIVES, SCHEDULES, VARIANCES, accepts
from oracle import Gaussian, oracle
from scipy import stats
from torch import Tensor

from diffusion_lab import likelihood
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.gaussian import posterior
from diffusion_lab.noise import Stream, normal
from diffusion_lab.objectives import PredNoise, PredV
from diffusion_lab.samplers import DDPM, grids
from diffusion_lab.schedules import VP, Cosine, Flow, Linear, Schedule
from diffusion_lab.variances import NPR, SN, Analytic, FixedLarge, FixedSmall, Learned, Variance

D, LN2 = torch.float64, math.log(2)
MEAN, STD = 0.3, 0.5
SHAPE = (3, 8, 8)
DATA = Gaussian(torch.full(SHAPE, MEAN), STD)
ENTROPY = 0.5 * math.log2(2 * math.pi * math.e * STD**2)
LEVELS = (torch.arange(256, dtype=D) * 2 - 255) / 255


def gaussian_images(count: int, seed: int = 5) -> Tensor:
    return MEAN + STD * normal(SHAPE, seed=seed, index=torch.arange(count), dtype=D)


def levels(count: int, shape: tuple[int, ...] = (3, 4, 4), dtype: torch.dtype = D) -> Tensor:
    """Return images on the grid of 256 levels, clamped to its ends."""
    u = (normal(shape, seed=8, index=torch.arange(count), dtype=D) * 0.6).clamp(-1, 1)
    return LEVELS[((u + 1) * 127.5).round().long()].to(dtype)


def f64(t: float) -> Tensor:
    return torch.tensor(t, dtype=D)


def ab(schedule: Schedule, t: float) -> tuple[float, float]:
    alpha, sigma = schedule.alpha_sigma(f64(t))
    return float(alpha), float(sigma)


def optimal_variance(schedule: Schedule, times: Tensor) -> Analytic:
    """Return the optimal variance of DATA at the times of a chain: E ε̂² = σ²/(α²v + σ²) gives c = Var[x_0 | x_t]."""
    alpha, sigma = schedule.alpha_sigma(times)
    return Analytic(times, sigma.square() / ((alpha * STD).square() + sigma.square()))


def closed_form(
    schedule: Schedule, times: Tensor, name: str, eta: float = 1.0
) -> tuple[float, list[float], float, float]:
    """Return (E L_T, [E L_{t−1}], E L_0, entropy + gaps) of DATA with the Gaussian decoder, in bits; times ascend, without 0.

    Let x_0 ~ N(m, v) in each dimension and x̂_0 = E[x_0 | x_t], whose error has the variance V_t = vσ_t²/(α_t²v + σ_t²).

    - q(x_s | x_t, x_0) has the variance λ² = η²σ̃², and x_0 has the factor g = α_s − √(σ_s² − λ²) α_t/σ_t in its mean. The
      means of q and p differ by g(x_0 − x̂_0), so E L_{t−1} = ½[ln(σ²/λ²) + λ²/σ² − 1 + g²V_t/σ²].
    - E L_T = ½α²(v + m²)/σ² at t = 1, and E L_0 = ½[ln 2πd² + V_t/d²] with d = σ/α at t = t_1.
    - FixedSmall has σ² = λ², FixedLarge σ² = σ²_{t|s}, Analytic σ² = V* = λ² + g²V_t.

    At η = 1 q is a Markov chain in reverse too, and q(x_s | x_t) = N(g x̂_0 + …, V*) because x_0 given x_t is Gaussian. The
    chain rule of the KL then gives the sum independently, as the entropy of x_0 plus the errors of p: with r = V*/σ²,
    ½[r − 1 − ln r] for each step; the same with r = V_{t_1}/d² for the decoder; and KL(N(αm, α²v + σ²) ‖ N(0, σ²)) for the
    prior. With V* as the variance only the last two remain. (At η < 1 x_s is not independent of later states given x_t, and
    only the sum of the terms is available.)
    """
    v = STD**2
    alphas, sigmas = (values.tolist() for values in schedule.alpha_sigma(times))
    points = list(zip(alphas, sigmas, strict=True))
    error = [v * s**2 / (a**2 * v + s**2) for a, s in points]

    def gap(r: float) -> float:
        return 0.5 * (r - 1 - math.log(r)) / LN2

    terms, gaps = [], 0.0
    for k, ((alpha_s, sigma_s), (alpha_t, sigma_t)) in enumerate(itertools.pairwise(points)):
        forward = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
        floor = eta**2 * forward * sigma_s**2 / sigma_t**2
        factor = alpha_s - math.sqrt(sigma_s**2 - floor) * alpha_t / sigma_t
        optimal = floor + factor**2 * error[k + 1]
        sigma2 = {"FixedSmall": floor, "FixedLarge": forward, "Analytic": optimal}[name]
        terms.append(0.5 * (math.log(sigma2 / floor) + optimal / sigma2 - 1) / LN2)
        gaps += gap(optimal / sigma2)
    alpha, sigma = points[-1]
    prior = 0.5 * alpha**2 * (v + MEAN**2) / sigma**2 / LN2
    gaps += gap(1 + alpha**2 * v / sigma**2) + 0.5 * (alpha * MEAN / sigma) ** 2 / LN2
    decoder_variance = (points[0][1] / points[0][0]) ** 2
    decoder = 0.5 * (math.log(2 * math.pi * decoder_variance) + error[0] / decoder_variance) / LN2
    gaps += gap(error[0] / decoder_variance)
    return prior, terms, decoder, ENTROPY + gaps


@pytest.mark.parametrize("curve", ["VP", "SubVP", "VE", "EDM", "Flow", "Cosine", "Linear-40-zero"])
@pytest.mark.parametrize(
    ("name", "eta"),
    [("FixedSmall", 1.0), ("FixedLarge", 1.0), ("Analytic", 1.0), ("FixedSmall", 0.5), ("Analytic", 0.5)],
)
def test_gaussian_data_closed_form(curve: str, name: str, eta: float) -> None:
    """8 terms from 40 images of 192 dimensions: each mean within 4.5 standard errors (a failure of any of the 350 comparisons has
    a probability of 0.3 %), and the closed form in two ways. With the optimal variance the bound equals the entropy up to the
    gaps of the prior and of the decoder, which is of order (σ/α)⁴ for t_1 near data."""
    schedule, x0 = SCHEDULES[curve], gaussian_images(40)
    den = oracle(DATA, schedule, PredV())
    times = grids.make_grid("linspace", schedule, 8).flip(0)[1:]
    variance = optimal_variance(schedule, times) if name == "Analytic" else VARIANCES[name]()
    got = likelihood.vlb(den, x0, 8, variance, decoder="gaussian", eta=eta)
    assert torch.equal(got.times, times)
    prior, terms, decoder, total = closed_form(schedule, times, name, eta)
    if eta == 1:
        assert prior + sum(terms) + decoder == pytest.approx(total, abs=1e-9)
    if (name, eta) == ("Analytic", 1):
        small = ab(schedule, float(times[0]))[1] / STD
        assert ENTROPY < total < ENTROPY + prior + small**4
    measured = [got.terms["L_T"], *got.terms["L"].T, got.terms["L_0"], got.bpd]
    for values, want in zip(measured, [prior, *terms, decoder, prior + sum(terms) + decoder], strict=True):
        mean, error = likelihood.average(values)
        assert error is not None
        assert abs(mean - want) < 4.5 * error + 1e-12


def test_the_bound_falls_to_the_entropy() -> None:
    """FixedSmall with the Gaussian decoder on [t_1, 1] for a fixed t_1. The excess over −log₂ p of the same images is of first
    order in the step size: 16 images at 60, 120 and 240 steps agree with the closed form within 4.5 standard errors of 0.02,
    and the closed form halves with every doubling, down to the gaps of prior and decoder (below 1e-3)."""
    for curve, grid in (("VP", "uniform_lambda"), ("VE", "linspace")):
        schedule, x0 = SCHEDULES[curve], gaussian_images(16)
        den = oracle(DATA, schedule, PredV())
        nats = 0.5 * ((x0 - MEAN) / STD) ** 2 + math.log(STD) + 0.5 * math.log(2 * math.pi)
        for steps in (60, 120, 240):
            got = likelihood.vlb(den, x0, steps, decoder="gaussian", grid=grid)
            mean, error = likelihood.average(got.bpd - nats.flatten(1).mean(1) / LN2)
            want = closed_form(schedule, got.times, "FixedSmall")[3] - ENTROPY
            assert error is not None
            assert abs(mean - want) < 4.5 * error < 0.15
    for curve in ("VP", "SubVP", "VE", "EDM"):
        schedule = SCHEDULES[curve]
        chains = (grids.make_grid("uniform_lambda", schedule, n).flip(0)[1:] for n in (1000, 2000, 4000))
        excess = [closed_form(schedule, times, "FixedSmall")[3] - ENTROPY for times in chains]
        assert 1.9 < excess[0] / excess[1] < 2.1
        assert 1.9 < excess[1] / excess[2] < 2.1
        assert 0 < excess[2] < 0.05


class Published:
    """Improved DDPM's bound by its published formulas in float64 NumPy: β of the respaced chain, posterior tables with the first
    log-variance clipped to the second, normal_kl and the discretized decoder; their prior is N(0, 1)."""

    def __init__(self, kept: np.ndarray, learned: bool, large: bool) -> None:
        bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[kept]
        before = np.append(1.0, bar[:-1])
        beta = 1 - bar / before
        self.bar, self.learned, self.large = bar, learned, large
        variance = beta * (1 - before) / (1 - bar)
        self.low = np.log(np.append(variance[1], variance[1:]))
        self.high, self.fixed_large = np.log(beta), np.log(np.append(variance[1], beta[1:]))
        self.coefficient0 = beta * np.sqrt(before) / (1 - bar)
        self.coefficient1 = (1 - before) * np.sqrt(1 - beta) / (1 - bar)

    def term(self, i: int, x0: np.ndarray, x_t: np.ndarray, output: np.ndarray) -> np.ndarray:
        noise, v = (output[:, :3], output[:, 3:]) if self.learned else (output, None)
        estimate = x_t / np.sqrt(self.bar[i]) - np.sqrt(1 / self.bar[i] - 1) * noise
        mean = self.coefficient0[i] * estimate + self.coefficient1[i] * x_t
        true = self.coefficient0[i] * x0 + self.coefficient1[i] * x_t
        log_variance = np.full_like(x0, self.fixed_large[i] if self.large else self.low[i])
        if v is not None:
            f = (v + 1) / 2
            log_variance = f * self.high[i] + (1 - f) * self.low[i]
        if i > 0:
            ratio = self.low[i] - log_variance
            nats = 0.5 * (-1 - ratio + np.exp(ratio) + (true - mean) ** 2 * np.exp(-log_variance))
        else:
            std = np.exp(0.5 * log_variance)
            upper, lower = (x0 - mean + 1 / 255) / std, (x0 - mean - 1 / 255) / std
            upper, lower = np.where(x0 > 0.999, np.inf, upper), np.where(x0 < -0.999, -np.inf, lower)
            mass = np.where(
                lower > 0, stats.norm.sf(lower) - stats.norm.sf(upper), stats.norm.cdf(upper) - stats.norm.cdf(lower)
            )
            nats = -np.log(np.maximum(mass, 1e-12))
        return np.asarray(nats.reshape(len(x0), -1).mean(1) / LN2)

    def prior(self, x0: np.ndarray) -> np.ndarray:
        a, s = self.bar[-1], 1 - self.bar[-1]
        nats = 0.5 * (-1 - np.log(s) + s + a * x0**2)
        return np.asarray(nats.reshape(len(x0), -1).mean(1) / LN2)


class Wavy:
    """A smooth function of (x, c), optionally with v outside [−1, 1]; records its inputs."""

    def __init__(self, learned: bool = False) -> None:
        self.learned, self.inputs, self.calls = learned, {}, 0  # type: ignore[var-annotated]

    def __call__(self, x: Tensor, c: Tensor, **_: Any) -> Tensor:
        self.calls += 1
        self.inputs[int(c[0])] = x
        y = (0.9 * x + 0.3 * x.roll(1, -1)).tanh() + 0.05 * torch.cos(c / 100).reshape(-1, 1, 1, 1)
        return torch.cat([y, 1.5 * torch.sin(3 * x)], 1) if self.learned else y


@pytest.mark.parametrize(
    ("kind", "steps"), [("learned", None), ("learned", 28), ("large", 28), ("small", 28), ("small", 2), ("large", 2)]
)
def test_terms_are_improved_ddpms(kind: str, steps: int | None) -> None:
    """Every term of every image (every 37th of 1000), to a relative 1e-9: x_t is α x_0 + σ ε with the keyed ε, everything else is
    computed independently. Their prior is N(0, 1) and ours N(0, σ_1²), at which sampling starts: they differ by 1e-8 bits."""
    kept = np.arange(1000) if steps is None else np.round(np.linspace(0, 999, steps)).astype(int)
    x0, net = levels(3), Wavy(kind == "learned")
    variance = {"small": FixedSmall(), "large": FixedLarge(), "learned": Learned()}[kind]
    got = likelihood.vlb(Denoiser(net, Linear(), PredNoise()), x0, steps, variance, seed=7)
    assert got.nfe == net.calls == len(kept)
    peer = Published(kept, kind == "learned", kind == "large")
    np.testing.assert_allclose(got.times.numpy(), (kept + 1) / 1000, rtol=1e-12)
    for i in range(0, len(kept), 1 if steps else 37):  # 999 = 27 · 37
        noise = normal((3, 4, 4), seed=7, index=torch.arange(3), draw=i + 2, stream=Stream.LIKELIHOOD, dtype=D)
        x_t = np.sqrt(peer.bar[i]) * x0.numpy() + np.sqrt(1 - peer.bar[i]) * noise.numpy()
        np.testing.assert_allclose(net.inputs[int(kept[i])].numpy(), x_t, rtol=0, atol=1e-12)
        output = net(torch.from_numpy(x_t), torch.full((3,), float(kept[i]), dtype=D)).numpy()
        ours = got.terms["L_0"] if i == 0 else got.terms["L"][:, i - 1]
        np.testing.assert_allclose(ours.numpy(), peer.term(i, x0.numpy(), x_t, output), rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(got.terms["L_T"].numpy(), peer.prior(x0.numpy()), rtol=0, atol=1e-8)


def test_total_is_the_sum_and_the_prior_is_small() -> None:
    """L_T = ½ᾱ_T x_0²/σ² ≈ 1e-5 bits/dim for linear-1000 (Ho et al. 2020): 2.9e-5 times the mean square of the pixels."""
    x0 = levels(4)
    got = likelihood.vlb(Denoiser(Wavy(), Linear(), PredNoise()), x0, 20)
    torch.testing.assert_close(got.bpd, got.terms["L_T"] + got.terms["L"].sum(1) + got.terms["L_0"], rtol=1e-14, atol=0)
    assert got.bpd.shape == got.terms["L_T"].shape == got.terms["L_0"].shape == (4,)
    assert got.terms["L"].shape == (4, 19)
    square = x0.square().flatten(1).mean(1)
    torch.testing.assert_close(got.terms["L_T"], 4.0358e-5 / (1 - 4.0358e-5) / 2 / LN2 * square, rtol=1e-4, atol=0)
    assert (got.terms["L_T"] < 1.5e-5).all()
    assert (got.terms["L_T"] > 0.5e-5).all()


def test_an_image_is_independent_of_its_batch() -> None:
    """Alone, repeated and in another order: x_t of every term is equal bit for bit, values to 1e-12."""
    x0, net = levels(5), Wavy()
    den = Denoiser(net, Cosine(), PredV())
    want = likelihood.vlb(den, x0, 9, seed=3)
    whole = dict(net.inputs)
    for rows in ([4], [2, 2, 0]):
        index = torch.tensor(rows)
        got = likelihood.vlb(den, x0[index], 9, seed=3, index=index)
        assert all(torch.equal(net.inputs[c], whole[c][index]) for c in whole)
        for a, b in ((got.bpd, want.bpd), *((got.terms[k], want.terms[k]) for k in want.terms)):
            torch.testing.assert_close(a, b[index], rtol=1e-12, atol=0)
    assert not torch.equal(likelihood.vlb(den, x0, 9, seed=4).bpd, want.bpd)
    assert not torch.equal(likelihood.vlb(den, x0, 9, seed=3, index=torch.arange(5) + 9).bpd, want.bpd)


@pytest.mark.parametrize("curve", ["VP", "Flow", "Cosine-40"])
def test_every_objective_has_the_same_bound(curve: str) -> None:
    schedule, x0 = SCHEDULES[curve], gaussian_images(3)
    names = [n for n in OBJECTIVES if accepts(OBJECTIVES[n], schedule)]
    assert len(names) > 2
    want = likelihood.vlb(oracle(DATA, schedule, PredV()), x0, 12)
    for name in names:
        got = likelihood.vlb(oracle(DATA, schedule, OBJECTIVES[name]), x0, 12)
        for key, value in want.terms.items():
            torch.testing.assert_close(got.terms[key], value, rtol=0, atol=1e-6)


def with_head(schedule: Schedule, kind: str) -> Denoiser:
    """Return the optimal denoiser of DATA with the optimal second head: (α²/σ²)V_t for npr, E[ε² | x_t] for sn."""
    inner = oracle(DATA, schedule, PredNoise())

    def net(x: Tensor, c: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha_sigma(inner.network.time(c))  # type: ignore[attr-defined]
        noise = inner.network(x, c)
        residual = ((alpha * STD) ** 2 / ((alpha * STD) ** 2 + sigma**2)).reshape(-1, 1, 1, 1).expand_as(x)
        return torch.cat([noise, residual + (noise.square() if kind == "sn" else 0)], 1)

    return Denoiser(net, schedule, PredNoise())


@pytest.mark.parametrize("curve", ["VP", "Cosine"])
def test_second_heads_give_the_bound_of_the_optimal_variance(curve: str) -> None:
    """SN and NPR with optimal heads have the terms of Analytic, here exact. L_0 depends on the learned variance only."""
    schedule, x0 = SCHEDULES[curve], gaussian_images(2)
    plain = oracle(DATA, schedule, PredNoise())
    chain = likelihood.vlb(plain, x0, 10)
    want = likelihood.vlb(plain, x0, 10, optimal_variance(schedule, chain.times))
    assert torch.equal(want.terms["L_0"], chain.terms["L_0"])
    assert (want.terms["L"].mean(0) < chain.terms["L"].mean(0)).all()
    for kind, variance in (("sn", SN()), ("npr", NPR())):
        got = likelihood.vlb(with_head(schedule, kind), x0, 10, variance)
        torch.testing.assert_close(got.terms["L"], want.terms["L"], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(got.terms["L_0"], want.terms["L_0"], rtol=1e-9, atol=0)
    learned = likelihood.vlb(with_head(schedule, "npr"), x0, 10, Learned())
    assert not torch.equal(learned.terms["L_0"], chain.terms["L_0"])
    assert torch.equal(likelihood.vlb(plain, x0, 10, FixedLarge()).terms["L_0"], chain.terms["L_0"])


def test_the_floor_of_the_decoder() -> None:
    """σ̃² of the next pair of the chain (last=strided) or of (2/T, 1/T) (last=full): a factor of 1.75 to 1.9 at 10 to 100 steps of
    linear-1000. It affects L_0 only; with every step of the table the two are equal."""
    full = float(posterior(Linear(), f64(0.002), f64(0.001)).variance)
    x0, den = levels(3), Denoiser(Wavy(), Linear(), PredNoise())
    for steps in (10, 100):
        one, two = (likelihood.vlb(den, x0, steps, last=last) for last in ("strided", "full"))
        strided = float(posterior(Linear(), one.times[1], one.times[0]).variance)
        assert 1.75 < strided / full < 1.9
        assert (one.last, two.last) == ("strided", "full")
        assert torch.equal(one.terms["L"], two.terms["L"])
        assert not torch.equal(one.terms["L_0"], two.terms["L_0"])
    den = Denoiser(Wavy(), Linear(40), PredNoise())
    assert torch.equal(likelihood.vlb(den, x0).bpd, likelihood.vlb(den, x0, last="full").bpd)


def test_clipping_is_removed_by_default() -> None:
    x0, net = levels(3), Wavy()
    plain, clipping = Denoiser(net, Linear(), PredNoise()), Denoiser(net, Linear(), PredNoise(), clip=1.0)
    want = likelihood.vlb(plain, x0, 9)
    got, clipped = likelihood.vlb(clipping, x0, 9), likelihood.vlb(clipping, x0, 9, clip=True)
    assert torch.equal(got.bpd, want.bpd)
    assert (clipped.bpd < want.bpd).all()  # x̂_0 exceeds the range of x_0 here
    assert (want.clipped, got.clipped, clipped.clipped) == (False, False, True)
    assert not likelihood.vlb(plain, x0, 9, clip=True).clipped
    assert clipping.clip == 1.0


def test_condition_and_times_of_a_sampler_reach_the_network() -> None:
    calls: list[dict[str, Any]] = []

    def net(x: Tensor, c: Tensor, **condition: Any) -> Tensor:
        calls.append({"c": float(c[0]), **condition})
        return 0.5 * x

    den, label = Denoiser(net, Linear(), PredNoise()), torch.tensor([1, 0])
    times = DDPM(5, grid="quadratic").time_grid(den)
    got = likelihood.vlb(den, levels(2), condition={"label": label}, times=times)
    assert torch.equal(got.times, times.flip(0)[1:])
    assert [call["c"] for call in calls] == pytest.approx([1000 * float(t) - 1 for t in got.times])
    assert all(torch.equal(call["label"], label) for call in calls)


def test_single_precision_is_close() -> None:
    """1e-4 bits/dim of a total around 1, over 50 terms."""
    x0, den = levels(3), Denoiser(lambda x, c: x.tanh(), Linear(), PredNoise())
    double, single = likelihood.vlb(den, x0, 50), likelihood.vlb(den, x0.float(), 50)
    assert single.bpd.dtype == D
    torch.testing.assert_close(single.bpd, double.bpd, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    """Bound and density on the GPU, with `index` and times on the CPU, equal those of the CPU to 1e-6."""
    x0, den = levels(3), Denoiser(lambda x, c: x.tanh(), Linear(), PredNoise())
    for evaluate in (lambda x: likelihood.vlb(den, x, 20, FixedLarge()), lambda x: likelihood.ode(den, x, "exact")):
        torch.testing.assert_close(evaluate(x0.cuda()).bpd.cpu(), evaluate(x0).bpd, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_images(dtype: torch.dtype) -> None:
    """They are converted to float32; one image of odd size, on a curve with α(1) = 0."""
    den, x0 = Denoiser(lambda x, c: x.tanh(), Flow(), PredV()), levels(1, (1, 3, 5)).to(dtype)
    got = likelihood.vlb(den, x0, 6)
    assert torch.equal(got.bpd, likelihood.vlb(den, x0.float(), 6).bpd)
    assert got.terms["L_T"].tolist() == [0.0]
    assert likelihood.ode(den, x0, rtol=1e-2, atol=1e-2).bpd.isfinite().all()


def test_average() -> None:
    values = torch.tensor([1.0, 2.0, 4.0])
    mean, error = likelihood.average(values)
    assert mean == pytest.approx(7 / 3)
    assert error == pytest.approx(stats.sem(values.numpy()))
    assert likelihood.average(values[:1]) == (1.0, None)


class Zero(Variance):
    def __call__(self, schedule: Any, t: Any, s: Any, prediction: Any, floor: Any = 0.0) -> Tensor:
        return torch.zeros_like(prediction.x0)


def refused(match: str, den: Denoiser, x0: Tensor, *args: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        likelihood.vlb(den, x0, *args, **options)
    assert "\n" not in str(caught.value)


def test_errors() -> None:
    """Each message is one line and names the remedy."""
    x0 = levels(2)
    table, curve = Denoiser(Wavy(), Linear(), PredNoise()), Denoiser(Wavy(), VP(), PredNoise())
    refused("write one of discretized, gaussian", table, x0, 5, decoder="nonesuch")
    refused("write one of strided, full", table, x0, 5, last="nonesuch")
    refused("last=strided", curve, x0, 5, last="full")
    refused("steps", curve, x0)
    refused("write one of", table, x0, 5, grid="nonesuch")
    refused("steps=2", table, x0, 1)
    refused("fewer", table, x0, 1001)
    refused("eta=1", table, x0, 5, eta=0.0)
    refused("likelihood.ode", table, x0, 5, eta=0.0)
    refused("eta=1", table, x0, 5, FixedLarge(), eta=0.5)
    refused("variance is 0", table, x0, 5, Zero())
    refused("variance=learned", table, x0, 5, Learned())
    refused("float images", table, (x0 * 127).to(torch.uint8), 5)
    refused("must fall", table, x0, times=torch.tensor([0.0, 0.5, 1.0]))
    refused("variance is 0, infinite", Denoiser(Wavy(), Flow(), PredV()), x0, 1, decoder="gaussian")

    class SelfConditioned(Wavy):
        self_conditioning = True

    refused("self-conditioning", Denoiser(SelfConditioned(), Linear(), PredNoise()), x0, 5)

    def diverging(x: Tensor, c: Tensor) -> Tensor:
        return x * torch.where(c > 700, torch.nan, 1.0).reshape(-1, 1, 1, 1)

    refused("NaN or infinity at t=0.75", Denoiser(diverging, Linear(), PredNoise()), x0, 5, last="full")
    assert likelihood.vlb(table, x0, 1, last="full").terms["L"].shape == (2, 0)
