"""What a command returns, and how the processes of one run find its configuration. The standard library alone."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from diffusion_lab.errors import ConfigError

CONFIG_ENV = "DIFFUSION_LAB_CONFIG"  # in further processes of a run: the configuration that rank 0 resolved


class Result(NamedTuple):
    """The result of a command.

    Attributes:
        code: the exit code.
        metric: the name of `value`.
        value: what a sweep compares and a sweeper minimizes: the best of the figure that decides best.ckpt.
        pruned: whether the sweeper ended the job early.
        reason: why it failed.
    """

    code: int
    metric: str | None = None
    value: float | None = None
    pruned: bool = False
    reason: str | None = None


class Refusal(SystemExit):
    """Ends a command with exit code 2; the line is on stderr already."""

    def __init__(self, reason: str) -> None:
        super().__init__(2)
        self.reason = reason


@contextmanager
def one_line() -> Iterator[None]:
    """Turn a ConfigError into one line on stderr and exit code 2; DIFFUSION_LAB_DEBUG=1 shows its traceback instead."""
    try:
        yield
    except ConfigError as error:
        if os.environ.get("DIFFUSION_LAB_DEBUG"):
            raise
        line = " ".join(str(error).split())
        print(f"error: {line}", file=sys.stderr, flush=True)
        raise Refusal(line) from None
