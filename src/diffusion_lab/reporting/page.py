"""Render the page: one HTML file without external resources, from the Jinja2 templates in templates/."""

import base64
import functools
import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from diffusion_lab.reporting import charts, compare, sections
from diffusion_lab.reporting.compare import NONE, Column
from diffusion_lab.reporting.read import Evaluation, Records, RunRecord

MARK = "diffusion-lab report"  # marks a file as a report, which may be overwritten


class Summary(NamedTuple):
    """The first paragraphs of the page.

    Attributes:
        text: the result in words, up to the best value.
        value: the best value; "" if the runs are not ranked.
        detail: sampler and number of evaluations of the best value.
        run: the run with the best value.
        more: the remaining sentences.
        incomparable: the choices that make losses incomparable, such as "the schedule and objective differ"; or "".
        ranked_by_loss: whether those losses rank the runs.
        left_out: number of folders that are left out.
    """

    text: str
    value: str = ""
    detail: str = ""
    run: RunRecord | None = None
    more: str = ""
    incomparable: str = ""
    ranked_by_loss: bool = False
    left_out: int = 0


def render(records: Records, title: str) -> str:
    """Return the HTML of the page."""
    runs, chosen, results = _ordered(records.runs)
    curves, against_nfe = charts.curves(runs), charts.against_nfe(runs, records.evaluations)
    candidates = [
        sections.runs_section(runs, chosen, results),
        sections.charts_section("Curves", "Curves", curves),
        sections.charts_section("NFE", "Quality against network evaluations", against_nfe),
        sections.samples_section(runs, chosen, results),
        sections.differences_section(runs),
        sections.commands_section(runs, chosen),
        sections.evaluations_section(runs, records.evaluations),
        sections.left_out_section(records.left_out),
    ]
    environment = _environment()
    # The style and the script are files of this package, so they are not escaped. All other text is.
    style, script = (Markup(_source(environment, name)) for name in ("page.css", "page.js"))
    html = environment.get_template("page.html").render(
        title=title,
        mark=MARK,
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        summary=_summary(runs, chosen, results, records),
        sections=[section for section in candidates if section],
        data={
            "runs": _run_labels(runs, chosen, records.evaluations),
            "choices": [column.key for column in chosen] if len(runs) > 1 else [],
            "charts": {"curves": curves, "nfe": against_nfe},
        },
    )
    return html.encode("utf-8", "replace").decode()  # names of files may contain bytes that are not UTF-8


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("diffusion_lab.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["anchor"] = sections.anchor
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


def _source(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _ordered(runs: list[RunRecord]) -> tuple[list[RunRecord], list[Column], list[Column]]:
    """Return the runs, the best first, and the columns of choices and results in that order."""
    if not runs:
        return [], [], []
    first = compare.results(runs)[0]
    sign = -1 if first.better == "high" else 1
    eligible = compare.long_enough(runs)
    missing = [not _is_number(v) for v in first.values]
    order = sorted(
        range(len(runs)), key=lambda i: (not eligible[i], missing[i], 0 if missing[i] else sign * first.values[i])
    )
    runs = [runs[i] for i in order]
    return runs, compare.choices(runs), compare.results(runs)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _run_labels(
    runs: Sequence[RunRecord], chosen: Sequence[Column], others: Sequence[Evaluation]
) -> list[dict[str, Any]]:
    """Return name, label and choices of the runs and evaluations that the `run` indices of the charts refer to."""
    texts = [compare.label(chosen, i, run) for i, run in enumerate(runs)]
    texts = [text if texts.count(text) == 1 else f"{text} · {run.name}" for text, run in zip(texts, runs, strict=True)]
    labels: list[dict[str, Any]] = [
        {"name": run.name, "label": texts[i], "values": [c.text(i) for c in chosen]} for i, run in enumerate(runs)
    ]
    return labels + [{"name": e.folder.name, "label": e.source, "values": [NONE] * len(chosen)} for e in others]


# summary ------------------------------------------------------------------------------------------------------------------


def _summary(
    runs: Sequence[RunRecord], chosen: Sequence[Column], results: Sequence[Column], records: Records
) -> Summary:
    if runs:
        summary = _result(runs, chosen, results[0])
        groups = compare.incomparable(runs)
        if groups:
            summary = summary._replace(incomparable=f"the {_enumeration(groups)} differ{'s' * (len(groups) == 1)}")
        summary = summary._replace(ranked_by_loss=results[0].key.endswith("/loss"))
    else:
        summary = Summary("Evaluations only." if records.evaluations else "No runs to show.")
    return summary._replace(left_out=len(records.left_out))


def _result(runs: Sequence[RunRecord], chosen: Sequence[Column], first: Column) -> Summary:
    """Return the best result; runs are sorted by the column `first`, the best first."""
    name = first.key.removeprefix("min ")
    status = "" if runs[0].status == "done" else f" It is {runs[0].status}."
    if len(runs) == 1:
        value = f": {first.key} {first.text(0)}" if first.values[0] is not None else ""
        return Summary(f"One run, {runs[0].steps:,} steps{value}.{status}")
    short = compare.long_enough(runs).count(False)
    unranked = ""
    if short:
        verbs = ("run has", "is") if short == 1 else ("runs have", "are")
        unranked = f" {short:,} {verbs[0]} fewer than half the steps of the longest run and {verbs[1]} not ranked."
    ranked = sum(first.number(i) is not None for i in range(len(runs)))
    if not ranked or (ranked == 1 and not short):
        return Summary(f"{len(runs)} runs; fewer than two have a {name} to compare.{unranked}")
    label = compare.label(chosen, 0, runs[0])
    extreme = "" if ranked == 1 else "Lowest " if first.better == "low" else "Highest "
    return Summary(
        f"{len(runs)} runs. {extreme}{name}:",
        first.text(0),
        first.details[0] if first.details else "",
        runs[0],
        (f": {label}." if label != runs[0].name else ".") + status + unranked + _best_mean(runs, chosen, first, name),
    )


def _best_mean(runs: Sequence[RunRecord], chosen: Sequence[Column], first: Column, name: str) -> str:
    """Return a sentence with the best mean over seeds; "" if no runs differ only in their seeds."""
    columns = compare.over_seeds(runs, chosen, first)
    if not columns:
        return ""
    *others, count, mean, std = columns
    label = " · ".join(column.text(0) for column in others)
    extreme = "lowest" if mean.better == "low" else "highest"
    value = mean.text(0) if std.values[0] is None else f"{mean.text(0)} ± {std.text(0)} ({count.text(0)} runs)"
    return f" Over seeds, the {extreme} mean {name} is {value}{f': {label}' if label else ''}."


def _enumeration(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
