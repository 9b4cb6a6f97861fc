"""Reverse variances: closed forms, strided pairs, shapes."""

from typing import Any

import pytest
import torch
from contracts import SCHEDULES, VARIANCES

from diffusion_lab.denoiser import Prediction
from diffusion_lab.gaussian import posterior
from diffusion_lab.schedules import Cosine, Linear
from diffusion_lab.variances import FixedLarge, FixedSmall

D = torch.float64
PLAIN = sorted(n for n, c in VARIANCES.items() if not c.extra_channels and n in {"FixedSmall", "FixedLarge"})


def prediction(batch: int = 2, dtype: torch.dtype = D) -> Prediction:
    x = torch.randn(batch, 3, 4, 5, dtype=dtype)
    return Prediction(x, x, x)


def test_the_fixed_ones_are_found() -> None:
    assert {"FixedSmall", "FixedLarge"} <= set(VARIANCES)
    assert VARIANCES["FixedLarge"].ancestral_only
    assert not VARIANCES["FixedSmall"].ancestral_only


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("shape", [(), (2,)])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_broadcastable_to_the_state(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """One time for all, or one for each image: the result multiplies x_t as it is, in its dtype (SURFACE.md)."""
    p = prediction(dtype=dtype)
    t, s = torch.full(shape, 0.5, dtype=D), torch.full(shape, 0.25, dtype=D)
    got = VARIANCES[name]()(Linear(), t, s, p, floor=posterior(Linear(), t, s).variance)
    assert (got * p.x0).shape == p.x0.shape
    assert got.dtype == dtype
    assert (torch.as_tensor(got) > 0).all()


def test_a_number_for_floor() -> None:
    p, t, s = prediction(), torch.tensor(0.5), torch.tensor(0.25)
    assert float(FixedSmall()(Linear(), t, s, p)) == 0
    assert float(FixedSmall()(Linear(), t, s, p, floor=0.25)) == 0.25


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("stride", [(1.0, 0.975), (1.0, 0.5), (0.5, 0.25), (0.05, 0.025)])
def test_fixed_large_is_the_forward_variance_of_the_pair(schedule: str, stride: tuple[float, float]) -> None:
    curve, p = SCHEDULES[schedule], prediction()
    t, s = (torch.tensor(v, dtype=D) for v in stride)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = curve.alpha_sigma(t), curve.alpha_sigma(s)
    want = sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2
    large = FixedLarge()(curve, t, s, p)
    assert float(large) == pytest.approx(float(want), rel=1e-12)
    assert float(posterior(curve, t, s).variance) < float(large)


@pytest.mark.parametrize("n", [10, 25, 50, 100])
def test_strided_pairs_are_those_of_the_respaced_chain(n: int) -> None:
    """Nichol & Dhariwal: β' = 1 − ᾱ_t/ᾱ_s of the kept times; a chain built from β' has these variances."""
    kept = torch.linspace(1, 1000, n).round().long()
    bar = torch.cat([torch.ones(1, dtype=D), (1 - torch.linspace(1e-4, 0.02, 1000, dtype=D)).cumprod(0)[kept - 1]])
    beta = 1 - bar[1:] / bar[:-1]
    small = (1 - bar[:-1]) / (1 - bar[1:]) * beta
    t, s = kept.double() / 1000, torch.cat([torch.zeros(1, dtype=D), kept[:-1].double() / 1000])
    p = prediction(batch=n)

    def flat(v: Any) -> torch.Tensor:
        return torch.as_tensor(v).flatten()

    torch.testing.assert_close(flat(FixedLarge()(Linear(), t, s, p)), beta, rtol=1e-9, atol=0)
    floor = posterior(Linear(), t, s).variance
    torch.testing.assert_close(flat(FixedSmall()(Linear(), t, s, p, floor=floor)), small, rtol=1e-9, atol=0)


def test_bounds_of_the_right_variance_for_gaussian_data() -> None:
    """x_0 ~ N(0, v): Var[x_s|x_t] = σ̃² + c_0² v σ_t²/(α_t²v + σ_t²) is σ̃² at v = 0 and σ²_{t|s} at v = 1 (Ho 2020, 3.2)."""
    t, s = torch.tensor(0.6, dtype=D), torch.tensor(0.5, dtype=D)
    (alpha, sigma), q, p = Cosine().alpha_sigma(t), posterior(Cosine(), t, s), prediction()
    for v, variance in ((0.0, FixedSmall()), (1.0, FixedLarge())):
        right = q.variance + q.c0**2 * v * sigma**2 / (alpha**2 * v + sigma**2)
        assert float(variance(Cosine(), t, s, p, floor=q.variance)) == pytest.approx(float(right), rel=1e-10)
