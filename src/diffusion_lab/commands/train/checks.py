"""Checks before the first step: processes, sharding, disk, data."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from torch import nn

from diffusion_lab import checkpoint as checkpoints
from diffusion_lab import processes
from diffusion_lab.commands.train.configuration import Resume
from diffusion_lab.conditions import Condition
from diffusion_lab.data.datamodule import DataModule
from diffusion_lab.errors import ConfigError
from diffusion_lab.io import require_space
from diffusion_lab.training.callbacks import QualityMonitor


def check_processes(settings: Mapping[str, Any], resume: Resume | None) -> None:
    """Raise ConfigError for a strategy that is not supported, or numbers of processes that contradict the launcher's."""
    options = settings["trainer"]
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        processes.check_sweep(options)
    strategy = str(options["strategy"])
    if strategy.startswith(("fsdp_", "deepspeed", "model_parallel")):
        raise ConfigError(f"trainer.strategy={strategy} is not supported: write trainer=fsdp, or trainer=ddp")
    if strategy == "fsdp":
        _check_sharding(settings, resume)
    each = processes.processes_per_node(options["devices"])
    started = processes.launched()
    in_slurm = "SLURM_NTASKS" in os.environ and not processes.interactive()
    if started is None and in_slurm and processes.is_multiprocess(options):
        raise ConfigError(
            "SLURM gave this job one task, so one process would train: submit with --ntasks-per-node=N and start by srun"
        )
    if started and each and (options["num_nodes"], each * options["num_nodes"]) != (started.nodes, started.world):
        raise ConfigError(
            f"{started.by} started {started.world} processes on {started.nodes} node(s), and trainer.devices={each} "
            f"trainer.num_nodes={options['num_nodes']} are other numbers: write trainer=ddp "
            f"trainer.devices={started.world // started.nodes} trainer.num_nodes={started.nodes}"
        )


def _check_sharding(settings: Mapping[str, Any], resume: Resume | None) -> None:
    """Raise ConfigError for settings that do not work with sharded weights."""
    if not (settings.get("callbacks") or {}).get("ema"):
        raise ConfigError(
            "trainer=fsdp shards the live weights, and validation and samples use the averages: write "
            "callbacks.ema.decay=0, whose average is the live weights"
        )
    if settings["compile"]:
        raise ConfigError("trainer=fsdp does not work with compile=true: write compile=false")
    if ((settings.get("logger") or {}).get("wandb") or {}).get("gradients"):
        raise ConfigError("trainer=fsdp has no gradients in one place for logger.wandb.gradients: write 0")
    if resume and not all(tensor.is_contiguous() for tensor in resume.content["state_dict"].values()):
        raise ConfigError(
            f"{resume.path} was written by an older version, and FSDP cannot read it: resume it by trainer=ddp first"
        )


def check_weights(resume: Resume, network: nn.Module) -> None:
    """Raise ConfigError if the network of a resumed run has other weights than the checkpoint."""
    _, stored = checkpoints.select(resume.content, "raw")
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    before = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    differ = sorted(name for name in {**shapes, **before} if shapes.get(name) != before.get(name))
    if differ:
        name = differ[0]
        raise ConfigError(
            f"{len(differ)} weights of {resume.path} do not fit this network, e.g. {name} ({before.get(name, 'missing')} in "
            f"the file, {shapes.get(name, 'missing')} here): leave out the keys that change the network, or write "
            f"init={resume.path} to begin another run with its weights"
        )


def check_disk(folder: Path, network: nn.Module, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError if the disk has no room for last.ckpt, best.ckpt and the file being written.

    Each holds the weights, their averages, and the two moments of Adam.
    """
    decay = ((settings.get("callbacks") or {}).get("ema") or {}).get("decay", [])
    copies = 3 + (len(decay) if isinstance(decay, list) else 1)
    need = 3 * copies * sum(p.numel() * p.element_size() for p in network.parameters())
    require_space(folder, need, "three checkpoints", "write hydra.run.dir= on another disk")


def check_data(data: DataModule, condition: Condition, callbacks: Sequence[pl.Callback], trainer: pl.Trainer) -> None:
    """Raise ConfigError where data and configuration do not fit.

    The batch size must be a multiple of processes × accumulated parts, the condition must find its tensors in a batch, the
    quality callback must be able to measure the images, and each process needs a validation image.
    """
    condition(data.train_dataloader().batch(0))
    for callback in callbacks:
        if isinstance(callback, QualityMonitor):
            callback.check(data)
    if 0 < data.size("val") < trainer.world_size:
        raise ConfigError(
            f"{data.size('val')} validation images are too few for {trainer.world_size} processes: write data.val=0"
        )
