"""`src/train.py`: train, resume, fine-tune."""

import functools
import logging
import math
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from signal import SIGUSR1
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.loggers import Logger, WandbLogger

from diffusion_lab import checkpoint as checkpoints
from diffusion_lab import composition, launchers
from diffusion_lab.commands.train import build
from diffusion_lab.commands.train.initialize import initialize
from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation import (
    instantiate,
    instantiate_untrusted,
    locate,
    refuse_untrusted,
    targets,
    untrusted_modules,
)
from diffusion_lab.io import os_errors, write_file
from diffusion_lab.processes import CONFIG_ENV, Result
from diffusion_lab.training.callbacks import (
    Checkpoints,
    GracefulStop,
    LossLogger,
    Pruning,
    QualityMonitor,
    Samples,
    WandbSummary,
)
from diffusion_lab.training.loggers import Identity, identity
from diffusion_lab.variances import Learned
from hydra_plugins.diffusion_lab_optuna import reporter

_NOT_FROM_CHECKPOINT = ("ckpt", "init", "overwrite", "trust", "run_dir")


def run(config: DictConfig) -> Result:
    """Train as configured. The exit code is 0, or 128 + the signal that ended the run; the value is the best of what decides
    best.ckpt."""
    _quiet()
    resume = _resume(config)
    merged = _merged(config, resume)
    composed = _with_usable_variance(merged.composed)
    settings = _plain(OmegaConf.create(composed))
    make = instantiate
    if resume:
        refuse_untrusted({k: v for k, v in settings.items() if k not in _NOT_FROM_CHECKPOINT}, merged.trust(settings))
        make = functools.partial(_untrusted, trust=merged.trust(settings))
        settings["ckpt"] = str(resume[0].absolute())  # what `latest` means now, for every process
    if settings["init"] and resume:
        raise ConfigError("ckpt= resumes a run and init= begins one from weights: write one of them")
    folder = Path(settings["run_dir"])
    build.check_nodes(settings)
    if resume:
        _refuse_other_optimizer(resume[0], settings)
    _check_processes(settings)
    who = _identity(merged, resume)
    hooks = build.callbacks(settings, folder, make)
    loggers = build.loggers(settings, folder, who, make)
    hooks += _hooks(loggers)
    trainer = build.trainer(settings, folder, loggers, hooks, make)
    data = build.data(settings, make)
    data.trainer = trainer
    if trainer.is_global_zero:
        data.prepare_data()
    if resume:
        path, step = resume
        if step >= trainer.max_steps:
            raise ConfigError(f"{path} has {step} steps already: write trainer.max_steps= above that")
        data.start_at(step)
    data.setup()
    condition, settings["condition"] = build.condition(settings, data, make)
    learned = locate(settings["variance"], "variance") is Learned
    network, settings["model"] = build.model(settings, condition, learned, make)
    if settings["init"]:
        _say(f"weights from {initialize(network, settings['init'])}")
    saved = build.saved(settings, composed, merged.overrides, merged.choices, who.id, data.class_names)
    module = build.module(settings, network, condition, saved, make)
    make(settings["sampler"], "sampler").check(module.denoiser)
    _check_disk(folder, network, settings)
    condition(data.train_dataloader().batch(0))  # refuses a batch size that does not divide, a condition without data
    for hook in hooks:
        if isinstance(hook, QualityMonitor):
            hook.check(data)
    if 0 < data.size("val") < trainer.world_size:
        raise ConfigError(
            f"{data.size('val')} validation images are too few for {trainer.world_size} processes: write data.val=0"
        )
    if trainer.is_global_zero:  # last, so that a run that is refused leaves nothing behind
        _write_configuration(folder, settings)
        if resume:
            _keep_best(resume[0], folder)
    os.environ[CONFIG_ENV] = str(folder / "config.yaml")  # read by the further processes that Lightning starts
    _announce(trainer, network, data, settings)
    failed = 1
    try:
        with os_errors():
            trainer.fit(module, datamodule=data, ckpt_path=str(resume[0]) if resume else None, weights_only=True)
        failed = 0
        _requeue(trainer, hooks)
    finally:
        os.environ.pop(CONFIG_ENV, None)
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish(exit_code=failed)  # or the next job of a sweep would go on with this job's run
    return _report(trainer, hooks, settings)


# configuration ----------------------------------------------------------------------------------------------------------


def _resume(config: DictConfig) -> tuple[Path, int] | None:
    """The checkpoint to continue and its step."""
    if not config.ckpt:
        return None
    path = checkpoints.find(config.ckpt)
    if path.suffix == ".safetensors":
        raise ConfigError(f"{path} holds weights alone, and resuming needs the optimizer's state: write init={path}")
    return path, int(checkpoints.read(path)["global_step"])


class Merged(NamedTuple):
    """The configuration of a run and where it comes from.

    Attributes:
        composed: interpolations unresolved.
        overrides: KEY=VALUE of the command lines that made it.
        choices: group → option.
        named: the classes that this command line names, which are trusted.
    """

    composed: dict[str, Any]
    overrides: list[str]
    choices: dict[str, str]
    named: frozenset[str] = frozenset()

    def trust(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """What a resumed run may instantiate besides this package's classes."""
        return (*settings["trust"], *self.named)


def _untrusted(node: Any, where: str = "", *, trust: tuple[str, ...], **given: Any) -> Any:
    return instantiate_untrusted(node, trust, where, **given)


def _merged(config: DictConfig, resume: tuple[Path, int] | None) -> Merged:
    """The configuration to run.

    Of a resumed run it is the checkpoint's. On top comes what the overrides of this command line name, as the files and the
    overrides of both command lines compose it: trainer=ddp keeps a trainer.max_steps= of the first run.
    """
    own: dict[str, Any] = OmegaConf.to_container(config, resolve=False)  # type: ignore[assignment]
    own["run_dir"] = str(config.run_dir)
    if (
        not HydraConfig.initialized()
    ):  # a further process of a run, whose configuration the first one has merged already
        return Merged(own, [], {})
    given = composition.task_overrides(HydraConfig.get())
    if resume is None:
        return Merged(own, given, _choices(HydraConfig.get()))
    checkpoint = checkpoints.read(resume[0])
    before = _without_replaced_classes(composition.parse(checkpoint["overrides"]), composition.parse(given))
    latest = {o.key_or_group: str(o.input_line) for o in [*before, *composition.parse(given)]}
    overrides = [line for key, line in latest.items() if key not in _NOT_FROM_CHECKPOINT]
    try:
        composed = composition.composed("train", overrides)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; an option that the first run had from a --config-dir needs that flag again"
        ) from None
    both = OmegaConf.to_container(composed, resolve=False)
    held, named = OmegaConf.create(checkpoint["composed"]), set[str]()
    for override in composition.parse(given):
        key = override.key_or_group
        if key in ("experiment", "recipe", "sweep"):
            raise ConfigError(
                f"{override.input_line} begins a run and ckpt= continues one: write the values that are to change"
            )
        value: Any = both
        for part in [] if override.is_delete() or key in _NOT_FROM_CHECKPOINT else key.split("."):
            value = value[part]
        if value is not both:
            named |= {value} if key.endswith("._target_") else targets(value)
        OmegaConf.update(held, key, None if value is both else value, merge=False, force_add=True)
    for key in _NOT_FROM_CHECKPOINT:
        held[key] = own[key]
    merged: dict[str, Any] = OmegaConf.to_container(held, resolve=False)  # type: ignore[assignment]
    return Merged(merged, overrides, _choices(composed.hydra), frozenset(named))


def _without_replaced_classes(before: Sequence[Override], now: Sequence[Override]) -> list[Override]:
    """The overrides of a checkpoint without a class named by `_target_`, and what was added for it, where this command line
    chooses an option of that group: lr_scheduler=cosine replaces a lr_scheduler=custom whole."""
    chosen = {o.key_or_group for o in now if composition.is_group(o.key_or_group)}
    replaced = {g for g in chosen if any(o.key_or_group == f"{g}._target_" for o in before)}

    def belongs(o: Override) -> bool:
        group, _, key = o.key_or_group.partition(".")
        return group in replaced and (key == "_target_" or o.is_add() or o.is_force_add())

    return [o for o in before if not belongs(o)]


def _with_usable_variance(composed: dict[str, Any]) -> dict[str, Any]:
    """The configuration with fixed_small for a sampler that cannot take the learned one, unless sampler.variance names one."""
    sampler = composed["sampler"]
    if not isinstance(sampler, dict) or sampler.get("variance") != "${variance}":
        return composed
    if locate(composed["variance"], "variance") is not Learned or getattr(
        locate(sampler, "sampler"), "ancestral", True
    ):
        return composed  # other variances are of the sampler alone, which refuses what it cannot use
    kind = locate(sampler).__name__
    _say(f"{kind} samples with variance=fixed_small, since Learned is for ancestral steps (sampler=ddpm)")
    return {**composed, "sampler": {**sampler, "variance": {"_target_": "diffusion_lab.variances.FixedSmall"}}}


def _choices(hydra: Any) -> dict[str, str]:
    """Group → option, without Hydra's own groups."""
    return {g: str(o) for g, o in hydra.runtime.choices.items() if o is not None and not str(g).startswith("hydra/")}


def _refuse_other_optimizer(path: Path, settings: Mapping[str, Any]) -> None:
    before, now = checkpoints.read(path)["config"]["optimizer"]["_target_"], settings["optimizer"]["_target_"]
    if before != now:
        raise ConfigError(
            f"optimizer._target_={now} cannot continue the state of {before} in {path}: write init={path} to begin another run "
            "with its weights, or leave the optimizer out"
        )


def _identity(merged: Merged, resume: tuple[Path, int] | None) -> Identity:
    job = HydraConfig.get() if HydraConfig.initialized() else None
    sweep = Path(job.sweep.dir) if job and job.mode == RunMode.MULTIRUN else None
    held = checkpoints.read(resume[0]).get("wandb_id") if resume and not sweep else None  # jobs are runs of their own
    return identity(merged.choices, merged.overrides, sweep, held)


def _hooks(loggers: list[Logger]) -> list[pl.Callback]:
    """Callbacks added by the command: W&B summaries and Optuna pruning."""
    hooks: list[pl.Callback] = []
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        hooks.append(WandbSummary())
    report = reporter()
    if report:
        hooks.append(Pruning(report))
    return hooks


def _plain(config: DictConfig) -> dict[str, Any]:
    resolved: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    return resolved


def _write_configuration(folder: Path, settings: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    try:  # the file is the run's claim on its folder: two runs of one second must not share it
        (folder / "config.yaml").open("x").close()
    except FileExistsError:
        if not settings["overwrite"]:
            raise ConfigError(f"{folder} was just created by another run: retry, or write hydra.run.dir=") from None
    write_file(folder / "config.yaml", yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))


def _keep_best(resumed: Path, folder: Path) -> None:
    """best.ckpt of the run that is continued, whose score is continued too, until this run does better."""
    best = resumed.with_name("best.ckpt")
    if best.is_file():
        write_file(folder / "checkpoints" / "best.ckpt", best.read_bytes())


# checks before the run --------------------------------------------------------------------------------------------------


def _check_processes(settings: Mapping[str, Any]) -> None:
    options = settings["trainer"]
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        launchers.check_sweep(options)
    strategy = str(options["strategy"])
    if strategy.startswith(("fsdp_", "deepspeed", "model_parallel")):
        raise ConfigError(f"trainer.strategy={strategy} is not supported: write trainer=fsdp, or trainer=ddp")
    if strategy == "fsdp":
        _check_sharding(settings)
    each = launchers.each(options["devices"])
    started = launchers.launched()
    if started is None and "SLURM_NTASKS" in os.environ and launchers.several(options) and not launchers.interactive():
        raise ConfigError(
            "SLURM gave this job one task, so that one process would train: ask for --ntasks-per-node=N and start it by srun"
        )
    if started:
        nodes = options["num_nodes"]
        if each and (nodes, each * nodes) != (started.nodes, started.world):
            raise ConfigError(
                f"{started.by} started {started.world} processes on {started.nodes} node(s), and trainer.devices={each} "
                f"trainer.num_nodes={nodes} are others: write trainer=ddp trainer.devices={started.world // started.nodes} "
                f"trainer.num_nodes={started.nodes}"
            )


def _check_sharding(settings: Mapping[str, Any]) -> None:
    if not (settings.get("callbacks") or {}).get("ema"):
        raise ConfigError(
            "trainer=fsdp cuts the live weights over processes, and what is validated and sampled from are the averages: write "
            "callbacks.ema.decay=0, whose average is the live weights"
        )
    if settings["compile"]:
        raise ConfigError("trainer=fsdp does not go with compile=true: write compile=false")
    if ((settings.get("logger") or {}).get("wandb") or {}).get("gradients"):
        raise ConfigError("trainer=fsdp has no gradients in one place for logger.wandb.gradients: write 0")
    if settings["ckpt"]:
        held = checkpoints.read(Path(settings["ckpt"]))["state_dict"]
        if not all(tensor.is_contiguous() for tensor in held.values()):
            raise ConfigError(
                f"{settings['ckpt']} was written by an older version, and FSDP cannot read it: resume it by trainer=ddp first"
            )


def _check_disk(folder: Path, network: torch.nn.Module, settings: Mapping[str, Any]) -> None:
    """Room for last.ckpt, best.ckpt and the one being written: live weights, averages, two moments of Adam each."""
    decay = ((settings.get("callbacks") or {}).get("ema") or {}).get("decay", [])
    copies = 3 + (len(decay) if isinstance(decay, list) else 1)
    need = 3 * copies * sum(p.numel() * p.element_size() for p in network.parameters())
    parent = next(p for p in [folder.absolute(), *folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(parent).free
    if free < need:
        raise ConfigError(
            f"not enough disk at {folder}: three checkpoints need {need / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free; "
            "make room, or write hydra.run.dir= on another disk"
        )


# what the user reads ------------------------------------------------------------------------------------------------------


def _config_dir() -> str | None:
    """The folder of options that this command line added by --config-dir."""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    return next((str(source.path) for source in sources if source.provider == "command-line"), None)


def _quiet() -> None:
    """Lightning's banners and advice about loaders it does not know of; what this run does is said by `_announce`."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for advice in (
        ".*Experiment logs directory .* exists and is not empty.*",  # it holds this run's configuration
        ".*Checkpoint directory .* exists and is not empty.*",  # it holds best.ckpt of the run that is continued
        ".*isinstance.treespec, LeafSpec.*",  # between Lightning and torch
        ".*does not have many workers.*",
    ):
        warnings.filterwarnings("ignore", advice)


def _say(text: str) -> None:
    if launchers.rank() == 0:
        print(text, flush=True)


def _announce(trainer: pl.Trainer, network: torch.nn.Module, data: Any, settings: Mapping[str, Any]) -> None:
    names = [str(settings[g]["_target_"]).rsplit(".", 1)[-1] for g in ("schedule", "objective", "weighting", "model")]
    parameters = sum(p.numel() for p in network.parameters())
    device = "GPU" if trainer.accelerator.__class__.__name__ == "CUDAAccelerator" else "CPU"
    workers = f"{trainer.world_size} processes" if trainer.world_size > 1 else "1 process"
    if settings["print_config"]:
        _say(yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
    threads = "" if device == "GPU" else f" of {torch.get_num_threads()} thread(s)"
    _say(
        f"{' · '.join(names)} with {parameters:,} parameters\n"
        f"{trainer.max_steps:,} steps of {settings['data']['batch_size']} images on {device}, {workers}{threads}\n"
        f"run folder {settings['run_dir']}"
    )


def _requeue(trainer: pl.Trainer, hooks: list[pl.Callback]) -> None:
    """Another turn for a SLURM job whose time is over; before anything slow, because the time is."""
    interrupt = next(h for h in hooks if isinstance(h, GracefulStop))
    if interrupt.received == SIGUSR1 and launchers.rank() == 0 and trainer.global_step < trainer.max_steps:
        job = launchers.requeue()
        if job:
            _say(f"requeued SLURM's job {job}")


def _report(trainer: pl.Trainer, hooks: list[pl.Callback], settings: Mapping[str, Any]) -> Result:
    """Says where things are and how to go on; what it came to."""
    signal = next(h for h in hooks if isinstance(h, GracefulStop)).received
    kept = next((h for h in hooks if isinstance(h, Checkpoints)), None)
    grids = next((h for h in hooks if isinstance(h, Samples)), None)
    quality = next((h for h in hooks if isinstance(h, QualityMonitor)), None)
    value = trainer.callback_metrics.get("val/loss")
    step = trainer.global_step
    spawned = str(settings["trainer"]["strategy"]).endswith("spawn")
    if spawned and kept and kept.last_path.is_file():  # what the spawned processes knew is in their checkpoint
        last = checkpoints.read(kept.last_path)
        step = int(last["global_step"])
        kept.load_state_dict(last["callbacks"][kept.state_key])
    _say(f"{step:,} steps done" + ("" if value is None else f", validation loss {float(value):.4f}"))
    if quality and quality.value is not None:
        best = f", best {kept.best:.4g}" if kept and kept.monitor in ("quality", quality.label) and kept.best else ""
        _say(f"{quality.label} {quality.value:.4g}{best}")
    if grids and grids.path:
        _say(f"look at  {grids.path}")
    if kept:
        program, modules = Path(sys.argv[0]).parent / "train.py", untrusted_modules(settings)
        trust = f" trust=[{','.join(modules)}]" if modules else ""
        again = f"{trust} --config-dir={shlex.quote(config_dir)}" if (config_dir := _config_dir()) else trust
        if step < trainer.max_steps and kept.last_path.is_file():
            _say(f"resume   python {program} ckpt={shlex.quote(str(kept.last_path))}{again}")
        if kept.last_path.is_file():
            _say(
                f"sample   python {program.with_name('sample.py')} ckpt={shlex.quote(str(kept.last_path))} n=64{trust}"
            )
    code = 0 if signal is None else 128 + signal
    if signal == SIGUSR1 and launchers.rank() > 0:
        code = 0  # or srun --kill-on-bad-exit would end process 0 while it still sends to W&B
    losses = next((h for h in hooks if isinstance(h, LossLogger)), None)
    reason = None
    if losses and losses.lost:
        code, reason = 1, f"training loss is NaN or Inf since step {losses.lost:,}"
        print(f"error: {reason}", file=sys.stderr, flush=True)
    pruned = any(h.pruned for h in hooks if isinstance(h, Pruning))
    metric = quality.label if quality and kept and kept.monitor == "quality" else kept.monitor if kept else "val/loss"
    lowest = kept.best if kept else float(value) if value is not None and math.isfinite(value) else None
    return Result(code, metric, lowest, pruned, reason)
