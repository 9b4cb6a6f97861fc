"""The page: one HTML file without any outside resource."""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusion_lab.reporting import charts, compare, sections
from diffusion_lab.reporting.compare import NONE, Column
from diffusion_lab.reporting.html import Html, el, join
from diffusion_lab.reporting.read import Evaluation, Found, Run
from diffusion_lab.reporting.sections import link

MARK = "diffusion-lab report"  # says of a file that it may be written anew
_HERE = Path(__file__).parent


def page(found: Found, title: str) -> str:
    """The whole file."""
    runs, chosen, results = _ordered(found.runs)
    curves, nfe = charts.curves(runs), charts.against_nfe(runs, found.evaluations)
    made = {
        "Runs": sections.table(runs, chosen, results),
        "Curves": sections.plots("curves", "Curves", curves),
        "NFE": sections.plots("nfe", "Quality against network evaluations", nfe),
        "Samples": sections.samples(runs, chosen, results),
        "What differs": sections.differences(runs),
        "Commands": sections.commands(runs, chosen),
        "Evaluations": sections.evaluations(runs, found.evaluations),
        "Left out": sections.left_out(found.left_out),
    }
    there = {name: section for name, section in made.items() if section}
    body = [
        el("header", el("h1", title), _summary(runs, chosen, results, found)),
        el("nav", [el("a", name, href=f"#{sections.key(name)}") for name in there], aria_label="Sections"),
        el("main", *there.values()),
        el("dialog", el("form", el("button", "Close"), method="dialog"), el("img", alt=""), id="large"),
    ]
    return _document(title, join(body), _data(runs, chosen, found.evaluations, {"curves": curves, "nfe": nfe}))


def _ordered(runs: list[Run]) -> tuple[list[Run], list[Column], list[Column]]:
    """Runs best first, and the columns in that order."""
    if not runs:
        return [], [], []
    first = compare.results(runs)[0]
    sign = -1 if first.better == "high" else 1
    missing = [not (isinstance(v, int | float) and math.isfinite(v)) for v in first.values]
    order = sorted(range(len(runs)), key=lambda i: (missing[i], 0 if missing[i] else sign * first.values[i]))
    runs = [runs[i] for i in order]
    return runs, compare.choices(runs), compare.results(runs)


def _document(title: str, body: Html, data: str) -> str:
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    head = [
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="generator", content=MARK),
        el("meta", name="color-scheme", content="light dark"),
        el("link", rel="icon", href="data:,"),
        el("title", title),
        el("style", Html((_HERE / "page.css").read_text(encoding="utf-8"))),
    ]
    tail = [el("script", Html(data), type="application/json", id="data"), el("script", Html(script))]
    return f'<!doctype html>\n<html lang="en"><head>{join(head)}</head>\n<body>{body}\n{join(tail)}</body></html>\n'


def _data(
    runs: Sequence[Run], chosen: Sequence[Column], others: Sequence[Evaluation], drawn: dict[str, list[charts.Chart]]
) -> str:
    """What the script draws. `<` never stands in it, so that no text ends the element."""
    named = [
        {"name": run.name, "label": compare.label(chosen, i, run), "values": [str(c.text(i)) for c in chosen]}
        for i, run in enumerate(runs)
    ]
    named += [{"name": e.folder.name, "label": e.of, "values": [NONE] * len(chosen)} for e in others]
    content = {
        "runs": named,
        "choices": [column.key for column in chosen] if len(runs) > 1 else [],
        "charts": drawn,
    }
    return json.dumps(content, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")


# what stands first --------------------------------------------------------------------------------------------------------


def _summary(runs: Sequence[Run], chosen: Sequence[Column], results: Sequence[Column], found: Found) -> list[Html]:
    if runs:
        said = [el("p", *_winner(runs, chosen, results[0]), class_="winner"), *_caveat(runs, results[0])]
    else:
        said = [el("p", "Evaluations only." if found.evaluations else "No run to show.", class_="winner")]
    if n := len(found.left_out):
        link = el("a", f"{n} folder{'s' * (n > 1)} left out", href="#left-out")
        said.append(el("p", link, ", with the reasons.", class_="note"))
    return said


def _winner(runs: Sequence[Run], chosen: Sequence[Column], first: Column) -> list[Any]:
    """Runs are sorted by the first column of results, the best first."""
    name = first.key.removeprefix("min ")
    if len(runs) == 1:
        value = f": {first.key} {first.text(0)}" if first.values[0] is not None else ""
        return [f"One run, {runs[0].steps:,} steps{value}.", _state(runs[0])]
    if sum(isinstance(v, int | float) and math.isfinite(v) for v in first.values) < 2:
        return [f"{len(runs)} runs, of which fewer than two have a {name} to compare."]
    extreme = "Lowest" if first.better == "low" else "Highest"
    said = compare.label(chosen, 0, runs[0])
    how = f" ({first.details[0]})" if first.details else ""
    told = f": {said}." if said != runs[0].name else "."
    mean = _mean(compare.over_seeds(runs, chosen, first), name)
    return [
        f"{len(runs)} runs. {extreme} {name}: ",
        el("strong", first.text(0)),
        how,
        ", ",
        link(runs[0]),
        told,
        _state(runs[0]),
        mean,
    ]


def _mean(columns: Sequence[Column], name: str) -> str:
    """The best mean over seeds, "" where there is none."""
    if not columns:
        return ""
    *others, count, mean, spread = columns
    said = " · ".join(column.text(0) for column in others)
    extreme = "lowest" if mean.better == "low" else "highest"
    figure = mean.text(0) if spread.values[0] is None else f"{mean.text(0)} ± {spread.text(0)} ({count.text(0)} runs)"
    return f" Over seeds, the {extreme} mean {name} is {figure}{f': {said}' if said else ''}."


def _caveat(runs: Sequence[Run], first: Column) -> list[Html]:
    """Losses of different objectives, schedules, … are different quantities."""
    unfair = compare.incomparable(runs)
    if not unfair:
        return []
    why = f"the {_listed(unfair)} differ{'s' * (len(unfair) == 1)}"
    if not first.key.endswith("/loss"):
        return [el("p", f"Losses do not compare across these runs, since {why}.", class_="note")]
    remedy = (el("code", "quality=classifier"), " while training, or ", el("code", "python src/evaluate.py ckpt=RUN"))
    said = f"The losses of these runs are not of one thing, since {why}: a lower one does not mean better samples. "
    return [el("p", said, *remedy, " for each of them, gives figures that compare.", class_="note")]


def _state(run: Run) -> str:
    return "" if run.status == "done" else f" It is {run.status}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
