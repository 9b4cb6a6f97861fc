"""`src/evaluate.py`: samples of a checkpoint, or any images, against a data set.

`prepare` builds and checks everything, `work` samples and measures, `processes` shares that, `report` writes it down.
"""

import sys
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.commands.evaluate import report, samplers
from diffusion_lab.commands.evaluate.prepare import prepare
from diffusion_lab.commands.evaluate.processes import shared
from diffusion_lab.commands.evaluate.work import rows
from diffusion_lab.io import os_errors

__all__ = ["run"]


def run(config: DictConfig) -> int:
    """Evaluates as configured: metrics.json, metrics.csv, quality.png, a table on the screen; returns the exit code."""
    with os_errors():
        settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        settings["sampler_nodes"] = samplers.nodes(settings) if settings["ckpt"] else {}
        prepared = prepare(settings)
        for warning in prepared.warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        with shared(settings, prepare, rows) as processes:
            found = rows(prepared, processes)
        report.write(prepared.out, found)
        report.log(settings, prepared.out, found)
    report.show(found, prepared.out)
    return 0
