"""Run a command in several processes with Lightning Fabric. Each process works on a share of the images."""

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from diffusion_lab.errors import ConfigError
from diffusion_lab.metrics.collect import Processes

TIMEOUT = timedelta(hours=2)  # a process may wait this long for the last blocks of the others

Settings = dict[str, Any]
Work = Callable[[Settings, Processes], None]


def run_in_group(work: Work, settings: Settings, devices: int, device: str) -> None:
    """Call work(settings, processes) in `devices` processes, or in this process if `devices` is 1.

    Args:
        work: a function on module level. Only rank 0 may print and write.
        settings: plain values.
        devices: number of processes; on GPUs, each process uses a separate one.
        device: "cpu" or "cuda".

    Raises:
        ConfigError: if `work` raises it in any process.
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
    """Call `work`, and return the message of a ConfigError. Fabric returns the value of rank 0 to the parent process."""
    try:
        work(settings, Processes(fabric.device))
    except ConfigError as error:
        return str(error)
    return None
