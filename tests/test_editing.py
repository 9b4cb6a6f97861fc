"""Edits against exact results: slerp, the distribution of SDEdit, the Gaussian conditional of inpainting."""

import itertools
import math
from typing import Any

import pytest
import torch
from contracts import SAMPLERS, SCHEDULES
from oracle import Gaussian, Mixture, Network, oracle
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.editing import InpaintingTransform, MaskedVariance, inpaint, passes, slerp
from diffusion_lab.gaussian import posterior
from diffusion_lab.noise import normal
from diffusion_lab.objectives import PredNoise, PredV, PredX0
from diffusion_lab.samplers import DDIM, DDPM, ODE, Heun, Sampler, prior
from diffusion_lab.schedules import Cosine, Linear, Schedule
from diffusion_lab.variances import Analytic, FixedLarge

D = torch.float64

# slerp --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_slerp_is_a_rotation_with_exact_ends(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 3, 4, 4, dtype=dtype)
    w = torch.tensor([0.0, 0.25, 0.5, 1.0])
    path = slerp(a, b, w)
    assert path.dtype == dtype
    assert torch.equal(path[0], a)
    assert torch.equal(path[-1], b)
    u, v = (end.double().flatten() / end.double().norm() for end in (a, b))
    angle = torch.arccos(u @ v)
    for weight, point in zip(w.tolist(), slerp(u, v, w), strict=True):
        across = (v - (u @ v) * u) / (v - (u @ v) * u).norm()  # the rotation in the plane of u and v, from u
        want = (weight * angle).cos() * u + (weight * angle).sin() * across
        assert torch.allclose(point, want, atol=1e-12)


@pytest.mark.parametrize("factor", [1.0, 2.0, 1 + 1e-9, -1.0, 0.0])
def test_slerp_of_parallel_opposite_and_zero_vectors_is_linear(factor: float) -> None:
    a = torch.randn(8, dtype=D)
    b = factor * a
    path = slerp(a, b, torch.linspace(0, 1, 5))
    assert torch.equal(path[0], a)
    assert torch.equal(path[-1], b)
    assert torch.allclose(path[1], 0.75 * a + 0.25 * b, atol=1e-12)


# SDEdit ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Cosine", "VE", "EDM", "Flow"])
def test_the_distribution_of_edits_of_gaussian_data(name: str) -> None:
    """x_t ~ N(α x_0, σ²), and the exact flow of the ODE from there is affine: mean and standard deviation of 4,000 edits, to 4
    standard errors plus the solver's error of 0.002. More noise preserves less of the image."""
    schedule, data = SCHEDULES[name], Gaussian(torch.full((1, 1, 1), 0.3), 0.5)
    noise, image = normal((1, 1, 1), seed=3, index=torch.arange(4000), dtype=D), torch.full((1, 1, 1, 1), 1.5, dtype=D)
    kept = []
    for t in (0.3, 0.6, 0.9):
        x_t = schedule.corrupt(image, noise, torch.tensor(t))
        x = Heun(40)(oracle(data, schedule, PredV()), x_t, start=t).x
        ends = torch.tensor([0.0, 1.0], dtype=D).reshape(2, 1, 1, 1)
        low, high = data.flow(ends, schedule, t, 1e-9).flatten().tolist()  # the flow: low + (high − low) x_t
        alpha, sigma = (float(v) for v in schedule.alpha_sigma(torch.tensor(t, dtype=D)))
        mean, std = low + (high - low) * alpha * 1.5, (high - low) * sigma
        assert abs(float(x.mean()) - mean) < 4 * std / 4000**0.5 + 0.002
        assert abs(float(x.std()) - std) < 4 * std / 8000**0.5 + 0.002
        kept.append(mean - 0.3)
    assert kept[0] > kept[1] > kept[2] > 0


# encoding and decoding ----------------------------------------------------------------------------------------------------

MIXTURE = Mixture(torch.tensor([-0.6, 0.6]).reshape(2, 1, 1, 1), torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.7]))


@pytest.mark.parametrize(("make", "encode_order", "round_trip_order"), [(DDIM, 1, 1), (Heun, 2, 3)])
def test_the_order_of_encoding_and_decoding(make: type[Sampler], encode_order: int, round_trip_order: int) -> None:
    """Doubling the steps divides the error by 2^order ± 15 %, between two inner times, with exact denoisers.

    Encoding has the order of the solver, compared with the exact flow of Gaussian data. Encoding and decoding has the same
    order if that is odd; for an even order it is one higher, because a step of −h cancels the leading error h³ of a step of h.
    """
    schedule, times = SCHEDULES["VP"], {"start": 0.3, "stop": 0.7}
    gaussian = Gaussian(torch.full((1, 1, 1), 0.3), 0.5)
    x = torch.linspace(-1, 1, 9, dtype=D).reshape(-1, 1, 1, 1)
    encoded, errors = [], []
    for steps in (20, 40):
        sampler = make(steps, grid="trailing")  # type: ignore[call-arg]
        z = sampler(oracle(gaussian, schedule, PredV()), x, **times).x
        encoded.append(float((z - gaussian.flow(x, schedule, *times.values())).abs().max()))
        z = sampler(oracle(MIXTURE, schedule, PredV()), x, **times).x
        back = sampler(oracle(MIXTURE, schedule, PredV()), z, start=0.7, stop=0.3).x
        errors.append(float((back - x).square().mean().sqrt()))
    for order, by_steps in ((encode_order, encoded), (round_trip_order, errors)):
        for coarse, fine in itertools.pairwise(by_steps):
            assert coarse / fine == pytest.approx(2**order, rel=0.15)


# passes of inpainting -----------------------------------------------------------------------------------------------------


def published(steps: int, jump_length: int, resample: int) -> list[int]:
    """Return the times that RePaint's code visits (Lugmayr et al. 2022, appendix: get_schedule_jump), in steps to data."""
    jumps = dict.fromkeys(range(0, steps - jump_length, jump_length), resample - 1)
    t, visited = steps, [steps]
    while t >= 1:
        t -= 1
        visited.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] -= 1
            visited += range(t + 1, t + jump_length + 1)
            t += jump_length
    return visited


@pytest.mark.parametrize(
    ("steps", "jump", "resample"), [(250, 10, 10), (50, 5, 10), (12, 4, 3), (10, 1, 2), (50, 5, 1)]
)
def test_passes_are_those_of_repaint(steps: int, jump: int, resample: int) -> None:
    """RePaint steps up once for each time and this package once for each segment, so the turning points are compared."""
    visited = published(steps, jump, resample)
    turns = [b for a, b, c in zip(visited, visited[1:], visited[2:], strict=False) if (b - a) * (c - b) < 0]
    segments = passes(steps, jump, resample)
    ours = []
    for part, following in itertools.pairwise(segments):
        assert following.begin == (part.begin if following.again else part.end)
        if following.again:
            ours += [steps - part.end, steps - part.begin]
    assert ours == turns
    assert segments[-1].end == steps


def test_passes_where_segments_do_not_divide_the_steps() -> None:
    assert passes(11, 5, 2) == [(0, 1, False), (1, 6, False), (1, 6, True), (6, 11, False), (6, 11, True)]
    assert passes(3, 5, 10) == passes(3, 3, 10) == passes(3, 1, 1) == [(0, 3, False)]
    for arguments in ((10, 0, 1), (10, 1, 0)):
        with pytest.raises(ValueError, match=r"inpaint.(jump_length|resample)=0: write an integer in"):
            passes(*arguments)


# inpainting ---------------------------------------------------------------------------------------------------------------


class Correlated:
    """x_0 ~ N(m, S), a row of a few pixels, as data for `oracle.Network`."""

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.mean, self.covariance = mean, covariance

    def gain(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return G of E[x_0 | x_t] = m + G (x_t − α m), for 0-d α and σ."""
        S = self.covariance
        return alpha * S @ torch.linalg.inv(alpha**2 * S + sigma**2 * torch.eye(len(S), dtype=D))

    def denoise(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        gap = x_t.flatten(1) - alpha[0] * self.mean
        return (self.mean + gap @ self.gain(alpha[0], sigma[0]).T).reshape(x_t.shape)


RHO, KNOWN = 0.8, 0.9
DATA = Correlated(torch.tensor([0.2, -0.1], dtype=D), torch.tensor([[1, RHO], [RHO, 1]], dtype=D) * 0.25)
MEAN = -0.1 + RHO * (KNOWN - 0.2)  # mean of the second pixel given the first
VARIANCE = 0.25 * (1 - RHO**2)
IMAGE = torch.tensor([KNOWN, 0.0], dtype=D).reshape(1, 1, 1, 2)
MASK = torch.tensor([0.0, 1.0], dtype=D).reshape(1, 1, 1, 2)


def correlated(schedule: Schedule) -> Denoiser:
    return Denoiser(Network(DATA, schedule, PredV()), schedule, PredV())  # type: ignore[arg-type]


def moments(sampler: Sampler, schedule: Schedule, jump_length: int, resample: int) -> tuple[float, float]:
    """Return mean and variance of the unknown pixel under `inpaint`, by propagating the moments of the pair.

    Every step is affine, so matrices replace samples; the steps of DDPM, DDIM and Heun's method are implemented independently.
    """
    times = sampler.time_grid(correlated(schedule))
    alpha, sigma = schedule.alpha_sigma(times)
    keep, know = torch.diag(torch.tensor([0.0, 1.0], dtype=D)), torch.tensor([KNOWN, 0.0], dtype=D)

    def estimate(i: int, A: Tensor, b: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return x̂_0 and ε̂ at the state A x + b and time i, each as a pair (A, b)."""
        G = keep @ DATA.gain(alpha[i], sigma[i])
        x0 = (G @ A, G @ b + know + keep @ DATA.mean - alpha[i] * G @ DATA.mean)
        return x0, ((A - alpha[i] * x0[0]) / sigma[i], (b - alpha[i] * x0[1]) / sigma[i])

    def down(i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (A, b, v) of the step x_s = A x_t + b + √v z."""
        one, zero, s = torch.eye(2, dtype=D), torch.zeros(2, dtype=D), i + 1
        x0, noise = estimate(i, one, zero)
        if isinstance(sampler, DDPM):
            ratio = alpha[i] / alpha[s]
            forward = sigma[i] ** 2 - ratio**2 * sigma[s] ** 2
            c1, c0 = ratio * sigma[s] ** 2 / sigma[i] ** 2, alpha[s] * forward / sigma[i] ** 2
            return c1 * one + c0 * x0[0], c0 * x0[1], forward * sigma[s] ** 2 / sigma[i] ** 2
        A, b = (alpha[s] * x0[k] + sigma[s] * noise[k] for k in (0, 1))
        if isinstance(sampler, Heun) and times[s] > 0:
            predicted = estimate(s, A, b)
            A, b = (
                start
                + (
                    (alpha[s] - alpha[i]) * (x0[k] + predicted[0][k])
                    + (sigma[s] - sigma[i]) * (noise[k] + predicted[1][k])
                )
                / 2
                for k, start in enumerate((one, zero))
            )
        return A, b, torch.zeros((), dtype=D)

    mean, covariance = torch.zeros(2, dtype=D), torch.eye(2, dtype=D) * sigma[0] ** 2
    segments, composed = passes(len(times) - 1, jump_length, resample), {}
    for begin, end in dict.fromkeys(segment[:2] for segment in segments):  # compose the steps of a segment
        A, b, C = torch.eye(2, dtype=D), torch.zeros(2, dtype=D), torch.zeros(2, 2, dtype=D)
        for step, shift, v in map(down, range(begin, end)):
            A, b, C = step @ A, step @ b + shift, step @ C @ step.T + v * torch.eye(2)
        composed[begin] = A, b, C
    for begin, end, again in segments:
        if again:
            up = alpha[begin] / alpha[end]
            mean, covariance = (
                up * mean,
                up**2 * covariance + (sigma[begin] ** 2 - up**2 * sigma[end] ** 2) * torch.eye(2),
            )
        A, b, C = composed[begin]
        mean, covariance = A @ mean + b, A @ covariance @ A.T + C
    return float(mean[1]), float(covariance[1, 1])


def initial(denoiser: Denoiser, known: torch.Tensor, index: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Return x_T of the images `index` in the shape and dtype of the known one."""
    return prior(denoiser.schedule, normal(tuple(known.shape[1:]), seed=seed, index=index, dtype=known.dtype))


def bias(mean: float, variance: float) -> tuple[float, float]:
    """Return the error of the mean in conditional standard deviations, and the relative error of the variance."""
    return abs(mean - MEAN) / VARIANCE**0.5, abs(variance / VARIANCE - 1)


@pytest.mark.parametrize("sampler", [DDPM(20), DDIM(20), Heun(12, "trailing")], ids=["DDPM", "DDIM", "Heun"])
def test_inpainting_against_propagated_moments_and_the_effect_of_resampling(sampler: Sampler) -> None:
    """Two pixels of correlation 0.8, one known: 6,000 draws against the propagated moments, to 4 standard errors. Without
    resampling the mean is off by over 0.6 conditional standard deviations; with resample=4 by less than 0.6 of that."""
    schedule, off = Cosine(), []
    for resample in (1, 4):
        x_T = initial(correlated(schedule), IMAGE, torch.arange(6000))
        x = inpaint(
            sampler, correlated(schedule), x_T, IMAGE, MASK, index=torch.arange(6000), jump_length=4, resample=resample
        ).x[:, 0, 0, 1]
        mean, variance = moments(sampler, schedule, 4, resample)
        assert abs(float(x.mean()) - mean) < 4 * (variance / 6000) ** 0.5
        assert abs(float(x.var()) - variance) < 4 * variance * (2 / 6000) ** 0.5
        off.append(bias(float(x.mean()), float(x.var()))[0])
    assert off[0] > 0.6
    assert off[1] < 0.6 * off[0]


@pytest.mark.parametrize(("make", "plain"), [(DDPM, (0.738, 0.325)), (DDIM, (1.051, 0.741))])
def test_many_steps_and_resamplings_converge_to_the_gaussian_conditional(
    make: type[Sampler], plain: tuple[float, float]
) -> None:
    """Propagated moments against the exact conditional, for (steps, jump_length, resample): limits of the error of the mean, in
    conditional standard deviations, and of the relative error of the variance."""
    assert bias(*moments(make(50), Cosine(), 5, 1)) == pytest.approx(plain, abs=1e-3)
    for (steps, jump, resample), mean, variance in (
        ((50, 5, 10), 0.19, 0.23),
        ((1000, 40, 20), 0.08, 0.025),
        ((4000, 160, 80), 0.03, 0.015),
    ):
        errors = bias(*moments(make(steps), Cosine(max(steps, 1000)), jump, resample))
        assert errors[0] < mean
        assert errors[1] < variance


@pytest.mark.parametrize("jump_length", [1, 2, 3, 8])
@pytest.mark.parametrize("make", [DDPM, DDIM])
def test_the_last_noise_is_bounded_for_every_jump_length(make: type[Any], jump_length: int) -> None:
    """With x̂_0 = 0 and no known pixels the last step between t_2 and t_1, before the step into data, is x → c x + σ z with
    c = c_1 or σ_s/σ_t. Its σ is 2/255·√(π/2) with max_final_noise=1, for every division of the grid, and more with ∞."""
    seen: list[tuple[int, torch.Tensor]] = []

    def network(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        seen.append((round(float(c[0])) + 1, x))
        return torch.zeros_like(x)

    schedule, fit = Cosine(40), torch.arange(1, 41, dtype=D) / 40
    zero, count = torch.zeros(1, 1, 1, 1, dtype=D), 4000
    for bound in (1.0, math.inf):
        sampler = make(8, variance=Analytic(fit, torch.zeros(40, dtype=D)), max_final_noise=bound)
        times = sampler.time_grid(Denoiser(network, schedule, PredX0()))
        seen.clear()
        inpaint(
            sampler, Denoiser(network, schedule, PredX0()), zero.expand(count, -1, -1, -1), zero, zero + 1,
            index=torch.arange(count), jump_length=jump_length, resample=2,
        )  # fmt: skip
        at = max(k for k, (node, _) in enumerate(seen) if node == round(float(times[-3]) * 40))
        sigma, sigma_s = schedule.alpha_sigma(times[-3:-1])[1]
        carried = posterior(schedule, times[-3], times[-2]).c1 if make is DDPM else sigma_s / sigma
        spread = float((seen[at + 1][1] - carried * seen[at][1]).std())
        level = 2 / 255 * (math.pi / 2) ** 0.5
        assert spread == pytest.approx(level, rel=0.05) if bound == 1 else spread > 2 * level


BLOBS = Mixture(torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(5)) / 2, torch.tensor([0.2, 0.3, 0.1]))
HOLE = torch.zeros(1, 1, 4, 4, dtype=D)
HOLE[..., 2:] = 1
PICTURE = torch.linspace(-1, 1, 16, dtype=D).reshape(1, 1, 4, 4)


def few(name: str) -> Sampler:
    cls: Any = SAMPLERS[name]
    return cls(1e-3, 1e-3) if name == "ODE" else cls(steps=6)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("curve", ["Linear", "VE"])
def test_known_pixels_are_exact_with_every_sampler(name: str, curve: str) -> None:
    """A sampler's final state has them up to rounding errors and `inpaint` bit for bit; the other pixels are generated."""
    denoiser, index = oracle(BLOBS, SCHEDULES[curve], PredV()), torch.arange(3)
    x_T = initial(denoiser, PICTURE, index)
    for resample in (1, 2):
        x = inpaint(few(name), denoiser, x_T, PICTURE, HOLE, index=index, jump_length=2, resample=resample).x
        assert torch.equal(x[..., :2], PICTURE[..., :2].expand(3, -1, -1, -1))
        assert x.isfinite().all()
        assert (x[..., 2:] - PICTURE[..., 2:]).abs().min() > 0
    final = few(name)(InpaintingTransform(denoiser, PICTURE, HOLE), x_T).x
    assert torch.allclose(final[..., :2], PICTURE[..., :2].expand(3, -1, -1, -1), atol=1e-12)


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_pass_without_known_pixels_is_the_sampler(name: str) -> None:
    denoiser, index = oracle(BLOBS, SCHEDULES["Linear"], PredV()), torch.arange(5, 8)
    x_T = initial(denoiser, PICTURE, index, seed=2)
    want = few(name)(denoiser, x_T, seed=2, index=index)
    got = inpaint(few(name), denoiser, x_T, PICTURE, torch.ones_like(HOLE), seed=2, index=index, resample=1)
    assert torch.allclose(got.x, want.x, atol=1e-12)
    assert got.nfe == want.nfe


def test_an_image_is_independent_of_its_batch() -> None:
    denoiser = oracle(BLOBS, SCHEDULES["Cosine"], PredV())
    whole, split = (
        torch.cat([
            inpaint(
                DDPM(8), denoiser, initial(denoiser, PICTURE, index, seed=1), PICTURE, HOLE,
                seed=1, index=index, jump_length=2, resample=3,
            ).x
            for index in batches
        ])
        for batches in (torch.arange(6)[None], torch.arange(6).split(2))
    )  # fmt: skip
    assert torch.allclose(whole, split, atol=1e-12)
    assert (whole[0] - whole[1]).abs().max() > 0.01


def test_known_pixels_follow_their_exact_chain_under_any_variance() -> None:
    """x_t = α x_0 + σ ε at t = 0.2: 4,000 samples, to 4 standard errors; unmasked, FixedLarge is too large."""
    denoiser, schedule = correlated(Linear()), Linear()
    inpainting, index = InpaintingTransform(denoiser, IMAGE, MASK), torch.arange(4000)
    alpha, sigma = (float(v) for v in schedule.alpha_sigma(torch.tensor(0.2, dtype=D)))
    start = normal((1, 1, 2), seed=4, index=index, dtype=D)
    for variance, exact in ((None, True), (MaskedVariance(FixedLarge(), MASK > 0), True), (FixedLarge(), False)):
        x = DDPM(3, variance, grid="trailing")(inpainting, start, index=index, seed=4, stop=0.2).x[..., 0]
        assert abs(float(x.mean()) - alpha * KNOWN) < 4 * sigma * 1.2 / 4000**0.5
        assert (abs(float(x.std()) / sigma - 1) < 4 / 8000**0.5) == exact
    z = torch.zeros(1, dtype=D) + 0.5
    prediction = inpainting(start[:5], z[0])
    assert torch.equal(prediction.x0[..., 0], torch.full_like(prediction.x0[..., 0], KNOWN))
    alpha, sigma = (float(v) for v in schedule.alpha_sigma(z[0]))
    assert torch.allclose(alpha * prediction.x0 + sigma * prediction.noise, start[:5], atol=1e-12)


def test_errors() -> None:
    denoiser = oracle(BLOBS, SCHEDULES["Cosine"], PredNoise())
    two = PICTURE.expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="one image at a time"):
        inpaint(ODE(), denoiser, two, two, HOLE, index=torch.arange(2))
    assert inpaint(DDIM(3), denoiser, two, two, HOLE, index=torch.arange(2), resample=1).x.shape == two.shape
    with pytest.raises(ValueError, match=r"inpaint.resample=0: write an integer in \[1, 10000\]"):
        inpaint(DDIM(3), denoiser, two, PICTURE, HOLE, index=torch.arange(2), resample=0)
