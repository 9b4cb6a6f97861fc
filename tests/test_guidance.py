"""Thresholding of x̂_0."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_lab.guidance import DynamicThreshold, StaticThreshold


def test_static() -> None:
    x = torch.tensor([-3.0, -0.5, 0.5, 3.0]).reshape(1, 1, 2, 2)
    assert StaticThreshold()(x).flatten().tolist() == [-1, -0.5, 0.5, 1]
    assert StaticThreshold(2)(x).flatten().tolist() == [-2, -0.5, 0.5, 2]


@settings(deadline=None, max_examples=30)
@given(scale=st.floats(0.1, 10), quantile=st.floats(0.1, 1.0), seed=st.integers(0, 99))
def test_dynamic_is_imagens(scale: float, quantile: float, seed: int) -> None:
    """s = quantile of |x| of each image, at least 1; clamp to ±s, divide by s. Against NumPy, in float64."""
    x = scale * torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    got = DynamicThreshold(quantile)(x)
    assert got.dtype == x.dtype
    for k in range(3):
        s = max(np.quantile(np.abs(x[k].numpy()), quantile), 1)
        np.testing.assert_allclose(got[k].numpy(), np.clip(x[k].numpy(), -s, s) / s, rtol=1e-12)
    assert got.abs().max() <= 1


def test_dynamic_leaves_images_in_range_alone() -> None:
    x = torch.rand(2, 1, 4, 4) * 2 - 1
    assert torch.equal(DynamicThreshold()(x), x)


def test_dynamic_knows_one_image_at_a_time() -> None:
    x = torch.randn(4, 1, 5, 5) * torch.tensor([0.1, 1, 5, 50])[:, None, None, None]
    together = DynamicThreshold()(x)
    for k in range(4):
        assert torch.equal(DynamicThreshold()(x[k : k + 1])[0], together[k])


def test_maximum_bounds_the_quantile() -> None:
    x = torch.full((1, 1, 2, 2), 8.0)
    x[0, 0, 0, 0] = 1.0
    assert DynamicThreshold(0.5, maximum=2.0)(x).flatten().tolist() == [0.5, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_halves(dtype: torch.dtype) -> None:
    """There is no quantile of halves in torch: it is taken in float32."""
    assert DynamicThreshold()(torch.randn(2, 1, 4, 4).to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: StaticThreshold(0), "limit > 0"),
        (lambda: DynamicThreshold(0), "0.995"),
        (lambda: DynamicThreshold(1.1), "0.995"),
        (lambda: DynamicThreshold(maximum=0.5), "maximum >= 1"),
    ],
)
def test_refusals(make: object, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        make()  # type: ignore[operator]
