"""Build Lightning's Trainer."""

import functools
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint, ModelSummary, ProgressBar, Timer
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.plugins.io import TorchCheckpointIO

from diffusion_lab import processes
from diffusion_lab.commands.train.build import Config, Make, validates
from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.instantiation import accepted, foreign, instantiate
from diffusion_lab.training import sharding
from diffusion_lab.training.saving import AtomicCheckpointIO


def build_trainer(
    config: Config, folder: Path, loggers: list[Logger], callbacks: list[pl.Callback], make: Make = instantiate
) -> pl.Trainer:
    """Build Lightning's Trainer from its node, with this project's defaults for arguments that the node does not set.

    Raises:
        ConfigError: if Lightning rejects, ignores or replaces a value.
    """
    node, validation = dict(config["trainer"]), config["validation"]
    if node["accelerator"] == "auto":  # not Apple's MPS, which has no float64: all coefficients are computed in it
        node["accelerator"] = "gpu" if torch.cuda.is_available() else "cpu"
    _check_flags(node)
    if node["strategy"] == "fsdp":
        available = 1 if node["accelerator"] == "cpu" else torch.cuda.device_count()
        per_node = processes.processes_per_node(node["devices"]) or available
        node["strategy"] = sharding.strategy(per_node * node["num_nodes"])
    validate = validates(config)
    launched = processes.launched()
    # SLURM jobs are requeued by `summary.requeue`. torchrun may run inside a SLURM job.
    in_slurm = SLURMEnvironment.detect() and not (launched and launched.by == "torchrun")
    defaults = {
        "val_check_interval": validation["every"] * node["accumulate_grad_batches"] if validate else None,
        "limit_val_batches": 1.0 if validate else 0,
        "benchmark": not node["deterministic"],
        "default_root_dir": str(folder),
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "enable_progress_bar": any(isinstance(callback, ProgressBar) for callback in callbacks),
        "enable_model_summary": any(isinstance(callback, ModelSummary) for callback in callbacks),
        "plugins": [SLURMEnvironment(auto_requeue=False)] if in_slurm else None,
    }
    arguments = accepted(node, **defaults)
    if validate and "check_val_every_n_epoch" not in node:
        arguments["check_val_every_n_epoch"] = None  # the interval counts over the endless stream
    if not isinstance(node["strategy"], str | dict):  # an object, but a node may contain only plain values
        arguments["strategy"] = node.pop("strategy")
    built: pl.Trainer = make(node, "trainer", **arguments, callbacks=callbacks, logger=loggers)
    if type(built.strategy.checkpoint_io) is TorchCheckpointIO:  # not one of trainer.plugins=
        built.strategy.checkpoint_io = AtomicCheckpointIO()
    if isinstance(node.get("profiler"), str):
        profiler: Any = built.profiler  # type: ignore[attr-defined]
        profiler.dirpath, profiler.filename = (
            folder,
            "profile",
        )  # otherwise the table goes to a Python logger without handlers
    return built


def _check_flags(node: Config) -> None:
    """Raise ConfigError for Trainer flags that are not supported, or that do not apply to an endless stream of batches."""
    if node["accelerator"] in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ConfigError("trainer.accelerator=gpu, but torch sees no CUDA device: write trainer=cpu")
    if node["accelerator"] == "cpu" and str(node["precision"]) == "16-mixed":
        raise ConfigError(
            "trainer.precision=16-mixed needs a GPU (on a CPU, Lightning would silently use bf16): write 32-true or bf16-mixed"
        )
    # A step is a 32-bit word of the key of all noise.
    for key, largest in (("max_steps", 2**32 - 1), ("accumulate_grad_batches", 10**6), ("log_every_n_steps", 10**9)):
        check_number(f"trainer.{key}", node[key], f"[1, {largest}]", "at least 1", whole=True)
    check_number("trainer.num_nodes", node["num_nodes"], "[1, 4096]", whole=True)
    check_number("trainer.gradient_clip_val", node["gradient_clip_val"], "[0, 1e9]", "0 for no clipping", optional=True)
    if node.get("max_time") is not None:
        duration = node["max_time"] if isinstance(node["max_time"], dict) else str(node["max_time"])
        limit = foreign(functools.partial(Timer, duration), "trainer.max_time").time_remaining()
        if limit is not None and not limit > 0:
            raise ConfigError(f"trainer.max_time={node['max_time']} is not a time: write DD:HH:MM:SS, or leave it out")
    if node.get("barebones"):
        raise ConfigError(
            "trainer.barebones=true is not supported, since it disables loggers, checkpoints and callbacks: write "
            "logger=none callbacks.samples=null callbacks.progress=null for a run with little overhead"
        )
    parts = node["accumulate_grad_batches"]
    for key in ("limit_train_batches", "overfit_batches"):
        value = node.get(key)
        if isinstance(value, float) and value not in (0.0, 1.0):
            raise ConfigError(
                f"trainer.{key}={value} is a fraction of an epoch, but the stream is endless: write a number of batches"
            )
        if value is not None and not isinstance(value, float) and value % parts:
            raise ConfigError(
                f"trainer.{key}={value} is not a multiple of trainer.accumulate_grad_batches={parts}: write "
                f"trainer.{key}={max(value // parts, 1) * parts}"
            )
    if node.get("limit_train_batches") == 0:
        raise ConfigError("trainer.limit_train_batches=0 disables training: write at least 1, or remove it")
