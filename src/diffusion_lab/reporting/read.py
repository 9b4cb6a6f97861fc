"""What runs and evaluations leave behind, read from plain files: neither torch nor a checkpoint is opened."""

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

from diffusion_lab.errors import ConfigError

Row = dict[str, Any]  # of metrics.json
Curve = list[tuple[int, float]]  # (step, value) in the order of the file; a value may be NaN
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where libyaml is there

_RUN = {"config.yaml", "metrics.csv", "checkpoints", ".hydra", "outcome.json"}  # any of these makes a folder a run
_LEAVES = {"checkpoints", "samples", "wandb", "tensorboard", "images", "cache"}  # nothing to look for below
_LOSSES = ("val/loss", "train/loss")
_UNSHOWN = {
    "step",
    "epoch",
    "speed/peak_memory_gib",
    "speed/hours_to_go",
}  # of metrics.csv; and the loss by bins of ln SNR


@dataclass
class Run:
    """One training run.

    Attributes:
        folder: where it lies.
        name: short, unique in a report.
        config: the resolved configuration.
        overrides: of its command line; None where the file is gone.
        choices: group → option, of the groups as they were composed; empty for a resumed run, which keeps its checkpoint's.
        curves: metrics.csv by column, those that a report shows and that are not empty.
        status: "done", or in words what became of it.
        notes: what a reader should know of its files.
        seconds: of the job; None where nothing says.
        grid: its last grid of samples.
        evaluations: rows of metrics.json whose checkpoint is this run's.
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
        """The last step that metrics.csv knows."""
        return max(curve[-1][0] for curve in self.curves.values())


@dataclass
class LeftOut:
    """A folder that the report cannot show, and why; with the overrides of its command line where they are known."""

    folder: Path
    reason: str
    overrides: list[str] | None = None


@dataclass
class Evaluation:
    """A metrics.json whose checkpoint belongs to none of the runs."""

    folder: Path
    of: str
    rows: list[Row]


@dataclass
class Found:
    """All that lies below the folders that were asked for."""

    runs: list[Run] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)


def within(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The mapping below a key; {} where there is none, or something else."""
    found = mapping.get(key)
    return found if isinstance(found, dict) else {}


def find(paths: Sequence[Path]) -> Found:
    """Reads every run and evaluation at or below `paths`, each once.

    Raises:
        ValueError: a path that is not there, or is a file.
    """
    found, measured, seen = Found(), list[tuple[Path, list[Row]]](), set[Path]()
    for path in paths:
        if not path.exists():
            raise ConfigError(
                f"there is no folder {path}: name a run (outputs/train/DATE), a sweep (outputs/multirun/DATE), or an evaluation"
            )
        if not path.is_dir():
            raise ConfigError(f"{path} is a file: name the folder of a run, a sweep or an evaluation")
        before = len(seen)
        for folder, kind in _walk(path):
            if (real := folder.resolve()) in seen:
                continue
            seen.add(real)
            try:
                if kind == "run":
                    found.runs.append(_run(folder))
                elif kind == "evaluation":
                    measured.append((folder, _rows(folder / "metrics.json")))
                else:
                    found.left_out.append(LeftOut(folder, "the folder is empty"))
            except ValueError as error:
                found.left_out.append(LeftOut(folder, str(error), _overrides(folder)))
        if len(seen) == before and path.resolve() not in seen:
            found.left_out.append(LeftOut(path, "holds no run: no config.yaml, metrics.csv or metrics.json below it"))
    _name(found.runs)
    _attach(found, measured)
    return found


# folders ------------------------------------------------------------------------------------------------------------------


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """(folder, "run" | "evaluation" | "empty") at and below `folder`, in the order of people: 2 before 10."""
    entries = list(os.scandir(folder))
    names = {entry.name for entry in entries}
    is_run = bool(names & _RUN) and "multirun.yaml" not in names
    if not entries:
        yield folder, "empty"
    elif "metrics.json" in names and not names & {"config.yaml", ".hydra"}:
        yield folder, "evaluation"
        return
    elif is_run:
        yield folder, "run"
    for entry in sorted(entries, key=lambda e: _natural(e.name)):
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".") and entry.name not in _LEAVES:
            yield from (f for f in _walk(Path(entry.path)) if not is_run or f[1] == "evaluation")


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _name(runs: list[Run]) -> None:
    """The path below what all runs have in common."""
    if runs:
        common = os.path.commonpath([run.folder.absolute().parent for run in runs])
        for run in runs:
            run.name = Path(os.path.relpath(run.folder.absolute(), common)).as_posix()


# one run ------------------------------------------------------------------------------------------------------------------


def _run(folder: Path) -> Run:
    """ValueError: why it cannot be shown."""
    notes: list[str] = []
    outcome = _outcome(folder, notes)
    status, reason = str(outcome.get("status", "")), outcome.get("reason")
    if status in ("failed", "refused"):
        raise ConfigError(f"{status}: {reason or 'no reason is recorded'}")
    config = _mapping(folder / "config.yaml", "it was refused, or stopped before training began")
    curves = _curves(folder / "metrics.csv", notes)
    resumed = bool(config.get("ckpt"))
    run = Run(folder, folder.name, config, _overrides(folder, config), {} if resumed else _choices(folder), curves)
    run.notes, run.status = notes, _status(run, status, reason)
    seconds = outcome.get("seconds")
    run.seconds = float(seconds) if isinstance(seconds, int | float) and math.isfinite(seconds) else None
    run.grid = max((folder / "samples").glob("step_*.png"), default=None)
    return run


def _status(run: Run, outcome: str, reason: object) -> str:
    if outcome in ("pruned", "interrupted"):
        return outcome + (f": {reason}" if reason else "")
    for name in _LOSSES:
        if name in run.curves and not math.isfinite(run.curves[name][-1][1]):
            tail = list(itertools.takewhile(lambda point: not math.isfinite(point[1]), reversed(run.curves[name])))
            first = tail[-1][0]
            return f"diverged: {name} is no number from step {first:,} on"
    asked, every = (within(run.config, "trainer").get(key) for key in ("max_steps", "log_every_n_steps"))
    row = every if isinstance(every, int) else 1  # steps after the last row leave no trace
    if outcome != "done" and isinstance(asked, int) and run.steps + row <= asked:
        return f"unfinished: {run.steps:,} of {asked:,} steps"
    return "done"


def _outcome(folder: Path, notes: list[str]) -> dict[str, Any]:
    """What a sweep says of its job; {} where no sweep does."""
    path = folder / "outcome.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    except (ValueError, OSError):
        pass
    notes.append("outcome.json cannot be read")
    return {}


def _mapping(path: Path, otherwise: str) -> dict[str, Any]:
    """A YAML file that holds a mapping."""
    if not path.is_file():
        raise ConfigError(f"no {path.name}: {otherwise}")
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise ConfigError(f"{path.name} cannot be read: {str(error).splitlines()[0]}") from None
    if found is None:
        raise ConfigError(f"{path.name} is empty: {otherwise}")
    if not isinstance(found, dict):
        raise ConfigError(f"{path.name} holds no configuration")
    return found


def _overrides(folder: Path, config: dict[str, Any] | None = None) -> list[str] | None:
    """Of the command line. The checkpoint that was resumed is named as a file: `latest` is another one by now."""
    try:
        found = yaml.load((folder / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"), _Loader) or []
    except (yaml.YAMLError, ValueError, OSError):
        found = _outcome(folder, []).get("overrides")
    if not isinstance(found, list):
        return None
    ckpt = (config or {}).get("ckpt")
    return [f"ckpt={ckpt}" if ckpt and str(line).startswith("ckpt=") else str(line) for line in found]


def _choices(folder: Path) -> dict[str, str]:
    """Hydra's own record of which option each group had."""
    try:
        found: Any = _mapping(folder / ".hydra" / "hydra.yaml", "")
        choices = found["hydra"]["runtime"]["choices"]
        return {str(group): "–" if option is None else str(option) for group, option in choices.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _curves(path: Path, notes: list[str]) -> dict[str, Curve]:
    """metrics.csv by column. A line that was cut while it was written is left out, and said so."""
    if not path.is_file():
        raise ConfigError("no metrics.csv: it stopped before its first row was logged")
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        raise ConfigError("metrics.csv is empty: it stopped before its first row was logged")
    whole = text.endswith(("\n", "\r"))
    rows = list(csv.reader(text.replace("\0", "").splitlines()))
    head, body, bad = rows[0], rows[1:], 0
    if not whole and body:
        body.pop()
        notes.append("the last line of metrics.csv is cut, and left out")
    if "step" not in head or not set(_LOSSES) & set(head):
        raise ConfigError(
            "metrics.csv has no columns step and val/loss or train/loss: its first line is cut, or not ours"
        )
    shown = {i: name for i, name in enumerate(head) if name not in _UNSHOWN and not name.startswith("train/loss_snr/")}
    curves: dict[str, Curve] = {name: [] for name in shown.values()}
    at, width = head.index("step"), len(head)
    for row in body:
        try:
            if len(row) != width:
                raise ValueError
            step = int(float(row[at]))
            values = [(i, float(row[i])) for i in shown if row[i]]
        except (ValueError, OverflowError):
            bad += 1
            continue
        for i, value in values:
            curves[shown[i]].append((step, value))
    if bad:
        notes.append(
            f"{bad} line{'s' * (bad > 1)} of metrics.csv cannot be read, and {'are' if bad > 1 else 'is'} left out"
        )
    curves = {name: sorted(curve, key=itemgetter(0)) for name, curve in curves.items() if curve}
    if not set(_LOSSES) & set(curves):
        raise ConfigError("metrics.csv holds no loss: it stopped before its first row was logged, or is cut")
    return curves


# evaluations --------------------------------------------------------------------------------------------------------------


def _rows(path: Path) -> list[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        raise ConfigError("metrics.json is cut or no JSON") from None
    if not (
        isinstance(rows, list)
        and rows
        and all(isinstance(r, dict) and isinstance(r.get("metrics"), dict) for r in rows)
    ):
        raise ConfigError("metrics.json holds no rows of metrics")
    return rows


def _attach(found: Found, measured: list[tuple[Path, list[Row]]]) -> None:
    """Each evaluation to the run whose checkpoint it judged."""
    for folder, rows in measured:
        of = _judged(rows[0])
        run = _owner(found.runs, folder, of)
        if run:
            run.evaluations += rows
        else:
            found.evaluations.append(Evaluation(folder, of or "unknown", rows))


def _judged(row: Row) -> str:
    return str(within(row, "checkpoint").get("path") or row.get("images") or "")


def _owner(runs: list[Run], folder: Path, of: str) -> Run | None:
    path = Path(of)
    if path.suffix == ".ckpt":
        path = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    for run in runs:
        if of and path.resolve() == run.folder.resolve():
            return run
    for run in runs:
        if run.folder.resolve() in folder.resolve().parents:
            return run
    if len(path.parts) < 2:
        return None
    # Folders are copied from where they were made: the run's own name and its parent's then tell, unless two runs share both.
    same = [run for run in runs if run.folder.absolute().parts[-2:] == path.parts[-2:]]
    return same[0] if len(same) == 1 else None
