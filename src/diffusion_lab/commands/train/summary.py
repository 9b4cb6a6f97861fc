"""Print the progress and outcome of a training run, and return its result."""

import logging
import math
import shlex
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from signal import SIGUSR1
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
import yaml
from hydra.core.hydra_config import HydraConfig

from diffusion_lab import checkpoint as checkpoints
from diffusion_lab import processes
from diffusion_lab.instantiation import untrusted_modules
from diffusion_lab.processes import Result
from diffusion_lab.training.callbacks import Checkpoints, GracefulStop, LossLogger, Pruning, QualityMonitor, Samples

C = TypeVar("C", bound=pl.Callback)


def silence_lightning() -> None:
    """Hide Lightning's banners, and its warnings that do not apply to this project."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for advice in (
        ".*Experiment logs directory .* exists and is not empty.*",  # it contains the configuration of this run
        ".*Checkpoint directory .* exists and is not empty.*",  # it contains best.ckpt of the resumed run
        ".*isinstance.treespec, LeafSpec.*",  # Lightning uses a deprecated function of torch
        ".*does not have many workers.*",
        ".*`srun` command is available on your system but is not used.*",  # one process on a login node
    ):
        warnings.filterwarnings("ignore", advice)


def print_once(text: str) -> None:
    """Print on rank 0."""
    if processes.rank() == 0:
        print(text, flush=True)


def announce(trainer: pl.Trainer, network: torch.nn.Module, settings: Mapping[str, Any]) -> None:
    """Print the classes, the numbers of parameters, steps, images and processes, and the run folder."""
    names = [str(settings[g]["_target_"]).rsplit(".", 1)[-1] for g in ("schedule", "objective", "weighting", "model")]
    parameters = sum(p.numel() for p in network.parameters())
    device = "GPU" if trainer.accelerator.__class__.__name__ == "CUDAAccelerator" else "CPU"
    workers = f"{trainer.world_size} processes" if trainer.world_size > 1 else "1 process"
    if settings["print_config"]:
        print_once(yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
    threads = "" if device == "GPU" else f" of {torch.get_num_threads()} thread(s)"
    print_once(
        f"{' · '.join(names)} with {parameters:,} parameters\n"
        f"{trainer.max_steps:,} steps of {settings['data']['batch_size']} images on {device}, {workers}{threads}\n"
        f"run folder {settings['run_dir']}"
    )


def requeue(trainer: pl.Trainer, callbacks: Iterable[pl.Callback]) -> None:
    """Requeue a SLURM job that reached its time limit. Call it right after training, since SLURM kills the job soon after."""
    stop = find(callbacks, GracefulStop)
    if stop and stop.received == SIGUSR1 and processes.rank() == 0 and trainer.global_step < trainer.max_steps:
        processes.requeue()


def report(trainer: pl.Trainer, callbacks: list[pl.Callback], settings: Mapping[str, Any]) -> Result:
    """Print the outcome, the files, and the commands to resume and sample. Return the result of the run."""
    stop, kept = find(callbacks, GracefulStop), find(callbacks, Checkpoints)
    grids, quality, losses = find(callbacks, Samples), find(callbacks, QualityMonitor), find(callbacks, LossLogger)
    value, step = trainer.callback_metrics.get("val/loss"), trainer.global_step
    spawned = str(settings["trainer"]["strategy"]).endswith("spawn")
    if spawned and kept and kept.last_path.is_file():  # the state of the spawned processes is only in the checkpoint
        last = checkpoints.read(kept.last_path)
        step = int(last["global_step"])
        kept.load_state_dict(last["callbacks"][kept.state_key])
    print_once(f"{step:,} steps done" + ("" if value is None else f", validation loss {float(value):.4f}"))
    if quality and quality.value is not None:
        best = f", best {kept.best:.4g}" if kept and kept.monitor in ("quality", quality.label) and kept.best else ""
        print_once(f"{quality.label} {quality.value:.4g}{best}")
    if grids and grids.path:
        print_once(f"look at  {grids.path}")
    if kept and kept.last_path.is_file():
        _print_commands(kept.last_path, settings, resumable=step < trainer.max_steps)
    received = stop.received if stop else None
    code = 0 if received is None else 128 + received
    if received == SIGUSR1 and processes.rank() > 0:
        code = 0  # with another code, srun --kill-on-bad-exit would kill rank 0 during its upload to W&B
    reason = None
    if losses and losses.nonfinite_since:
        code, reason = 1, f"training loss is NaN or Inf since step {losses.nonfinite_since:,}"
        print(f"error: {reason}", file=sys.stderr, flush=True)
    pruned = any(callback.pruned for callback in callbacks if isinstance(callback, Pruning))
    metric = quality.label if quality and kept and kept.monitor == "quality" else kept.monitor if kept else "val/loss"
    lowest = kept.best if kept else float(value) if value is not None and math.isfinite(value) else None
    return Result(code, metric, lowest, pruned, reason)


def _print_commands(last: Path, settings: Mapping[str, Any], resumable: bool) -> None:
    """Print the commands that resume the run and sample from it."""
    program, modules = Path(sys.argv[0]).parent / "train.py", untrusted_modules(settings)
    trust = f" trust=[{','.join(modules)}]" if modules else ""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    config_dir = next((str(source.path) for source in sources if source.provider == "command-line"), None)
    if resumable:
        flag = f" --config-dir={shlex.quote(config_dir)}" if config_dir else ""
        print_once(f"resume   python {program} ckpt={shlex.quote(str(last))}{trust}{flag}")
    print_once(f"sample   python {program.with_name('sample.py')} ckpt={shlex.quote(str(last))} n=64{trust}")


def find(callbacks: Iterable[pl.Callback], kind: type[C]) -> C | None:
    """Return the first callback of a class, or None."""
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)
