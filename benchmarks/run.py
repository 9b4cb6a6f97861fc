"""`make bench`: print the tables of docs/benchmarks.md. ARGS=quick takes a minute or two; ARGS=NAME runs one part."""

import logging
import sys
import warnings

import guidance
import logging_cost
import overhead
import quality
import samplers
import solvers
from common import machine

import report

PARTS = {
    "overhead": overhead.main,
    "quality": quality.main,
    "samplers_cost": samplers.cost,
    "solvers": solvers.main,
    "guidance": guidance.main,
    "logging_cost": logging_cost.main,
    "report": report.main,
}


def main(arguments: list[str]) -> int:
    """Print the named parts, or all; return the exit code."""
    unknown = [a for a in arguments if a not in (*PARTS, "quick")]
    if unknown:
        print(f"error: {unknown[0]} is unknown: write quick, {', '.join(PARTS)}", file=sys.stderr)
        return 2
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print(machine(), flush=True)
    for name in [a for a in arguments if a in PARTS] or PARTS:
        print(f"\n## {name}\n\n{PARTS[name]('quick' in arguments)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
