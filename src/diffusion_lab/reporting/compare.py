"""What differs between runs, what came of it, and which did best."""

import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from diffusion_lab.metrics import figures
from diffusion_lab.reporting.read import Row, Run, within

_IGNORED = {"run_dir", "overwrite", "trust", "logger"}  # where a run writes and to whom it tells, not what it is
_COMPARABLE = (
    "data",
    "condition",
    "schedule",
    "objective",
    "weighting",
    "loss",
    "variance",
)  # what val/loss depends on
_IMAGES = (
    "source",
    "image_size",
    "channels",
    "val",
    "test",
    "split_seed",
    "limit",
)  # of data: which images val/loss is of
_ALONE = ("data", "schedule", "objective", "weighting", "variance", "sampler")  # shown of a single run
_COLUMNS = 6  # of choices, where no command line says which differences were meant
NONE = "–"


@dataclass
class Difference:
    """Keys of the configuration that differ, alike, and their values run by run (None: the run's class has no such key)."""

    keys: list[str]
    values: list[str | None]


@dataclass
class Column:
    """One column of the table.

    Attributes:
        key: its name, also in the page's address, `#sort=KEY`.
        values: run by run; None where there is none.
        better: "low", "high", or "" where neither is.
        about: what it is, in words.
        texts: how the values read, where not as numbers of four digits.
        ranks: whether the best value may be called best.
        details: what stands small beside each value.
    """

    key: str
    values: list[Any]
    better: str = ""
    about: str = ""
    texts: list[str] | None = None
    ranks: bool = True
    details: list[str] | None = None

    def text(self, i: int) -> str:
        value = self.values[i]
        if self.texts is not None:
            return self.texts[i]
        if value is None:
            return NONE
        return (
            figures.number(value)
            if isinstance(value, float)
            else f"{value:,}"
            if isinstance(value, int)
            else str(value)
        )

    def best(self) -> int | None:
        """The run with the best value; None where there is no best, or no two values."""
        finite = [(v, i) for i, v in enumerate(self.values) if isinstance(v, int | float) and math.isfinite(v)]
        if not self.better or len({value for value, _ in finite}) < 2:
            return None
        return min(finite)[1] if self.better == "low" else max(finite, key=lambda pair: (pair[0], -pair[1]))[1]


# what differs -------------------------------------------------------------------------------------------------------------

_ABSENT = object()  # the run has no such key
_OUTSIDE = object()  # the run has another class there: its keys say nothing about this one's


def differences(configs: Sequence[dict[str, Any]]) -> list[Difference]:
    """Of resolved configurations, in their order. A class that differs stands for its arguments; those are compared among
    runs of one class. Copies of a value under other keys (`seed`, `data.seed`) are one difference."""
    merged: dict[tuple[str | None, ...], Difference] = {}
    for key, values in _differ([{k: v for k, v in c.items() if k not in _IGNORED} for c in configs], ""):
        merged.setdefault(tuple(values), Difference([], values)).keys.append(key)
    return list(merged.values())


def common(configs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Key → value of all leaves that the configurations share."""
    flat = [dict(_leaves(c, "")) for c in configs]
    return {k: v for k, v in flat[0].items() if k.split(".")[0] not in _IGNORED and all(f.get(k) == v for f in flat)}


def _differ(nodes: list[Any], path: str) -> Iterator[tuple[str, list[str | None]]]:
    inside = [node for node in nodes if node is not _OUTSIDE]
    if not all(isinstance(node, dict) for node in inside):
        values = [None if node is _OUTSIDE else _text(node) for node in nodes]
        if len(set(values) - {None}) > 1:
            yield path, values
        return
    kinds = list(dict.fromkeys(node.get("_target_") for node in inside))
    if len(kinds) > 1:
        yield path, [None if node is _OUTSIDE else _text(node) for node in nodes]
    for kind in kinds:
        own = [node if node is not _OUTSIDE and node.get("_target_") == kind else _OUTSIDE for node in nodes]
        if sum(node is not _OUTSIDE for node in own) < 2:
            continue
        for key in dict.fromkeys(key for node in own if isinstance(node, dict) for key in node):
            parts = [node.get(key, _ABSENT) if isinstance(node, dict) else _OUTSIDE for node in own]
            yield from _differ(parts, f"{path}.{key}" if path else str(key))


def _leaves(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, _text(node)


def _text(node: Any) -> str:
    if node is _ABSENT:
        return "not there"
    if isinstance(node, dict) and "_target_" in node:
        return str(node["_target_"]).rsplit(".", 1)[-1]
    if isinstance(node, str):
        return node
    return json.dumps(node, ensure_ascii=False, default=str)


# choices ------------------------------------------------------------------------------------------------------------------


def choices(runs: Sequence[Run]) -> list[Column]:
    """The columns that tell runs apart: what their command lines name and what differs, or else what differs at all."""
    if len(runs) == 1:
        return [_choice(group, [_value(runs[0], group)]) for group in _ALONE if group in runs[0].config]
    named = dict.fromkeys(_key(line) for run in runs for line in run.overrides or ())
    columns: dict[tuple[Any, ...], Column] = {}
    for key in named:
        values = [_value(run, key) for run in runs]
        if key and key.split(".")[0] not in _IGNORED and len(set(values)) > 1:
            columns.setdefault(tuple(values), _choice(key, values))
    if not columns:
        for difference in differences([run.config for run in runs])[:_COLUMNS]:
            values = [NONE if v is None else v for v in difference.values]
            columns[tuple(values)] = _choice(difference.keys[0], values)
    return list(columns.values())


def _choice(key: str, values: list[Any]) -> Column:
    """Numbers read as they were written, not rounded."""
    return Column(key, values, texts=[f"{v:g}" if isinstance(v, float) else str(v) for v in values])


def _key(line: str) -> str:
    return re.split(r"[=@]", line.lstrip("+~"), maxsplit=1)[0]


def _value(run: Run, key: str) -> Any:
    """The option of a group, else the value of the resolved configuration; numbers stay numbers."""
    if key in run.choices:
        return run.choices[key]
    node: Any = run.config
    for part in key.split("."):
        node = node.get(part, _ABSENT) if isinstance(node, dict) else _ABSENT
    if node is _ABSENT:
        return NONE
    if isinstance(node, int | float) and not isinstance(node, bool):
        return node
    text = _text(node)
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", text).lower()
    return snake if isinstance(node, dict) and "_target_" in node else text


# results ------------------------------------------------------------------------------------------------------------------


def lowest(run: Run, name: str) -> tuple[int, float] | None:
    """(step, value) of the least finite value of a curve."""
    finite = [point for point in run.curves.get(name, ()) if math.isfinite(point[1])]
    return min(finite, key=lambda point: (point[1], point[0]), default=None)


def quality(runs: Sequence[Run]) -> list[str]:
    """The columns of metrics.csv that measure samples: fd_classifier_1k, fid_10k, confident_fraction_1k, …."""
    names = dict.fromkeys(name for run in runs for name in run.curves)
    return [name for name in names if "/" not in name and figures.better(name)]


def protocols(rows: Sequence[Row]) -> dict[tuple[str, ...], str]:
    """What must agree for two evaluations to compare → how the metric's name says it; "" where all agree."""
    keys = list(dict.fromkeys(protocol(row) for row in rows))
    if len(keys) == 1:
        return {keys[0]: ""}
    names = ("data", "n", "split", "extractor", "repeats")
    differing = [i for i in range(len(names)) if len({key[i] for key in keys}) > 1]
    return {key: ", ".join(f"{names[i]}={key[i]}" for i in differing) for key in keys}


def protocol(row: Row) -> tuple[str, ...]:
    """Data set, number of images, split, extractor, number of seeds."""
    seeds = row.get("seeds")
    told = (within(row, "data").get("name"), row.get("n"), row.get("split"), row.get("extractor"))
    return (*map(str, told), str(len(seeds)) if isinstance(seeds, list) else "1")


def scalars(row: Row) -> dict[str, float]:
    """The metrics that are numbers, without their standard errors."""
    kept = {}
    for name, value in row["metrics"].items():
        if isinstance(value, int | float) and not isinstance(value, bool) and not name.endswith("_std"):
            kept[name] = float(value)
    return kept


def results(runs: Sequence[Run]) -> list[Column]:
    """What came of the runs, the figure that ranks them first."""
    evaluated = _evaluated(runs)
    trained = [_of_curve(runs, name) for name in quality(runs)]
    losses = _losses(runs)
    candidates = [*(c for c in evaluated if c.better == "low"), *(c for c in trained if c.better == "low"), losses[0]]
    enough = [c for c in candidates if 2 * sum(v is not None for v in c.values) >= len(runs)]
    first = (enough or candidates)[0]
    rest = [c for c in (*evaluated, *trained, *losses) if c is not first]
    return [first, *rest, *_costs(runs)]


def _evaluated(runs: Sequence[Run]) -> list[Column]:
    """The best of each metric over samplers and steps, one column for each protocol."""
    rows = [row for run in runs for row in run.evaluations]
    columns = []
    for key, said in protocols(rows).items() if rows else ():
        for name in dict.fromkeys(name for row in rows if protocol(row) == key for name in scalars(row)):
            low = figures.better(name).startswith("lower")
            best = []
            for run in runs:
                own = [
                    (scalars(row)[name], row)
                    for row in run.evaluations
                    if protocol(row) == key and name in scalars(row)
                ]
                own = [pair for pair in own if math.isfinite(pair[0])]
                best.append((min if low else max)(own, key=lambda pair: pair[0], default=None))
            columns.append(
                Column(
                    f"{name} ({said})" if said else name,
                    [None if b is None else b[0] for b in best],
                    _way(name),
                    f"evaluation, the best of its samplers and steps; {figures.better(name)}",
                    details=["" if b is None else _how(b[1]) for b in best],
                )
            )
    return columns


def _how(row: Row) -> str:
    return f"{row['sampler']}, {row['nfe']} NFE" if row.get("sampler") and row.get("nfe") else ""


def _way(name: str) -> str:
    return {"lower": "low", "higher": "high"}.get(figures.better(name).split(" ")[0], "")


def _of_curve(runs: Sequence[Run], name: str) -> Column:
    values: list[float | None] = []
    for run in runs:
        finite = [value for _, value in run.curves.get(name, ()) if math.isfinite(value)]
        values.append((min if _way(name) == "low" else max)(finite) if finite else None)
    return Column(name, values, _way(name), f"best figure while training; {figures.better(name)}")


def _losses(runs: Sequence[Run]) -> list[Column]:
    name = "val/loss" if any("val/loss" in run.curves for run in runs) else "train/loss"
    least, fair = [lowest(run, name) for run in runs], not incomparable(runs)
    last = [run.curves[name][-1][1] if name in run.curves else None for run in runs]
    return [
        Column(f"min {name}", [p and p[1] for p in least], "low", "the lowest of the run", ranks=fair),
        Column("at step", [p and p[0] for p in least], about=f"where {name} was lowest"),
        Column(f"last {name}", last, "low", "the run's last", ranks=fair),
    ]


def _costs(runs: Sequence[Run]) -> list[Column]:
    rates = []
    for run in runs:
        finite = [v for _, v in run.curves.get("speed/images_per_s", ()) if math.isfinite(v)]
        rates.append(statistics.median(finite) if finite else None)
    seconds = [_seconds(run, rate) for run, rate in zip(runs, rates, strict=True)]
    return [
        Column(
            "images/s",
            rates,
            "high",
            "median over the rows of metrics.csv",
            [NONE if r is None else f"{r:,.0f}" for r in rates],
        ),
        Column("steps", [run.steps for run in runs], about="done"),
        Column(
            "seconds",
            [s and s[0] for s in seconds],
            "",
            "of the job; with ≈ of its training steps alone, which is steps × batch ÷ images/s",
            [NONE if s is None else f"{'' if s[1] else '≈ '}{s[0]:,.0f}" for s in seconds],
        ),
        Column("state", [run.status.split(":")[0] for run in runs], about="what became of the run"),
    ]


def _seconds(run: Run, rate: float | None) -> tuple[float, bool] | None:
    """(seconds, whether they were measured)."""
    if run.seconds is not None:
        return run.seconds, True
    batch = within(run.config, "data").get("batch_size")
    return (run.steps * batch / rate, False) if rate and isinstance(batch, int) else None


def incomparable(runs: Sequence[Run]) -> list[str]:
    """The groups that differ and on which val/loss depends, so that its values are not of one thing."""
    names = [group for group in _COMPARABLE if group in {k.split(".")[0] for d in _main(runs) for k in d.keys}]
    if any(_learns(run) for run in runs):
        return names
    return [name for name in names if name != "variance"]  # any other variance is chosen after training


def _main(runs: Sequence[Run]) -> list[Difference]:
    """Differences of the groups themselves; seeds, batches and the like leave the loss what it is."""
    kept = [{group: run.config.get(group) for group in _COMPARABLE} for run in runs]
    for of in kept:
        of["data"] = {key: within(of, "data").get(key) for key in _IMAGES}
    return differences(kept)


def _learns(run: Run) -> bool:
    return str(within(run.config, "variance").get("_target_")).endswith(".Learned")


def over_seeds(runs: Sequence[Run], chosen: Sequence[Column], figure: Column) -> list[Column]:
    """Columns of a table with one row for each set of choices but the seed, the best first: choices, number of runs, mean and
    spread of a figure. Empty unless several runs differ by their seed alone."""
    others = [column for column in chosen if column.key != "seed"]
    if len(others) == len(chosen):
        return []
    groups: dict[tuple[str, ...], list[float]] = {}
    for i, value in enumerate(figure.values):
        if isinstance(value, int | float) and math.isfinite(value):
            groups.setdefault(tuple(column.text(i) for column in others), []).append(value)
    if max(map(len, groups.values()), default=0) < 2:
        return []
    rows = sorted(groups.items(), key=lambda row: statistics.fmean(row[1]), reverse=figure.better == "high")
    return [
        *(Column(column.key, [key[k] for key, _ in rows]) for k, column in enumerate(others)),
        Column("runs", [len(values) for _, values in rows]),
        Column(
            figure.key,
            [statistics.fmean(values) for _, values in rows],
            figure.better,
            "mean over seeds",
            ranks=figure.ranks,
        ),
        Column(
            "spread",
            [statistics.stdev(v) if len(v) > 1 else None for _, v in rows],
            about="standard deviation over seeds",
        ),
    ]


def label(columns: Sequence[Column], i: int, run: Run) -> str:
    """What tells run i apart, in a few words."""
    return " · ".join(_short(c, c.values[i]) for c in columns if c.values[i] != NONE) or run.name


def _short(column: Column, value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_]\w*", value) and value not in ("true", "false", "null"):
        return value
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{column.key.rsplit('.', 1)[-1]}={text}"
