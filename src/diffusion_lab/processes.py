"""What a command returns, and how the processes of one run find its configuration. The standard library alone."""

from typing import NamedTuple

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
