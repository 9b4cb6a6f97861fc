"""Several processes for one command: this one, and others that it starts and that do the same on other parts of the work."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from diffusion_lab.errors import ConfigError
from diffusion_lab.metrics.collect import Processes

PATIENCE = timedelta(hours=2)  # for a process that waits for the others' last blocks
POLL = 0.05  # seconds


@contextmanager
def shared(
    settings: dict[str, Any],
    prepare: Callable[[dict[str, Any], int], Any],
    work: Callable[[Any, Processes], Any],
) -> Iterator[Processes]:
    """The processes that share what the body does, this one the first. With devices=1 it is alone.

    Args:
        settings: of the command; `devices` says how many.
        prepare: prepare(settings, rank), what every other process builds, and may refuse; a function of a module.
        work: work(prepared, processes), what the body does here too; it reduces over the processes.

    Raises:
        ValueError: another process refused what this one accepted.
        ChildProcessError: one ended before its time.
    """
    world = settings["devices"]
    if world == 1:
        yield Processes()
        return
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="diffusion-lab-") as name:
        folder, threads = Path(name), _threads(world)
        others = [
            context.Process(target=_worker, args=(settings, prepare, work, rank, world, name, threads), daemon=True)
            for rank in range(1, world)
        ]
        for other in others:
            other.start()
        before = torch.get_num_threads()
        try:
            _wait(folder, others)
            torch.set_num_threads(threads)
            yield _join(folder, 0, world)
            for other in others:
                other.join()
        finally:
            torch.set_num_threads(before)
            for other in others:
                other.terminate()
                other.join()
            if distributed.is_initialized():
                distributed.destroy_process_group()


def _threads(world: int) -> int:
    """Of each process: as the environment says, else its share."""
    return torch.get_num_threads() if os.environ.get("OMP_NUM_THREADS") else max(1, torch.get_num_threads() // world)


def _join(folder: Path, rank: int, world: int) -> Processes:
    on_gpu = torch.cuda.is_available() and world <= torch.cuda.device_count()
    if on_gpu:
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{folder / 'meet'}",
        rank=rank,
        world_size=world,
        timeout=PATIENCE,
    )
    return Processes(f"cuda:{rank}" if on_gpu else "cpu")


def _wait(folder: Path, others: list[Any]) -> None:
    """Until every process has built what it needs; what one refuses is refused here."""
    while True:
        for refused in folder.glob("refused-*"):
            raise ConfigError(refused.read_text())
        if len(list(folder.glob("ready-*"))) == len(others):
            return
        dead = [other for other in others if other.exitcode is not None]
        if dead and not list(folder.glob("refused-*")):
            raise ChildProcessError(
                f"a process of devices={len(others) + 1} ended with code {dead[0].exitcode}: see above"
            )
        time.sleep(POLL)


def _worker(
    settings: dict[str, Any],
    prepare: Callable[[dict[str, Any], int], Any],
    work: Callable[[Any, Processes], Any],
    rank: int,
    world: int,
    name: str,
    threads: int,
) -> None:
    folder = Path(name)
    torch.set_num_threads(threads)
    try:
        prepared = prepare(settings, rank)
    except (ConfigError, OSError) as error:
        (folder / f"refused.{rank}").write_text(str(error))
        os.replace(folder / f"refused.{rank}", folder / f"refused-{rank}")
        return
    (folder / f"ready-{rank}").touch()
    processes = _join(folder, rank, world)
    try:
        work(prepared, processes)
    except Exception:
        return  # rank 0 raises the same error
    finally:
        distributed.destroy_process_group()
