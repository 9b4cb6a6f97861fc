"""Run the jobs of a sweep (--multirun), and summarize their outcomes.

A job runs in this process, in another process (joblib) or on another machine (submitit). Its outcome is therefore written to
outcome.json in its folder: {status, code, reason, metric, value, overrides, seconds}. A failed job does not end the sweep.
"""

import json
import shlex
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusion_lab import composition
from diffusion_lab.errors import printable
from diffusion_lab.io import write_file
from diffusion_lab.processes import Refusal, Result, one_line

FILE = "outcome.json"
FAILED = 1  # exit code of a sweep with a failed job

Outcome = dict[str, Any]


_folder: Path | None = None  # folder of the sweep that runs in this process


def begin(folder: Path | None) -> None:
    """Set the folder of the current sweep; None for a single run."""
    global _folder
    _folder = folder


def folder() -> Path | None:
    """Return the folder of the current sweep; None for a single run."""
    return _folder


def job(call: Callable[[], Result], folder: Path, overrides: Sequence[str]) -> Outcome:
    """Run one job, write its outcome to `folder`, and return it.

    The message of an exception is stored as the reason. Its traceback is printed on stderr, except for a ConfigError.

    Args:
        call: runs the job.
        folder: the folder of the job.
        overrides: the overrides of the job.
    """
    started, result, reason = time.perf_counter(), Result(FAILED), None
    try:
        with one_line():
            result = call()
        reason = result.reason
        status = "pruned" if result.pruned else "interrupted" if result.code else "done"
        status = "failed" if result.code == FAILED else status
    except Refusal as refusal:
        status, reason = "refused", refusal.reason
    except Exception as error:
        traceback.print_exc()
        status, reason = "failed", f"{type(error).__name__}: {composition.first_line(error)}"
    outcome = {
        "status": status,
        "code": 2 if status == "refused" else result.code,
        "reason": reason,
        "metric": result.metric,
        "value": result.value,
        "overrides": list(overrides),
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_file(folder / FILE, json.dumps(outcome, indent=2, ensure_ascii=False))
    return outcome


def summarize(folder: Path) -> int:
    """Print the outcomes of the jobs of a sweep, the best first and failed ones last, and return the exit code of the sweep.

    Args:
        folder: hydra.sweep.dir. Files older than its multirun.yaml, which Hydra writes first, belong to an earlier sweep and
            are ignored.
    """
    began_at = (folder / "multirun.yaml").stat().st_mtime if (folder / "multirun.yaml").is_file() else 0.0
    outcomes = {
        path.parent.relative_to(folder).as_posix(): json.loads(path.read_text())
        for path in sorted(folder.rglob(FILE))
        if path.stat().st_mtime >= began_at
    }
    for record in sorted(folder.rglob(".hydra")):  # jobs without outcome.json were killed
        name = record.parent.relative_to(folder).as_posix()
        if name not in outcomes and record.stat().st_mtime >= began_at:
            reason = "no result recorded: probably killed or out of memory"
            outcomes[name] = {
                "status": "failed",
                "reason": reason,
                "overrides": _recorded_overrides(record),
                "value": None,
            }
    if not outcomes:
        return 0
    counts: dict[str, int] = {}
    for outcome in outcomes.values():
        counts[outcome["status"]] = counts.get(outcome["status"], 0) + 1
    print(f"\n{len(outcomes)} jobs in {folder}: " + ", ".join(f"{n} {status}" for status, n in counts.items()))
    common = set.intersection(*(set(o["overrides"]) for o in outcomes.values())) if len(outcomes) > 1 else set()
    valued = {name: o for name, o in outcomes.items() if o["value"] is not None and o["status"] != "failed"}
    for name, o in sorted(valued.items(), key=lambda item: (str(item[1]["metric"]), float(item[1]["value"]))):
        status = "" if o["status"] == "done" else f"  {o['status']}"
        print(f"  {o['metric']} {o['value']:<9.4g} {name}  {_own_overrides(o, common)}{status}")
    unsuccessful = {name: o for name, o in outcomes.items() if o["status"] in ("failed", "refused")}
    for name, o in unsuccessful.items():
        print(printable(f"  {o['status']}  {name}  {_own_overrides(o, common)}: {o['reason']}"))
    print(f"compare  python src/report.py {shlex.quote(str(folder))}", flush=True)
    return FAILED if unsuccessful else 0


def _own_overrides(outcome: Outcome, common: set[str]) -> str:
    """Return the overrides of a job without those that all jobs share."""
    return " ".join(o for o in outcome["overrides"] if o not in common)


def _recorded_overrides(hydra: Path) -> list[str]:
    import yaml

    path = hydra / "overrides.yaml"
    return list(yaml.safe_load(path.read_text()) or []) if path.is_file() else []
