"""What the page's curves are drawn from: plain lists of numbers."""

import math
from collections.abc import Sequence
from typing import Any

from diffusion_lab.metrics import figures
from diffusion_lab.reporting.compare import protocol, protocols, scalars
from diffusion_lab.reporting.read import Curve, Evaluation, Run, within

POINTS = 300  # of one line
Chart = dict[str, Any]


def thinned(curve: Curve, points: int = POINTS) -> Curve:
    """At most `points` of a curve: its ends, and the least and greatest value of each stretch between, so that no spike is
    lost. NaN counts as neither; a stretch of nothing else keeps one, the gap in the line."""
    if len(curve) <= points:
        return curve
    inner, count = curve[1:-1], (points - 2) // 2
    kept = [curve[0]]
    for k in range(count):
        part = inner[k * len(inner) // count : (k + 1) * len(inner) // count]
        finite = [point for point in part if math.isfinite(point[1])]
        low = min(finite or part, key=lambda point: point[1])
        high = max(finite or part, key=lambda point: point[1])
        kept += sorted({low, high}) if finite else [part[0]]
    return [*kept, curve[-1]]


def curves(runs: Sequence[Run]) -> list[Chart]:
    """A chart for each column of metrics.csv that is a loss, a figure of quality, or the user's own."""
    names = dict.fromkeys(name for run in runs for name in run.curves)
    shown = [n for n in names if not n.startswith("speed/")]
    shown.sort(key=lambda n: ("val/loss", "train/loss").index(n) if n in ("val/loss", "train/loss") else 2)
    return [
        {
            "name": name,
            "note": figures.better(name),
            "x": "step",
            "axis": "step",
            "points": False,
            "series": [_series(i, "", thinned(run.curves[name])) for i, run in enumerate(runs) if name in run.curves],
        }
        for name in shown
    ]


def against_nfe(runs: Sequence[Run], others: Sequence[Evaluation]) -> list[Chart]:
    """A chart for each metric and protocol: a line for each run and sampler over network evaluations. Evaluations of no run
    come after the runs."""
    sources = [
        *((i, run.evaluations) for i, run in enumerate(runs)),
        *((len(runs) + i, e.rows) for i, e in enumerate(others)),
    ]
    rows = [row for _, own in sources for row in own]
    charts: list[Chart] = []
    for key, said in protocols(rows).items() if rows else ():
        for name in dict.fromkeys(name for row in rows if protocol(row) == key for name in scalars(row)):
            series = []
            for i, own in sources:
                lines: dict[str, Curve] = {}
                for row in own:
                    if protocol(row) == key and name in scalars(row) and isinstance(row.get("nfe"), int):
                        lines.setdefault(_sampler(row, own), []).append((row["nfe"], scalars(row)[name]))
                series += [_series(i, sampler, sorted(line)) for sampler, line in lines.items()]
            if series:
                title = f"{name} ({said})" if said else name
                note, axis = figures.better(name), "network evaluations a sample"
                charts.append({"name": title, "note": note, "x": "NFE", "axis": axis, "points": True, "series": series})
    return charts


def _sampler(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The sampler, and the seed, the weights or the step of the checkpoint where one run was judged with several."""
    named = [str(row.get("sampler"))]
    for key in ("seed", "weights"):
        if len({str(r.get(key)) for r in rows}) > 1:
            named.append(f"{key} {row.get(key)}" if key == "seed" else str(row.get(key)))
    if len({str(within(r, "checkpoint").get("step")) for r in rows}) > 1:
        named.append(f"step {within(row, 'checkpoint').get('step')}")
    return ", ".join(named)


def _series(run: int, name: str, curve: Curve) -> dict[str, Any]:
    """Values to five digits; NaN and infinity, which JSON has not, are null: a gap."""
    ys = [float(f"{y:.5g}") if math.isfinite(y) else None for _, y in curve]
    return {"run": run, "name": name, "x": [x for x, _ in curve], "y": ys}
