"""Bits per dimension of a data set under a checkpoint: `metrics=[nll]` of evaluate.py.

`measure` gives the numbers, `chain` the bound's options for a sampler, `write` the tables and the plot.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
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
from diffusion_lab.io import write_file
from diffusion_lab.samplers import DDIM, DDPM, Sampler
from diffusion_lab.variances import FixedSmall, Variance

KINDS = ("vlb", "ode")
COLOURS = ("#3566a8", "#c8553d", "#4a8f5c", "#8a63a6", "#b0862b", "#4f9aa3", "#7a7a7a")

Measured = dict[str, Any]


def chain(sampler: Sampler, denoiser: Denoiser) -> dict[str, Any]:
    """What `measure(kind="vlb")` needs to judge the chain that a sampler walks: its times, η and variance.

    Raises:
        ValueError: the sampler is no chain of Gaussians: deterministic (DDIM with η = 0), or a solver of an ODE or SDE.
    """
    eta = sampler.eta if isinstance(sampler, DDIM) else 1.0
    if not isinstance(sampler, DDPM | DDIM) or eta == 0 or sampler.deterministic:
        how = " with eta=0" if isinstance(sampler, DDIM) else ""
        raise ConfigError(
            f"the variational bound is that of a chain with noise, and {type(sampler).__name__}{how} is none, so it has no "
            "finite one: write samplers=[ddpm] or samplers=[{ddim:{eta:1}}], or take the likelihood of the ODE"
        )
    return {"times": sampler.time_grid(denoiser), "eta": eta, "variance": sampler.variance}


def measure(
    run: Run,
    images: NDArray[np.uint8] | Rows | Tensor,
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
    """Mean bits per dimension of images, with what it is made of. x̂_0 is not clipped unless `clip=True` is among the options.

    Args:
        run: of a checkpoint, on the device that is to work.
        images: uint8 (N, C, H, W); say which split they are.
        condition: keyword arguments for the network, each with N rows; None asks it without.
        kind: "vlb", the variational bound of the ancestral chain, or "ode", the density of the ODE on dequantized images.
        steps: of the bound's chain; None is every step of a table, or its `times` among the options.
        variance: of the bound's chain; default fixed_small.
        seed: of all noise; image i has that of (seed, i), whatever the batch.
        batch_size: images at a time; None is all at once.
        progress: show a bar.
        options: for `likelihood.vlb` (grid, times, eta, decoder, last, clip) or `likelihood.ode` (divergence, dequantize, rtol,
            atol, start), e.g. `**chain(sampler, run.denoiser)`.

    Returns:
        - kind, n, seed: as given.
        - bpd, standard_error: the mean over images and its standard error (None for one image).
        - nfe: network evaluations an image, the mean for the adaptive solver.
        - settings: what else decides the number, in plain values.
        - values: float64 (N,), each image's.
        - terms: a list of {term, t, bpd, standard_error}. For the bound L_0, then L in the order of t, then L_T; their means add
          up to bpd. For the ODE the prior and the divergence, which with log₂ 127.5 add up to it.

    Raises:
        ValueError: as the likelihoods do; images that are not uint8, no image, or a condition of another number.
    """
    if kind not in KINDS:
        raise ConfigError(f"nll kind {kind!r} is unknown: write {' or '.join(KINDS)}")
    if images.dtype not in (np.uint8, torch.uint8) or len(images) < 1:
        raise ConfigError(f"nll needs images as uint8, at least one, and has {len(images)} of {images.dtype}")
    for name, value in (condition or {}).items():
        if len(value) != len(images):
            raise ConfigError(f"nll has {len(value)} rows of {name} for {len(images)} images: give one for each")
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
    found = {
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
    found["terms"] = [
        {"term": name, "t": t, "bpd": value, "standard_error": spread if n > 1 else None}
        for (name, t), value, spread in terms
    ]
    return found


class _Part(NamedTuple):
    """What a likelihood says of a batch."""

    bpd: Tensor  # (B,)
    evaluations: float  # summed over the batch
    names: list[tuple[str, float | None]]  # of the terms, with their times
    terms: Tensor  # (B, len(names)) on the CPU
    settings: dict[str, Any]


def _bound(denoiser: Denoiser, x0: Tensor, **options: Any) -> _Part:
    found = likelihood.vlb(denoiser, x0, **options)
    times = found.times.tolist()
    names: list[tuple[str, float | None]] = [("L_0", times[0]), *(("L", t) for t in times[1:]), ("L_T", times[-1])]
    terms = torch.cat([found.terms["L_0"][:, None], found.terms["L"], found.terms["L_T"][:, None]], 1)
    settings = {
        **_plain({"grid": "linspace", "eta": 1.0, **options}),
        "steps": found.nfe,
        "variance": type(options["variance"]).__name__,
        "decoder": found.decoder,
        "last": found.last,
        "clipped": found.clipped,
    }
    if options.get("times") is not None:
        del settings["grid"]
    return _Part(found.bpd, found.nfe * len(x0), names, terms.cpu(), settings)


def _density(denoiser: Denoiser, x0: Tensor, **options: Any) -> _Part:
    found = likelihood.ode(denoiser, x0, **options)
    defaults = {"divergence": "hutchinson", "dequantize": True, "rtol": 1e-5, "atol": 1e-5}
    return _Part(
        found.bpd,
        float(found.evaluations.sum()),
        [("prior", 1.0), ("divergence", None)],
        torch.stack([found.terms["prior"], found.terms["divergence"]], 1).cpu(),
        {**_plain({**defaults, **options}), "start": found.start, "clipped": False},
    )


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """What of the options is a plain value and no key of the noise."""
    return {k: v for k, v in options.items() if isinstance(v, str | int | float) and k not in ("seed", "progress")}


def write(out: Path, measured: Mapping[str, Measured]) -> None:
    """Writes what was measured, each under its name: nll_terms.csv, nll_images.csv, and nll_terms.png where there are bounds.

    Args:
        out: the folder.
        measured: results of `measure`, of the same images, by a name for the table and the plot, e.g. "ddpm, 50 steps".
    """
    fields = ["name", "kind", "term", "t", "bpd", "standard_error"]
    rows = [{"name": name, "kind": m["kind"], **term} for name, m in measured.items() for term in m["terms"]]
    write_file(out / "nll_terms.csv", _table(fields, ([row[field] for field in fields] for row in rows)))
    columns = [m["values"].tolist() for m in measured.values()]
    table = ([i, *row] for i, row in enumerate(zip(*columns, strict=True)))
    write_file(out / "nll_images.csv", _table(["image", *measured], table))
    bounds = {name: m for name, m in measured.items() if m["kind"] == "vlb"}
    if bounds:
        write_file(out / "nll_terms.png", _plot(bounds))


def _table(fields: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(fields)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    return text.getvalue()


def _plot(bounds: Mapping[str, Measured]) -> bytes:
    """The bound term by term over t, on logarithmic axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4 + 0.12 * len(bounds)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (name, m), colour in zip(bounds.items(), COLOURS * len(bounds), strict=False):
        error = "" if m["standard_error"] is None else f" ± {m['standard_error']:.2g}"
        label: str | None = f"{name}: {m['bpd']:.4g}{error} bits/dim"
        dots = "." if len(m["terms"]) <= 60 else ""  # of each term, where they are few
        for term, marker, size in (("L_0", "o", 7), ("L", dots, 5), ("L_T", "^", 7)):
            # a term of 0 has no place on the axis: L_T of a curve that ends in noise
            points = [(row["t"], row["bpd"]) for row in m["terms"] if row["term"] == term and row["bpd"] > 0]
            x, y = zip(*points, strict=True) if points else ((), ())
            axes.plot(x, y, color=colour, linewidth=1.8, marker=marker, markersize=size, label=label)
            label = None
    _dress(axes, bounds)
    figure.legend(loc="outside lower center", ncols=1 if len(bounds) < 4 else 2, frameon=False, fontsize=8.5)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


def _dress(axes: Any, bounds: Mapping[str, Measured]) -> None:
    first = min(row["t"] for m in bounds.values() for row in m["terms"])
    n = next(iter(bounds.values()))["n"]
    axes.set_title(
        f"The variational bound term by term, mean over {n:,} images (● $L_0$, lines $L$, ▲ $L_T$)",
        fontsize=10,
        loc="left",
    )
    axes.set_xscale("log" if first > 1e-4 else "linear")  # on ve and edm it is 0+, and t a logarithm already
    axes.set_yscale("log")
    axes.set_xlabel("t", fontsize=9)
    axes.set_ylabel("bits per dimension", fontsize=9)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, color="#999999")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#999999")
