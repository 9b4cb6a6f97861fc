"""Several processes for one command, by Lightning Fabric: each takes its share of the images."""

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from diffusion_lab.errors import ConfigError
from diffusion_lab.metrics.collect import Processes

TIMEOUT = timedelta(hours=2)  # for a process that waits for the last blocks of the others

Settings = dict[str, Any]
Work = Callable[[Settings, Processes], None]


def run_in_group(work: Work, settings: Settings, devices: int, device: str) -> None:
    """Run work(settings, processes) in `devices` processes, or in this one if there is one.

    Args:
        work: a function of a module; rank 0 prints and writes.
        settings: plain values.
        devices: number of processes, each with a GPU of its own where they use one.
        device: "cpu" or "cuda".

    Raises:
        ConfigError: `work` refused, in any process.
    """
    if devices == 1:
        work(settings, Processes())
        return
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    strategy = DDPStrategy(start_method="spawn", timeout=TIMEOUT)
    fabric = Fabric(accelerator=device, devices=devices, strategy=strategy)
    refusal = fabric.launch(functools.partial(_work, work=work, settings=settings))
    if refusal is not None:
        raise ConfigError(refusal)


def _work(fabric: Any, work: Work, settings: Settings) -> str | None:
    """Run in each process; the return value of rank 0 reaches the process that started the group."""
    try:
        work(settings, Processes(fabric.device))
    except ConfigError as error:
        return str(error)
    return None
