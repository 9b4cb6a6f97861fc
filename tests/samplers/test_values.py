"""Samplers are immutable: a call does not change them, equal calls give equal results, and threads can share one."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from contracts import SAMPLERS, takes
from oracle import Mixture, oracle

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.editing import inpaint
from diffusion_lab.noise import normal
from diffusion_lab.objectives import PredV
from diffusion_lab.samplers import DDCM, DDIM, DDPM, Heun, Samples, prior
from diffusion_lab.samplers.base import Sampler
from diffusion_lab.schedules import Cosine
from diffusion_lab.variances import Analytic, FixedLarge

D = torch.float64
SHAPE = (1, 4, 4)
DATA = Mixture(torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(5)) / 2, torch.tensor([0.2, 0.3, 0.1]))
FIT = Analytic([0.25, 0.5, 0.75, 1.0], [0.2, 0.5, 0.8, 0.95])


def default(name: str) -> Sampler:
    cls: Any = SAMPLERS[name]
    options: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3} if takes(cls, "rtol") else {}
    return cls(steps=4, **options) if takes(cls, "steps") else cls(**options)


BUILDERS: dict[str, Any] = {
    **{name: (lambda name=name: default(name)) for name in SAMPLERS},
    "DDPM, optimal grid": lambda: DDPM(3, FIT, grid="optimal"),
    "DDPM, fixed_large": lambda: DDPM(4, FixedLarge()),
    "DDIM, analytic": lambda: DDIM(4, eta=0.5, variance=FIT, grid="optimal"),
    "Heun, budget": lambda: Heun(budget=6, s_churn=1.0),
}
every = pytest.mark.parametrize("name", BUILDERS)


def denoiser() -> Denoiser:
    return oracle(DATA, Cosine(20), PredV())


def start(seed: int) -> torch.Tensor:
    return prior(Cosine(20), normal(SHAPE, seed=seed, index=torch.arange(3), dtype=D))


def contents(sampler: Sampler) -> tuple[dict[str, Any], bytes]:
    """Return the attributes, to be compared by identity, and the pickled sampler."""
    return dict(vars(sampler)), pickle.dumps(sampler)


def unchanged(sampler: Sampler, before: tuple[dict[str, Any], bytes]) -> bool:
    attributes, whole = contents(sampler)
    same = attributes.keys() == before[0].keys() and all(v is before[0][k] for k, v in attributes.items())
    return same and whole == before[1]


@every
def test_no_use_changes_the_sampler(name: str) -> None:
    """Not a call, encoding, inpainting or compression; the first call's images and counts are reproduced afterwards."""
    sampler, den = BUILDERS[name](), denoiser()
    before = contents(sampler)
    first = sampler(den, start(0), seed=1)
    assert type(first) is Samples
    assert first.nfe > 0
    sampler.check(den)
    sampler(den, start(1), seed=2, stop=0.25)
    if sampler.deterministic:
        sampler(den, first.x, start=0.0, stop=1.0)
    known, mask = torch.zeros(1, *SHAPE, dtype=D), torch.ones(1, *SHAPE, dtype=D)
    mask[..., :2] = 0
    inpaint(sampler, den, start(5)[:2], known, mask, index=torch.arange(2), jump_length=2, resample=2)
    if isinstance(sampler, DDCM):
        code = sampler.compress(den, start(3))
        sampler.decompress(den, code.indices, code.image)
    assert unchanged(sampler, before)
    again = sampler(den, start(0), seed=1)
    assert torch.equal(again.x, first.x)
    assert again.nfe == first.nfe
    assert (again.evaluations is None) == (first.evaluations is None)
    assert first.evaluations is None or torch.equal(first.evaluations, again.evaluations)  # type: ignore[arg-type]


@every
def test_two_threads_share_a_sampler(name: str) -> None:
    """Eight concurrent calls on different states equal single calls: images, evaluations, and the sampler's attributes."""
    sampler, den = BUILDERS[name](), denoiser()
    expected = [BUILDERS[name]()(den, start(k), seed=k) for k in range(8)]
    before = contents(sampler)
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda k: sampler(den, start(k), seed=k), range(8)))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.x, b.x)
        assert a.nfe == b.nfe
    assert unchanged(sampler, before)


def test_inpainting_does_not_change_the_variance_of_the_sampler() -> None:
    """After inpainting a call uses the sampler's variance again: with fixed_large the images are equal."""
    sampler, den = DDPM(4, FixedLarge()), denoiser()
    variance, before = sampler.variance, sampler(den, start(0), seed=1).x
    known, mask = torch.zeros(1, *SHAPE, dtype=D), torch.zeros(1, *SHAPE, dtype=D)
    mask[..., 2:] = 1
    inpaint(sampler, den, start(5), known, mask, index=torch.arange(3))
    assert sampler.variance is variance
    assert torch.equal(sampler(den, start(0), seed=1).x, before)
