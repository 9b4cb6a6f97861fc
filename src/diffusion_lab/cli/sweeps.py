"""Sweeps: what each job of --multirun leaves, and what is said of all of them at the end.

A job runs in this process, in another one (joblib) or on another machine (submitit). What it came to is therefore a file in its
folder, outcome.json: {status, code, reason, metric, value, overrides, seconds}. A job that fails does not end the sweep.
"""

import json
import shlex
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusion_lab.io import write_file
from diffusion_lab.processes import Refusal, Result, one_line

FILE = "outcome.json"
FAILED = 1  # the exit code of a sweep with a job that failed

Outcome = dict[str, Any]


_folder: Path | None = None  # of the sweep that runs in this process


def begin(folder: Path | None) -> None:
    """State the folder of the sweep that begins, None for a single run."""
    global _folder
    _folder = folder


def folder() -> Path | None:
    """The folder of the sweep that `begin` stated."""
    return _folder


def job(call: Callable[[], Result], folder: Path, overrides: Sequence[str]) -> Outcome:
    """Runs one job and leaves its outcome in `folder`. What it raises becomes the reason, with the traceback on stderr
    unless it is a refusal."""
    begin, result, reason = time.perf_counter(), Result(FAILED), None
    try:
        with one_line():
            result = call()
        reason = result.reason
        ended = "pruned" if result.pruned else "interrupted" if result.code else "done"
        status = "failed" if result.code == FAILED else ended
    except Refusal as refusal:
        status, reason = "refused", refusal.reason
    except Exception as error:
        traceback.print_exc()
        status, reason = "failed", f"{type(error).__name__}: {_first_line(error)}"
    outcome = {
        "status": status,
        "code": 2 if status == "refused" else result.code,
        "reason": reason,
        "metric": result.metric,
        "value": result.value,
        "overrides": list(overrides),
        "seconds": round(time.perf_counter() - begin, 1),
    }
    write_file(folder / FILE, json.dumps(outcome, indent=2, ensure_ascii=False))
    return outcome


def summarize(folder: Path) -> int:
    """Says what the jobs below `folder` came to, the best first and those that failed last; the exit code of the sweep.

    Args:
        folder: hydra.sweep.dir. What is older than its multirun.yaml, with which a sweep begins, was there before.
    """
    began_at = (folder / "multirun.yaml").stat().st_mtime if (folder / "multirun.yaml").is_file() else 0.0
    outcomes = {
        path.parent.relative_to(folder).as_posix(): json.loads(path.read_text())
        for path in sorted(folder.rglob(FILE))
        if path.stat().st_mtime >= began_at
    }
    for began in sorted(folder.rglob(".hydra")):  # killed, or out of memory
        name = began.parent.relative_to(folder).as_posix()
        if name not in outcomes and began.stat().st_mtime >= began_at:
            reason = "no result recorded: probably killed or out of memory"
            outcomes[name] = {"status": "failed", "reason": reason, "overrides": _overrides(began), "value": None}
    if not outcomes:
        return 0
    counts: dict[str, int] = {}
    for outcome in outcomes.values():
        counts[outcome["status"]] = counts.get(outcome["status"], 0) + 1
    print(f"\n{len(outcomes)} jobs in {folder}: " + ", ".join(f"{n} {status}" for status, n in counts.items()))
    common = set.intersection(*(set(o["overrides"]) for o in outcomes.values())) if len(outcomes) > 1 else set()
    valued = {name: o for name, o in outcomes.items() if o["value"] is not None and o["status"] != "failed"}
    for name, o in sorted(valued.items(), key=lambda item: (str(item[1]["metric"]), float(item[1]["value"]))):
        print(
            f"  {o['metric']} {o['value']:<9.4g} {name}  {_told(o, common)}{'' if o['status'] == 'done' else '  ' + o['status']}"
        )
    bad = {name: o for name, o in outcomes.items() if o["status"] in ("failed", "refused")}
    for name, o in bad.items():
        print(f"  {o['status']}  {name}  {_told(o, common)}: {o['reason']}")
    print(f"compare  python src/report.py {shlex.quote(str(folder))}", flush=True)
    return FAILED if bad else 0


def _told(outcome: Outcome, common: set[str]) -> str:
    return " ".join(o for o in outcome["overrides"] if o not in common)


def _overrides(hydra: Path) -> list[str]:
    import yaml

    path = hydra / "overrides.yaml"
    return list(yaml.safe_load(path.read_text()) or []) if path.is_file() else []


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
