"""DDCM: the published rule, bit-equal reconstructions, distortion against bits."""

import math
from typing import Any

import pytest
import torch
from oracle import Mixture, oracle

from diffusion_lab.denoiser import Denoiser, Prediction
from diffusion_lab.gaussian import posterior
from diffusion_lab.noise import Stream, normal
from diffusion_lab.objectives import PredV
from diffusion_lab.samplers import DDCM, DDPM
from diffusion_lab.schedules import VE, Cosine, Schedule

D = torch.float64
SHAPE = (2, 4, 4)
CENTERS = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0)) / 2
DATA = Mixture(CENTERS, torch.full((6,), 0.15))
X0 = CENTERS[[0, 3, 3, 5, 1]].double() + 0.15 * normal(SHAPE, seed=1, index=torch.arange(5), dtype=D)


def book(step: int, size: int, seed: int = 0) -> torch.Tensor:
    return normal(SHAPE, seed=seed, index=torch.arange(size), draw=step + 1, stream=Stream.CODEBOOK, dtype=D)


@pytest.mark.parametrize("schedule", [Cosine(), VE()])
def test_compression_by_hand(schedule: Schedule) -> None:
    """At each step the vector with the largest ⟨z_k, x_0 − x̂_0⟩ is the noise of DDPM's step; x_T is one vector for all."""
    den, sampler = oracle(DATA, schedule, PredV()), DDCM(12, codebook=8)
    grid = sampler.time_grid(den)
    first = normal(SHAPE, seed=0, index=torch.zeros(5, dtype=torch.int64), draw=0, stream=Stream.CODEBOOK, dtype=D)
    x, chosen = schedule.alpha_sigma(grid[0])[1] * first, []
    for i in range(11):
        x0 = den(x, grid[i]).x0
        score = torch.einsum("bchw,kchw->bk", X0 - x0, book(i, 8))
        chosen.append(score.argmax(1))
        q = posterior(schedule, grid[i], grid[i + 1])
        x = q.mean(x, x0) + q.variance.sqrt() * book(i, 8)[chosen[-1]]
    code = sampler.compress(den, X0)
    assert torch.equal(code.indices, torch.stack(chosen, 1))
    torch.testing.assert_close(code.image, den(x, grid[11]).x0, rtol=1e-10, atol=1e-10)
    assert code.bits == 11 * 3
    assert code.nfe == 12


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_reconstructions_are_bit_equal(dtype: torch.dtype) -> None:
    """The reconstruction depends on indices and network alone; for a single image, whose kernels may differ, to 1e-4."""
    torch.manual_seed(0)
    net = torch.nn.Conv2d(2, 2, 3, padding=1).to(dtype)

    def network(x: torch.Tensor, c: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return net(x).tanh() * label[:, None, None, None]

    den, label, sampler = Denoiser(network, Cosine(), PredV(), clip=1.0), torch.arange(5), DDCM(30, codebook=16)
    code = sampler.compress(den, X0.to(dtype), {"label": label})
    got = DDCM(30, codebook=16).decompress(den, code.indices, torch.zeros_like(code.image), {"label": label}).x
    assert torch.equal(got, code.image)
    assert got.dtype == dtype
    one = sampler.decompress(den, code.indices[2:3], code.image[2:3], {"label": label[2:3]}).x
    torch.testing.assert_close(one, code.image[2:3], rtol=0, atol=1e-4)
    assert not torch.equal(
        DDCM(30, codebook=16, codebook_seed=1).decompress(den, code.indices, got, {"label": label}).x, got
    )


def test_more_bits_less_distortion() -> None:
    """Mean squared error of 30 and 200 steps with 2, 16 and 256 vectors: it falls with both. At 1,592 bits it is below
    0.0225, the variance within a component, which is the error of selecting the component alone."""
    den = oracle(DATA, Cosine(), PredV())
    error, bits = {}, {}
    for steps in (30, 200):
        for size in (2, 16, 256):
            code = DDCM(steps, codebook=size).compress(den, X0)
            error[steps, size], bits[steps, size] = float((code.image - X0).square().mean()), code.bits
    for steps in (30, 200):
        assert error[steps, 2] > error[steps, 16] > error[steps, 256], error
    assert all(error[200, size] < error[30, size] for size in (16, 256)), error
    assert bits[200, 256] == 199 * 8
    assert error[200, 256] < 0.015, error


def test_generation_draws_from_the_codebook_by_key() -> None:
    """Every z is a vector of the step's codebook, all vectors are equally likely (χ² within 5 standard deviations), and the
    vector of an image depends on its key alone."""
    seen: list[torch.Tensor] = []

    class Recording(DDCM):
        def chain(self, x: Any, times: Any, context: Any, steps: Any, draw: Any) -> torch.Tensor:
            def recorded(i: int, prediction: Prediction) -> torch.Tensor:
                seen.append(draw(i, prediction))
                return seen[-1]

            return super().chain(x, times, context, steps, recorded)

    den, size = oracle(DATA, Cosine(), PredV()), 4000

    def draws(index: torch.Tensor) -> torch.Tensor:
        seen.clear()
        Recording(10, codebook=8)(den, torch.zeros(len(index), *SHAPE, dtype=D), seed=3, index=index)
        which = (seen[4][:, None] == book(4, 8)).flatten(2).all(2)
        assert bool((which.sum(1) == 1).all())
        return which.long().argmax(1)

    chosen = draws(torch.arange(size))
    counts = torch.bincount(chosen, minlength=8).double()
    chi2 = float(((counts - size / 8).square() / (size / 8)).sum())
    assert abs(chi2 - 7) < 5 * math.sqrt(14)
    assert torch.equal(draws(torch.tensor([17, 5])), chosen[[17, 5]])


def test_compression_does_not_change_the_sampler() -> None:
    den, sampler = oracle(DATA, Cosine(), PredV()), DDCM(10)
    x = normal(SHAPE, seed=2, index=torch.arange(3), dtype=D)
    expected = sampler(den, x, seed=5).x
    sampler.compress(den, X0)
    assert torch.equal(sampler(den, x, seed=5).x, expected)
    assert not torch.equal(expected, DDPM(10)(den, x, seed=5).x)


def test_the_code_of_one_step_is_empty() -> None:
    den = oracle(DATA, Cosine(), PredV())
    code = DDCM(1).compress(den, X0)
    assert (code.bits, code.indices.shape) == (0.0, (5, 0))
    assert torch.equal(DDCM(1).decompress(den, code.indices, X0).x, code.image)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(5, 8, dtype=torch.int64),
        torch.zeros(4, 9, dtype=torch.int64),
        torch.full((5, 9), 64),
        torch.full((5, 9), -1),
    ],
)
def test_indices_of_another_code_are_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="write the steps, the grid and the codebook"):
        DDCM(10).decompress(oracle(DATA, Cosine(), PredV()), wrong, X0)


@pytest.mark.parametrize("options", [{"codebook": 1}, {"codebook": 0}])
def test_a_codebook_needs_two_vectors(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"codebook=[01]: write an integer in \[2, 65536\]"):
        DDCM(**options)
