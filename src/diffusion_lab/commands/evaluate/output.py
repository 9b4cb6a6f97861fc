"""Write and print the results of an evaluation: metrics.json, metrics.csv, quality.png, a table, and loggers."""

import csv
import io
import json
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_lab.instantiation import accepted, instantiate
from diffusion_lab.io import write_file
from diffusion_lab.metrics.classifier import CONFIDENT
from diffusion_lab.metrics.figures import better, number
from diffusion_lab.training.loggers import Identity, log_table

Row = dict[str, Any]
COLORS = ("#1f6f8b", "#d1495b", "#5b8c5a", "#8e6c8a", "#e09f3e", "#3d405b", "#7f7f7f", "#b56576")


def write(out: Path, rows: list[Row]) -> None:
    """Write metrics.json, metrics.csv and quality.png.

    Raises:
        OSError: if a file cannot be written.
    """
    plot = _plot(rows)  # before any file is written
    write_file(out / "metrics.json", json.dumps(rows, indent=2, ensure_ascii=False))
    text = io.StringIO()
    flat = [_flat(row) for row in rows]
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in flat for name in row)))
    writer.writeheader()
    writer.writerows(flat)
    write_file(out / "metrics.csv", text.getvalue())
    if plot is not None:
        write_file(out / "quality.png", plot)


def _flat(row: Row) -> Row:
    """Return one line of metrics.csv."""
    head = {k: row[k] for k in ("sampler", "steps", "nfe", "n", "seed", "split", "weights", "extractor")}
    for name, value in row["metrics"].items():
        if isinstance(value, list):
            head |= {f"{name}_{i}": v for i, v in enumerate(value)}
        else:
            head[name] = value
            if "spread" in row:
                head[f"{name}_spread"] = row["spread"][name]
    return {**head, "seconds": row["seconds"]}


def scalars(row: Row) -> dict[str, float]:
    """Return the metrics of the printed table, without lists and standard errors."""
    return {k: v for k, v in row["metrics"].items() if not isinstance(v, list) and not k.endswith("_std")}


# the printed table --------------------------------------------------------------------------------------------------------


def show(rows: list[Row], out: Path) -> None:
    """Print the number and origin of the images, the references, and the table."""
    first = rows[0]
    likelihood = first["sampler"] is not None and "seeds" not in first  # metrics=[nll], which needs no samples
    of = f"seed {first['seed']}, weights {first['weights']}, " if first["weights"] else ""
    repeats = f", mean ± spread of {len(first['seeds'])} seeds" if "spread" in first else ""
    against = "likelihood of" if likelihood else "against"
    print(f"{first['n']:,} images, {of}{against} {first['data']['name']} {first['split']}{repeats}")
    for name, reference in first["references"].items():
        n = f"{reference['n']:,} images" if reference["n"] else "an unknown number of images"
        accuracy = reference.get("accuracy")
        quality = (
            ""
            if accuracy is None
            else f"; {accuracy:.2%} accuracy on held-out images, confident: probability of at least {CONFIDENT:.0%}"
        )
        print(f"{name} {reference['weights'][:8]}: reference of {n}{quality}")
    print(table(rows))
    print(f"written to {out}")


def table(rows: list[Row]) -> str:
    """Format rows as aligned columns."""
    names = list(dict.fromkeys(name for row in rows for name in scalars(row)))
    sampled = any(row["sampler"] for row in rows)
    head = [*(["sampler", "steps", "nfe"] if sampled else []), *names]
    lines = [head]
    for row in rows:
        labels = [str(row["sampler"] or "–"), str(row["steps"] or "–"), str(row["nfe"] or "–")] if sampled else []
        lines.append([*labels, *(_cell(row, name) for name in names)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    left = 1 if sampled else 0
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _cell(row: Row, name: str) -> str:
    if name not in row["metrics"]:
        return "–"
    spread = f" ± {number(row['spread'][name])}" if "spread" in row and name in row["spread"] else ""
    return number(row["metrics"][name]) + spread


# the plot -----------------------------------------------------------------------------------------------------------------


def _plot(rows: list[Row]) -> bytes | None:
    """Plot metrics against network evaluations, a panel per metric and a line per sampler.

    Returns:
        A PNG; None if no row has a sampler or a metric.
    """
    rows = [row for row in rows if row["nfe"]]
    names = list(dict.fromkeys(name for row in rows for name in scalars(row)))
    if not rows or not names:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4.4 * columns, 3.4 * lines + 0.7), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    samplers = list(dict.fromkeys(row["sampler"] for row in rows))
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for name, axes in zip(names, panels, strict=False):
        for sampler, color in zip(samplers, COLORS * len(samplers), strict=False):
            line = [row for row in rows if row["sampler"] == sampler and name in row["metrics"]]
            line = sorted(line, key=lambda row: row["nfe"])
            spread = [r["spread"][name] for r in line] if all(name in r.get("spread", {}) for r in line) else None
            axes.errorbar(
                [row["nfe"] for row in line],
                [row["metrics"][name] for row in line],
                yerr=spread,
                label=sampler,
                color=color,
                marker="o",
                markersize=5,
                linewidth=1.8,
                capsize=3,
            )
        _format_axes(axes, name, sorted({row["nfe"] for row in rows}), rows)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    first = rows[0]
    parts = [first["extractor"], first["weights"]]
    figure.suptitle(
        " · ".join([f"{first['data']['name']}, {first['split']}", f"{first['n']:,} images", *filter(None, parts)]),
        fontsize=10,
        color="#444444",
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False, fontsize=9)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


def _format_axes(axes: Any, name: str, nfe: list[int], rows: list[Row]) -> None:
    axes.set_title(f"{name}  ({better(name)})" if better(name) else name, fontsize=10, loc="left")
    axes.set_xlabel("network evaluations per sample", fontsize=9)
    axes.set_xscale("log")
    axes.set_xticks(nfe, [str(v) for v in nfe])
    axes.minorticks_off()
    axes.set_xlim(nfe[0] / 1.25, nfe[-1] * 1.25)
    values = [row["metrics"][name] for row in rows if name in row["metrics"]]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, color="#999999")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")


# W&B ----------------------------------------------------------------------------------------------------------------------


def log(settings: Mapping[str, Any], out: Path, rows: list[Row]) -> None:
    """Log the table with every logger of the group `logger`, and the plot with W&B."""
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    values = [[row.get(name) for name in names] for row in flat]
    curves = list(scalars(rows[0])) if rows[0]["sampler"] else []
    identity = Identity(out.name, None, [], secrets.token_hex(4))
    for name, node in (settings.get("logger") or {}).items():
        if node is not None:
            if node.get("save_dir") == settings["run_dir"]:  # out= replaces the run folder
                node = {**node, "save_dir": str(out)}
            arguments = accepted(node, save_dir=str(out), identity=identity, config=dict(settings), job_type="evaluate")
            log_table(instantiate(node, f"logger.{name}", **arguments), out, "quality", names, values, curves)
