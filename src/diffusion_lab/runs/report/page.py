"""The page: one HTML file without any outside resource."""

import base64
import hashlib
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusion_lab.runs import figures
from diffusion_lab.runs.report import charts, compare, grids
from diffusion_lab.runs.report.compare import NONE, Column
from diffusion_lab.runs.report.html import Html, el, join
from diffusion_lab.runs.report.read import Evaluation, Found, LeftOut, Row, Run

MARK = "diffusion-lab report"  # says of a file that it may be written anew
_HERE = Path(__file__).parent
_NAMED = 12  # runs named beside a value that they share


def page(found: Found, title: str) -> str:
    """The whole file."""
    runs, chosen, results = _ordered(found.runs)
    curves, nfe = charts.curves(runs), charts.against_nfe(runs, found.evaluations)
    sections = {
        "Runs": _table(runs, chosen, results),
        "Curves": _charts("curves", "Curves", curves),
        "NFE": _charts("nfe", "Quality against network evaluations", nfe),
        "Samples": _grids(runs, chosen, results),
        "What differs": _differences(runs),
        "Commands": _commands(runs, chosen),
        "Evaluations": _evaluations(runs, found.evaluations),
        "Left out": _left_out(found.left_out),
    }
    there = {name: section for name, section in sections.items() if section}
    body = [
        el("header", el("h1", title), _summary(runs, chosen, results, found)),
        el("nav", [el("a", name, href=f"#{_key(name)}") for name in there], aria_label="Sections"),
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
    if first.best() is None:
        return [f"{len(runs)} runs, of which fewer than two have a {name} to compare."]
    extreme = "Lowest" if first.better == "low" else "Highest"
    said = compare.label(chosen, 0, runs[0])
    told = f": {said}." if said != runs[0].name else "."
    return [
        f"{len(runs)} runs. {extreme} {name}: ",
        el("strong", first.text(0)),
        ", ",
        _link(runs[0]),
        told,
        _state(runs[0]),
    ]


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


def _link(run: Run) -> Html:
    return el("a", f"run {run.name}", href=f"#{_id(run)}")


def _id(run: Run) -> str:
    """Of a run's card: letters and digits, whatever its folder is called."""
    return "run-" + hashlib.sha256(str(run.folder.absolute()).encode("utf-8", "replace")).hexdigest()[:8]


# sections -----------------------------------------------------------------------------------------------------------------


def _section(name: str, title: str, *children: Any) -> Html:
    """A section that the navigation calls `name`."""
    key = _key(name)
    return el("section", el("h2", title, id=f"{key}-title"), *children, id=key, aria_labelledby=f"{key}-title")


def _key(name: str) -> str:
    return name.lower().replace(" ", "-")


def _scroll(label: str, content: Html) -> Html:
    """A box that scrolls sideways by itself, also by keyboard."""
    return el("div", content, class_="scroll", tabindex="0", role="region", aria_label=label)


def _table(runs: Sequence[Run], chosen: Sequence[Column], results: Sequence[Column]) -> Html:
    if not runs:
        return Html("")
    name = Column("run", [run.name for run in runs])
    columns = [name, *chosen, *results]
    best = {id(c): c.best() for c in results if c.ranks}
    measured = {id(c) for c in results if c.key != "state"}
    head = [
        el(
            "th",
            el("button", c.key, title=c.about or None),
            scope="col",
            data_key=c.key,
            class_="number" if id(c) in measured else None,
            aria_sort=("descending" if c.better == "high" else "ascending") if c is results[0] else None,
        )
        for c in columns
    ]
    rows = []
    for i, run in enumerate(runs):
        cells = [el("th", _link(run), scope="row", data_v=run.name)]
        for c in columns[1:]:
            top = best.get(id(c)) == i
            kinds = ["number"] * (id(c) in measured) + ["best"] * top
            text: Any = c.text(i)
            if c.key == "state" and run.status != "done":
                text = el("span", text, title=run.status, class_="warn")
            cells.append(el("td", text, class_=" ".join(kinds) or None, data_v=_sortable(c.values[i])))
        rows.append(el("tr", *cells))
    told = el("p", "A click on a heading sorts; the best value of a column is marked.", class_="note")
    table = el("table", el("thead", el("tr", *head)), el("tbody", *rows), class_="sortable")
    notes = [el("li", _link(run), ": ", "; ".join(said)) for run in runs if (said := _remarks(run))]
    return _section(
        "Runs", "Runs", _scroll("Table of runs", table), told, el("ul", *notes, class_="note") if notes else None
    )


def _remarks(run: Run) -> list[str]:
    return ([] if run.status == "done" else [run.status]) + run.notes


def _sortable(value: Any) -> str | None:
    if value is None or value == NONE or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return repr(value) if isinstance(value, int | float) else str(value)


def _charts(key: str, title: str, drawn: Sequence[charts.Chart]) -> Html:
    """Places that the script fills."""
    if not drawn:
        return Html("")
    figures_ = [
        el(
            "figure",
            el(
                "figcaption",
                el("b", chart["name"]),
                el("small", chart["note"]) if chart["note"] else None,
                el("label", el("input", type="checkbox"), "log scale"),
            ),
            el("div", class_="plot", role="img", aria_label=_said(chart)),
            data_chart=str(i),
            data_of=key,
        )
        for i, chart in enumerate(drawn)
    ]
    scriptless = el(
        "noscript", el("p", "The curves are drawn by this page's script, which is switched off.", class_="note")
    )
    tools = el("div", class_="legend", data_of=key)
    return _section(key, title, scriptless, tools, el("div", *figures_, class_="charts"))


def _said(chart: charts.Chart) -> str:
    values = [y for series in chart["series"] for y in series["y"] if y is not None]
    n = len(chart["series"])
    span = f", from {figures.number(min(values))} to {figures.number(max(values))}" if values else ""
    return f"{chart['name']} over {chart['x']}, {n} line{'s' * (n != 1)}{span}"


def _grids(runs: Sequence[Run], chosen: Sequence[Column], results: Sequence[Column]) -> Html:
    cards = []
    for i, (run, p) in enumerate(zip(runs, grids.pictures([run.grid for run in runs]), strict=True)):
        first = results[0]
        said = [
            el("b", f"run {run.name}"),
            el("span", compare.label(chosen, i, run)) if len(runs) > 1 else None,
            el("span", f"{first.key} {first.text(i)}") if first.values[i] is not None else None,
        ]
        if isinstance(p, grids.Picture) and run.grid is not None:
            step = run.grid.stem.removeprefix("step_").lstrip("0") or "0"
            said.append(el("span", f"step {step}"))
            alt = f"Samples of run {run.name} at step {step}"
            size = {"width": p.width, "height": p.height}
            image = el("img", src=p.address, alt=alt, **size, loading="lazy", decoding="async")
            shown = el("button", image, class_="enlarge", title="larger")
        else:
            shown = el("p", p or "no grid of samples", class_="none")
        cards.append(el("figure", shown, el("figcaption", *said), id=_id(run), data_run=run.name))
    return _section("Samples", "Samples", el("div", *cards, class_="grids")) if cards else Html("")


def _differences(runs: Sequence[Run]) -> Html:
    if not runs:
        return Html("")
    configs = [run.config for run in runs]
    found, shared = compare.differences(configs), compare.common(configs)
    rows = []
    for difference in found:
        holders: dict[str, list[str]] = {}
        for run, value in zip(runs, difference.values, strict=True):
            if value is not None:
                holders.setdefault(value, []).append(run.name)
        keys = [el("div", el("code", key)) for key in difference.keys]
        values = [
            el("div", el("code", v), el("small", _holders(names)), class_="holder") for v, names in holders.items()
        ]
        rows.append(el("tr", el("th", *keys, scope="row"), el("td", *values)))
    differing = (
        _scroll(
            "What differs",
            el(
                "table",
                el("thead", el("tr", el("th", "key", scope="col"), el("th", "values", scope="col"))),
                el("tbody", *rows),
            ),
        )
        if rows
        else el(
            "p",
            "Nothing: the configurations are the same." if len(runs) > 1 else "There is one run only.",
            class_="note",
        )
    )
    same = [el("tr", el("th", el("code", k), scope="row"), el("td", el("code", v))) for k, v in shared.items()]
    title = f"{len(same)} keys that {'all runs share' if len(runs) > 1 else 'the run has'}"
    folded = el("details", el("summary", title), _scroll(title, el("table", el("tbody", *same))))
    return _section("What differs", "What differs", differing, folded if same else None)


def _holders(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
    return f"{'run' if len(names) == 1 else f'{len(names)} runs:'} {shown}"


def command(overrides: Sequence[str]) -> str:
    """The line that starts such a run, quoted for a shell."""
    return shlex.join(["python", "src/train.py", *overrides])


def _commands(runs: Sequence[Run], chosen: Sequence[Column]) -> Html:
    rows = []
    for i, run in enumerate(runs):
        said = el("div", el("b", f"run {run.name}"), " ", compare.label(chosen, i, run) if len(runs) > 1 else "")
        if run.overrides is None:
            line = el("p", "its command line is not known: .hydra/overrides.yaml is missing", class_="none")
        else:
            line = _line(command(run.overrides))
        rows.append(el("li", said, line))
    intro = el("p", "Run from the project's folder, each begins such a run anew.", class_="note")
    return _section("Commands", "Commands", intro, el("ol", *rows, class_="commands")) if rows else Html("")


def _line(text: str) -> Html:
    return el("div", el("code", text), el("button", "Copy", class_="copy"), class_="command")


def _evaluations(runs: Sequence[Run], others: Sequence[Evaluation]) -> Html:
    rows: list[tuple[Any, Row]] = [(_link(run), row) for run in runs for row in run.evaluations]
    rows += [(e.of, row) for e in others for row in e.rows]
    if not rows:
        return Html("")
    about = ("sampler", "steps", "nfe", "n", "seed", "split", "weights", "extractor")
    names = list(dict.fromkeys(name for _, row in rows for name in compare.scalars(row)))
    head = [el("th", el("button", name), scope="col", data_key=name) for name in ("of", *about, *names)]
    lines = []
    for of, row in rows:
        cells = [el("th", of, scope="row", data_v=str(of))]
        for key in about:
            value = row.get(key)
            cells.append(el("td", NONE if value is None else value, data_v=_sortable(value)))
        for name in names:
            metric = compare.scalars(row).get(name)
            spread = (row.get("spread") or {}).get(name)
            text = NONE if metric is None else figures.number(metric)
            text += f" ± {figures.number(spread)}" if metric is not None and isinstance(spread, float) else ""
            cells.append(el("td", text, class_="number", data_v=_sortable(metric)))
        lines.append(el("tr", *cells))
    table = el("table", el("thead", el("tr", *head)), el("tbody", *lines), class_="sortable")
    title = f"{len(rows)} rows, one for each sampler and number of steps"
    folded = el("details", el("summary", title), _scroll("Evaluations", table), open=not runs)
    return _section("Evaluations", "Evaluations", folded)


def _left_out(found: Sequence[LeftOut]) -> Html:
    items = [
        el(
            "li",
            el("b", left.folder),
            ": ",
            left.reason,
            _line(command(left.overrides)) if left.overrides is not None else None,
        )
        for left in found
    ]
    return _section("Left out", "Left out", el("ul", *items, class_="left-out")) if items else Html("")
