"""`src/evaluate.py`: compare samples of a checkpoint, or any images, with a data set.

`prepare` builds and checks everything, `measure` samples and computes the metrics, `output` writes and prints the results.
"""

import sys
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.commands.evaluate import output, samplers
from diffusion_lab.commands.evaluate.measure import rows
from diffusion_lab.commands.evaluate.prepare import check_settings, prepare
from diffusion_lab.device import device
from diffusion_lab.io import os_errors
from diffusion_lab.metrics.collect import Processes
from diffusion_lab.metrics.worker_group import run_in_group

__all__ = ["evaluate", "run"]


def run(config: DictConfig) -> int:
    """Evaluate a checkpoint or images. Write metrics.json, metrics.csv and quality.png, print a table, return the exit code."""
    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    with os_errors():
        check_settings(settings)
        settings["sampler_nodes"] = samplers.nodes(settings) if settings["ckpt"] else {}
        kind = device(settings["device"], settings["devices"]).partition(":")[0]
        run_in_group(evaluate, settings, settings["devices"], kind)
    return 0


def evaluate(settings: dict[str, Any], processes: Processes) -> None:
    """Evaluate in this process, as one of a group. Rank 0 writes the results and prints them."""
    prepared = processes.build(lambda: prepare(settings, processes.rank))
    if processes.rank == 0:
        for warning in prepared.warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    results = rows(prepared, processes)
    if processes.rank == 0:
        output.write(prepared.out, results)
        output.log(settings, prepared.out, results)
        output.show(results, prepared.out)
