"""Checks before the first step: processes, sharding, disk, data."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from torch import nn

from diffusion_lab import processes
from diffusion_lab.commands.train.configuration import Resume
from diffusion_lab.conditions import Condition
from diffusion_lab.data.datamodule import DataModule
from diffusion_lab.errors import ConfigError
from diffusion_lab.io import require_space
from diffusion_lab.training.callbacks import QualityMonitor


def check_processes(settings: Mapping[str, Any], resume: Resume | None) -> None:
    """Raise ConfigError for numbers of processes, or a strategy, that cannot be run as configured."""
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
            "SLURM gave this job one task, so that one process would train: ask for --ntasks-per-node=N and start it by srun"
        )
    if started and each and (options["num_nodes"], each * options["num_nodes"]) != (started.nodes, started.world):
        raise ConfigError(
            f"{started.by} started {started.world} processes on {started.nodes} node(s), and trainer.devices={each} "
            f"trainer.num_nodes={options['num_nodes']} are others: write trainer=ddp "
            f"trainer.devices={started.world // started.nodes} trainer.num_nodes={started.nodes}"
        )


def _check_sharding(settings: Mapping[str, Any], resume: Resume | None) -> None:
    if not (settings.get("callbacks") or {}).get("ema"):
        raise ConfigError(
            "trainer=fsdp shards the live weights, and validation and samples use the averages: write "
            "callbacks.ema.decay=0, whose average is the live weights"
        )
    if settings["compile"]:
        raise ConfigError("trainer=fsdp does not go with compile=true: write compile=false")
    if ((settings.get("logger") or {}).get("wandb") or {}).get("gradients"):
        raise ConfigError("trainer=fsdp has no gradients in one place for logger.wandb.gradients: write 0")
    if resume and not all(tensor.is_contiguous() for tensor in resume.content["state_dict"].values()):
        raise ConfigError(
            f"{resume.path} was written by an older version, and FSDP cannot read it: resume it by trainer=ddp first"
        )


def check_disk(folder: Path, network: nn.Module, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError without room for last.ckpt, best.ckpt and the one being written, each with the weights, their averages
    and two moments of Adam."""
    decay = ((settings.get("callbacks") or {}).get("ema") or {}).get("decay", [])
    copies = 3 + (len(decay) if isinstance(decay, list) else 1)
    need = 3 * copies * sum(p.numel() * p.element_size() for p in network.parameters())
    require_space(folder, need, "three checkpoints", "write hydra.run.dir= on another disk")


def check_data(data: DataModule, condition: Condition, callbacks: Sequence[pl.Callback], trainer: pl.Trainer) -> None:
    """Raise ConfigError for a batch size that does not divide, a condition without its data, a quality callback that cannot
    measure these data, or fewer validation images than processes."""
    condition(data.train_dataloader().batch(0))
    for callback in callbacks:
        if isinstance(callback, QualityMonitor):
            callback.check(data)
    if 0 < data.size("val") < trainer.world_size:
        raise ConfigError(
            f"{data.size('val')} validation images are too few for {trainer.world_size} processes: write data.val=0"
        )
