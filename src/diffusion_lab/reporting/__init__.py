"""`src/report.py`: one run or many as one HTML page that needs nothing but itself.

`read` finds and reads what lies in the folders, `compare` says what differs and which did best, `charts` and `grids` make
curves and pictures small, `page` writes it all down with `page.css` and `page.js`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from diffusion_lab.errors import ConfigError
from diffusion_lab.io import os_errors, write_file
from diffusion_lab.processes import one_line
from diffusion_lab.reporting.page import MARK, page
from diffusion_lab.reporting.read import find

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """Refuses in one line, as every command here does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help says what can be written")


def main(arguments: Sequence[str]) -> int:
    """Writes the report; returns the exit code."""
    parser = _Parser(prog="python src/report.py", description="One run or a whole sweep as one HTML page.")
    parser.add_argument(
        "paths", nargs="+", type=Path, metavar="PATH", help="a run, a sweep, an evaluation, or a folder of them"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first PATH")
    parser.add_argument("--title", help="default: the name of the first PATH")
    with one_line(), os_errors():
        asked = parser.parse_args(arguments)
        found = find(asked.paths)
        out = asked.out or asked.paths[0] / "report.html"
        _refuse_another(out)
        write_file(out, page(found, asked.title or asked.paths[0].resolve().name))
    for left in found.left_out:
        print(f"left out  {left.folder}: {left.reason}", file=sys.stderr)
    rows = sum(len(run.evaluations) for run in found.runs) + sum(len(e.rows) for e in found.evaluations)
    print(f"{_counted(len(found.runs), 'run')}, {_counted(rows, 'evaluation')}, {len(found.left_out)} left out")
    print(f"open  {out}  ({out.stat().st_size / 1e6:.1f} MB)")
    return 0


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _refuse_another(out: Path) -> None:
    """A report is written anew, anything else never over."""
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder: name a file, {out / 'report.html'}")
    if out.exists():
        with out.open("rb") as file:
            if MARK.encode() not in file.read(1000):
                raise ConfigError(f"{out} is there and no report: name another file with --out")
