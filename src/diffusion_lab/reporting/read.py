"""Read the plain files of training runs and evaluations. Neither torch nor a checkpoint is loaded."""

import csv
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import yaml

from diffusion_lab.errors import ConfigError, DamagedFileError
from diffusion_lab.io import parse_plain, read_bytes

Row = dict[str, Any]  # one row of metrics.json
Curve = list[tuple[int, float]]  # (step, value), sorted by step; a value may be NaN
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast if libyaml is installed

MOST_YAML, MOST_JSON, MOST_CSV = 1 << 20, 16 << 20, 32 << 20  # bytes; a run of a million steps writes 10 MB

_RUN_FILES = {"config.yaml", "metrics.csv", "checkpoints", ".hydra", "outcome.json"}  # any of these marks a run folder
_TRAIN_FOLDERS = {"checkpoints", ".hydra"}  # only src/train.py writes these; every command writes config.yaml
_SKIPPED_FOLDERS = {"checkpoints", "samples", "wandb", "tensorboard", "images", "cache"}  # contain no runs
_LOSSES = ("val/loss", "train/loss")
# Columns of metrics.csv without a chart; the training loss by bins of ln SNR has none either.
_HIDDEN_COLUMNS = {"step", "epoch", "speed/peak_memory_gib", "speed/hours_to_go"}
_RENAMED_METRICS = {"recognised": "confident_fraction", "as_asked": "label_accuracy"}  # names written by older versions


@dataclass
class RunRecord:
    """The files of one training run.

    Attributes:
        folder: the run folder.
        name: short name, unique within a report.
        config: the resolved configuration.
        overrides: command-line overrides; None if they were not recorded.
        choices: Hydra group → selected option. Empty for a resumed run, which uses the configuration of its checkpoint.
        curves: the non-empty columns of metrics.csv that the report shows.
        status: "done", or a description such as "pruned", "diverged: …", "unfinished: 100 of 200 steps".
        notes: problems found in the files.
        seconds: duration of the job; None if it was not recorded.
        grid: the last grid of samples.
        evaluations: rows of metrics.json that evaluate a checkpoint of this run.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    overrides: list[str] | None
    choices: dict[str, str]
    curves: dict[str, Curve]
    status: str = "done"
    notes: list[str] = field(default_factory=list)
    seconds: float | None = None
    grid: Path | None = None
    evaluations: list[Row] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """The last step in metrics.csv."""
        return max(curve[-1][0] for curve in self.curves.values())


@dataclass
class LeftOut:
    """A folder that cannot be shown.

    Attributes:
        folder: the folder.
        reason: why it cannot be shown.
        overrides: command-line overrides; None if they were not recorded.
        program: the command that wrote the folder, such as "train" or "evaluate".
    """

    folder: Path
    reason: str
    overrides: list[str] | None = None
    program: str = "train"


@dataclass
class Evaluation:
    """A metrics.json that evaluates none of the runs in the report.

    Attributes:
        folder: the folder of metrics.json.
        source: the evaluated checkpoint or folder of images.
        rows: the rows of metrics.json.
    """

    folder: Path
    source: str
    rows: list[Row]


@dataclass
class Records:
    """Runs, evaluations and unreadable folders below the requested paths."""

    runs: list[RunRecord] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def submapping(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return `mapping[key]` if it is a dictionary, else {}."""
    value = mapping.get(key)
    return value if isinstance(value, dict) else {}


def read_records(paths: Sequence[Path]) -> Records:
    """Read every run and evaluation at or below `paths`, each folder once.

    Raises:
        ConfigError: a path does not exist or is a file.
    """
    records, measured, seen = Records(), list[tuple[Path, list[Row]]](), set[tuple[Path, str]]()
    for path in paths:
        if not path.exists():
            raise ConfigError(
                f"there is no folder {path}: name a run (outputs/train/DATE), a sweep (outputs/multirun/DATE), or an evaluation"
            )
        if not path.is_dir():
            raise ConfigError(f"{path} is a file: name the folder of a run, a sweep or an evaluation")
        empty = not any(path.iterdir())
        found = [(path, "empty")] if empty else list(_walk(path, in_sweep=(path.parent / "multirun.yaml").exists()))
        for folder, kind in found:
            if (real := (folder.resolve(), kind)) in seen:
                continue
            seen.add(real)
            try:
                if kind == "run":
                    records.runs.append(_read_run(folder))
                elif kind == "evaluation":
                    measured.append((folder, _read_rows(folder / "metrics.json")))
                elif kind == "job":
                    _refuse_failed(_read_outcome(folder, []))
                else:
                    records.left_out.append(LeftOut(folder, "the folder is empty"))
            except ConfigError as error:
                records.left_out.append(LeftOut(folder, str(error), _read_overrides(folder), _program(folder)))
        if not found:
            reason = "contains neither a run of src/train.py nor an evaluation of src/evaluate.py"
            records.left_out.append(LeftOut(path, reason))
    _set_names(records.runs)
    _assign_evaluations(records, measured)
    return records


# folders ------------------------------------------------------------------------------------------------------------------


def _walk(folder: Path, in_sweep: bool = False) -> Iterator[tuple[Path, str]]:
    """Yield (folder, "run" | "evaluation" | "job" | "empty") at and below `folder`, in natural order: 2 before 10.

    A run that was evaluated into its own folder is both a run and an evaluation. A job is one of a sweep of another command,
    which is shown if it failed, and an empty folder one of a job that left nothing. Other folders of other commands, such as
    those of sample.py, contain nothing that the report shows.
    """
    entries = list(os.scandir(folder))
    names = {entry.name for entry in entries}
    is_run = is_evaluation = False
    if not entries and in_sweep:
        yield folder, "empty"
    elif "multirun.yaml" not in names:
        is_evaluation = "metrics.json" in names
        is_run = bool(names & _RUN_FILES) and _is_run(folder, names)
        if is_run:
            yield folder, "run"
        if is_evaluation:
            yield folder, "evaluation"
        elif not is_run and "outcome.json" in names:
            yield folder, "job"
    for entry in sorted(entries, key=lambda e: _natural_key(e.name)):
        if (
            not (is_evaluation and not is_run)
            and entry.is_dir(follow_symlinks=False)
            and not entry.name.startswith(".")
            and entry.name not in _SKIPPED_FOLDERS
        ):
            below = _walk(Path(entry.path), "multirun.yaml" in names)
            yield from (f for f in below if not is_run or f[1] == "evaluation")


def _is_run(folder: Path, names: set[str]) -> bool:
    """Whether src/train.py wrote a folder that has files of a run; an evaluation has a config.yaml and a metrics.csv as well."""
    if names & _TRAIN_FOLDERS:
        return True
    if "config.yaml" in names:
        try:
            config = _read_yaml(folder / "config.yaml")
        except ConfigError:
            config = None
        return "trainer" in config if isinstance(config, dict) else "metrics.json" not in names
    return "metrics.json" not in names and _program(folder) == "train"


def _program(folder: Path) -> str:
    """Return the command that ran a job of a sweep, by Hydra's record in the folder above; "train" without one."""
    try:
        record: Any = _read_yaml(folder.parent / "multirun.yaml")
        return str(record["hydra"]["job"]["name"])
    except (ConfigError, KeyError, TypeError):
        return "train"


def _natural_key(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _set_names(runs: list[RunRecord]) -> None:
    """Name each run by its path relative to the common parent folder of all runs."""
    if runs:
        common = os.path.commonpath([run.folder.absolute().parent for run in runs])
        for run in runs:
            run.name = Path(os.path.relpath(run.folder.absolute(), common)).as_posix()


# one run ------------------------------------------------------------------------------------------------------------------


def _read_run(folder: Path) -> RunRecord:
    """Read one run folder.

    Raises:
        ConfigError: the reason why the run cannot be shown.
    """
    notes: list[str] = []
    outcome = _read_outcome(folder, notes)
    _refuse_failed(outcome)
    status, reason = str(outcome.get("status", "")), outcome.get("reason")
    config = _read_mapping(folder / "config.yaml", "the run was refused, or stopped before training began")
    curves = _read_curves(folder / "metrics.csv", notes)
    choices = {} if config.get("ckpt") else _read_choices(folder)
    run = RunRecord(folder, folder.name, config, _read_overrides(folder, config), choices, curves)
    run.notes, run.status = notes, _status(run, status, reason)
    seconds = outcome.get("seconds")
    run.seconds = float(seconds) if isinstance(seconds, int | float) and math.isfinite(seconds) else None
    run.grid = max((folder / "samples").glob("step_*.png"), default=None)
    return run


def _refuse_failed(outcome: dict[str, Any]) -> None:
    """Raise ConfigError with the reason that outcome.json records for a failed or refused job."""
    if (status := outcome.get("status")) in ("failed", "refused"):
        raise ConfigError(f"{status}: {outcome.get('reason') or 'no reason is recorded'}")


def _status(run: RunRecord, outcome: str, reason: object) -> str:
    if outcome in ("pruned", "interrupted"):
        return outcome + (f": {reason}" if reason else "")
    for name in _LOSSES:
        if name in run.curves and not math.isfinite(run.curves[name][-1][1]):
            tail = list(itertools.takewhile(lambda point: not math.isfinite(point[1]), reversed(run.curves[name])))
            return f"diverged: {name} is NaN or Inf since step {tail[-1][0]:,}"
    max_steps, log_every = (submapping(run.config, "trainer").get(key) for key in ("max_steps", "log_every_n_steps"))
    interval = log_every if isinstance(log_every, int) else 1  # steps after the last logged row leave no trace
    if outcome != "done" and isinstance(max_steps, int) and run.steps + interval <= max_steps:
        return f"unfinished: {run.steps:,} of {max_steps:,} steps"
    return "done"


def _read_outcome(folder: Path, notes: list[str]) -> dict[str, Any]:
    """Return the outcome.json that a sweep writes for each job; {} if the file is missing or unreadable."""
    path = folder / "outcome.json"
    if not path.exists():
        return {}
    try:
        outcome = parse_plain(read_bytes(path, MOST_JSON), json.loads, path.name)
        if isinstance(outcome, dict):
            return outcome
    except (ConfigError, OSError):
        pass
    notes.append("outcome.json cannot be read")
    return {}


def _read_yaml(path: Path) -> Any:
    """Return the content of a YAML file. Raises ConfigError: it cannot be read."""

    def loads(text: str | bytes) -> Any:
        try:
            return yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise DamagedFileError(str(error)) from None

    try:
        return parse_plain(read_bytes(path, MOST_YAML), loads, path.name)
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read: {error.strerror}") from None


def _read_mapping(path: Path, cause: str) -> dict[str, Any]:
    """Return the mapping in a YAML file; `cause` explains a missing or empty file."""
    if not path.exists():
        raise ConfigError(f"no {path.name}: {cause}")
    content = _read_yaml(path)
    if content is None:
        raise ConfigError(f"{path.name} is empty: {cause}")
    if not isinstance(content, dict):
        raise ConfigError(f"{path.name} contains no mapping")
    return content


def _read_overrides(folder: Path, config: dict[str, Any] | None = None) -> list[str] | None:
    """Return the command-line overrides. `ckpt=latest` is replaced by the file that was resumed."""
    try:
        overrides = _read_yaml(folder / ".hydra" / "overrides.yaml") or []
    except ConfigError:
        overrides = _read_outcome(folder, []).get("overrides")
    if not isinstance(overrides, list):
        return None
    ckpt = (config or {}).get("ckpt")
    return [f"ckpt={ckpt}" if ckpt and str(line).startswith("ckpt=") else str(line) for line in overrides]


def _read_choices(folder: Path) -> dict[str, str]:
    """Return Hydra's record of the option selected in each group."""
    try:
        content: Any = _read_mapping(folder / ".hydra" / "hydra.yaml", "")
        choices = content["hydra"]["runtime"]["choices"]
        return {str(group): "–" if option is None else str(option) for group, option in choices.items()}
    except (ConfigError, KeyError, TypeError, AttributeError):
        return {}


def _read_curves(path: Path, notes: list[str]) -> dict[str, Curve]:
    """Return the columns of metrics.csv. A truncated last line is skipped and noted in `notes`."""
    if not path.exists():
        raise ConfigError("no metrics.csv: the run stopped before its first row was logged")
    try:
        text = read_bytes(path, MOST_CSV).decode(errors="replace")
    except OSError as error:
        raise ConfigError(f"metrics.csv cannot be read: {error.strerror}") from None
    if not text.replace("\0", "").strip():
        raise ConfigError("metrics.csv is empty: the run stopped before its first row was logged")
    complete = text.endswith(("\n", "\r"))
    try:
        rows = list(csv.reader(text.replace("\0", "").splitlines()))
    except csv.Error as error:
        raise ConfigError(f"metrics.csv cannot be read: {error}") from None
    header, body, unreadable = rows[0], rows[1:], 0
    if not complete and body:
        body.pop()
        notes.append("the last line of metrics.csv is truncated and was skipped")
    if "step" not in header or not set(_LOSSES) & set(header):
        raise ConfigError(
            "metrics.csv has no columns step and val/loss or train/loss: its header is truncated, "
            "or another program wrote the file"
        )
    shown = {
        i: current_name(name)
        for i, name in enumerate(header)
        if name not in _HIDDEN_COLUMNS and not name.startswith("train/loss_snr/")
    }
    curves: dict[str, Curve] = {name: [] for name in shown.values()}
    step_column = header.index("step")
    for row in body:
        try:
            if len(row) != len(header):
                raise DamagedFileError
            step = int(float(row[step_column]))
            values = [(i, float(row[i])) for i in shown if row[i]]
        except (ValueError, OverflowError):
            unreadable += 1
            continue
        for i, value in values:
            curves[shown[i]].append((step, value))
    if unreadable:
        lines, were = ("line", "was") if unreadable == 1 else ("lines", "were")
        notes.append(f"{unreadable} {lines} of metrics.csv cannot be read and {were} skipped")
    curves = {name: sorted(curve, key=itemgetter(0)) for name, curve in curves.items() if curve}
    if not set(_LOSSES) & set(curves):
        raise ConfigError(
            "metrics.csv contains no loss: the run stopped before its first row was logged, or the file is truncated"
        )
    return curves


def current_name(metric: str) -> str:
    """Return today's name of a metric that an older version wrote: recognised_1k → confident_fraction_1k."""
    for old, new in _RENAMED_METRICS.items():
        if metric == old or metric.startswith(f"{old}_"):
            return new + metric.removeprefix(old)
    return metric


# evaluations --------------------------------------------------------------------------------------------------------------


def _read_rows(path: Path) -> list[Row]:
    """Return the rows of metrics.json, its metrics under their current names."""
    try:
        rows = parse_plain(read_bytes(path, MOST_JSON), json.loads, path.name)
    except (ConfigError, OSError):
        raise ConfigError("metrics.json is truncated or not JSON") from None
    if not (
        isinstance(rows, list)
        and rows
        and all(isinstance(row, dict) and isinstance(row.get("metrics"), dict) for row in rows)
    ):
        raise ConfigError("metrics.json contains no rows of metrics")
    for row in rows:
        for key in {"metrics", "spread"} & set(row):
            if isinstance(row[key], dict):
                row[key] = {current_name(name): value for name, value in row[key].items()}
    return rows


def _assign_evaluations(records: Records, measured: list[tuple[Path, list[Row]]]) -> None:
    """Add each evaluation to the run whose checkpoint it evaluates, or to `records.evaluations`."""
    for folder, rows in measured:
        source = str(submapping(rows[0], "checkpoint").get("path") or rows[0].get("images") or "").replace("\0", "")
        run = _find_run(records.runs, folder, source)
        if run:
            run.evaluations += rows
        else:
            records.evaluations.append(Evaluation(folder, source or "unknown", rows))


def _find_run(runs: list[RunRecord], folder: Path, source: str) -> RunRecord | None:
    """Return the run whose folder contains `source`, or else the run whose folder contains the evaluation `folder`."""
    path = Path(source)
    if path.suffix == ".ckpt":
        path = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    for run in runs:
        if source and path.resolve() == run.folder.resolve():
            return run
    place = folder.resolve()
    for run in runs:
        if run.folder.resolve() in (place, *place.parents):
            return run
    if len(path.parts) < 2:
        return None
    # The runs may have been copied to another place: compare the last two folder names, unless they are ambiguous.
    candidates = [run for run in runs if run.folder.absolute().parts[-2:] == path.parts[-2:]]
    return candidates[0] if len(candidates) == 1 else None
