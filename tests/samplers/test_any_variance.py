"""DDPM and DDIM with every variance: standard deviation at few steps, identity at η = 1, bound on the last stochastic step,
optimal grid, the learned range against diffusers."""

import itertools
import math
from typing import Any

import pytest
import torch
from contracts import SAMPLERS, SCHEDULES, takes
from oracle import Gaussian, Mixture, WithHead, oracle

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.editing import InpaintingTransform
from diffusion_lab.gaussian import posterior
from diffusion_lab.guidance import ClassifierFree, ClassifierGuidance
from diffusion_lab.noise import normal
from diffusion_lab.objectives import PredNoise, PredV
from diffusion_lab.samplers import DDIM, DDPM
from diffusion_lab.samplers.ancestral import LEVEL, optimal_grid
from diffusion_lab.samplers.grids import make_grid
from diffusion_lab.schedules import Cosine, Linear, Schedule
from diffusion_lab.variances import NPR, SN, Analytic, FixedLarge, FixedSmall, Learned, Variance
from diffusion_lab.variances.trajectory import costs

D = torch.float64
MEAN, VAR = 0.3, 0.25
DATA = Gaussian(torch.full((1, 1, 1), MEAN), VAR**0.5)
MIXTURE = Mixture(torch.tensor([-0.6, 0.6]).reshape(2, 1, 1, 1), torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.7]))
X = torch.tensor([-2.0, -0.5, 0.3, 1.0, 2.0], dtype=D).reshape(5, 1, 1, 1)
FREE = math.inf  # no bound on the last stochastic step


def fitted(curve: Schedule, count: int = 1000) -> Analytic:
    fit = torch.arange(1, count + 1, dtype=D) / count
    alpha, sigma = curve.alpha_sigma(fit)
    return Analytic(fit, sigma**2 / (alpha**2 * VAR + sigma**2))


def best(name: str, curve: Schedule, data: Mixture = DATA) -> tuple[Variance, Denoiser]:
    """Return a variance, and a denoiser whose network outputs the extra channels that it reads."""
    if name == "analytic":
        return fitted(curve), oracle(data, curve, PredV())
    return {"sn": SN(), "npr": NPR()}[name], Denoiser(WithHead(data, curve, PredV(), name), curve, PredV())


def propagated(curve: Schedule, variance: Variance, grid: torch.Tensor, eta: float, x: Prediction) -> float:
    """Return the exact Var[x] at the end of the grid. Steps are affine for Gaussian data: x̂_0 = m + αv(x − αm)/(α²v + σ²)."""
    var = curve.alpha_sigma(grid[0])[1] ** 2 + curve.alpha_sigma(grid[0])[0] ** 2 * VAR
    for t, s in itertools.pairwise(grid):
        (alpha, sigma), (alpha_s, sigma_s) = curve.alpha_sigma(t), curve.alpha_sigma(s)
        floor = eta**2 * posterior(curve, t, s).variance
        shrink = alpha * VAR / (alpha**2 * VAR + sigma**2)
        slope = alpha_s * shrink + (sigma_s**2 - floor).clamp(min=0).sqrt() * (1 - alpha * shrink) / sigma
        var = slope**2 * var + (float(variance(curve, t, s, x, floor)) if s > 0 else 0)
    return float(var)


@pytest.mark.parametrize("schedule", ["Linear", "Cosine", "VP", "Flow"])
@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_the_optimal_variance_keeps_the_marginal_of_gaussian_data_at_any_stride(
    schedule: str, n: int, eta: float
) -> None:
    """Var[x_s] = α_s²v + σ_s² at the end of 2 and 5 steps to s = 0.1, to 1e-7, the precision of a moment near 1 with
    α² = 2e-9 (1e-3 from α = 0, where c is that of the next time); the fixed variances miss it by 2 %, from opposite sides."""
    curve, x = SCHEDULES[schedule], Prediction(X, X, X)
    grid = torch.linspace(1, 0.1, n + 1, dtype=D)
    alpha, sigma = curve.alpha_sigma(grid[-1])
    expected = float(alpha**2 * VAR + sigma**2)
    got = propagated(curve, fitted(curve), grid, eta, x)
    assert got == pytest.approx(expected, rel=1e-3 if curve.zero_terminal_snr else 1e-7)
    if eta == 1:
        assert propagated(curve, FixedSmall(), grid, 1, x) < 0.98 * expected
        assert propagated(curve, FixedLarge(), grid, 1, x) > 1.02 * expected


@pytest.mark.parametrize("name", ["analytic", "sn", "npr"])
@pytest.mark.parametrize("cls", [DDPM, DDIM])
def test_few_steps_return_the_standard_deviation_of_the_data(name: str, cls: Any) -> None:
    """5 steps, 20,000 images of N(0.3, 0.25): the standard deviation within 4 standard errors of that of x̂_0 at the first node,
    0.5; with fixed_small it is 10 % too small for DDPM. The same for DDIM with η = 0."""
    curve = Linear()
    variance, den = best(name, curve)
    x_T = normal((1, 1, 1), seed=3, index=torch.arange(20000), dtype=D)
    x = cls(5, variance=variance, grid="linspace", max_final_noise=FREE)(den, x_T, seed=4).x
    alpha, sigma = (float(v) for v in curve.alpha_sigma(torch.tensor(1e-3, dtype=D)))
    std = (VAR * alpha**2 * VAR / (alpha**2 * VAR + sigma**2)) ** 0.5
    assert float(x.std()) == pytest.approx(std, abs=4 * std / 40000**0.5)
    assert float(x.mean()) == pytest.approx(MEAN, abs=4 * std / 20000**0.5)
    assert float(DDPM(5)(den, x_T, seed=4).x.std()) < 0.9 * std


def test_second_heads_give_each_image_its_variance() -> None:
    """Mixture data, from t = 0.35 to 0.2 in one step: NPR and SN give a variance per image, closer to the exact Var[x_s] than
    with Γ. In closed form: the KL-optimal σ² is floor + gain · Var[x_0 | x_t]."""
    curve, t, s = Cosine(), torch.tensor(0.35, dtype=D), torch.tensor(0.2, dtype=D)
    index = torch.arange(4000)
    x0 = torch.where(normal((1, 1, 1), seed=0, index=index, dtype=D) < -0.524, -0.6, 0.6)
    alpha, sigma = curve.alpha_sigma(t)
    x = alpha * x0 + sigma * normal((1, 1, 1), seed=1, index=index, dtype=D)
    true = MIXTURE.spread(x, alpha, sigma)
    moment = 1 - float(true.mean()) * float(alpha / sigma) ** 2
    floor = posterior(curve, t, s).variance
    p = oracle(MIXTURE, curve, PredV())(x, t)
    one = Analytic([0.35], [moment])(curve, t, s, p, floor)
    _, den = best("npr", curve, MIXTURE)
    each = NPR()(curve, t, s, den(x, t), floor)
    gain = posterior(curve, t, s).c0 ** 2
    expected = floor + gain * true

    def kl(guess: torch.Tensor) -> float:
        return float((0.5 * (guess.log() - expected.log() - 1 + expected / guess)).mean())

    assert kl(each) < 1e-12
    assert kl(one.expand_as(expected)) > 1e-3


@pytest.mark.parametrize("schedule", ["Linear-40", "Cosine-40", "Cosine-40-zero"])
@pytest.mark.parametrize("name", ["analytic", "sn", "npr"])
@pytest.mark.parametrize("grid", ["linspace", "trailing"])
def test_ddim_with_eta_1_is_ddpm_for_every_variance_with_a_floor(schedule: str, name: str, grid: str) -> None:
    """All steps and 7 of 40, with the default bound on the last stochastic step, to 1e-9."""
    variance, den = best(name, SCHEDULES[schedule], MIXTURE)
    for n in (None, 7):
        got = DDIM(n, eta=1.0, variance=variance, grid=grid)(den, X, seed=5).x
        torch.testing.assert_close(got, DDPM(n, variance, grid=grid)(den, X, seed=5).x, rtol=1e-9, atol=1e-9)


def test_max_final_noise_bounds_the_last_stochastic_step_only() -> None:
    """σ² ≤ (y · 2/255 · √(π/2))², so that E|σz| ≤ y levels: compared with the noise of each step."""
    curve, n = Linear(), 6
    variance, den = best("analytic", curve)

    def noise_scales(sampler: DDPM | DDIM, stop: float = 0.0) -> list[float]:
        """Return σ of each step of one image, from the difference of the state and its mean."""
        seen: list[tuple[float, torch.Tensor, Prediction]] = []
        end = sampler(den, X[:1], seed=2, stop=stop, callback=lambda i, t, x, p: seen.append((t, x, p))).x
        grid, out = [*sampler.time_grid(den, stop=stop)], []
        for k, (_, x, p) in enumerate(seen):
            q = posterior(curve, grid[k], grid[k + 1])
            after = seen[k + 1][1] if k + 1 < len(seen) else end
            out.append(
                float(
                    (after - q.mean(x, p.x0)).abs()
                    / normal((1, 1, 1), seed=2, index=torch.arange(1), draw=k + 1, dtype=D).abs()
                )
            )
        return out

    free, bound, half = (noise_scales(DDPM(n, variance, max_final_noise=y)) for y in (FREE, None, 0.5))
    assert free[:-2] == pytest.approx(bound[:-2], rel=1e-9)
    assert free[-2] > LEVEL
    assert bound[-2] == pytest.approx(2 / 255 * (math.pi / 2) ** 0.5, rel=1e-9)
    assert half[-2] == pytest.approx(bound[-2] / 2, rel=1e-9)
    assert free[-1] == bound[-1] == 0
    assert 2 * LEVEL * (2 / math.pi) ** 0.5 * 255 / 2 == pytest.approx(2)  # y = 2: two levels of 2/255 on average
    assert noise_scales(DDPM(n, variance), stop=0.2) == pytest.approx(
        noise_scales(DDPM(n, variance, max_final_noise=FREE), stop=0.2)
    )
    assert noise_scales(DDPM(n, FixedLarge()))[-2] > LEVEL, "no bound by default"
    assert noise_scales(DDPM(n, FixedLarge(), max_final_noise=1))[-2] == pytest.approx(LEVEL, rel=1e-9)
    with pytest.raises(ValueError, match=r"max_final_noise=0: write null, or a number in \(0, inf\]"):
        DDPM(n, max_final_noise=0)


def test_a_variance_without_its_extra_channels_is_refused() -> None:
    class Net:
        extra = None

        def __call__(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            return x

    den = Denoiser(Net(), Linear(), PredV())
    for sampler in (DDPM(5, Learned()), DDPM(5, SN()), DDIM(5, variance=NPR())):
        with pytest.raises(ValueError, match="needs extra channels, and this network gives none"):
            sampler.check(den)
        with pytest.raises(ValueError, match="needs extra channels, and the network gives 0"):
            sampler(den, X)
    with pytest.raises(ValueError, match="sampler=ddpm"):
        DDIM(5, variance=Learned())


# ------------------------------------------------------------------------------------------------ the optimal grid


def mixture_fit(curve: Schedule, count: int) -> Analytic:
    """Return the fit Γ = 1 − (α²/σ²) E Var[x_0 | x_t] of the mixture, by a sum over 400 values of x_t."""
    fit = torch.arange(1, count + 1, dtype=D) / count
    x = torch.linspace(-6, 6, 400, dtype=D)
    variances = []
    for t in fit:
        alpha, sigma = curve.alpha_sigma(t)
        std = ((alpha * MIXTURE.stds) ** 2 + sigma**2).sqrt()
        gap = (x[:, None] - alpha * MIXTURE.means.flatten()) / std
        density = (MIXTURE.weights / std * (-0.5 * gap**2).exp()).sum(1)
        spread = MIXTURE.spread(x.reshape(-1, 1, 1, 1), alpha, sigma).flatten()
        variances.append(1 - (alpha / sigma) ** 2 * (density * spread).sum() / density.sum())
    return Analytic(fit, torch.stack(variances))


@pytest.mark.parametrize("cls", [DDPM, DDIM])
def test_the_optimal_grid_has_a_smaller_bound_than_others(cls: Any) -> None:
    """On mixture data, at 5 and 10 steps by at least 1 %. For Gaussian data the bound is the same for every grid, because
    q(x_s | x_t) is Gaussian for every pair."""
    curve, nodes = Linear(200), torch.arange(1, 201, dtype=D) / 200
    mixture, gaussian = mixture_fit(curve, 200), fitted(curve, 200)
    table, flat = (costs(v, curve, nodes) for v in (mixture, gaussian))
    den = oracle(MIXTURE, curve, PredV())

    def loss(of: torch.Tensor, grid: torch.Tensor) -> float:
        path = (grid[:-1] * 200).round().long().flip(0) - 1
        return sum(float(of[i, j]) for i, j in itertools.pairwise(path.tolist()))

    for n in (5, 10, 50):
        sampler = cls(n, variance=mixture, grid="optimal")
        grid = sampler.time_grid(den)
        assert len(grid) == n + 1
        assert (grid.diff() < 0).all()
        assert (float(grid[0]), float(grid[-2]), float(grid[-1])) == (1.0, 0.005, 0.0)
        assert grid is sampler.time_grid(den), "computed once"
        for name in ("linspace", "quadratic"):
            other = make_grid(name, curve, n)
            other[-2] = 0.005
            assert loss(table, grid) < (1 if n == 50 else 0.99) * loss(table, other)
            assert loss(flat, grid) == pytest.approx(loss(flat, other), rel=1e-9)
        x, nfe, _ = sampler(den, X, seed=1)
        assert nfe == n
        assert x.isfinite().all()


def test_the_optimal_grid_between_two_times_and_on_a_curve() -> None:
    curve = Linear(40)
    part = optimal_grid(fitted(curve, 40), curve, 4, 0.8, 0.2)
    assert (float(part[0]), float(part[-1]), len(part)) == (0.8, 0.2, 5)
    torch.testing.assert_close((part * 40).round() / 40, part)
    assert optimal_grid(fitted(curve, 40), curve, None, 1.0, 0.0).tolist() == [k / 40 for k in range(40, -1, -1)]
    assert optimal_grid(fitted(curve, 40), curve, 1, 1.0, 0.0).tolist() == [1.0, 0.0]
    free = SCHEDULES["VP"]
    grid = optimal_grid(fitted(free, 50), free, 7, 1.0, 0.0)
    assert len(grid) == 8
    assert float(grid[-2]) == 0.02, "the smallest fitted time"


def test_the_optimal_grid_needs_a_fit_enough_times_and_start_above_stop() -> None:
    curve = Linear(40)
    for cls in (DDPM, DDIM):
        for variance in (FixedSmall(), SN()):
            with pytest.raises(ValueError, match="write variance=analytic"):
                cls(5, variance=variance, grid="optimal")
        with pytest.raises(ValueError, match="write fewer steps"):
            cls(41, variance=fitted(curve), grid="optimal").check(oracle(DATA, curve, PredV()))
        with pytest.raises(ValueError, match=r"karras, optimal$"):
            cls(5, grid="nonesuch")
    with pytest.raises(ValueError, match="from noise to data"):
        optimal_grid(fitted(curve), curve, 5, 0.2, 0.8)


@pytest.mark.parametrize(
    "name", [n for n, cls in SAMPLERS.items() if takes(cls, "grid") and "optimal" not in cls.grid_names]
)
def test_samplers_without_a_variance_refuse_the_optimal_grid(name: str) -> None:
    with pytest.raises(ValueError, match="unknown time grid 'optimal'"):
        SAMPLERS[name](5, grid="optimal")


# ------------------------------------------------------------------------------------------------ improved DDPM


def two(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """A network with 2C channels, v between −1.5 and 1.5."""
    time = c[:, None, None, None] / 1000
    return torch.cat([(x * (1 + time)).tanh(), 1.5 * (3 * x - time).sin()], dim=1)


@pytest.mark.parametrize("steps", [None, 7])
def test_learned_range_matches_improved_ddpm(steps: int | None) -> None:
    """Improved DDPM's sampling computed from β: means of the respaced chain, log σ² between its two bounds."""
    bar = torch.cat([torch.ones(1, dtype=D), (1 - torch.linspace(1e-4 * 25, 0.02 * 25, 40, dtype=D)).cumprod(0)])
    nodes = [round(float(t) * 40) for t in make_grid("linspace", Linear(40), steps)]
    x = X
    for k, (t, s) in enumerate(itertools.pairwise(nodes)):
        out = two(x, torch.full((5,), t - 1, dtype=D))
        x0 = (x - (1 - bar[t]).sqrt() * out[:, :1]) / bar[t].sqrt()
        beta = 1 - bar[t] / bar[s]
        mean = bar[s].sqrt() * beta / (1 - bar[t]) * x0 + (1 - beta).sqrt() * (1 - bar[s]) / (1 - bar[t]) * x
        if s:
            f = (out[:, 1:] + 1) / 2
            log = f * beta.log() + (1 - f) * (beta * (1 - bar[s]) / (1 - bar[t])).log()
            mean = mean + (0.5 * log).exp() * normal((1, 1, 1), seed=8, index=torch.arange(5), draw=k + 1, dtype=D)
        x = mean
    got = DDPM(steps, Learned())(Denoiser(two, Linear(40), PredNoise()), X, seed=8).x
    torch.testing.assert_close(got, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("curve", ["Flow", "Cosine-zero", "Linear-40-zero"])
@pytest.mark.parametrize("name", ["sn", "npr", "analytic"])
@pytest.mark.parametrize("n", [2, 10])
def test_a_step_out_of_alpha_0_has_the_spread_of_the_data(curve: str, name: str, n: int) -> None:
    """x_1 does not determine a head's c = Cov[x_0 | x_1]. DDIM with the optimal variance has the marginals α²v + σ² of Gaussian
    data at any number of steps: 10,000 draws, standard error 0.7 %. The network is called once a step."""
    schedule = SCHEDULES[curve]
    variance, den = best(name, schedule)
    z = normal((1, 1, 1), seed=4, index=torch.arange(10_000), dtype=D)
    alpha, sigma = (float(v) for v in schedule.alpha_sigma(torch.tensor(0.3, dtype=D)))
    x, nfe, _ = DDIM(n, variance=variance)(den, z, seed=4, stop=0.3)
    assert float(x.mean()) == pytest.approx(alpha * MEAN, abs=0.02)
    assert float(x.std()) == pytest.approx((alpha**2 * VAR + sigma**2) ** 0.5, rel=0.028)
    assert nfe == n


@pytest.mark.parametrize("kind", ["sn", "npr"])
def test_the_head_at_alpha_0_with_guidance_and_known_pixels(kind: str) -> None:
    """One call on twice the batch returns the prediction at t = 1 and the head's channels at λ = −ln 32, bit for bit."""
    schedule, calls = SCHEDULES["Flow"], []

    def network(x: torch.Tensor, c: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        y = (x + label[:, None, None, None]).tanh() * (1 + c[:, None, None, None] / 999)
        return torch.cat([y, y**2], 1)

    plain = Denoiser(network, schedule, PredV(), clip=0.5)
    known = torch.rand(3, 1, 2, 2, dtype=D) - 0.5
    den = InpaintingTransform(ClassifierFree(plain, 3.0, num_classes=2), known, torch.tensor([0.0, 1.0]))
    x, label = torch.randn(3, 1, 2, 2, dtype=D), torch.tensor([0, 1, 1])
    one = torch.ones((), dtype=D)
    at = {"sn": SN(), "npr": NPR()}[kind].extra_time(schedule, one)
    assert at is not None
    assert float(schedule.lam(at)) == pytest.approx(-math.log(32), rel=1e-12)
    calls.clear()
    got = den.with_extra_at(x, one, at, label=label)
    assert calls == [12]  # twice for the head, twice for guidance
    first, second = den(x, one, label=label), den(x, at, label=label)
    for name in ("x0", "noise", "output"):
        torch.testing.assert_close(getattr(got, name), getattr(first, name), rtol=1e-12, atol=1e-12)
    for name in ("extra", "unclipped"):
        torch.testing.assert_close(getattr(got, name), getattr(second, name), rtol=1e-12, atol=1e-12)
    assert NPR().extra_time(schedule, one * 0.999) is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "n"), [("learned_range", 10), ("learned_range", 250), ("fixed_small_log", 10)])
def test_learned_range_against_diffusers(kind: str, n: int) -> None:
    """Every step of our chain by diffusers, with a float64 table and our noise, to 1e-9."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(variance_type=kind, clip_sample=True, timestep_spacing="leading")
    theirs.alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=D)).cumprod(0)
    theirs.set_timesteps(n)
    seen: list[tuple[float, torch.Tensor, Prediction]] = []
    den = Denoiser(two, Linear(), PredNoise(), clip=1.0)
    variance = Learned() if kind == "learned_range" else FixedSmall()
    end = DDPM(n, variance, grid="leading")(den, X, seed=1, callback=lambda i, t, x, p: seen.append((t, x, p))).x
    for k, (t, x, p) in enumerate(seen):
        i = round(t * 1000) - 1
        output = two(x, torch.full((5,), float(i), dtype=D)) if kind == "learned_range" else p.output
        step = theirs.step(output, i, x, generator=torch.Generator().manual_seed(k)).prev_sample
        if i:
            z = torch.randn(x.shape, generator=torch.Generator().manual_seed(k), dtype=D)
            std = theirs._get_variance(i, predicted_variance=p.extra)
            std = (0.5 * std).exp() if kind == "learned_range" else std
            step = step + std * (normal((1, 1, 1), seed=1, index=torch.arange(5), draw=k + 1, dtype=D) - z)
        torch.testing.assert_close(seen[k + 1][1] if k + 1 < len(seen) else end, step, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_wrong_variances_of_diffusers() -> None:
    """`fixed_large_log` takes the square root of a logarithm, NaN. `learned` takes the square root of the network's output, but
    the published network (Nichol & Dhariwal's learn_sigma without a range) outputs the logarithm, here −4."""
    diffusers = pytest.importorskip("diffusers")
    x = torch.zeros(1, 1, 2, 2)
    theirs = diffusers.DDPMScheduler(variance_type="fixed_large_log")
    assert theirs.step(x, 500, x, generator=torch.Generator().manual_seed(0)).prev_sample.isnan().any()
    theirs = diffusers.DDPMScheduler(variance_type="learned")
    step = theirs.step(torch.cat([x, x - 4], 1), 500, x, generator=torch.Generator().manual_seed(0))
    assert step.prev_sample.isnan().any()


@pytest.mark.parametrize("variance", [FixedLarge(), Learned()], ids=["large", "learned"])
def test_ddim_with_eta_1_takes_the_variances_of_ddpm(variance: Variance) -> None:
    """Equal samples on one grid; below η = 1 a refusal that names it."""
    den = Denoiser(two, Linear(40), PredNoise(), clip=1.0)
    got, want = (s(den, X, seed=5).x for s in (DDIM(10, 1.0, variance), DDPM(10, variance, "trailing")))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"sampler\.eta=1"):
        DDIM(10, 0.5, variance)


def test_ddim_with_eta_1_takes_the_published_guidance() -> None:
    plain = oracle(DATA, Cosine(), PredV())
    den = ClassifierGuidance(plain, lambda x, t: torch.cat([x.flatten(1), -x.flatten(1)], 1), 2, 1.5, form="published")
    label = torch.tensor([0, 1, 1, 0, 1])
    got, want = (s(den, X, seed=5, condition={"label": label}).x for s in (DDIM(10, 1.0), DDPM(10, grid="trailing")))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert (got - DDIM(10, 1.0)(plain, X, seed=5).x).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"guidance\.form=exact"):
        DDIM(10, 0.5)(den, X, condition={"label": label})
