"""Write the files of metrics=[nll]: tables of all terms and all images, and a plot of the variational bounds."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion_lab.io import write_file
from diffusion_lab.metrics.nll import Measured

COLORS = ("#3566a8", "#c8553d", "#4a8f5c", "#8a63a6", "#b0862b", "#4f9aa3", "#7a7a7a")


def write(out: Path, measured: Mapping[str, Measured]) -> None:
    """Write nll_terms.csv, nll_images.csv, and nll_terms.png if there are bounds.

    Args:
        out: the output folder.
        measured: results of `nll.measure` for the same images, by a name for tables and plot, e.g. "ddpm, 50 steps".
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
    """Return a PNG of the terms of the bounds over t, on logarithmic axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4 + 0.12 * len(bounds)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (name, m), color in zip(bounds.items(), COLORS * len(bounds), strict=False):
        error = "" if m["standard_error"] is None else f" ± {m['standard_error']:.2g}"
        label: str | None = f"{name}: {m['bpd']:.4g}{error} bits/dim"
        dots = "." if len(m["terms"]) <= 60 else ""  # a marker for each of few terms
        for term, marker, size in (("L_0", "o", 7), ("L", dots, 5), ("L_T", "^", 7)):
            # A logarithmic axis has no 0: L_T of a schedule with zero terminal SNR.
            points = [(row["t"], row["bpd"]) for row in m["terms"] if row["term"] == term and row["bpd"] > 0]
            x, y = zip(*points, strict=True) if points else ((), ())
            axes.plot(x, y, color=color, linewidth=1.8, marker=marker, markersize=size, label=label)
            label = None
    _style_axes(axes, bounds)
    figure.legend(loc="outside lower center", ncols=1 if len(bounds) < 4 else 2, frameon=False, fontsize=8.5)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


def _style_axes(axes: Any, bounds: Mapping[str, Measured]) -> None:
    first = min(row["t"] for m in bounds.values() for row in m["terms"])
    n = next(iter(bounds.values()))["n"]
    axes.set_title(
        f"The variational bound term by term, mean over {n:,} images (● $L_0$, lines $L$, ▲ $L_T$)",
        fontsize=10,
        loc="left",
    )
    # On ve and edm the first time is 0+, and t is logarithmic in σ
    axes.set_xscale("log" if first > 1e-4 else "linear")
    axes.set_yscale("log")
    axes.set_xlabel("t", fontsize=9)
    axes.set_ylabel("bits per dimension", fontsize=9)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, color="#999999")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#999999")
