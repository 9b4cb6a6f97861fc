"""Write training runs and evaluations as one self-contained HTML page.

`read` reads the files of run folders, `compare` compares their configurations and results, `charts` and `grids` prepare curves
and images, `sections` the content of each section, and `page` renders the templates.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from diffusion_lab.errors import ConfigError, printable
from diffusion_lab.io import os_errors, write_file
from diffusion_lab.reporting.page import MARK, render
from diffusion_lab.reporting.read import LeftOut, read_records

__all__ = ["Report", "print_report", "write_report"]


class Report(NamedTuple):
    """A written report.

    Attributes:
        path: the HTML file.
        size: its size in bytes.
        runs: number of runs.
        evaluations: number of rows of metrics.json.
        left_out: the folders that cannot be shown, with the reasons.
    """

    path: Path
    size: int
    runs: int
    evaluations: int
    left_out: list[LeftOut]


def write_report(paths: Sequence[Path], out: Path | None = None, title: str | None = None) -> Report:
    """Read the runs and evaluations at or below `paths` and write them as one HTML page.

    The page is written to a temporary name and renamed. An existing file is overwritten only if it is a report.

    Args:
        paths: runs, sweeps, evaluations, or folders of them.
        out: the HTML file; default report.html in the first path.
        title: the title of the page; default the name of the first path.

    Raises:
        ConfigError: a path does not exist, or `out` cannot be written.
    """
    out = out or paths[0] / "report.html"
    with os_errors():
        records = read_records(paths)
        _check_output(out)
        write_file(out, render(records, title or paths[0].resolve().name))
    rows = sum(len(run.evaluations) for run in records.runs) + sum(len(e.rows) for e in records.evaluations)
    return Report(out, out.stat().st_size, len(records.runs), rows, records.left_out)


def print_report(report: Report) -> None:
    """Print what the report contains and its path to stdout, the folders that are left out to stderr."""
    for folder in report.left_out:
        print(printable(f"left out  {folder.folder}: {folder.reason}"), file=sys.stderr)
    counts = f"{_count(report.runs, 'run')}, {_count(report.evaluations, 'evaluation')}"
    print(f"{counts}, {len(report.left_out)} left out")
    print(printable(f"open  {report.path}  ({report.size / 1e6:.1f} MB)"))


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def _check_output(out: Path) -> None:
    """Refuse a folder, and an existing file that is not a report."""
    if out.is_dir():
        raise ConfigError(f"the output {out} is a folder: name a file, {out / 'report.html'}")
    if out.exists():
        with out.open("rb") as file:
            if MARK.encode() not in file.read(1000):
                raise ConfigError(f"the output {out} exists and is not a report: name another file")
