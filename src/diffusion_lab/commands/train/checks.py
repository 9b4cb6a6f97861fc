"""Check processes, sharding, disk space and data before the first step."""

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
from diffusion_lab.training.callbacks import QualityMonitor, Samples


def check_processes(settings: Mapping[str, Any], resume: Resume | None) -> None:
    """Raise ConfigError if the strategy is not supported, or the number of processes differs from the launcher's."""
    options = settings["trainer"]
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        processes.check_sweep(options)
    strategy = str(options["strategy"])
    if strategy.startswith(("fsdp_", "deepspeed", "model_parallel")):
        raise ConfigError(f"trainer.strategy={strategy} is not supported: write trainer=fsdp, or trainer=ddp")
    if strategy == "fsdp":
        _check_sharding(settings, resume)
    each = processes.processes_per_node(options["devices"])
    if processes.launched() is None and options["num_nodes"] > 1:
        raise ConfigError(
            f"trainer.num_nodes={options['num_nodes']}, and no launcher starts the other nodes: start by srun or torchrun, or "
            "write trainer.num_nodes=1"
        )
    started = processes.launched()
    in_slurm = "SLURM_NTASKS" in os.environ and not processes.interactive()
    if started is None and in_slurm and processes.is_multiprocess(options):
        raise ConfigError(
            "the SLURM job has one task, but the trainer needs several processes: submit with --ntasks-per-node=N and start "
            "with srun"
        )
    if started and each and (options["num_nodes"], each * options["num_nodes"]) != (started.nodes, started.world):
        raise ConfigError(
            f"{started.by} started {started.world} processes on {started.nodes} node(s), but trainer.devices={each} and "
            f"trainer.num_nodes={options['num_nodes']}: write trainer=ddp "
            f"trainer.devices={started.world // started.nodes} trainer.num_nodes={started.nodes}"
        )


def _check_sharding(settings: Mapping[str, Any], resume: Resume | None) -> None:
    """Raise ConfigError for settings that do not work with sharded weights."""
    if not (settings.get("callbacks") or {}).get("ema"):
        raise ConfigError(
            "trainer=fsdp needs an average of the weights for validation and samples: write callbacks.ema.decay=0 for a copy "
            "of the weights"
        )
    if settings["compile"]:
        raise ConfigError("trainer=fsdp does not work with compile=true: write compile=false")
    if ((settings.get("logger") or {}).get("wandb") or {}).get("gradients"):
        raise ConfigError("trainer=fsdp does not support histograms of gradients: write logger.wandb.gradients=0")
    if resume and not all(tensor.is_contiguous() for tensor in resume.content["state_dict"].values()):
        raise ConfigError(
            f"{resume.path} was written by an older version and cannot be read with trainer=fsdp: resume it with trainer=ddp"
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
    """Raise ConfigError if the disk has no space for last.ckpt, best.ckpt and a temporary file.

    Each file contains the weights, their averages, and the two moments of Adam.
    """
    decay = ((settings.get("callbacks") or {}).get("ema") or {}).get("decay", [])
    copies = 3 + (len(decay) if isinstance(decay, list) else 1)
    need = 3 * copies * sum(p.numel() * p.element_size() for p in network.parameters())
    require_space(folder, need, "three checkpoints", "write hydra.run.dir= on another disk")


def check_data(data: DataModule, condition: Condition, callbacks: Sequence[pl.Callback], trainer: pl.Trainer) -> None:
    """Raise ConfigError if the data does not fit the configuration.

    The batch size must be a multiple of the number of processes times `accumulate_grad_batches`, a batch must contain the
    tensors of the condition, the data must fit the extractor of `QualityMonitor`, and each process needs a validation image.
    """
    condition(data.train_dataloader().batch(0))
    for callback in callbacks:
        if isinstance(callback, QualityMonitor):
            callback.check(data)
        if isinstance(callback, Samples) and data.channels not in (1, 3):
            raise ConfigError(
                f"callbacks.samples draws images of 1 or 3 channels, and data.channels={data.channels}: write "
                "callbacks.samples=null"
            )
    if 0 < data.size("val") < trainer.world_size:
        raise ConfigError(
            f"{data.size('val')} validation image(s) are fewer than the {trainer.world_size} processes: write data.val=0, or a "
            "larger data.val="
        )
