"""Thresholds for x̂_0, and guidance on data with known class-conditional scores."""

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from contracts import OBJECTIVES, PAIRS, SCHEDULES
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Mixture, Network, WithHead, oracle
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from diffusion_lab.clipping import DynamicThreshold, StaticThreshold
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.gaussian import posterior
from diffusion_lab.guidance import ClassifierFree, ClassifierGuidance, NoisyClassifier
from diffusion_lab.noise import normal
from diffusion_lab.objectives import Objective, PredV
from diffusion_lab.samplers import DDIM, DDPM, ODE, DPMSolverPP, Heun, ReverseDiffusion, Sampler, UniPC, prior
from diffusion_lab.schedules import VP, Cosine, Schedule, append_dims_like
from diffusion_lab.variances import NPR, SN, FixedLarge, FixedSmall


def test_static() -> None:
    x = torch.tensor([-3.0, -0.5, 0.5, 3.0]).reshape(1, 1, 2, 2)
    assert StaticThreshold()(x).flatten().tolist() == [-1, -0.5, 0.5, 1]
    assert StaticThreshold(2)(x).flatten().tolist() == [-2, -0.5, 0.5, 2]


@settings(deadline=None, max_examples=30)
@given(scale=st.floats(0.1, 10), quantile=st.floats(0.1, 1.0), seed=st.integers(0, 99))
def test_dynamic_thresholding_against_numpy(scale: float, quantile: float, seed: int) -> None:
    """s is the quantile of |x| of each image, at least 1; clamp to ±s and divide by s."""
    x = scale * torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    got = DynamicThreshold(quantile)(x)
    assert got.dtype == x.dtype
    for k in range(3):
        s = max(np.quantile(np.abs(x[k].numpy()), quantile), 1)
        np.testing.assert_allclose(got[k].numpy(), np.clip(x[k].numpy(), -s, s) / s, rtol=1e-12)
    assert got.abs().max() <= 1


def test_dynamic_does_not_change_images_in_range() -> None:
    x = torch.rand(2, 1, 4, 4) * 2 - 1
    assert torch.equal(DynamicThreshold()(x), x)


def test_dynamic_thresholds_each_image_independently() -> None:
    x = torch.randn(4, 1, 5, 5) * torch.tensor([0.1, 1, 5, 50])[:, None, None, None]
    batch = DynamicThreshold()(x)
    for k in range(4):
        assert torch.equal(DynamicThreshold()(x[k : k + 1])[0], batch[k])


def test_maximum_bounds_the_quantile() -> None:
    x = torch.full((1, 1, 2, 2), 8.0)
    x[0, 0, 0, 0] = 1.0
    assert DynamicThreshold(0.5, maximum=2.0)(x).flatten().tolist() == [0.5, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    """The quantile of half-precision images is computed in float32; the result has the dtype of x."""
    assert DynamicThreshold()(torch.randn(2, 1, 4, 4).to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: StaticThreshold(0), r"limit=0: write a number in \(0, 1000\]"),
        (lambda: DynamicThreshold(0), "0.995"),
        (lambda: DynamicThreshold(1.1), "0.995"),
        (lambda: DynamicThreshold(maximum=0.5), r"maximum=0.5: write null, or a number in \[1, 1000\]"),
    ],
)
def test_threshold_errors(make: object, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        make()  # type: ignore[operator]


# guidance: the classes are the components of a mixture, so that every conditional score is known --------------------------------

D = torch.float64
MEANS = torch.tensor([[-0.8, 0.3], [0.1, -0.5], [0.6, 0.7]]).reshape(3, 1, 1, 2)
STDS = torch.tensor([0.15, 0.3, 0.2])
WEIGHTS = torch.tensor([0.5, 0.2, 0.3])
DATA = Mixture(MEANS, STDS, WEIGHTS)
CLASSES = [Mixture(MEANS[k : k + 1], STDS[k : k + 1]) for k in range(3)]


class Labeled:
    """The optimal labeled network: labels 0 … 2 are the components, 3 (null) the mixture. Counts the images it evaluates."""

    num_classes, evaluated = 3, 0

    def __init__(self, schedule: Schedule, objective: Objective, head: str | None = None) -> None:
        make = (
            (lambda d: WithHead(d, schedule, objective, head)) if head else (lambda d: Network(d, schedule, objective))
        )
        self.networks = [make(data) for data in (*CLASSES, DATA)]
        self.extra = head

    def __call__(self, x: Tensor, c: Tensor, label: Tensor) -> Tensor:
        self.evaluated += len(x)
        each = torch.stack([network(x, c) for network in self.networks])
        return each[label, torch.arange(len(x))]


def posterior_log(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return log p(k, x_t) of each component up to a constant, (B, 3), independently of the oracle."""
    spread = (alpha.reshape(-1, 1) * STDS.double()) ** 2 + sigma.reshape(-1, 1) ** 2
    gap = x[:, None] - alpha.reshape(-1, 1, 1, 1, 1) * MEANS.double()
    return WEIGHTS.double().log() - gap.square().sum((2, 3, 4)) / (2 * spread) - spread.log()


def exact_classifier(schedule: Schedule) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: posterior_log(x, *schedule.alpha_sigma(t.double()))


def labeled_denoiser(schedule: Schedule, objective: Objective, head: str | None = None) -> Denoiser:
    return Denoiser(Labeled(schedule, objective, head), schedule, objective)


def states(schedule: Schedule, t: Tensor, n: int = 6) -> Tensor:
    alpha, sigma = schedule.alpha_sigma(t)
    return normal((1, 1, 2), seed=3, index=torch.arange(n), dtype=D) * (alpha + sigma).reshape(-1, 1, 1, 1)


LABEL = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(("schedule", "objective"), PAIRS)
def test_both_guidances_agree_for_an_exact_classifier(schedule: str, objective: str) -> None:
    """∇ log p(y|x_t) = −(ε_c − ε_u)/σ, so both give the same prediction at any scale, with one time or one for each image."""
    s, o = SCHEDULES[schedule], OBJECTIVES[objective]
    for t in (torch.tensor(0.3, dtype=D), torch.linspace(0.2, 0.9, 6, dtype=D)):
        x = states(s, t)
        for scale in (0.0, 2.5):
            free = ClassifierFree(labeled_denoiser(s, o), scale)(x, t, label=LABEL)
            classifier = ClassifierGuidance(oracle(DATA, s, o), exact_classifier(s), 3, scale)(x, t, label=LABEL)
            for got, want in zip(classifier[:3], free[:3], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
            alpha, sigma = (append_dims_like(v, x) for v in s.alpha_sigma(t))
            torch.testing.assert_close(alpha * free.x0 + sigma * free.noise, x, rtol=1e-9, atol=1e-9)


def test_scale_1_is_the_conditional_network_bit_for_bit_and_costs_nothing() -> None:
    den, t = labeled_denoiser(Cosine(), PredV()), torch.tensor(0.4, dtype=D)
    x = states(Cosine(), t)
    plain, evaluated = den(x, t, label=LABEL), den.network.evaluated  # type: ignore[attr-defined]
    guided = ClassifierFree(den, 1.0)(x, t, label=LABEL)
    assert den.network.evaluated == 2 * evaluated == 12  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(guided[:3], plain[:3], strict=True))
    ClassifierFree(den, 2.0)(x, t, label=LABEL)
    assert den.network.evaluated == 24  # type: ignore[attr-defined]  # one call on twice the batch


def guided_score(x: np.ndarray, t: float, s: Schedule, scale: float, k: int) -> np.ndarray:
    """Return ∇ log [p_u^(1−s) p_c^s], in NumPy, from the densities."""
    alpha, sigma = (float(v) for v in s.alpha_sigma(torch.tensor(t, dtype=D)))
    spread = (alpha * STDS.double().numpy()) ** 2 + sigma**2
    gap = x - alpha * MEANS.double().numpy().reshape(3, 2)
    log = np.log(WEIGHTS.double().numpy()) - (gap**2).sum(1) / (2 * spread) - np.log(spread)
    share = np.exp(log - log.max())
    each = -gap / spread[:, None]
    unconditional = (share[:, None] * each).sum(0) / share.sum()
    return (1 - scale) * unconditional + scale * each[k]


@pytest.mark.integration
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("kind", ["free", "classifier"])
def test_the_guided_ode_against_scipy(kind: str, scale: float) -> None:
    """SciPy's DOP853 on an independent form of the probability-flow ODE with the guided score."""
    s, o = VP(), PredV()  # a schedule with smooth coefficients
    x_T = normal((1, 1, 2), seed=0, index=torch.arange(3), dtype=D)
    label, stop = torch.tensor([0, 1, 2]), 0.02
    den = (
        ClassifierFree(labeled_denoiser(s, o), scale)
        if kind == "free"
        else ClassifierGuidance(oracle(DATA, s, o), exact_classifier(s), 3, scale)
    )
    got = ODE(rtol=1e-7, atol=1e-8)(den, x_T, condition={"label": label}, start=0.98, stop=stop).x
    for k in (0, 2):

        def slope(t: float, x: np.ndarray, k: int = k) -> np.ndarray:
            f, g2 = (float(v) for v in s.drift_diffusion(torch.tensor(t, dtype=D)))
            return f * x - 0.5 * g2 * guided_score(x, t, s, scale, k)

        want = solve_ivp(slope, (0.98, stop), x_T[k].flatten().numpy(), method="DOP853", rtol=1e-8, atol=1e-9).y[:, -1]
        np.testing.assert_allclose(got[k].flatten().numpy(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: DDIM(50), lambda: DDPM(60), lambda: Heun(20), lambda: UniPC(20)])
@pytest.mark.parametrize("kind", ["free", "classifier"])
def test_samples_at_scale_1_have_the_class_distribution(make: Callable[[], Sampler], kind: str) -> None:
    """Mean and standard deviation of p(x|y), to 4 standard errors (n = 1,500 a class) plus the solver's bias of 0.02."""
    s, o, n = Cosine(), PredV(), 4500
    index = torch.arange(n)
    label = index % 3
    den = (
        ClassifierFree(labeled_denoiser(s, o), 1.0)
        if kind == "free"
        else ClassifierGuidance(oracle(DATA, s, o), exact_classifier(s), 3, 1.0)
    )
    x = make()(den, prior(s, normal((1, 1, 2), seed=1, index=index, dtype=D)), seed=1, condition={"label": label}).x
    for k in range(3):
        samples, std = x[label == k].reshape(-1, 2), float(STDS[k])
        margin = 4 * std / 1500**0.5 + 0.02
        torch.testing.assert_close(samples.mean(0), MEANS[k].double().flatten(), rtol=0, atol=margin)
        torch.testing.assert_close(samples.std(0), torch.full((2,), std, dtype=D), rtol=0, atol=margin)


def test_the_published_form_shifts_the_mean_by_the_variance_times_the_gradient() -> None:
    """Dhariwal & Nichol 2021, algorithm 1, with any variance; for many steps it converges to the exact form."""
    s, o, t, u = Cosine(), PredV(), torch.tensor(0.6, dtype=D), torch.tensor(0.4, dtype=D)
    x, plain = states(s, t), oracle(DATA, s, o)
    den = ClassifierGuidance(plain, exact_classifier(s), 3, 1.5, form="published")
    options = {"condition": {"label": LABEL}, "start": 0.6, "stop": 0.4, "seed": 4}
    for variance in (FixedSmall(), FixedLarge()):
        got = DDPM(1, variance)(den, x, **options).x - DDPM(1, variance)(plain, x, seed=4, start=0.6, stop=0.4).x
        y = x.clone().requires_grad_()
        log_p = exact_classifier(s)(y, t).log_softmax(1)[torch.arange(6), LABEL].sum()
        (gradient,) = torch.autograd.grad(log_p, y)
        spread = variance(s, t, u, plain(x, t), posterior(s, t, u).variance)
        torch.testing.assert_close(got, 1.5 * spread * gradient, rtol=1e-9, atol=1e-9)
    exact = ClassifierGuidance(plain, exact_classifier(s), 3, 1.5)
    gaps = []
    for steps in (30, 100, 300):
        a, b = (
            DDPM(steps)(d, states(s, torch.ones((), dtype=D)), seed=4, condition={"label": LABEL}).x
            for d in (den, exact)
        )
        gaps.append(float((a - b).abs().mean()))
    assert gaps[1] < 0.5 * gaps[0]
    assert gaps[2] < 0.5 * gaps[1]
    for sampler in (DDIM(5), Heun(5), DPMSolverPP(5), ReverseDiffusion(5)):
        with pytest.raises(ValueError, match=r"guidance\.form=exact"):
            sampler(den, x, condition={"label": LABEL})


def test_rescale_against_numpy() -> None:
    """Lin et al. 2024, eq. 15 and 16."""
    s, o, t = Cosine(), PredV(), torch.tensor(0.5, dtype=D)
    x, den = states(s, t), labeled_denoiser(s, o)
    c = den(x, t, label=LABEL).output.numpy()
    u = den(x, t, label=torch.full_like(LABEL, 3)).output.numpy()
    for phi in (0.0, 0.7, 1.0):
        cfg = u + 4 * (c - u)
        factor = c.reshape(6, -1).std(1) / cfg.reshape(6, -1).std(1)
        want = phi * cfg * factor[:, None, None, None] + (1 - phi) * cfg
        got = ClassifierFree(den, 4.0, rescale=phi)(x, t, label=LABEL).output
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_rescale_leaves_a_constant_output_as_it_is(dtype: torch.dtype, value: float) -> None:
    """The standard deviations of eq. 15 are 0, or rounding errors, for an image of one pixel or of equal pixels: the factor is 1.
    A guided output without spread stays as it is, also if the conditional output has a spread."""
    ramp = torch.linspace(-1, 1, 16, dtype=dtype).reshape(1, 1, 4, 4)

    def network(slope: torch.Tensor, x: torch.Tensor, c: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        shade = label.to(x).reshape(-1, 1, 1, 1)
        return x + shade / 7 + (3 + shade / 3) * slope  # label 3 is the null label

    for side, slope in (
        (1, ramp[..., :1, :1] * 0),
        (4, ramp * 0),
        (4, ramp),
    ):  # last: u has slope 4, c slope 3, u + 4 (c − u) slope 0
        x = torch.full((1, 1, side, side), value, dtype=dtype)
        plain = Denoiser(functools.partial(network, slope), Cosine(), PredV())
        free, scaled = (ClassifierFree(plain, 4.0, rescale=phi, num_classes=3) for phi in (0.0, 0.7))
        want, got = (
            den(x, torch.tensor(0.5, dtype=D), label=torch.zeros(1, dtype=torch.int64)).output for den in (free, scaled)
        )
        assert float(want.std(correction=0)) < 1e-6
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_the_interval() -> None:
    """Outside (low, high] the output and the cost are those of the conditional network, for each image by its own time."""
    s, o = Cosine(), PredV()
    den = labeled_denoiser(s, o)
    for guided, whole, evaluations in (
        (ClassifierFree(den, 3.0, interval=(0.3, 0.6)), ClassifierFree(den, 3.0), 2),
        (
            ClassifierGuidance(den, exact_classifier(s), 3, 3.0, interval=(0.3, 0.6)),
            ClassifierGuidance(den, exact_classifier(s), 3, 3.0),
            1,
        ),
    ):
        times = torch.tensor([0.2, 0.3, 0.31, 0.6, 0.61, 1.0], dtype=D)
        x = states(s, times)
        batch = guided(x, times, label=LABEL).output
        for i, inside in enumerate([False, False, True, True, False, False]):
            row = slice(i, i + 1)
            want = (whole if inside else den)(x[row], times[i], label=LABEL[row]).output
            torch.testing.assert_close(batch[row], want, rtol=1e-9, atol=1e-9)
            before = den.network.evaluated  # type: ignore[attr-defined]
            torch.testing.assert_close(guided(x[row], times[i], label=LABEL[row]).output, want, rtol=1e-9, atol=1e-9)
            cost = den.network.evaluated - before  # type: ignore[attr-defined]
            assert cost == (evaluations if inside else 1)


@pytest.mark.parametrize("head", ["sn", "npr"])
def test_the_variance_is_that_of_the_conditional_network(head: str) -> None:
    """Guidance and clipping do not change the variance, which the second head predicts around the ε̂ of the network."""
    s, o = Cosine(), PredV()
    den, t, u = labeled_denoiser(s, o, head), torch.tensor(0.6, dtype=D), torch.tensor(0.5, dtype=D)
    x, variance = states(s, t), {"sn": SN(), "npr": NPR()}[head]
    want = variance(s, t, u, den(x, t, label=LABEL))
    for scale, clip in ((1.0, None), (3.0, None), (3.0, 0.5)):
        guided = ClassifierFree(Denoiser(den.network, s, o, clip=clip), scale)
        torch.testing.assert_close(variance(s, t, u, guided(x, t, label=LABEL)), want, rtol=1e-9, atol=1e-12)
    classifier = ClassifierGuidance(den, exact_classifier(s), 3, 2.0, labeled=True)
    torch.testing.assert_close(variance(s, t, u, classifier(x, t, label=LABEL)), want, rtol=1e-9, atol=1e-12)


def test_clipping_is_applied_once_after_guidance() -> None:
    s, o, t = Cosine(), PredV(), torch.tensor(0.9, dtype=D)
    x, den = states(s, t), labeled_denoiser(s, o)
    bare = ClassifierFree(den, 6.0)(x, t, label=LABEL)
    assert bare.x0.abs().max() > 1
    clipped = ClassifierFree(Denoiser(den.network, s, o, clip=1.0), 6.0)(x, t, label=LABEL)
    assert torch.equal(clipped.x0, bare.x0.clamp(-1, 1))
    assert torch.equal(clipped.output, bare.output)


def test_attributes_and_the_null_label() -> None:
    """Neither attributes of 0 nor the null label are guided."""

    class Sum:
        num_classes = 2

        def __call__(self, x: Tensor, c: Tensor, label: Tensor) -> Tensor:
            return x + label.sum(1).reshape(-1, 1, 1, 1)

    x = torch.randn(2, 1, 2, 2, dtype=D)
    label = torch.tensor([[1.0, 0.0], [1.0, -1.0]], dtype=D)
    got = ClassifierFree(Denoiser(Sum(), Cosine(), PredV()), 3.0)(x, 0.5, label=label).output
    torch.testing.assert_close(got, x + torch.tensor([3.0, 0.0], dtype=D).reshape(2, 1, 1, 1))
    s = Cosine()
    den, t = oracle(DATA, s, PredV()), torch.tensor(0.5, dtype=D)
    y = states(s, t, 2)
    got = ClassifierGuidance(den, exact_classifier(s), 3, 2.0)(y, t, label=torch.tensor([3, 1])).output
    assert torch.equal(got[0], den(y, t).output[0])
    assert not torch.allclose(got[1], den(y, t).output[1])


def test_both_halves_get_the_previous_estimate() -> None:
    """With self-conditioning the conditional and unconditional halves both read the guided x̂_0 of the previous step."""

    class SelfConditioned:
        num_classes, self_conditioning = 2, True

        def __call__(self, x: Tensor, c: Tensor, label: Tensor, previous: Tensor | None) -> Tensor:
            return x * append_dims_like(label, x) + (
                0 if previous is None else previous * append_dims_like(label + 1, x)
            )

    x, previous, label = torch.randn(3, 1, 2, 2, dtype=D), torch.randn(3, 1, 2, 2, dtype=D), torch.tensor([0, 1, 0])
    den = Denoiser(SelfConditioned(), Cosine(), PredV())
    for p in (None, previous):
        c, u = (den(x, 0.5, p, label=k).output for k in (label, torch.full_like(label, 2)))
        got = ClassifierFree(den, 3.0)(x, 0.5, p, label=label).output
        torch.testing.assert_close(got, u + 3 * (c - u), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trained_along", ["Cosine", "Linear", "VP", "EDM", "VE"])
@pytest.mark.parametrize("schedule", ["Cosine", "Linear", "VP", "Flow", "EDM", "VE", "SubVP"])
def test_a_classifier_works_on_another_curve(trained_along: str, schedule: str) -> None:
    """A classifier that is exact on one schedule agrees, wrapped by NoisyClassifier, with the exact one of another schedule."""
    mine, other = SCHEDULES[trained_along], SCHEDULES[schedule]

    class Classifier(nn.Module):
        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            assert x.dtype == c.dtype == torch.float32
            return posterior_log(x.double(), *mine.alpha_sigma(time(c)))

    def time(c: Tensor) -> Tensor:
        grid = torch.linspace(0, 1, 200_001, dtype=D)[1:]
        return torch.from_numpy(np.interp(c.double(), mine.conditioning(grid), grid))

    for t in (torch.tensor(0.4, dtype=D), torch.linspace(0.3, 0.7, 6, dtype=D)):
        lam = other.lam(t)
        if not bool(
            ((lam < mine.lam(torch.tensor(mine.t_min, dtype=D))) & (lam > mine.lam(torch.ones((), dtype=D)))).all()
        ):
            continue
        x = states(other, t)
        got = NoisyClassifier(Classifier(), mine, other)(x, t).log_softmax(1)
        torch.testing.assert_close(got, exact_classifier(other)(x, t).log_softmax(1), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda den: ClassifierFree(den, -1.0), r"guidance\.scale"),
        (lambda den: ClassifierFree(den, rescale=1.5), "0.7"),
        (lambda den: ClassifierFree(den, interval=(0.6, 0.3)), "low < high"),
        (lambda den: ClassifierFree(oracle(DATA, Cosine(), PredV())), "condition=label"),
        (lambda den: ClassifierGuidance(den, exact_classifier(Cosine()), 3, form="other"), "exact or published"),
        (lambda den: ClassifierFree(den)(torch.zeros(1, 1, 1, 2, dtype=D), 0.5), "label"),
        (
            lambda den: ClassifierGuidance(den, exact_classifier(Cosine()), 3)(torch.zeros(1, 1, 1, 2, dtype=D), 0.5),
            "label",
        ),
    ],
)
def test_guidance_errors(make: Callable[[Denoiser], object], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        make(labeled_denoiser(Cosine(), PredV()))
