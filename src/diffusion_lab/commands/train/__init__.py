"""Train, resume or fine-tune a model (`src/train.py`). `run` lists the steps, the other modules implement them."""

import functools
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher

from diffusion_lab.commands.train import build, checks, foreign, resuming, summary
from diffusion_lab.commands.train.configuration import Configuration, refuse_other_optimizer
from diffusion_lab.commands.train.initialize import initialize
from diffusion_lab.commands.train.trainer import build_trainer
from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation import locate, require_kind
from diffusion_lab.io import os_errors, write_file
from diffusion_lab.processes import CONFIG_ENV, Interrupted, Result, stop_signals
from diffusion_lab.samplers import Sampler
from diffusion_lab.training.callbacks import GracefulStop, Pruning, WandbSummary
from diffusion_lab.training.loggers import Identity, identity
from diffusion_lab.variances import Learned
from hydra_plugins.diffusion_lab_optuna import reporter


@os_errors()
def run(config: DictConfig) -> Result:
    """Train a model.

    Args:
        config: the composed configuration of `conf/train.yaml`.

    Returns:
        The exit code (0; 1 for a NaN or Inf loss; 128 + the number of the signal that ended the run) and the best value of the
        monitored metric.

    Raises:
        ConfigError: if the configuration is invalid.
    """
    summary.silence_lightning()
    configuration = Configuration.of(config)
    settings, resume, make = configuration.settings, configuration.resume, configuration.make
    folder = Path(settings["run_dir"])

    build.check_nodes(settings)
    if resume:
        refuse_other_optimizer(resume, settings)
    checks.check_processes(settings, resume)

    run_identity = _identity(configuration)
    callbacks = build.callbacks(settings, folder, make)
    loggers = build.loggers(settings, folder, run_identity, make)
    callbacks += added_callbacks(loggers)
    trainer = build_trainer(settings, folder, loggers, callbacks, make)

    data = build.data(settings, make)
    data.trainer = trainer
    if trainer.is_global_zero:
        data.prepare_data()
    if resume:
        if resume.step >= trainer.max_steps:
            raise ConfigError(
                f"{resume.path} has {resume.step} steps, but trainer.max_steps={trainer.max_steps}: write a larger "
                "trainer.max_steps="
            )
        foreign.check_loops(resume.content, trainer.fit_loop.state_dict(), resume.path)
        data.start_at(resume.step)
    data.setup()

    condition, settings["condition"] = build.condition(settings, data, make)
    learned = locate(settings["variance"], "variance") is Learned
    check = functools.partial(checks.check_weights, resume) if resume else None
    network, settings["model"] = build.model(settings, condition, learned, make, check)
    if resume:
        checks.check_weights(resume, network)
    if settings["init"]:
        summary.print_once(f"weights from {initialize(network, settings['init'])}")
    saved = configuration.entries(run_identity.id, data.class_names)
    module = build.module(settings, network, condition, saved, make)

    sampler = make(settings["sampler"], "sampler")
    require_kind(sampler, Sampler, "sampler")
    sampler.check(module.denoiser)
    checks.check_disk(folder, network, settings)
    checks.check_data(data, condition, callbacks, trainer)
    if trainer.is_global_zero:  # after all checks, so that an invalid configuration leaves no files
        with os_errors():
            _write_configuration(folder, settings)
            if resume:
                resuming.carry(resume, settings, folder, loggers, callbacks)

    summary.announce(trainer, network, settings)
    os.environ[CONFIG_ENV] = str(folder / "config.yaml")  # read by the processes that Lightning starts
    failed = 1
    try:
        with spawning(trainer, callbacks):
            checkpoint = str(resume.path) if resume else None
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        failed = 0
        summary.requeue(trainer, callbacks)
    except Interrupted as stop:
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(stop.number)  # other processes of a run that has not begun
        if not stop_signals.deferred:  # nothing was trained
            raise
        failed = 0  # stopped in a validation, after last.ckpt was written
        summary.requeue(trainer, callbacks)
    finally:
        stop_signals.deferred = stop_signals.received is not None  # the next job of a sweep starts up
        os.environ.pop(CONFIG_ENV, None)
        if "wandb" in sys.modules:
            # Otherwise the next job of a sweep would continue this job's W&B run.
            sys.modules["wandb"].finish(exit_code=failed)
    return summary.report(trainer, callbacks, settings)


def _identity(configuration: Configuration) -> Identity:
    """Return the name, tags and group of the run; a resumed run keeps its W&B id, unless it is a job of a sweep."""
    job = HydraConfig.get() if HydraConfig.initialized() else None
    sweep = Path(job.sweep.dir) if job and job.mode == RunMode.MULTIRUN else None
    resumed = configuration.resume.content.get("wandb_id") if configuration.resume and not sweep else None
    return identity(configuration.choices, configuration.overrides, sweep, resumed)


@contextmanager
def spawning(trainer: pl.Trainer, callbacks: list[pl.Callback]) -> Iterator[None]:
    """Pass stop signals on to the processes that trainer=ddp_spawn starts, while this one waits for them."""
    stop = summary.find(callbacks, GracefulStop)
    if stop and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        stop_signals.notify, stop_signals.deferred = stop.record, True
    try:
        yield
    finally:
        stop_signals.notify = None


def added_callbacks(loggers: list[Logger]) -> list[pl.Callback]:
    """Return the callbacks that the command adds: W&B summaries, and Optuna pruning in a search."""
    callbacks: list[pl.Callback] = []
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        callbacks.append(WandbSummary())
    report = reporter()
    if report:
        callbacks.append(Pruning(report))
    return callbacks


def _write_configuration(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write config.yaml. Raises ConfigError if another run has created the folder in the meantime."""
    folder.mkdir(parents=True, exist_ok=True)
    try:  # mode "x" fails if the file exists, so that two runs started in the same second do not share a folder
        (folder / "config.yaml").open("x").close()
    except FileExistsError:
        if not settings["overwrite"]:
            raise ConfigError(f"{folder} was just created by another run: retry, or write hydra.run.dir=") from None
    write_file(folder / "config.yaml", yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
