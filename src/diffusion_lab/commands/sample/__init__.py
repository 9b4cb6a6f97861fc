"""Sample images from a checkpoint (`src/sample.py`).

Each task is a module. `tasks` checks the options, and `context` contains the functions that several tasks use.
"""

import importlib
from typing import Any

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.commands.sample.tasks import check
from diffusion_lab.io import os_errors


def run(config: DictConfig) -> int:
    """Run a task, write its files, print a summary, and return the exit code."""
    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    with os_errors():
        check(settings)  # before torch is imported
        task = importlib.import_module(f"diffusion_lab.commands.sample.{settings['task']}")
        context = importlib.import_module("diffusion_lab.commands.sample.context").SamplingContext
        summary = task.run_task(context.build(settings))
    print(summary)
    return 0
