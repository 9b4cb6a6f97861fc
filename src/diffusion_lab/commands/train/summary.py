"""What a training run prints, and its result for a sweep."""

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
    """Hide Lightning's banners and its advice on data loaders; `announce` prints the facts of the run."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for advice in (
        ".*Experiment logs directory .* exists and is not empty.*",  # it holds this run's configuration
        ".*Checkpoint directory .* exists and is not empty.*",  # it holds best.ckpt of the run that is continued
        ".*isinstance.treespec, LeafSpec.*",  # between Lightning and torch
        ".*does not have many workers.*",
    ):
        warnings.filterwarnings("ignore", advice)


def say(text: str) -> None:
    """Print on rank 0."""
    if processes.rank() == 0:
        print(text, flush=True)


def announce(trainer: pl.Trainer, network: torch.nn.Module, settings: Mapping[str, Any]) -> None:
    """Print the choices, the number of parameters, steps, images and processes, and the run folder."""
    names = [str(settings[g]["_target_"]).rsplit(".", 1)[-1] for g in ("schedule", "objective", "weighting", "model")]
    parameters = sum(p.numel() for p in network.parameters())
    device = "GPU" if trainer.accelerator.__class__.__name__ == "CUDAAccelerator" else "CPU"
    workers = f"{trainer.world_size} processes" if trainer.world_size > 1 else "1 process"
    if settings["print_config"]:
        say(yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
    threads = "" if device == "GPU" else f" of {torch.get_num_threads()} thread(s)"
    say(
        f"{' · '.join(names)} with {parameters:,} parameters\n"
        f"{trainer.max_steps:,} steps of {settings['data']['batch_size']} images on {device}, {workers}{threads}\n"
        f"run folder {settings['run_dir']}"
    )


def requeue(trainer: pl.Trainer, callbacks: Iterable[pl.Callback]) -> None:
    """Requeue a SLURM job whose time is over, before anything slow."""
    stop = find(callbacks, GracefulStop)
    if stop and stop.received == SIGUSR1 and processes.rank() == 0 and trainer.global_step < trainer.max_steps:
        job = processes.requeue()
        if job:
            say(f"requeued SLURM's job {job}")


def report(trainer: pl.Trainer, callbacks: list[pl.Callback], settings: Mapping[str, Any]) -> Result:
    """Print the outcome, the files, and the commands that go on; return the result of the run."""
    stop, kept = find(callbacks, GracefulStop), find(callbacks, Checkpoints)
    grids, quality, losses = find(callbacks, Samples), find(callbacks, QualityMonitor), find(callbacks, LossLogger)
    value, step = trainer.callback_metrics.get("val/loss"), trainer.global_step
    spawned = str(settings["trainer"]["strategy"]).endswith("spawn")
    if spawned and kept and kept.last_path.is_file():  # the state of the spawned processes is in their checkpoint
        last = checkpoints.read(kept.last_path)
        step = int(last["global_step"])
        kept.load_state_dict(last["callbacks"][kept.state_key])
    say(f"{step:,} steps done" + ("" if value is None else f", validation loss {float(value):.4f}"))
    if quality and quality.value is not None:
        best = f", best {kept.best:.4g}" if kept and kept.monitor in ("quality", quality.label) and kept.best else ""
        say(f"{quality.label} {quality.value:.4g}{best}")
    if grids and grids.path:
        say(f"look at  {grids.path}")
    if kept and kept.last_path.is_file():
        _print_commands(kept.last_path, settings, resumable=step < trainer.max_steps)
    received = stop.received if stop else None
    code = 0 if received is None else 128 + received
    if received == SIGUSR1 and processes.rank() > 0:
        code = 0  # or srun --kill-on-bad-exit would end process 0 while it still sends to W&B
    reason = None
    if losses and losses.nonfinite_since:
        code, reason = 1, f"training loss is NaN or Inf since step {losses.nonfinite_since:,}"
        print(f"error: {reason}", file=sys.stderr, flush=True)
    pruned = any(callback.pruned for callback in callbacks if isinstance(callback, Pruning))
    metric = quality.label if quality and kept and kept.monitor == "quality" else kept.monitor if kept else "val/loss"
    lowest = kept.best if kept else float(value) if value is not None and math.isfinite(value) else None
    return Result(code, metric, lowest, pruned, reason)


def _print_commands(last: Path, settings: Mapping[str, Any], resumable: bool) -> None:
    program, modules = Path(sys.argv[0]).parent / "train.py", untrusted_modules(settings)
    trust = f" trust=[{','.join(modules)}]" if modules else ""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    config_dir = next((str(source.path) for source in sources if source.provider == "command-line"), None)
    if resumable:
        flag = f" --config-dir={shlex.quote(config_dir)}" if config_dir else ""
        say(f"resume   python {program} ckpt={shlex.quote(str(last))}{trust}{flag}")
    say(f"sample   python {program.with_name('sample.py')} ckpt={shlex.quote(str(last))} n=64{trust}")


def find(callbacks: Iterable[pl.Callback], kind: type[C]) -> C | None:
    """Return the first callback of a class."""
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)
