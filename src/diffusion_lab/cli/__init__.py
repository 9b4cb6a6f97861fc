"""The entry point of every command: `start(name)`, `main(name)`. Nothing heavy is imported before a command line was checked."""

import signal
import sys
from typing import NoReturn

from diffusion_lab import processes


def start(name: str) -> NoReturn:
    """Run the command `name` as a program: `main` with protected output, then exit with its code."""
    processes.protect_output()
    try:
        code = main(name)
    finally:  # Ctrl-C while the interpreter shuts down ends it without a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(code)


def main(name: str) -> int:
    """Run the command `name`, with the configuration of conf/NAME.yaml and the function `run` of commands/NAME.

    A stop signal before the command has anything to save ends it with one line.

    Returns:
        The exit code: 0, 2 for a refusal, 128 + a signal's number, 1 for a sweep with a failed job.
    """
    with processes.handling_signals():
        try:
            processes.limit_threads()
            with processes.signals_first():
                from diffusion_lab.cli.entry import run  # late: Hydra is imported under the signal handler

                return run(name)
        except processes.Interrupted as stop:
            return processes.ended_by(stop, requeues=name == "train")


__all__ = ["main", "start"]
