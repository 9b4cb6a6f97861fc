"""Processes: the result of a command, one-line errors, and how torchrun or SLURM started this process. No heavy imports.

Under torchrun or srun, rank 0 runs the command as a single process does. The others wait for the configuration that it
writes and join, as the processes do that Lightning starts by itself.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_lab.errors import ConfigError

CONFIG_ENV = (
    "DIFFUSION_LAB_CONFIG"  # for further processes of a run: the file of the configuration that rank 0 resolved
)
POLL_SECONDS = 0.5


class Result(NamedTuple):
    """The result of a command.

    Attributes:
        code: the exit code.
        metric: the name of `value`.
        value: the best of the monitored figure, which a sweep compares and a sweeper minimizes.
        pruned: whether the sweeper ended the job early.
        reason: the cause of a failure.
    """

    code: int
    metric: str | None = None
    value: float | None = None
    pruned: bool = False
    reason: str | None = None


class Refusal(SystemExit):
    """Ends a command with exit code 2. Its line has been printed on stderr."""

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


# launchers ------------------------------------------------------------------------------------------------------------------


class Launched(NamedTuple):
    """How this process was started, and its place among the others.

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
    """Return how this process was started; None for a process of its own, also in a SLURM job of one task."""
    if "TORCHELASTIC_RUN_ID" in env:
        world = int(env["WORLD_SIZE"])
        return Launched("torchrun", int(env["RANK"]), world, world // int(env["LOCAL_WORLD_SIZE"]))
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env and not interactive(env):
        return Launched("srun", int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_NNODES", "1")))
    return None


def interactive(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this SLURM job is interactive, by the job names that Lightning uses."""
    return env.get("SLURM_JOB_NAME") in ("bash", "interactive")


def rank(env: Mapping[str, str] = os.environ) -> int:
    """Return the rank of this process in its run, however it was started. Rank 0 prints and writes."""
    started = launched(env)
    return started.rank if started else int(env.get("LOCAL_RANK", "0"))


def check_launch(started: Launched, command: str, sweep: bool, named_folder: bool, overwrite: bool) -> None:
    """Raise ConfigError for a command that several processes of `started` cannot run together."""
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


def processes_per_node(devices: int | str | list[Any]) -> int | None:
    """Return the number of processes on each node for `trainer.devices`, as Lightning reads it; None for auto.

    Raises:
        ConfigError: no process.
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


def is_multiprocess(trainer: Mapping[str, Any]) -> bool:
    """Whether a run with this node of the trainer has several processes, or may have."""
    return processes_per_node(trainer["devices"]) != 1 or trainer["num_nodes"] > 1


def check_sweep(trainer: Mapping[str, Any]) -> None:
    """Raise ConfigError where each job of a sweep would have several processes; `trainer` is the node of one."""
    if is_multiprocess(trainer):
        raise ConfigError(
            "--multirun with several processes would run the sweep again in every process: write trainer.devices=1, "
            "or start each run on its own"
        )


def wait_for(path: Path) -> Path:
    """Wait until rank 0 has written `path`, and return it. If rank 0 fails, the launcher ends this process."""
    while not (path.is_file() and path.stat().st_size):
        time.sleep(POLL_SECONDS)
    return path


def requeue(env: Mapping[str, str] = os.environ) -> str | None:
    """Requeue this SLURM job, which must be `--requeue`; return its name, None outside SLURM.

    Raises:
        subprocess.CalledProcessError: scontrol failed.
    """
    if "SLURM_JOB_ID" not in env:
        return None
    job = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    subprocess.run(["scontrol", "requeue", job], check=True)
    return job
