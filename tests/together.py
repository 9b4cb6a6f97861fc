"""Processes of one run, started as torchrun or srun starts them, but forked from one that has imported everything already: an
import takes longer than such a run."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from command import code

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["diffusion_lab.commands.train", "torchvision"])


def free_port() -> str:
    """One that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def torchrun(rank: int, world: int) -> dict[str, str]:
    """What torchrun tells process `rank` of `world` on one machine."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    return {"TORCHELASTIC_RUN_ID": "tests", **{key: str(value) for key, value in here.items()}}


def srun(rank: int, world: int) -> dict[str, str]:
    """What srun tells it."""
    here = {"PROCID": rank, "LOCALID": rank, "NODEID": 0, "NTASKS": world, "NTASKS_PER_NODE": world, "NNODES": 1}
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train"}
    return {**job, **{f"SLURM_{key}": str(value) for key, value in here.items()}}


def meeting() -> dict[str, str]:
    """Where they meet; torchrun says it, too, and beside srun the user does."""
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}


def train(printed: Path, arguments: Sequence[str], by=torchrun, world: int = 2) -> str:
    """`torchrun --nproc_per_node=WORLD src/train.py arguments…`, or srun; must succeed. What process 0 printed.

    Args:
        printed: a folder for it.
        arguments: hydra.run.dir= among them.
    """
    printed.mkdir(exist_ok=True)
    meet = meeting()
    said = [printed / f"{by.__name__}_{rank}.txt" for rank in range(world)]
    runs = [
        _FORKED.Process(target=_one, args=({**by(rank, world), **meet}, list(arguments), said[rank]))
        for rank in range(world)
    ]
    for run in reversed(runs):  # process 0 last: the others wait for it
        run.start()
    for run in runs:
        run.join(timeout=240)
        run.kill()
    assert [run.exitcode for run in runs] == [0] * world, "\n".join(file.read_text()[-3000:] for file in said)
    return said[0].read_text()


def _one(environment: dict[str, str], arguments: list[str], printed: Path) -> None:
    os.environ.update(environment)
    with printed.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(code("train", arguments))
