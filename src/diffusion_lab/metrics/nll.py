"""Bits per dimension of images under a checkpoint, by the variational bound or the ODE."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_lab import likelihood
from diffusion_lab.checkpoint import Run
from diffusion_lab.data.images import Rows, to_float
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import ConfigError
from diffusion_lab.io import progress as show_progress
from diffusion_lab.samplers import DDIM, DDPM, Sampler
from diffusion_lab.variances import FixedSmall, Variance

KINDS = ("vlb", "ode")

Measured = dict[str, Any]


def chain(sampler: Sampler, denoiser: Denoiser) -> dict[str, Any]:
    """Return the options of `measure(kind="vlb")` for the chain of a sampler: times, η and variance.

    Raises:
        ConfigError: the sampler is not a chain of Gaussians: deterministic (DDIM with η = 0), or a solver of an ODE or SDE.
    """
    eta = sampler.eta if isinstance(sampler, DDIM) else 1.0
    if not isinstance(sampler, DDPM | DDIM) or eta == 0 or sampler.deterministic:
        how = " with eta=0" if isinstance(sampler, DDIM) else ""
        raise ConfigError(
            f"{type(sampler).__name__}{how} has no finite variational bound, which requires noise in every step: "
            "write samplers=[ddpm], samplers=[{ddim:{eta:1}}], or samplers=[ode] for the likelihood of the ODE"
        )
    return {"times": sampler.time_grid(denoiser), "eta": eta, "variance": sampler.variance}


def measure(
    run: Run,
    images: NDArray[Any] | Rows | Tensor,
    condition: Mapping[str, Tensor] | None = None,
    *,
    kind: str = "vlb",
    steps: int | None = None,
    variance: Variance | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
    **options: Any,
) -> Measured:
    """Compute the mean bits per dimension of images, and its terms. x̂_0 is not clipped unless `clip=True` is passed.

    Args:
        run: a run from `load_checkpoint`, on its device.
        images: images, uint8 (N, C, H, W).
        condition: keyword arguments of the network, each with N rows, or None.
        kind: "vlb" for the variational bound of the ancestral chain, "ode" for the density of the ODE on dequantized images.
        steps: number of steps of the chain; None for every step of a table, or the times in the option `times`.
        variance: variance of the chain; None for fixed_small.
        seed: seed of the noise, which depends on (seed, i) for image i.
        batch_size: number of images per batch; None for all images.
        progress: whether to show a progress bar.
        options: options of `likelihood.vlb` (grid, times, eta, decoder, last, clip) or `likelihood.ode` (divergence, dequantize,
            rtol, atol, start), e.g. `**chain(sampler, run.denoiser)`.

    Returns:
        A dictionary with

        - kind, n, seed: the arguments.
        - bpd, standard_error: the mean over images and its standard error (None for one image).
        - nfe: number of network evaluations per image; the mean for the adaptive solver.
        - settings: all other options that affect the result, in plain values.
        - values: bits per dimension of each image, float64 (N,).
        - terms: a list of {term, t, bpd, standard_error}. For the bound, the terms are L_0, L in the order of t, and L_T; their
          sum is bpd. For the ODE, the terms are the prior and the divergence; their sum plus log₂ 127.5 is bpd.

    Raises:
        ConfigError: if images are not uint8 or there are none, a condition does not have N rows, and as for the likelihoods.
    """
    if kind not in KINDS:
        raise ConfigError(f"nll kind {kind!r} is unknown: write {' or '.join(KINDS)}")
    if images.dtype not in (np.uint8, torch.uint8) or len(images) < 1:
        raise ConfigError(
            f"nll needs at least one image of type uint8, not {len(images)} of {images.dtype}: name another split"
        )
    for name, value in (condition or {}).items():
        if len(value) != len(images):
            raise ConfigError(f"nll has {len(value)} rows of {name} for {len(images)} images: pass one for each image")
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: write at least 1")
    if kind == "vlb":
        options |= {"steps": steps, "variance": variance or FixedSmall()}
    n, values, evaluations = len(images), [], 0.0
    total = square = torch.zeros(())
    starts = range(0, n, batch_size or n)
    for start in show_progress(starts, "likelihood", "batch", progress and len(starts) > 1):
        rows = slice(start, min(start + (batch_size or n), n))
        part = (_bound if kind == "vlb" else _density)(
            run.denoiser,
            to_float(images[rows]).to(run.device),
            condition={name: value[rows].to(run.device) for name, value in (condition or {}).items()},
            seed=seed,
            index=torch.arange(rows.start, rows.stop),
            **options,
        )
        values.append(part.bpd.cpu())
        evaluations += part.evaluations
        total, square = total + part.terms.sum(0), square + part.terms.square().sum(0)
    mean, error = likelihood.average(torch.cat(values))
    errors = ((square / n - (total / n).square()).clamp(min=0) / max(n - 1, 1)).sqrt()
    measured = {
        "kind": kind,
        "n": n,
        "seed": seed,
        "bpd": mean,
        "standard_error": error,
        "nfe": evaluations / n,
        "settings": part.settings,
        "values": torch.cat(values).numpy(),
    }
    terms = zip(part.names, (total / n).tolist(), errors.tolist(), strict=True)
    measured["terms"] = [
        {"term": name, "t": t, "bpd": value, "standard_error": spread if n > 1 else None}
        for (name, t), value, spread in terms
    ]
    return measured


class _Part(NamedTuple):
    """Likelihood of a batch."""

    bpd: Tensor  # (B,)
    evaluations: float  # network evaluations, summed over the batch
    names: list[tuple[str, float | None]]  # names and times of the terms
    terms: Tensor  # (B, len(names)) on the CPU
    settings: dict[str, Any]


def _bound(denoiser: Denoiser, x0: Tensor, **options: Any) -> _Part:
    result = likelihood.vlb(denoiser, x0, **options)
    times = result.times.tolist()
    names: list[tuple[str, float | None]] = [("L_0", times[0]), *(("L", t) for t in times[1:]), ("L_T", times[-1])]
    terms = torch.cat([result.terms["L_0"][:, None], result.terms["L"], result.terms["L_T"][:, None]], 1)
    settings = {
        **_plain({"grid": "linspace", "eta": 1.0, **options}),
        "steps": result.nfe,
        "variance": type(options["variance"]).__name__,
        "decoder": result.decoder,
        "last": result.last,
        "clipped": result.clipped,
    }
    if options.get("times") is not None:
        del settings["grid"]
    return _Part(result.bpd, result.nfe * len(x0), names, terms.cpu(), settings)


def _density(denoiser: Denoiser, x0: Tensor, **options: Any) -> _Part:
    result = likelihood.ode(denoiser, x0, **options)
    defaults = {"divergence": "hutchinson", "dequantize": True, "rtol": 1e-5, "atol": 1e-5}
    return _Part(
        result.bpd,
        float(result.evaluations.sum()),
        [("prior", 1.0), ("divergence", None)],
        torch.stack([result.terms["prior"], result.terms["divergence"]], 1).cpu(),
        {**_plain({**defaults, **options}), "start": result.start, "clipped": False},
    )


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that have plain values, except seed and progress."""
    return {k: v for k, v in options.items() if isinstance(v, str | int | float) and k not in ("seed", "progress")}
