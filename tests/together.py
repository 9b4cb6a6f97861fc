"""Start the processes of one run with the environment of torchrun or srun.

They are forked from a server that has already imported the package, because the imports take longer than such a run.
"""

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
    """Return a free TCP port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def torchrun(rank: int, world: int) -> dict[str, str]:
    """Return the variables that torchrun sets for process `rank` of `world` on one machine."""
    here = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    return {"TORCHELASTIC_RUN_ID": "tests", **{key: str(value) for key, value in here.items()}}


def srun(rank: int, world: int) -> dict[str, str]:
    """Return the variables that srun sets for process `rank` of `world` on one machine."""
    here = {"PROCID": rank, "LOCALID": rank, "NODEID": 0, "NTASKS": world, "NTASKS_PER_NODE": world, "NNODES": 1}
    job = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train"}
    return {**job, **{f"SLURM_{key}": str(value) for key, value in here.items()}}


def meeting() -> dict[str, str]:
    """Return the address of the rendezvous: torchrun sets it, with srun the user does."""
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}


def train(printed: Path, arguments: Sequence[str], by=torchrun, world: int = 2) -> str:
    """Run `torchrun --nproc_per_node=WORLD src/train.py ARGUMENTS`, or srun, and assert that it succeeds.

    Args:
        printed: folder for the output of the processes.
        arguments: of the command; they contain hydra.run.dir=.
        by: torchrun or srun, the environment of a process.
        world: number of processes.

    Returns:
        The output of process 0.
    """
    printed.mkdir(exist_ok=True)
    address = meeting()
    outputs = [printed / f"{by.__name__}_{rank}.txt" for rank in range(world)]
    runs = [
        _FORKED.Process(target=_one, args=({**by(rank, world), **address}, list(arguments), outputs[rank]))
        for rank in range(world)
    ]
    for run in reversed(runs):  # process 0 last: the others wait for it
        run.start()
    for run in runs:
        run.join(timeout=240)
        run.kill()
    assert [run.exitcode for run in runs] == [0] * world, "\n".join(file.read_text()[-3000:] for file in outputs)
    return outputs[0].read_text()


def _one(environment: dict[str, str], arguments: list[str], printed: Path) -> None:
    os.environ.update(environment)
    with printed.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(code("train", arguments))
