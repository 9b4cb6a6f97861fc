"""Compare runs: which choices differ, their results, and the run with the best result."""

import json
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from diffusion_lab.metrics import figures
from diffusion_lab.reporting.read import Row, RunRecord, submapping

NONE = "–"  # text of a missing value
_IGNORED = {"run_dir", "overwrite", "trust", "logger"}  # keys of output and logging, which do not change the result
_COMPARABLE = (
    "data",
    "condition",
    "schedule",
    "objective",
    "weighting",
    "loss",
    "variance",
)  # val/loss depends on these
_IMAGE_KEYS = ("source", "image_size", "channels", "val", "test", "split_seed", "limit")  # of data: select the images
_SINGLE_RUN_GROUPS = ("data", "schedule", "objective", "weighting", "variance", "sampler")  # shown for a single run
# Columns of choices are in this order, and others before the seed.
_ORDER = (
    *("experiment", "data", "model", "condition", "schedule", "objective", "weighting", "loss", "time_sampler"),
    *("variance", "sampler", "clip", "optimizer", "lr_scheduler"),
)
# Keys of execution and recording. Those that differ are folded, unless no choice differs.
_EXECUTION = {
    *("trainer", "callbacks", "validation", "quality", "compile", "print_config", "init", "ckpt", "debug", "recipe"),
    *("sweep", "hydra", "data.download", "data.eval_batch_size"),
}
_CHOICES_OF_EXECUTION = ("callbacks.ema", "trainer.precision", "trainer.gradient_clip_val")  # which change the result
_MAX_TEXT = 32  # characters of a value in a label
_MAX_CHOICES = 6  # columns of choices if no command line names a key that differs


@dataclass
class Difference:
    """Keys that have the same differing values, and the value of each run (None: the class of that run has no such key)."""

    keys: list[str]
    values: list[str | None]


@dataclass
class Column:
    """One column of a table of runs.

    Attributes:
        key: name of the column, used in the address of the page: `#sort=KEY`.
        values: one value a run; None if it is missing.
        better: "low", "high", or "" if neither is better.
        description: tooltip of the heading.
        texts: formatted values; None formats numbers to four significant digits.
        ranks: whether the best value may be marked.
        details: small print below each value.
        eligible: whether each run may have the best value; None for all runs.
    """

    key: str
    values: list[Any]
    better: str = ""
    description: str = ""
    texts: list[str] | None = None
    ranks: bool = True
    details: list[str] | None = None
    eligible: list[bool] | None = None

    def number(self, i: int) -> float | None:
        """Return the value of run `i` if it is a finite number and the run is eligible, else None."""
        value, eligible = self.values[i], self.eligible is None or self.eligible[i]
        return value if eligible and isinstance(value, int | float) and math.isfinite(value) else None

    def text(self, i: int) -> str:
        """Return the formatted value of run `i`."""
        value = self.values[i]
        if self.texts is not None:
            return self.texts[i]
        if value is None:
            return NONE
        if isinstance(value, float):
            return figures.number(value)
        return f"{value:,}" if isinstance(value, int) else str(value)

    def best(self) -> int | None:
        """Return the index of the run with the best value; None if fewer than two values differ or neither way is better."""
        finite = [(v, i) for i in range(len(self.values)) if (v := self.number(i)) is not None]
        if not self.better or len({value for value, _ in finite}) < 2:
            return None
        return min(finite)[1] if self.better == "low" else max(finite, key=lambda pair: (pair[0], -pair[1]))[1]


# differences --------------------------------------------------------------------------------------------------------------

_ABSENT = object()  # the run has no such key
_OTHER_CLASS = object()  # the run has another class at this node, so its keys are not compared


def differences(configs: Sequence[dict[str, Any]]) -> list[Difference]:
    """Return the differences of resolved configurations, in the order of their keys.

    If the class of a node differs, the class is the difference; arguments are compared among runs of the same class.
    Keys with the same values in every run, such as copies by interpolation, are merged into one difference.
    """
    merged: dict[tuple[str | None, ...], Difference] = {}
    for key, values in _walk_differences([{k: v for k, v in c.items() if k not in _IGNORED} for c in configs], ""):
        merged.setdefault(tuple(values), Difference([], values)).keys.append(key)
    return list(merged.values())


def common(configs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return key → value of the leaves that all configurations share."""
    flat = [dict(_leaves(c, "")) for c in configs]
    return {k: v for k, v in flat[0].items() if k.split(".")[0] not in _IGNORED and all(f.get(k) == v for f in flat)}


def _walk_differences(nodes: list[Any], path: str) -> Iterator[tuple[str, list[str | None]]]:
    """Yield (path of a key, its values) for each key whose values differ; `nodes` has one node a run."""
    compared = [node for node in nodes if node is not _OTHER_CLASS]
    if not all(isinstance(node, dict) for node in compared):
        values = [None if node is _OTHER_CLASS else _text(node) for node in nodes]
        if len(set(values) - {None}) > 1:
            yield path, values
        return
    classes = list(dict.fromkeys(node.get("_target_") for node in compared))
    if len(classes) > 1:
        yield path, [None if node is _OTHER_CLASS else _text(node) for node in nodes]
    for target in classes:
        same_class = [
            node if node is not _OTHER_CLASS and node.get("_target_") == target else _OTHER_CLASS for node in nodes
        ]
        if sum(node is not _OTHER_CLASS for node in same_class) < 2:
            continue
        for key in dict.fromkeys(key for node in same_class if isinstance(node, dict) for key in node):
            children = [node.get(key, _ABSENT) if isinstance(node, dict) else _OTHER_CLASS for node in same_class]
            yield from _walk_differences(children, f"{path}.{key}" if path else str(key))


def _leaves(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, _text(node)


def _text(node: Any) -> str:
    if node is _ABSENT:
        return "absent"
    if isinstance(node, dict) and "_target_" in node:
        return str(node["_target_"]).rsplit(".", 1)[-1]
    if isinstance(node, str):
        return node
    return json.dumps(node, ensure_ascii=False, default=str)


# choices ------------------------------------------------------------------------------------------------------------------


def choices(runs: Sequence[RunRecord]) -> list[Column]:
    """Return the columns that distinguish the runs: differing keys of their command lines, or else of their configurations.

    Keys of execution, such as trainer.max_steps, are columns only if no choice differs; see `folded`.
    """
    if len(runs) == 1:
        return [_choice(group, [_value(runs[0], group)]) for group in _SINGLE_RUN_GROUPS if group in runs[0].config]
    columns = _differing(runs)
    if not columns:
        for difference in sorted(
            differences([run.config for run in runs]), key=lambda d: all(map(is_execution, d.keys))
        ):
            key = next((key for key in difference.keys if not is_execution(key)), difference.keys[0])
            columns.append(_choice(key, [NONE if v is None else v for v in difference.values]))
        columns = columns[:_MAX_CHOICES]
    return [column for column in columns if not is_execution(column.key)] or columns


def folded(runs: Sequence[RunRecord]) -> list[Column]:
    """Return the columns of differing keys of the command lines that are not among `choices`."""
    shown = {column.key for column in choices(runs)}
    return [column for column in _differing(runs) if column.key not in shown]


def is_execution(key: str) -> bool:
    """Whether a key of the configuration sets how a run is executed and recorded, and not what is trained."""
    below = [key[:i] for i, character in enumerate(f"{key}.") if character == "."]
    return bool(_EXECUTION & set(below)) and not set(_CHOICES_OF_EXECUTION) & set(below)


def _differing(runs: Sequence[RunRecord]) -> list[Column]:
    """Return a column for each key of the command lines whose values differ; keys with the same values share one."""
    keys = dict.fromkeys(_key(override).removesuffix("._target_") for run in runs for override in run.overrides or ())
    columns: dict[tuple[Any, ...], Column] = {}
    for key in sorted(keys, key=_place):
        values = [_value(run, key) for run in runs]
        if key and key.split(".")[0] not in _IGNORED and len(set(values)) > 1:
            columns.setdefault(tuple(values), _choice(key, values))
    return list(columns.values())


def _place(key: str) -> int:
    group = key.split(".")[0]
    return _ORDER.index(group) if group in _ORDER else len(_ORDER) + (group == "seed")


def _choice(key: str, values: list[Any]) -> Column:
    """Return a column whose numbers are shown as written, not rounded."""
    return Column(key, values, texts=[f"{v:g}" if isinstance(v, float) else str(v) for v in values])


def _key(override: str) -> str:
    return re.split(r"[=@]", override.lstrip("+~"), maxsplit=1)[0]


def _value(run: RunRecord, key: str) -> Any:
    """Return the option of a group, the class of a node, or the value in the configuration; numbers stay numbers."""
    if run.choices.get(key, "custom") != "custom":
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


def lowest(run: RunRecord, name: str) -> tuple[int, float] | None:
    """Return (step, value) of the smallest finite value of a curve; None if it has none."""
    finite = [point for point in run.curves.get(name, ()) if math.isfinite(point[1])]
    return min(finite, key=lambda point: (point[1], point[0]), default=None)


def quality(runs: Sequence[RunRecord]) -> list[str]:
    """Return the columns of metrics.csv that measure sample quality: fd_classifier_1k, fid_10k, confident_fraction_1k, …."""
    names = dict.fromkeys(name for run in runs for name in run.curves)
    return [name for name in names if "/" not in name and figures.better(name)]


def protocols(rows: Sequence[Row]) -> dict[tuple[str, ...], str]:
    """Return each protocol of the rows → the text that distinguishes it from the others; "" if there is only one.

    Evaluations are comparable only if their protocols are equal.
    """
    keys = list(dict.fromkeys(protocol(row) for row in rows))
    if len(keys) == 1:
        return {keys[0]: ""}
    names = ("data", "n", "split", "extractor", "repeats")
    differing = [i for i in range(len(names)) if len({key[i] for key in keys}) > 1]
    return {key: ", ".join(f"{names[i]}={key[i]}" for i in differing) for key in keys}


def protocol(row: Row) -> tuple[str, ...]:
    """Return (data set, number of images, split, extractor, number of seeds)."""
    seeds = row.get("seeds")
    fields = (submapping(row, "data").get("name"), row.get("n"), row.get("split"), row.get("extractor"))
    return (*map(str, fields), str(len(seeds)) if isinstance(seeds, list) else "1")


def scalars(row: Row) -> dict[str, float]:
    """Return the metrics that are numbers, without their standard errors (`…_std`)."""
    return {
        name: float(value)
        for name, value in row["metrics"].items()
        if isinstance(value, int | float) and not isinstance(value, bool) and not name.endswith("_std")
    }


def results(runs: Sequence[RunRecord]) -> list[Column]:
    """Return the columns of results. The first one ranks the runs: a quality metric that most runs have, else a loss."""
    evaluated = _evaluated(runs)
    trained = [_best_of_curve(runs, name) for name in quality(runs)]
    losses, eligible = _losses(runs), long_enough(runs)
    candidates = [*(c for c in evaluated if c.better == "low"), *(c for c in trained if c.better == "low"), losses[0]]
    columns = [*evaluated, *trained, *losses, *_costs(runs)]
    for column in columns:
        column.eligible = eligible
    counts = [
        sum(value is not None for value, is_long in zip(c.values, eligible, strict=True) if is_long) for c in candidates
    ]
    frequent = [c for c, count in zip(candidates, counts, strict=True) if 2 * count >= sum(eligible)]
    first = (frequent or candidates)[0]
    return [first, *(c for c in columns if c is not first)]


def long_enough(runs: Sequence[RunRecord]) -> list[bool]:
    """Whether each run has at least half the steps of the longest one. Shorter runs are shown, but are not the best."""
    least = max(run.steps for run in runs) / 2
    return [run.steps >= least for run in runs]


def _evaluated(runs: Sequence[RunRecord]) -> list[Column]:
    """Return the best value of each metric over samplers and steps, one column for each protocol."""
    rows = [row for run in runs for row in run.evaluations]
    columns = []
    for key, text in protocols(rows).items() if rows else ():
        for name in dict.fromkeys(name for row in rows if protocol(row) == key for name in scalars(row)):
            best = [_best_row(run, key, name) for run in runs]
            columns.append(
                Column(
                    f"{name} ({text})" if text else name,
                    [None if row is None else scalars(row)[name] for row in best],
                    _better(name),
                    _joined("evaluation: the best value over samplers and steps", figures.better(name)),
                    details=["" if row is None else _sampler_text(row) for row in best],
                )
            )
    return columns


def _best_row(run: RunRecord, key: tuple[str, ...], name: str) -> Row | None:
    """Return the evaluation of protocol `key` with the best finite value of a metric."""
    rows = [row for row in run.evaluations if protocol(row) == key and math.isfinite(scalars(row).get(name, math.nan))]
    best = min if _better(name) == "low" else max
    return best(rows, key=lambda row: scalars(row)[name], default=None)


def _sampler_text(row: Row) -> str:
    return f"{row['sampler']}, {row['nfe']} NFE" if row.get("sampler") and row.get("nfe") else ""


def _better(name: str) -> str:
    return {"lower": "low", "higher": "high"}.get(figures.better(name).split(" ")[0], "")


def _joined(*parts: str) -> str:
    return "; ".join(filter(None, parts))


def _best_of_curve(runs: Sequence[RunRecord], name: str) -> Column:
    values: list[float | None] = []
    for run in runs:
        finite = [value for _, value in run.curves.get(name, ()) if math.isfinite(value)]
        values.append((min if _better(name) == "low" else max)(finite) if finite else None)
    return Column(name, values, _better(name), _joined("best value during training", figures.better(name)))


def _losses(runs: Sequence[RunRecord]) -> list[Column]:
    name = "val/loss" if any("val/loss" in run.curves for run in runs) else "train/loss"
    minima, comparable = [lowest(run, name) for run in runs], not incomparable(runs)
    last = [run.curves[name][-1][1] if name in run.curves else None for run in runs]
    return [
        Column(f"min {name}", [p and p[1] for p in minima], "low", "lowest value of the run", ranks=comparable),
        Column("at step", [p and p[0] for p in minima], description=f"step of the lowest {name}"),
        Column(f"last {name}", last, "low", "last value of the run", ranks=comparable),
    ]


def _costs(runs: Sequence[RunRecord]) -> list[Column]:
    rates = []
    for run in runs:
        finite = [v for _, v in run.curves.get("speed/images_per_s", ()) if math.isfinite(v)]
        rates.append(statistics.median(finite) if finite else None)
    rate_texts = [NONE if r is None else f"{r:,.0f}" for r in rates]
    seconds = [_seconds(run, rate) for run, rate in zip(runs, rates, strict=True)]
    second_texts = [NONE if s is None else f"{'' if s[1] else '≈ '}{s[0]:,.0f}" for s in seconds]
    second_description = "duration of the job; ≈ marks an estimate, steps × batch size ÷ images/s"
    short = ["" if is_long else "not ranked: short" for is_long in long_enough(runs)]
    return [
        Column("images/s", rates, "high", "median over the rows of metrics.csv", rate_texts),
        Column("steps", [run.steps for run in runs], description="last step of metrics.csv", details=short),
        Column("seconds", [s and s[0] for s in seconds], "", second_description, second_texts),
        Column("state", [run.status.split(":")[0] for run in runs], description="how the run ended"),
    ]


def _seconds(run: RunRecord, rate: float | None) -> tuple[float, bool] | None:
    """Return (seconds, whether they were measured)."""
    if run.seconds is not None:
        return run.seconds, True
    batch_size = submapping(run.config, "data").get("batch_size")
    return (run.steps * batch_size / rate, False) if rate and isinstance(batch_size, int) else None


def incomparable(runs: Sequence[RunRecord]) -> list[str]:
    """Return the groups that differ and change the meaning of val/loss; [] if the losses of the runs are comparable."""
    groups = {key.split(".")[0] for difference in _loss_differences(runs) for key in difference.keys}
    if not any(str(submapping(run.config, "variance").get("_target_")).endswith(".Learned") for run in runs):
        groups -= {"variance"}  # only a learned variance is part of the training loss
    return [group for group in _COMPARABLE if group in groups]


def _loss_differences(runs: Sequence[RunRecord]) -> list[Difference]:
    """Return the differences of the groups that val/loss depends on; of data only those that select other images."""
    configs = [{group: run.config.get(group) for group in _COMPARABLE} for run in runs]
    for config in configs:
        config["data"] = {key: submapping(config, "data").get(key) for key in _IMAGE_KEYS}
    return differences(configs)


def over_seeds(runs: Sequence[RunRecord], chosen: Sequence[Column], metric: Column) -> list[Column]:
    """Return a table with one row for each set of choices except the seed, the best mean first.

    Its columns are the choices, the number of runs, the mean and the standard deviation of `metric`. It is empty unless
    several runs differ only in their seeds.
    """
    others = [column for column in chosen if column.key != "seed"]
    grouping = [*others, *folded(runs)] if len(runs) > 1 else others
    if len(others) == len(chosen):
        return []
    groups: dict[tuple[str, ...], list[float]] = {}
    for i in range(len(runs)):
        if (value := metric.number(i)) is not None:
            groups.setdefault(tuple(column.text(i) for column in grouping), []).append(value)
    if max(map(len, groups.values()), default=0) < 2:
        return []
    rows = sorted(groups.items(), key=lambda row: statistics.fmean(row[1]), reverse=metric.better == "high")
    means = [statistics.fmean(values) for _, values in rows]
    deviations = [statistics.stdev(values) if len(values) > 1 else None for _, values in rows]
    return [
        *(Column(column.key, [key[k] for key, _ in rows]) for k, column in enumerate(others)),
        Column("runs", [len(values) for _, values in rows]),
        Column(metric.key, means, metric.better, "mean over seeds", ranks=metric.ranks),
        Column("std", deviations, description="standard deviation over seeds"),
    ]


def label(columns: Sequence[Column], i: int, run: RunRecord) -> str:
    """Return the choices of run `i` as a short text, or its name if it has none."""
    return " · ".join(_short(c, c.values[i]) for c in columns if c.values[i] != NONE) or run.name


def _short(column: Column, value: Any) -> str:
    if (
        isinstance(value, str)
        and re.fullmatch(r"[A-Za-z_]\w*", value)
        and value not in ("true", "false", "null", "none")
    ):
        return value
    text = f"{value:g}" if isinstance(value, float) else str(value)
    text = text.rstrip("/").rsplit("/", 1)[-1]  # of a path, its last part
    text = text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"
    return f"{column.key.rsplit('.', 1)[-1]}={text}"
