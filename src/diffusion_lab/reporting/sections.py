"""The content of each section of the page, as plain values that the templates of the same name turn into HTML."""

import hashlib
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from diffusion_lab.metrics import figures
from diffusion_lab.reporting import compare
from diffusion_lab.reporting.charts import Chart
from diffusion_lab.reporting.compare import NONE, Column
from diffusion_lab.reporting.grids import Picture, pictures
from diffusion_lab.reporting.read import Evaluation, LeftOut, Row, RunRecord, submapping

_MAX_NAMES = 12  # runs listed next to a value that they share


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Attributes:
        name: its name in the navigation.
        title: its heading.
        template: the file in templates/ that renders it.
        content: the value that the template reads.
    """

    name: str
    title: str
    template: str
    content: Any

    @property
    def id(self) -> str:
        """The fragment of the section's address."""
        return self.name.lower().replace(" ", "-")


class Heading(NamedTuple):
    """The heading of a column; `sorted` is the value of aria-sort."""

    text: str
    description: str = ""
    numeric: bool = False
    sorted: str | None = None


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
        text: the shown value.
        sort_key: the value to sort by; None sorts last.
        numeric: whether to align it like a number.
        best: whether it is the best of its column.
        detail: small print below the value.
        warning: tooltip of a value that is shown as a warning.
        run: the run to link to.
    """

    text: Any
    sort_key: str | None = None
    numeric: bool = False
    best: bool = False
    detail: str = ""
    warning: str = ""
    run: RunRecord | None = None


class Table(NamedTuple):
    """A table; the first cell of each row is its heading."""

    label: str
    headings: list[Heading]
    rows: list[list[Cell]]
    sortable: bool = True


def anchor(run: RunRecord) -> str:
    """Return the fragment of the run's card among the samples: letters and digits, whatever the folder's name."""
    return "run-" + hashlib.sha256(str(run.folder.absolute()).encode("utf-8", "replace")).hexdigest()[:8]


def command(overrides: Sequence[str], program: str = "train") -> str:
    """Return the shell command that starts a run with these overrides; for a job of a sweep, that run alone."""
    single_run = ["hydra.mode=RUN"] if any(o.startswith("sweep=") for o in overrides) else []
    return shlex.join(["python", f"src/{program}.py", *overrides, *single_run])


# runs ---------------------------------------------------------------------------------------------------------------------


def runs_section(runs: Sequence[RunRecord], chosen: Sequence[Column], results: Sequence[Column]) -> Section | None:
    """Return the table of runs, notes about their files, and means over seeds."""
    if not runs:
        return None
    headings = [Heading("run"), *(Heading(c.key, c.description) for c in chosen)]
    for c in results:
        ranked = c is results[0] and all(compare.long_enough(runs))  # short runs are the last rows
        order = ("descending" if c.better == "high" else "ascending") if ranked else None
        headings.append(Heading(c.key, c.description, c.key != "state", order))
    best = [c.best() if c.ranks else None for c in results]
    rows = []
    for i, run in enumerate(runs):
        cells = [Cell(f"run {run.name}", run.name, run=run)]
        cells += [Cell(c.text(i), _sort_key(c.values[i])) for c in chosen]
        for c, best_run in zip(results, best, strict=True):
            detail = c.details[i] if c.details else ""
            warning = run.status if c.key == "state" and run.status != "done" else ""
            cells.append(
                Cell(c.text(i), _sort_key(c.values[i]), c.key != "state", best_run == i, detail, warning),
            )
        rows.append(cells)
    notes = [(run, _notes(run)) for run in runs if _notes(run)]
    means = _means_over_seeds(compare.over_seeds(runs, chosen, results[0]))
    return Section(
        "Runs", "Runs", "runs.html", {"table": Table("Table of runs", headings, rows), "notes": notes, "means": means}
    )


def _means_over_seeds(columns: Sequence[Column]) -> Table | None:
    if not columns:
        return None
    mean = columns[-2]
    best = mean.best() if mean.ranks else None
    first_number = len(columns) - 3
    headings = [Heading(c.key, c.description, k >= first_number) for k, c in enumerate(columns)]
    rows = [
        [Cell(c.text(i), None, k >= first_number, c is mean and i == best) for k, c in enumerate(columns)]
        for i in range(len(mean.values))
    ]
    return Table("Over seeds", headings, rows, sortable=False)


def _notes(run: RunRecord) -> str:
    return "; ".join(([] if run.status == "done" else [run.status]) + run.notes)


def _sort_key(value: Any) -> str | None:
    if value is None or value == NONE or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return repr(value) if isinstance(value, int | float) else str(value)


# charts and samples -------------------------------------------------------------------------------------------------------


def charts_section(name: str, title: str, charts: Sequence[Chart]) -> Section | None:
    """Return the charts with their text for screen readers; the script of the page draws them."""
    return Section(name, title, "charts.html", [(chart, _chart_text(chart)) for chart in charts]) if charts else None


def _chart_text(chart: Chart) -> str:
    values = [y for series in chart["series"] for y in series["y"] if y is not None]
    n = len(chart["series"])
    value_range = f", from {figures.number(min(values))} to {figures.number(max(values))}" if values else ""
    return f"{chart['name']} over {chart['x']}, {n} line{'s' * (n != 1)}{value_range}"


def samples_section(runs: Sequence[RunRecord], chosen: Sequence[Column], results: Sequence[Column]) -> Section | None:
    """Return a card for each run: its last grid of samples, or why there is none, and its first result."""
    cards = []
    for i, (run, image) in enumerate(zip(runs, pictures([run.grid for run in runs]), strict=True)):
        texts = [compare.label(chosen, i, run)] if len(runs) > 1 else []
        if results[0].values[i] is not None:
            texts.append(f"{results[0].key} {results[0].text(i)}")
        step = ""
        if isinstance(image, Picture) and run.grid is not None:
            step = run.grid.stem.removeprefix("step_").lstrip("0") or "0"
        cards.append(
            {
                "run": run,
                "texts": texts,
                "step": step,
                "picture": image if isinstance(image, Picture) else None,
                "message": image if isinstance(image, str) else "no grid of samples",
            }
        )
    return Section("Samples", "Samples", "samples.html", cards) if cards else None


# configurations and commands ----------------------------------------------------------------------------------------------


def differences_section(runs: Sequence[RunRecord]) -> Section | None:
    """Return the keys of the configurations that differ, with the runs of each value, and those that all runs share."""
    if not runs:
        return None
    configs = [run.config for run in runs]
    rows: list[tuple[list[str], list[tuple[str, str]]]] = []
    for difference in compare.differences(configs):
        names_by_value: dict[str, list[str]] = {}
        for run, value in zip(runs, difference.values, strict=True):
            if value is not None:
                names_by_value.setdefault(value, []).append(run.name)
        rows.append((difference.keys, [(value, _run_names(names)) for value, names in names_by_value.items()]))
    shared = compare.common(configs)
    summary = f"{len(shared)} keys that {'all runs share' if len(runs) > 1 else 'the run has'}"
    message = "The choices are equal." if len(runs) > 1 else "There is only one run."
    folded = [row for row in rows if all(map(compare.is_execution, row[0]))]
    content = {
        "rows": [row for row in rows if row not in folded],
        "message": message,
        "folded": folded,
        "folded_summary": f"{len(folded)} differences in execution and recording",
        "shared": shared,
        "summary": summary,
    }
    return Section("What differs", "What differs", "differences.html", content)


def _run_names(names: Sequence[str]) -> str:
    listed = ", ".join(names[:_MAX_NAMES]) + (", …" if len(names) > _MAX_NAMES else "")
    return f"{'run' if len(names) == 1 else f'{len(names)} runs:'} {listed}"


def commands_section(runs: Sequence[RunRecord], chosen: Sequence[Column]) -> Section | None:
    """Return (run, label, command or None) for each run."""
    rows = [
        (
            run,
            compare.label(chosen, i, run) if len(runs) > 1 else "",
            None if run.overrides is None else command(run.overrides),
        )
        for i, run in enumerate(runs)
    ]
    return Section("Commands", "Commands", "commands.html", rows) if rows else None


# evaluations and folders that are left out --------------------------------------------------------------------------------


def evaluations_section(runs: Sequence[RunRecord], others: Sequence[Evaluation]) -> Section | None:
    """Return every row of every metrics.json."""
    sources: list[tuple[Cell, Row]] = [
        (Cell(f"run {run.name}", run.name, run=run), row) for run in runs for row in run.evaluations
    ]
    sources += [(Cell(e.source, e.source), row) for e in others for row in e.rows]
    if not sources:
        return None
    fields = ("sampler", "steps", "nfe", "n", "seed", "split", "weights", "extractor")
    names = list(dict.fromkeys(name for _, row in sources for name in compare.scalars(row)))
    rows = []
    for source, row in sources:
        cells = [Cell(NONE if row.get(field) is None else row[field], _sort_key(row.get(field))) for field in fields]
        rows.append([source, *cells, *(_metric_cell(row, name) for name in names)])
    headings = [*map(Heading, ("source", *fields)), *(Heading(n, figures.better(n), numeric=True) for n in names)]
    summary = f"{len(rows)} rows, one for each sampler and number of steps"
    content = {"table": Table("Evaluations", headings, rows), "summary": summary, "open": not runs}
    return Section("Evaluations", "Evaluations", "evaluations.html", content)


def _metric_cell(row: Row, name: str) -> Cell:
    value = compare.scalars(row).get(name)
    if value is None:
        return Cell(NONE, numeric=True)
    spread = submapping(row, "spread").get(name)
    text = figures.number(value) + (f" ± {figures.number(spread)}" if isinstance(spread, float) else "")
    return Cell(text, _sort_key(value), numeric=True)


def left_out_section(left_out: Sequence[LeftOut]) -> Section | None:
    """Return (folder, reason, command or None) for each folder that cannot be shown."""
    rows = [
        (folder.folder, folder.reason, None if folder.overrides is None else command(folder.overrides, folder.program))
        for folder in left_out
    ]
    return Section("Left out", "Left out", "left_out.html", rows) if rows else None
