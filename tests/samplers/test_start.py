"""The state at the first time of a grid, for grids that omit `start`: its distribution, and that of the samples."""

from typing import Any

import pytest
import torch
from contracts import SAMPLERS, SCHEDULES, takes
from oracle import Gaussian, oracle
from torch import Tensor

from diffusion_lab import likelihood
from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.editing import inpaint
from diffusion_lab.generation import batch_of, decode
from diffusion_lab.noise import normal
from diffusion_lab.objectives import PredFlow
from diffusion_lab.samplers import DDCM, DDIM, Sampler, prior

D = torch.float64
STD = 0.375  # exact in float32
DATA = Gaussian(torch.zeros(1, 1, 1), STD)
STEPPED = [name for name in SAMPLERS if takes(SAMPLERS[name], "grid")]
CURVES = ["VE", "EDM", "Flow", "Linear-40", "Cosine-zero"]


class States:
    """A callback that keeps the state of every step and its time."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.x: list[Tensor] = []

    def __call__(self, i: int, t: float, x: Tensor, prediction: Prediction) -> None:
        self.times.append(t)
        self.x.append(x)


def gaussian(schedule: str) -> Denoiser:
    return oracle(DATA, SCHEDULES[schedule], PredFlow())


def sigma(schedule: str, t: float) -> float:
    return float(SCHEDULES[schedule].alpha_sigma(torch.tensor(t, dtype=D))[1])


def ddim_scale(schedule: str, times: Tensor) -> float:
    """Return the factor of a DDIM chain on its initial state: α_s x̂_0 + σ_s ε̂ is linear in x for data N(0, s²)."""
    alpha, std = (v.tolist() for v in SCHEDULES[schedule].alpha_sigma(times))
    scale = 1.0
    for k in range(len(times) - 1):
        variance = (alpha[k] * STD) ** 2 + std[k] ** 2
        scale *= (alpha[k + 1] * alpha[k] * STD**2 + std[k + 1] * std[k]) / variance
    return scale


@pytest.mark.parametrize("name", STEPPED)
@pytest.mark.parametrize("grid", ["leading", "linspace"])
def test_pure_noise_has_the_level_of_the_first_time(name: str, grid: str) -> None:
    """With every sampler the first evaluation is at σ(t_0) z, t_0 the first time of the grid."""
    z = normal((1, 1, 1), seed=0, index=torch.arange(3), dtype=D)
    for schedule in ("VE", "Linear-40"):
        sampler: Any = SAMPLERS[name](steps=6, grid=grid)
        seen, denoiser = States(), gaussian(schedule)
        sampler(denoiser, prior(denoiser.schedule, z), callback=seen)
        first = float(sampler.time_grid(denoiser)[0])
        assert seen.times[0] == first
        assert (first < 1) == (grid == "leading")
        torch.testing.assert_close(seen.x[0], sigma(schedule, first) * z, rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", CURVES)
def test_samples_of_a_leading_grid_have_the_spread_of_the_data(schedule: str) -> None:
    """The samples are those of the closed form, and their spread differs from the data's by the error of the steps alone."""
    denoiser, sampler = gaussian(schedule), DDIM(10, grid="leading")
    z = normal((1, 1, 1), seed=3, index=torch.arange(5), dtype=D)
    times = sampler.time_grid(denoiser)
    scale = sigma(schedule, float(times[0])) * ddim_scale(schedule, times)
    torch.testing.assert_close(sampler(denoiser, prior(denoiser.schedule, z)).x, scale * z, rtol=1e-9, atol=0)
    many = DDIM(39, grid="leading").time_grid(denoiser)
    assert sigma(schedule, float(many[0])) * ddim_scale(schedule, many) == pytest.approx(STD, rel=0.12)


@pytest.mark.parametrize("schedule", CURVES)
@pytest.mark.parametrize("start", [0.5, 1.0])
def test_an_edit_starts_at_the_first_time(schedule: str, start: float) -> None:
    """x_0 noised to times[0] is the state there, also at strength 1: x = scale · (α x_0 + σ z) in closed form."""
    denoiser, sampler = gaussian(schedule), DDIM(5, grid="leading")
    batch, z = batch_of(range(4), None, "cpu"), normal((1, 1, 1), seed=1, index=torch.arange(4), dtype=D)
    times = sampler.time_grid(denoiser, start)
    state = denoiser.schedule.corrupt(0.1 * z.flip(0), z, times[0])
    expected = (ddim_scale(schedule, times) * state).clamp(-1, 1).float()
    torch.testing.assert_close(decode(denoiser, sampler, state, batch, times=times).x, expected, rtol=1e-6, atol=1e-7)
    if start < 1:
        torch.testing.assert_close(sampler(denoiser, state, start=start).x.clamp(-1, 1).float(), expected)


@pytest.mark.parametrize("sampler", [DDIM(6, grid="leading"), DDCM(6, grid="leading", codebook=8)])
def test_inpainting_and_compression_start_there_too(sampler: Sampler) -> None:
    seen: list[Tensor] = []

    def network(x: Tensor, c: Tensor) -> Tensor:
        seen.append(x)
        return torch.zeros_like(x)

    denoiser = Denoiser(network, SCHEDULES["VE"], PredFlow())
    z = normal((1, 1, 1), seed=0, index=torch.arange(3), dtype=D)
    if isinstance(sampler, DDCM):
        sampler.compress(denoiser, z)
        z = sampler._vectors(z, torch.zeros(3, dtype=torch.int64), 0)
    else:
        x_T = prior(denoiser.schedule, z)
        inpaint(sampler, denoiser, x_T, torch.zeros(1, 1, 1, 1, dtype=D), torch.ones(1), index=torch.arange(3))
    first = sigma("VE", float(sampler.time_grid(denoiser)[0]))
    torch.testing.assert_close(seen[0], first * z, rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", CURVES)
def test_the_bound_of_a_leading_grid_has_the_prior_of_its_sampler(schedule: str) -> None:
    """L_T = KL(N(α x_0, σ²) ‖ N(0, σ²)) = α²x_0²/2σ² nats at the first time, where the sampler starts with σ z."""
    denoiser, x0 = gaussian(schedule), torch.tensor([-1.0, 0.2, 1.0], dtype=D).reshape(3, 1, 1, 1)
    times = DDIM(10, grid="leading").time_grid(denoiser)
    bound = likelihood.vlb(denoiser, x0, times=times, decoder="gaussian")
    alpha, std = denoiser.schedule.alpha_sigma(times[0])
    expected = (alpha * x0.flatten() / std).square() / 2 / torch.tensor(2.0, dtype=D).log()
    torch.testing.assert_close(bound.terms["L_T"], expected, rtol=1e-9, atol=0)
