"""Processes that something outside this project started: torchrun, or SLURM's srun. No heavy imports.

Process 0 does what a run alone does. The others wait for the configuration that it writes and take part with it, as the
processes do that Lightning starts by itself.
"""

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_lab.errors import ConfigError

_POLL_SECONDS = 0.5


class Launched(NamedTuple):
    """Who started this process, and its place among the others.

    Attributes:
        by: torchrun or srun.
        rank: of all processes, 0 is the first.
        world: processes in all.
        nodes: machines.
    """

    by: str
    rank: int
    world: int
    nodes: int


def launched(env: Mapping[str, str] = os.environ) -> Launched | None:
    """How this process was started, None where nothing but the user did. A SLURM job of one task is a run alone."""
    if "TORCHELASTIC_RUN_ID" in env:
        world = int(env["WORLD_SIZE"])
        return Launched("torchrun", int(env["RANK"]), world, world // int(env["LOCAL_WORLD_SIZE"]))
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env and not interactive(env):
        return Launched("srun", int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_NNODES", "1")))
    return None


def interactive(env: Mapping[str, str] = os.environ) -> bool:
    """Whether a person sits at this SLURM job; Lightning knows it by the name, too."""
    return env.get("SLURM_JOB_NAME") in ("bash", "interactive")


def rank(env: Mapping[str, str] = os.environ) -> int:
    """This process's place among all of a run, however they were started; 0 is the one that speaks."""
    started = launched(env)
    return started.rank if started else int(env.get("LOCAL_RANK", "0"))


def check(started: Launched, command: str, sweep: bool, named_folder: bool, overwrite: bool) -> None:
    """Raise ValueError for a command that several processes of `started` cannot run together."""
    if command != "train":
        raise ConfigError(f"{command}.py starts its own processes, without {started.by}: write devices={started.world}")
    if sweep:
        raise ConfigError(
            f"--multirun under {started.by} would run the sweep in every process: start each run on its own"
        )
    if not named_folder:
        raise ConfigError(
            f"started by {started.by}, {started.world} processes must agree on a folder: write hydra.run.dir=FOLDER"
        )
    if overwrite:
        raise ConfigError(
            f"overwrite=true under {started.by}: the processes meet in a new folder, write another hydra.run.dir="
        )


def each(devices: int | str | list[Any]) -> int | None:
    """Processes on each machine that trainer.devices means, as Lightning reads it; None: one for each GPU there is, or one.

    Raises:
        ValueError: it means none.
    """
    if devices in ("auto", "-1", -1):
        return None
    if isinstance(devices, str) and "," in devices:
        devices = [int(index) if index.isdigit() else index for index in devices.replace(" ", "").split(",") if index]
    if isinstance(devices, list):
        count = len(devices) if all(isinstance(index, int) and index >= 0 for index in devices) else 0
    else:
        count = int(devices) if str(devices).isdigit() else 0
    if count < 1:
        raise ConfigError(f"trainer.devices={devices}: write a number of processes, a list of GPUs as [0,1], or auto")
    return count


def several(trainer: Mapping[str, Any]) -> bool:
    """Whether these options of the trainer, plain, ask for more than one process, or may."""
    return each(trainer["devices"]) != 1 or trainer["num_nodes"] > 1


def check_sweep(trainer: Mapping[str, Any]) -> None:
    """Raise ValueError where the jobs of a sweep would be of several processes each; `trainer`: the options of one, plain."""
    if several(trainer):
        raise ConfigError(
            "--multirun with several processes would run the sweep again in every process: write trainer.devices=1, "
            "or start each run on its own"
        )


def wait_for(path: Path) -> Path:
    """Waits until process 0 has written `path`; whoever started the processes ends this one if process 0 fails."""
    while not (path.is_file() and path.stat().st_size):
        time.sleep(_POLL_SECONDS)
    return path


def requeue(env: Mapping[str, str] = os.environ) -> str | None:
    """Asks SLURM to run this job again, which it does where the job is `--requeue`; the job's name there, None outside SLURM.

    Raises:
        subprocess.CalledProcessError: SLURM refuses.
    """
    if "SLURM_JOB_ID" not in env:
        return None
    job = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    subprocess.run(["scontrol", "requeue", job], check=True)
    return job
