"""Configuration of a training run: that of the command line, or that of a checkpoint with the command line's overrides."""

import copy
import functools
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import diffusion_lab
from diffusion_lab import checkpoint as checkpoints
from diffusion_lab import composition
from diffusion_lab.checkpoint.build import data_module
from diffusion_lab.commands.train import foreign
from diffusion_lab.commands.train.build import Make
from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation import CONF, instantiate, instantiate_untrusted, locate, refuse_untrusted, targets
from diffusion_lab.processes import rank
from diffusion_lab.samplers.ancestral import is_ancestral
from diffusion_lab.variances import Learned

BEGIN = ("experiment", "recipe", "sweep")  # set keys in several groups, and cannot be combined with ckpt=
_NOT_FROM_CHECKPOINT = ("ckpt", "init", "overwrite", "trust", "run_dir")


class Resume(NamedTuple):
    """The checkpoint from which a run is resumed."""

    path: Path
    step: int
    content: dict[str, Any]


class Configuration(NamedTuple):
    """The configuration of a run and its origin.

    Attributes:
        settings: the configuration in plain containers, with interpolations resolved.
        composed: the configuration in plain containers, with interpolations. It is stored in checkpoints, so that keys can be
            overridden when a run is resumed.
        overrides: the overrides of this command line and of the resumed run.
        choices: maps groups to the selected options.
        resume: the checkpoint from which the run is resumed, or None.
        make: the function that instantiates a node: `instantiate`, or `instantiate_untrusted` for a checkpoint's configuration.
    """

    settings: dict[str, Any]
    composed: dict[str, Any]
    overrides: list[str]
    choices: dict[str, str]
    resume: Resume | None
    make: Make

    @classmethod
    def of(cls, config: DictConfig) -> "Configuration":
        """Resolve the configuration that Hydra composed, merged with that of the checkpoint if `ckpt` is set.

        Raises:
            ConfigError: if the checkpoint is missing, it names a class that is not trusted, or both ckpt and init are set.
        """
        current: dict[str, Any] = OmegaConf.to_container(config, resolve=False)  # type: ignore[assignment]
        current["run_dir"] = str(config.run_dir)
        resume = _resume(config.ckpt) if config.ckpt else None
        composed, overrides, choices = current, list[str](), dict[str, str]()
        named, trusted = set[str](), set[str]()
        if HydraConfig.initialized():  # else rank 0 has merged the configuration for this process
            overrides, choices = composition.task_overrides(HydraConfig.get()), _choices(HydraConfig.get())
            if resume:
                named, trusted = _named(composition.parse(overrides))
                composed, overrides, choices = _merged(current, overrides, resume)
                composed = foreign.without_places(composed, named)
        settings = _resolved(composed)
        make: Make = instantiate
        if resume:
            trust = (*settings["trust"], *trusted)
            refuse_untrusted({k: v for k, v in settings.items() if k not in _NOT_FROM_CHECKPOINT}, trust)
            foreign.refuse_places(settings, named)
            make = functools.partial(_make_untrusted, trust=trust, named=frozenset(named))
            settings["ckpt"] = str(resume.path.absolute())  # absolute, so that all processes load the same file
            if settings["init"]:
                raise ConfigError("ckpt= resumes a run and init= begins one from weights: write one of them")
        usable = _with_usable_variance(composed)  # imports the sampler's class, which is trusted by now
        if usable is not composed:
            composed, settings = usable, {**settings, "sampler": _resolved(usable)["sampler"]}
        return cls(settings, composed, overrides, choices, resume, make)

    def entries(self, wandb_id: str, class_names: Sequence[str]) -> dict[str, Any]:
        """Return the entries that this project adds to a checkpoint: plain values that load with `weights_only=True`."""
        packages = ("torchvision", "numpy", "hydra-core", "omegaconf", "torchmetrics")
        return {
            "choices": dict(self.choices),
            "wandb_id": wandb_id,
            "class_names": list(class_names),
            "config": copy.deepcopy(self.settings),
            "overrides": list(self.overrides),
            "composed": copy.deepcopy(self.composed),
            "diffusion_lab": {
                "format": checkpoints.FORMAT,
                "version": diffusion_lab.__version__,
                "torch": str(torch.__version__),
                "lightning": str(pl.__version__),
                "python": platform.python_version(),
                **{name: version(name) for name in packages},
                "commit": _commit(),
            },
        }


def _resume(ckpt: str) -> Resume:
    path = checkpoints.find(ckpt)
    if path.suffix == ".safetensors":
        raise ConfigError(f"{path} contains only weights, but resuming needs the optimizer's state: write init={path}")
    content = checkpoints.read(path)
    foreign.require_resumable(content, path)
    return Resume(path, int(content["global_step"]), content)


def _resolved(composed: dict[str, Any]) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(composed), resolve=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration cannot be resolved: {composition.first_line(error)}") from None
    return settings


def _make_untrusted(
    node: Any, where: str = "", *, trust: tuple[str, ...], named: frozenset[str], **arguments: Any
) -> Any:
    if where == "data":
        keys = {"" if key == "data" else key.removeprefix("data.") for key in named}
        return data_module(node, trust, keys, **arguments)
    return instantiate_untrusted(node, trust, where, **arguments)


def _named(now: Sequence[Override]) -> tuple[set[str], set[str]]:
    """Return the keys and groups that this command line writes, and the classes that it names, which are trusted.

    The options of groups are composed without the checkpoint's overrides, which could add classes to them.
    """
    keys = {o.key_or_group.split("@")[0] for o in now}
    groups = [o for o in now if composition.is_group(o.key_or_group) and o.key_or_group not in BEGIN]
    trusted = set[str]()
    if groups:
        lines = [str(o.input_line) for o in now if o.key_or_group in ("data", *(g.key_or_group for g in groups))]
        alone: Any = OmegaConf.to_container(composition.composed("train", lines), resolve=False)
        trusted |= {t for o in groups for t in targets(alone.get(o.key_or_group))}
    for override in now:
        if not override.is_delete() and override not in groups:
            value = override.value()
            key = override.key_or_group
            trusted |= {str(value)} if key.endswith("._target_") else targets(value)
    return keys, trusted


def _merged(
    current: dict[str, Any], overrides: list[str], resume: Resume
) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """Merge the checkpoint's configuration with the keys that this command line overrides.

    The values of these keys are composed with the overrides of both command lines. For example, trainer=ddp keeps the
    trainer.max_steps= of the first run.

    Returns:
        The configuration, the overrides of both command lines, and the choices.
    """
    now = composition.parse(overrides)
    stored = [o for o in composition.parse(resume.content["overrides"]) if not o.key_or_group.startswith("hydra")]
    before = _without_replaced(stored, now)
    latest = {o.key_or_group: str(o.input_line) for o in [*before, *now]}
    lines = [line for key, line in latest.items() if key not in _NOT_FROM_CHECKPOINT]
    try:
        composed = composition.composed("train", lines)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; if the first run used an option from a --config-dir, pass that flag again"
        ) from None
    both = OmegaConf.to_container(composed, resolve=False)
    merged = OmegaConf.create(foreign.with_defaults(resume.content["composed"], current))
    for override in now:
        key = override.key_or_group
        if key in BEGIN:
            raise ConfigError(
                f"{override.input_line} cannot be combined with ckpt=, which resumes a run: write the keys to change, KEY=VALUE"
            )
        value: Any = both
        for part in [] if override.is_delete() or key in _NOT_FROM_CHECKPOINT else key.split("."):
            value = value[part]
        OmegaConf.update(merged, key, None if value is both else value, merge=False, force_add=True)
    for key in _NOT_FROM_CHECKPOINT:
        merged[key] = current[key]
    plain: dict[str, Any] = OmegaConf.to_container(merged, resolve=False)  # type: ignore[assignment]
    return plain, lines, _choices(composed.hydra)


def _without_replaced(before: Sequence[Override], now: Sequence[Override]) -> list[Override]:
    """Drop the overrides of the first run that a group chosen by this command line replaces.

    These are the keys that the new option's file sets itself: trainer=ddp replaces trainer.devices=1, and keeps
    trainer.max_steps=. If the first run replaced the `_target_` of the group, its arguments are dropped as well:
    lr_scheduler=cosine replaces all of lr_scheduler=custom lr_scheduler._target_=… +lr_scheduler.gamma=….
    """
    chosen = {o.key_or_group: str(o.value()) for o in now if composition.is_group(o.key_or_group)}
    own_class = {group for group in chosen if any(o.key_or_group == f"{group}._target_" for o in before)}

    def replaced(o: Override) -> bool:
        group, _, key = o.key_or_group.partition(".")
        if group not in chosen or not key:
            return False
        if group in own_class and (key == "_target_" or o.is_add() or o.is_force_add()):
            return True
        file = CONF / group / f"{chosen[group]}.yaml"
        return file.is_file() and OmegaConf.select(OmegaConf.load(file), key) is not None

    return [o for o in before if not replaced(o)]


def _with_usable_variance(composed: dict[str, Any]) -> dict[str, Any]:
    """Replace variance=learned by fixed_small in a sampler that cannot use it, unless sampler.variance= was set."""
    sampler = composed["sampler"]
    if not isinstance(sampler, dict) or sampler.get("variance") != "${variance}":
        return composed
    ancestral = is_ancestral(locate(sampler, "sampler"), sampler.get("eta"))
    if locate(composed["variance"], "variance") is not Learned or ancestral:
        return composed  # the constructor of the sampler raises an error for other variances that it cannot use
    if rank() == 0:
        name = locate(sampler).__name__
        print(f"{name} uses variance=fixed_small, since Learned requires ancestral steps (sampler=ddpm)", flush=True)
    return {**composed, "sampler": {**sampler, "variance": {"_target_": "diffusion_lab.variances.FixedSmall"}}}


def _choices(hydra: Any) -> dict[str, str]:
    """Return the selected option of each group, except Hydra's own groups."""
    return {g: str(o) for g, o in hydra.runtime.choices.items() if o is not None and not str(g).startswith("hydra/")}


def refuse_other_optimizer(resume: Resume, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError if the class of the optimizer differs from the checkpoint's, whose state it cannot load."""
    before, now = resume.content["config"]["optimizer"]["_target_"], settings["optimizer"]["_target_"]
    if before != now:
        raise ConfigError(
            f"optimizer._target_={now} cannot load the state of {before} in {resume.path}: write init={resume.path} to "
            "begin a new run with its weights, or remove optimizer="
        )


def _commit() -> str:
    """Return the git commit of this package, or "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        return "unknown"
    return result.stdout.strip() or "unknown"
