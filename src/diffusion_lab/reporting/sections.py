"""The sections of the page, each from what it shows to HTML; "" where there is nothing to show."""

import hashlib
import math
import shlex
from collections.abc import Sequence
from typing import Any

from diffusion_lab.metrics import figures
from diffusion_lab.reporting import compare
from diffusion_lab.reporting.charts import Chart
from diffusion_lab.reporting.compare import NONE, Column
from diffusion_lab.reporting.grids import Picture, pictures
from diffusion_lab.reporting.html import Html, el, join
from diffusion_lab.reporting.read import Evaluation, LeftOut, Row, Run, within

_NAMED = 12  # runs named beside a value that they share


def key(name: str) -> str:
    """The address within the page of the section that the navigation calls `name`."""
    return name.lower().replace(" ", "-")


def link(run: Run) -> Html:
    """To the run's card among the samples."""
    return el("a", f"run {run.name}", href=f"#{_id(run)}")


def _id(run: Run) -> str:
    """Letters and digits, whatever the folder is called."""
    return "run-" + hashlib.sha256(str(run.folder.absolute()).encode("utf-8", "replace")).hexdigest()[:8]


def _section(name: str, title: str, *children: Any) -> Html:
    """A section that the navigation calls `name`."""
    here = key(name)
    return el("section", el("h2", title, id=f"{here}-title"), *children, id=here, aria_labelledby=f"{here}-title")


def _scroll(label: str, content: Html) -> Html:
    """A box that scrolls sideways by itself, also by keyboard."""
    return el("div", content, class_="scroll", tabindex="0", role="region", aria_label=label)


def table(runs: Sequence[Run], chosen: Sequence[Column], results: Sequence[Column]) -> Html:
    if not runs:
        return Html("")
    columns = [Column("run", [run.name for run in runs]), *chosen, *results]
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
        cells = [el("th", link(run), scope="row", data_v=run.name)]
        for c in columns[1:]:
            top = best.get(id(c)) == i
            kinds = ["number"] * (id(c) in measured) + ["best"] * top
            text: Any = c.text(i)
            if c.key == "state" and run.status != "done":
                text = el("span", text, title=run.status, class_="warn")
            detail = el("small", c.details[i]) if c.details and c.details[i] else None
            cells.append(el("td", text, detail, class_=" ".join(kinds) or None, data_v=_sortable(c.values[i])))
        rows.append(el("tr", *cells))
    told = el("p", "A click on a heading sorts; the best value of a column is marked.", class_="note")
    made = el("table", el("thead", el("tr", *head)), el("tbody", *rows), class_="sortable")
    notes = [el("li", link(run), ": ", "; ".join(said)) for run in runs if (said := _remarks(run))]
    listed = el("ul", *notes, class_="note") if notes else None
    return _section("Runs", "Runs", _scroll("Table of runs", made), told, listed, _over_seeds(runs, chosen, results[0]))


def _over_seeds(runs: Sequence[Run], chosen: Sequence[Column], first: Column) -> Html | None:
    """One seed says little: means and spreads."""
    columns = compare.over_seeds(runs, chosen, first)
    if not columns:
        return None
    best = columns[-2].best() if first.ranks else None
    head = [
        el("th", c.key, scope="col", title=c.about or None, class_="number" if k >= len(columns) - 3 else None)
        for k, c in enumerate(columns)
    ]
    rows = []
    for i in range(len(columns[0].values)):
        cells = []
        for k, c in enumerate(columns):
            kinds = ["number"] * (k >= len(columns) - 3) + ["best"] * (c is columns[-2] and i == best)
            cells.append(el("td", c.text(i), class_=" ".join(kinds) or None))
        rows.append(el("tr", *cells))
    return join(
        [el("h3", "Over seeds"), _scroll("Over seeds", el("table", el("thead", el("tr", *head)), el("tbody", *rows)))]
    )


def _remarks(run: Run) -> list[str]:
    return ([] if run.status == "done" else [run.status]) + run.notes


def _sortable(value: Any) -> str | None:
    if value is None or value == NONE or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return repr(value) if isinstance(value, int | float) else str(value)


def plots(name: str, title: str, drawn: Sequence[Chart]) -> Html:
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
            data_of=key(name),
        )
        for i, chart in enumerate(drawn)
    ]
    scriptless = el(
        "noscript", el("p", "The curves are drawn by this page's script, which is switched off.", class_="note")
    )
    tools = el("div", class_="legend", data_of=key(name))
    return _section(name, title, scriptless, tools, el("div", *figures_, class_="charts"))


def _said(chart: Chart) -> str:
    values = [y for series in chart["series"] for y in series["y"] if y is not None]
    n = len(chart["series"])
    span = f", from {figures.number(min(values))} to {figures.number(max(values))}" if values else ""
    return f"{chart['name']} over {chart['x']}, {n} line{'s' * (n != 1)}{span}"


def samples(runs: Sequence[Run], chosen: Sequence[Column], results: Sequence[Column]) -> Html:
    cards = []
    for i, (run, p) in enumerate(zip(runs, pictures([run.grid for run in runs]), strict=True)):
        first = results[0]
        said = [
            el("b", f"run {run.name}"),
            el("span", compare.label(chosen, i, run)) if len(runs) > 1 else None,
            el("span", f"{first.key} {first.text(i)}") if first.values[i] is not None else None,
        ]
        if isinstance(p, Picture) and run.grid is not None:
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


def differences(runs: Sequence[Run]) -> Html:
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
        keys = [el("div", el("code", name)) for name in difference.keys]
        values = [
            el("div", el("code", v), el("small", _holders(names)), class_="holder") for v, names in holders.items()
        ]
        rows.append(el("tr", el("th", *keys, scope="row"), el("td", *values)))
    if rows:
        head = el("tr", el("th", "key", scope="col"), el("th", "values", scope="col"))
        differing = _scroll("What differs", el("table", el("thead", head), el("tbody", *rows)))
    else:
        said = "Nothing: the configurations are the same." if len(runs) > 1 else "There is one run only."
        differing = el("p", said, class_="note")
    same = [el("tr", el("th", el("code", k), scope="row"), el("td", el("code", v))) for k, v in shared.items()]
    title = f"{len(same)} keys that {'all runs share' if len(runs) > 1 else 'the run has'}"
    folded = el("details", el("summary", title), _scroll(title, el("table", el("tbody", *same))))
    return _section("What differs", "What differs", differing, folded if same else None)


def _holders(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
    return f"{'run' if len(names) == 1 else f'{len(names)} runs:'} {shown}"


def command(overrides: Sequence[str]) -> str:
    """The line that starts such a run, quoted for a shell; of a sweep's job this one run, not the sweep."""
    alone = ["hydra.mode=RUN"] if any(o.startswith("sweep=") for o in overrides) else []
    return shlex.join(["python", "src/train.py", *overrides, *alone])


def commands(runs: Sequence[Run], chosen: Sequence[Column]) -> Html:
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


def evaluations(runs: Sequence[Run], others: Sequence[Evaluation]) -> Html:
    rows: list[tuple[str, Any, Row]] = [(run.name, link(run), row) for run in runs for row in run.evaluations]
    rows += [(e.of, e.of, row) for e in others for row in e.rows]
    if not rows:
        return Html("")
    about = ("sampler", "steps", "nfe", "n", "seed", "split", "weights", "extractor")
    names = list(dict.fromkeys(name for *_, row in rows for name in compare.scalars(row)))
    head = [el("th", el("button", name), scope="col", data_key=name) for name in ("of", *about, *names)]
    lines = []
    for of, shown, row in rows:
        cells = [el("th", shown, scope="row", data_v=of)]
        for field in about:
            value = row.get(field)
            cells.append(el("td", NONE if value is None else value, data_v=_sortable(value)))
        for name in names:
            metric = compare.scalars(row).get(name)
            spread = within(row, "spread").get(name)
            text = NONE if metric is None else figures.number(metric)
            text += f" ± {figures.number(spread)}" if metric is not None and isinstance(spread, float) else ""
            cells.append(el("td", text, class_="number", data_v=_sortable(metric)))
        lines.append(el("tr", *cells))
    made = el("table", el("thead", el("tr", *head)), el("tbody", *lines), class_="sortable")
    title = f"{len(rows)} rows, one for each sampler and number of steps"
    folded = el("details", el("summary", title), _scroll("Evaluations", made), open=not runs)
    return _section("Evaluations", "Evaluations", folded)


def left_out(found: Sequence[LeftOut]) -> Html:
    items = []
    for left in found:
        line = None if left.overrides is None else _line(command(left.overrides))
        items.append(el("li", el("b", left.folder), ": ", left.reason, line))
    return _section("Left out", "Left out", el("ul", *items, class_="left-out")) if items else Html("")
