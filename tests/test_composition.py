"""Transforms of a denoiser compose: every order of guidance and inpainting against formulas in ε, with a Gaussian for each
class, whose x̂_0 has a closed form, and a linear classifier, whose gradient has one."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from contracts import OBJECTIVES, PAIRS, SCHEDULES
from oracle import Gaussian, Mixture, oracle
from torch import Tensor

from diffusion_lab import likelihood
from diffusion_lab.clipping import DynamicThreshold, NoThreshold, StaticThreshold
from diffusion_lab.denoiser import Denoiser, Evaluate, Output
from diffusion_lab.editing import InpaintingTransform, MaskedVariance, inpaint
from diffusion_lab.errors import ConfigError
from diffusion_lab.guidance import ClassifierFree, ClassifierGuidance, Unguided
from diffusion_lab.likelihood.base import ready
from diffusion_lab.noise import normal
from diffusion_lab.objectives import Objective, PredNoise, PredV
from diffusion_lab.samplers import DDIM, DDPM, Heun, prior
from diffusion_lab.schedules import VP, Cosine, Schedule, append_dims_like
from diffusion_lab.variances import SN, FixedLarge

D = torch.float64
MEANS = torch.tensor([[-0.8, 0.3, 0.5], [0.1, -0.5, -0.4], [0.6, 0.7, -0.9]], dtype=D).reshape(3, 1, 1, 3)
STDS = torch.tensor([0.15, 0.3, 0.2], dtype=D)
CLASSES = [
    *(Gaussian(MEANS[k], float(STDS[k])) for k in range(3)),
    Mixture(MEANS, STDS),
]  # the null label is the mixture
LABEL = torch.tensor([0, 1, 2, 0, 1, 2])
SLOPES = torch.tensor([[0.4, -1.0, 0.3], [1.1, 0.2, -0.7], [-0.5, 0.6, 0.9]], dtype=D)
KNOWN = torch.tensor([0.25, 0.0, -1.0], dtype=D).reshape(1, 1, 1, 3)
MASK = torch.tensor([0.0, 1.0, 0.0], dtype=D).reshape(1, 1, 1, 3)
S, W, V = 2.5, 1.5, 0.7  # the scales of classifier-free, exact and published guidance


def estimate(x: Tensor, label: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return E[x_0 | x_t, label], (B, C, H, W)."""
    every = torch.stack([data.denoise(x, alpha, sigma) for data in CLASSES])
    return every[label, torch.arange(len(x))]


class Network:
    """The optimal network of the labeled data."""

    num_classes = 3

    def __init__(self, schedule: Schedule, objective: Objective) -> None:
        self.schedule, self.objective = schedule, objective
        self.each = [oracle(data, schedule, objective).network for data in CLASSES]

    def __call__(self, x: Tensor, c: Tensor, label: Tensor) -> Tensor:
        return torch.stack([network(x, c) for network in self.each])[label, torch.arange(len(x))]


def classifier(x: Tensor, t: Tensor) -> Tensor:
    return x.flatten(1) @ SLOPES.T


def gradient(x: Tensor, label: Tensor) -> Tensor:
    """Return ∇ log p(label | x) of the linear classifier: w_label − Σ_k p_k w_k."""
    share = (x.flatten(1) @ SLOPES.T).softmax(1)
    return (SLOPES[label] - share @ SLOPES).reshape(x.shape)


TRANSFORMS = {
    "cfg": lambda den: ClassifierFree(den, S),
    "exact": lambda den: ClassifierGuidance(den, classifier, 3, W),
    "published": lambda den: ClassifierGuidance(den, classifier, 3, V, form="published"),
    "known": lambda den: InpaintingTransform(den, KNOWN, MASK),
}


def composed(names: Sequence[str], den: Denoiser) -> Denoiser:
    for name in names:
        den = TRANSFORMS[name](den)
    return den


def states(schedule: Schedule, t: Tensor) -> Tensor:
    alpha, sigma = schedule.alpha_sigma(t)
    return normal((1, 1, 3), seed=3, index=torch.arange(6), dtype=D) * (alpha + sigma).reshape(-1, 1, 1, 1)


def formula(names: Sequence[str], x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x̂_0, ε̂, gradient) in closed form, by applying each transform to the conditional ε̂."""
    a, s = (append_dims_like(v, x) for v in (alpha, sigma))
    conditional = (x - a * estimate(x, LABEL, alpha, sigma)) / s
    unconditional = (x - a * estimate(x, torch.full_like(LABEL, 3), alpha, sigma)) / s
    push = torch.zeros_like(x)
    for name in names:
        if name == "cfg":
            conditional, push = (1 - S) * unconditional + S * conditional, S * push
        elif name == "exact":
            conditional = conditional - W * s * gradient(x, LABEL)
        elif name == "published":
            push = push + V * gradient(x, LABEL)
    x0 = (x - s * conditional) / a
    if "known" in names:
        x0, push = torch.where(MASK > 0, x0, KNOWN), torch.where(MASK > 0, push, 0.0)
    return x0, (x - a * x0) / s, push


def check(names: Sequence[str], schedule: Schedule, objective: Objective) -> None:
    for t in (torch.tensor(0.3, dtype=D), torch.linspace(0.2, 0.8, 6, dtype=D)):
        x = states(schedule, t)
        got = composed(names, Denoiser(Network(schedule, objective), schedule, objective))(x, t, label=LABEL)
        x0, noise, push = formula(names, x, *schedule.alpha_sigma(t))
        torch.testing.assert_close(got.x0, x0, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got.noise, noise, rtol=1e-6, atol=1e-6)
        if "published" in names:
            assert got.gradient is not None
            torch.testing.assert_close(got.gradient, push, rtol=1e-9, atol=1e-9)
        else:
            assert got.gradient is None
        if "known" in names:
            assert torch.equal(got.x0[..., [0, 2]], KNOWN[..., [0, 2]].expand(6, -1, -1, -1))


@pytest.mark.parametrize("names", itertools.product(TRANSFORMS, repeat=2), ids="-".join)
def test_two_transforms_in_every_order(names: tuple[str, str]) -> None:
    """Also each transform twice: the shifts and gradients of two classifiers add, classifier-free guidance extrapolates twice."""
    for schedule, objective in (("Cosine", "PredV"), ("VP", "PredNoise"), ("EDM", "PredX0"), ("Flow", "PredFlow")):
        check(names, SCHEDULES[schedule], OBJECTIVES[objective])


@pytest.mark.parametrize("names", itertools.permutations(TRANSFORMS), ids="-".join)
def test_all_four_in_every_order(names: tuple[str, ...]) -> None:
    check(names, Cosine(), PredV())


@pytest.mark.parametrize(("schedule", "objective"), PAIRS)
def test_the_order_of_classifier_and_classifier_free_guidance(schedule: str, objective: str) -> None:
    """The classifier first: (1 − s) ε_u + s (ε_c − w σ ∇). Classifier-free guidance first: (1 − s) ε_u + s ε_c − w σ ∇."""
    s, t = SCHEDULES[schedule], torch.tensor(0.4, dtype=D)
    x, den = states(s, t), Denoiser(Network(s, OBJECTIVES[objective]), s, OBJECTIVES[objective])
    alpha, sigma = s.alpha_sigma(t)
    c, u = ((x - alpha * estimate(x, label, alpha, sigma)) / sigma for label in (LABEL, torch.full_like(LABEL, 3)))
    shift = W * sigma * gradient(x, LABEL)
    classifier_first = composed(("exact", "cfg"), den)(x, t, label=LABEL).noise
    cfg_first = composed(("cfg", "exact"), den)(x, t, label=LABEL).noise
    torch.testing.assert_close(classifier_first, (1 - S) * u + S * (c - shift), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cfg_first, (1 - S) * u + S * c - shift, rtol=1e-6, atol=1e-6)


def test_guidance_of_a_network_without_labels_composes() -> None:
    """Two classifiers, alone and in classifier-free guidance: each classifier gets the label, the network does not."""
    s, o, t = VP(), PredV(), torch.tensor(0.4, dtype=D)
    x, den = states(s, t), oracle(CLASSES[3], s, o)

    def strict(x: Tensor, c: Tensor) -> Tensor:
        return den.network(x, c)

    bare = Denoiser(strict, s, o)
    sigma = s.alpha_sigma(t)[1]
    plain, shift = bare(x, t).noise, sigma * gradient(x, LABEL)
    twice = ClassifierGuidance(ClassifierGuidance(bare, classifier, 3, W), classifier, scale=V)
    torch.testing.assert_close(twice(x, t, label=LABEL).noise, plain - (W + V) * shift, rtol=1e-9, atol=1e-9)
    free = ClassifierFree(twice, S, num_classes=3)
    torch.testing.assert_close(free(x, t, label=LABEL).noise, plain - S * (W + V) * shift, rtol=1e-9, atol=1e-9)


def test_the_variance_of_a_second_head_is_that_of_the_conditional_network() -> None:
    """`unclipped` is ε̂ of the conditional, unguided y in every order, with and without clipping."""
    s, t, u = Cosine(), torch.tensor(0.6, dtype=D), torch.tensor(0.5, dtype=D)
    x, network = states(s, t), Network(s, PredV())

    class Headed:
        num_classes, extra = 3, "sn"

        def __call__(self, x: Tensor, c: Tensor, label: Tensor) -> Tensor:
            return torch.cat([network(x, c, label), 1 + 0.1 * x + 0.2 * append_dims_like(label.double(), x)], 1)

    den = Denoiser(Headed(), s, PredV())
    alpha, sigma = s.alpha_sigma(t)
    conditional = (x - alpha * estimate(x, LABEL, alpha, sigma)) / sigma
    want = SN()(s, t, u, den(x, t, label=LABEL))
    for names in itertools.permutations(TRANSFORMS):
        for clip in (None, 0.4):
            got = composed(names, dataclasses.replace(den, clip=clip))(x, t, label=LABEL)
            assert got.unclipped is not None
            torch.testing.assert_close(got.unclipped, conditional, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(SN()(s, t, u, got), want, rtol=1e-9, atol=1e-12)


# known pixels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", list(itertools.permutations(TRANSFORMS)), ids="-".join)
def test_known_pixels_are_exact_in_every_order(names: tuple[str, ...]) -> None:
    """DDPM returns them bit for bit, also after dataclasses.replace, and equals `inpaint` of the guided denoiser."""
    s = Cosine()
    den = composed(names, Denoiser(Network(s, PredV()), s, PredV()))
    start = prior(s, normal((1, 1, 3), seed=0, index=torch.arange(6), dtype=D))
    for denoiser in (den, dataclasses.replace(den, clip=0.5)):
        x = DDPM(6, FixedLarge())(denoiser, start, condition={"label": LABEL}).x
        assert torch.equal(x[..., [0, 2]], KNOWN[..., [0, 2]].expand(6, -1, -1, -1))
        assert (x[..., 1] - KNOWN[..., 1]).abs().min() > 0
    guided = composed([name for name in names if name != "known"], Denoiser(Network(s, PredV()), s, PredV()))
    got = inpaint(DDPM(6), guided, start, KNOWN, MASK, index=torch.arange(6), condition={"label": LABEL}, resample=1)
    whole = DDPM(6)(den, start, condition={"label": LABEL})
    assert torch.equal(got.x, whole.x)
    assert got.nfe == whole.nfe == 6


def test_unknown_pixels_are_unchanged_bit_for_bit() -> None:
    s, t = Cosine(), torch.tensor(0.4, dtype=D)
    x = states(s, t)
    for clip in (None, 0.3):
        den = Denoiser(Network(s, PredV()), s, PredV(), clip=clip)
        plain, got = den(x, t, label=LABEL), InpaintingTransform(den, KNOWN, MASK)(x, t, label=LABEL)
        assert torch.equal(got.noise[..., 1], plain.noise[..., 1])
        assert torch.equal(got.x0[..., 1], plain.x0[..., 1])
        assert not torch.equal(got.noise[..., 0], plain.noise[..., 0])


def test_a_known_pixel_that_equals_the_clipped_estimate_has_no_gradient() -> None:
    """x̂_0 is clipped to −1, the value of the known pixel: x̂_0 does not change there, but the gradient must be 0."""
    s, t = Cosine(), torch.tensor(0.9, dtype=D)
    den = Denoiser(lambda x, c: torch.full_like(x, 3.0), s, PredV(), clip=1.0)
    x = states(s, t)
    low = torch.full_like(KNOWN, -1.0)
    assert (den(x, t).x0 == -1).all()
    guided = ClassifierGuidance(den, classifier, 3, V, form="published")
    got = InpaintingTransform(guided, low, MASK)(x, t, label=LABEL).gradient
    assert got is not None
    assert (got[..., [0, 2]] == 0).all()
    torch.testing.assert_close(got[..., 1], V * gradient(x, LABEL)[..., 1], rtol=1e-12, atol=0)


def test_a_masked_variance_is_the_floor_at_known_pixels() -> None:
    s, t, r = Cosine(), torch.tensor(0.6, dtype=D), torch.tensor(0.5, dtype=D)
    prediction = Denoiser(Network(s, PredV()), s, PredV())(states(s, t), t, label=LABEL)
    floor = torch.tensor(0.01, dtype=D)
    whole = FixedLarge()(s, t, r, prediction, floor)
    got = MaskedVariance(FixedLarge(), MASK > 0)(s, t, r, prediction, floor)
    assert torch.equal(got, torch.where(MASK > 0, whole, floor))


# the tuples of transforms -------------------------------------------------------------------------------------------------


def test_transforms_are_applied_in_order_and_on_any_rows() -> None:
    """Each on_output evaluates the earlier ones, on any rows. on_x0 is applied after clipping, and ε̂ is recomputed."""
    s, t, calls = Cosine(), torch.tensor(0.5, dtype=D), []

    def network(x: Tensor, c: Tensor, **_: Any) -> Tensor:
        calls.append(len(x))
        return 2 * x

    def double(
        evaluate: Evaluate, x: Tensor, t: Tensor, previous: Tensor | None, condition: dict[str, Tensor]
    ) -> Output:
        output = evaluate(x, t, previous, **condition)
        return output._replace(y=2 * output.y)

    def mean_of_first_two(
        evaluate: Evaluate, x: Tensor, t: Tensor, previous: Tensor | None, condition: dict[str, Tensor]
    ) -> Output:
        return Output(evaluate(x[:2], t).y.mean(0, keepdim=True).expand_as(x) + 1)

    x = states(s, t)
    den = Denoiser(network, s, PredV(), on_output=(double, mean_of_first_two))
    torch.testing.assert_close(den(x, t).output, (4 * x[:2]).mean(0, keepdim=True).expand_as(x) + 1, rtol=1e-12, atol=0)
    assert calls == [2]
    other = dataclasses.replace(den, on_output=(mean_of_first_two, double))
    torch.testing.assert_close(
        other(x, t).output, 2 * ((2 * x[:2]).mean(0, keepdim=True).expand_as(x) + 1), rtol=1e-12, atol=0
    )
    alpha, sigma = s.alpha_sigma(t)
    clipped = dataclasses.replace(
        den, on_output=(), clip=0.5, on_x0=(lambda x0, x, t: x0 + 1, lambda x0, x, t: torch.where(x > 0, 3 * x0, x0))
    )
    got, bare = clipped(x, t), Denoiser(network, s, PredV())(x, t)
    x0 = bare.x0.clamp(-0.5, 0.5) + 1
    want = torch.where(x > 0, 3 * x0, x0)
    assert torch.equal(got.x0, want)
    torch.testing.assert_close(got.noise, (x - alpha * want) / sigma, rtol=1e-12, atol=1e-12)
    assert got.unclipped is not None
    assert torch.equal(got.unclipped, bare.noise)


def test_a_denoiser_is_a_frozen_value_and_replace_keeps_its_transforms() -> None:
    s, t = Cosine(), torch.tensor(0.4, dtype=D)
    den = composed(("cfg", "exact", "known"), Denoiser(Network(s, PredV()), s, PredV(), clip=1.0))
    assert type(den) is Denoiser
    assert (len(den.on_output), len(den.on_x0), den.clip) == (2, 1, 1.0)
    for name in [field.name for field in dataclasses.fields(Denoiser)]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(den, name, None)
    for transform in (*den.on_output, *den.on_x0):
        with pytest.raises(dataclasses.FrozenInstanceError):
            transform.scale = 2.0  # type: ignore[union-attr]
    x = states(s, t)
    again = dataclasses.replace(dataclasses.replace(den, clip=None), clip=1.0)(x, t, label=LABEL)
    for a, b in zip(again[:3], den(x, t, label=LABEL)[:3], strict=True):
        assert torch.equal(a, b)
    assert Unguided(den) is den


def test_no_threshold_is_no_clipping_bit_for_bit() -> None:
    """Without a threshold ε̂ is not recomputed; thresholds are applied after guidance."""
    s, t = Cosine(), torch.tensor(0.8, dtype=D)
    x, bare = states(s, t), Denoiser(Network(s, PredV()), s, PredV())
    den = Denoiser(bare.network, s, PredV(), clip=NoThreshold())
    assert den.clip is None
    assert dataclasses.replace(bare, clip=NoThreshold()).clip is None
    for a, b in zip(den(x, t, label=LABEL), bare(x, t, label=LABEL), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)  # type: ignore[arg-type]
    assert torch.equal(NoThreshold()(x), x)
    for clip in (StaticThreshold(0.2), DynamicThreshold(0.9)):
        guided = ClassifierFree(dataclasses.replace(bare, clip=clip), 6.0)(x, t, label=LABEL)
        assert torch.equal(guided.x0, clip(ClassifierFree(bare, 6.0)(x, t, label=LABEL).x0))


def test_other_samplers_refuse_the_published_form_at_any_position() -> None:
    s = Cosine()
    den = composed(("published", "cfg", "known"), Denoiser(Network(s, PredV()), s, PredV()))
    assert den.moves_mean
    for sampler in (DDIM(4), Heun(4)):
        with pytest.raises(ConfigError, match=r"guidance\.form=exact"):
            sampler.check(den)
    assert not composed(("exact", "cfg", "known"), Denoiser(Network(s, PredV()), s, PredV())).moves_mean


# likelihood ---------------------------------------------------------------------------------------------------------------


def test_a_likelihood_refuses_known_pixels_and_drops_clipping_under_guidance() -> None:
    """vlb and ode of a clipped and guided denoiser equal those of the unclipped one."""
    s = Cosine(20)
    den = Denoiser(Network(s, PredNoise()), s, PredNoise())
    x0 = (torch.linspace(-1, 1, 18, dtype=D).reshape(6, 1, 1, 3) * 127.5).round() / 127.5
    condition = {"label": LABEL}
    for clip in (None, 0.1):
        known = composed(("cfg", "known"), dataclasses.replace(den, clip=clip))
        for call in (likelihood.vlb, likelihood.ode):
            with pytest.raises(ConfigError, match=r"replace\(denoiser, on_x0=\(\)\)"):
                call(known, x0, condition=condition)  # type: ignore[operator]
    guided = composed(("exact",), den)
    clipped = dataclasses.replace(guided, clip=0.1)
    kept, _ = ready(clipped, x0)
    assert kept.clip is None
    assert kept.on_output == guided.on_output
    assert torch.equal(
        likelihood.vlb(clipped, x0, condition=condition).bpd, likelihood.vlb(guided, x0, condition=condition).bpd
    )
    free = likelihood.vlb(den, x0, condition=condition).bpd
    assert not torch.allclose(likelihood.vlb(guided, x0, condition=condition).bpd, free)
    assert not torch.allclose(likelihood.vlb(clipped, x0, condition=condition, clip=True).bpd, free)
    options: dict[str, Any] = {"condition": condition, "rtol": 1e-3, "atol": 1e-3}
    assert torch.equal(likelihood.ode(clipped, x0, **options).bpd, likelihood.ode(guided, x0, **options).bpd)


def test_old_spellings_are_refused_with_the_new_ones() -> None:
    s = Cosine(20)
    den, x0 = Denoiser(Network(s, PredV()), s, PredV()), torch.zeros(6, 1, 1, 3, dtype=D)
    with pytest.raises(ConfigError, match="write decoder='discretized'"):
        likelihood.vlb(den, x0, decoder="discretised", condition={"label": LABEL})
    with pytest.raises(ConfigError, match="write dequantize=False"):
        likelihood.ode(den, x0, dequantise=False, condition={"label": LABEL})
