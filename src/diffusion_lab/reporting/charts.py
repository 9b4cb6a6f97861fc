"""Data of the charts that page.js draws as SVG: plain lists of numbers.

Why no chart library: plotly.js (4.8 MB: the page of 100 runs grows from 7.2 to 12 MB) and bokeh (1.3 MB) contain network calls,
which the page must not; uPlot (51 KB, not on PyPI) saves 37 of 90 lines of script, but raises RangeError on a logarithmic axis
fitted to the data, and its canvas ignores the CSS theme; Matplotlib's SVG loses hover values, line filters and the phone layout.
"""

import math
from collections.abc import Sequence
from typing import Any, TypedDict

from diffusion_lab.metrics import figures
from diffusion_lab.reporting.compare import protocol, protocols, scalars
from diffusion_lab.reporting.read import Curve, Evaluation, Row, RunRecord, submapping

POINTS = 300  # maximum points of one line
_FIRST_CURVES = ("val/loss", "train/loss")  # drawn before the other columns of metrics.csv


class Series(TypedDict):
    """One line: index of its run, sampler (or ""), x values, y values (None is a gap)."""

    run: int
    name: str
    x: list[int]
    y: list[float | None]


class Chart(TypedDict):
    """One chart.

    Fields:
        name: title.
        note: "lower is better", "higher is better" or "".
        x: short name of the x value, for tooltips.
        axis: label of the x axis.
        points: whether to mark each point; x is then logarithmic.
        series: the lines.
    """

    name: str
    note: str
    x: str
    axis: str
    points: bool
    series: list[Series]


def thinned(curve: Curve, points: int = POINTS) -> Curve:
    """Reduce a curve to at most `points`: its ends, and the minimum and maximum of equal stretches between, so that no
    spike is lost. NaN is ignored unless a stretch contains nothing else; then one NaN keeps the gap in the line.
    """
    if len(curve) <= points:
        return curve
    inner, count = curve[1:-1], (points - 2) // 2
    kept = [curve[0]]
    for k in range(count):
        stretch = inner[k * len(inner) // count : (k + 1) * len(inner) // count]
        finite = [point for point in stretch if math.isfinite(point[1])]
        low = min(finite or stretch, key=lambda point: point[1])
        high = max(finite or stretch, key=lambda point: point[1])
        kept += sorted({low, high}) if finite else [stretch[0]]
    return [*kept, curve[-1]]


def curves(runs: Sequence[RunRecord]) -> list[Chart]:
    """Return a chart for each column of metrics.csv except the speed, with one line a run."""
    names = [name for name in dict.fromkeys(n for run in runs for n in run.curves) if not name.startswith("speed/")]
    names.sort(key=lambda n: _FIRST_CURVES.index(n) if n in _FIRST_CURVES else len(_FIRST_CURVES))
    return [
        {
            "name": name,
            "note": figures.better(name),
            "x": "step",
            "axis": "step",
            "points": False,
            "series": [_series(i, "", thinned(run.curves[name])) for i, run in enumerate(runs) if name in run.curves],
        }
        for name in names
    ]


def against_nfe(runs: Sequence[RunRecord], others: Sequence[Evaluation]) -> list[Chart]:
    """Return a chart for each metric, with a line over network evaluations for each evaluated run, sampler and protocol.

    The indices of `others`, evaluations of no run in the report, follow those of the runs.
    """
    sources = [run.evaluations for run in runs] + [evaluation.rows for evaluation in others]
    rows = [row for source in sources for row in source if isinstance(row.get("nfe"), int)]
    charts: list[Chart] = []
    for name in dict.fromkeys(name for row in rows for name in scalars(row)):
        texts = protocols([row for row in rows if name in scalars(row)])
        series = []
        for i, source in enumerate(sources):
            lines: dict[str, Curve] = {}
            for row in source:
                if isinstance(row.get("nfe"), int) and name in scalars(row):
                    line = ", ".join(filter(None, (_line_name(row, source), texts[protocol(row)])))
                    lines.setdefault(line, []).append((row["nfe"], scalars(row)[name]))
            series += [_series(i, line, sorted(curve)) for line, curve in lines.items()]
        incomparable = "" if len(texts) == 1 else f"not comparable: {'; '.join(texts.values())}"
        charts.append(
            {
                "name": name,
                "note": "; ".join(filter(None, (figures.better(name), incomparable))),
                "x": "NFE",
                "axis": "network evaluations per sample",
                "points": True,
                "series": series,
            }
        )
    return charts


def _line_name(row: Row, rows: Sequence[Row]) -> str:
    """Return the sampler, with the seed, weights or checkpoint step if `rows` contain several."""
    parts = [str(row.get("sampler"))]
    if len({str(r.get("seed")) for r in rows}) > 1:
        parts.append(f"seed {row.get('seed')}")
    if len({str(r.get("weights")) for r in rows}) > 1:
        parts.append(str(row.get("weights")))
    if len({str(_checkpoint_step(r)) for r in rows}) > 1:
        parts.append(f"step {_checkpoint_step(row)}")
    return ", ".join(parts)


def _checkpoint_step(row: Row) -> Any:
    return submapping(row, "checkpoint").get("step")


def _series(run: int, name: str, curve: Curve) -> Series:
    """Return a line with y rounded to five significant digits; NaN and infinity, which JSON lacks, become None."""
    ys = [float(f"{y:.5g}") if math.isfinite(y) else None for _, y in curve]
    return {"run": run, "name": name, "x": [x for x, _ in curve], "y": ys}
