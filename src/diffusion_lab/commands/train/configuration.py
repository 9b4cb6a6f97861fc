"""The configuration of a training run: this command line's, or a checkpoint's with the overrides of this one on top."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from diffusion_lab import checkpoint as checkpoints
from diffusion_lab import composition
from diffusion_lab.commands.train.build import Make
from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation import instantiate, instantiate_untrusted, locate, refuse_untrusted, targets
from diffusion_lab.processes import rank
from diffusion_lab.variances import Learned

_NOT_FROM_CHECKPOINT = ("ckpt", "init", "overwrite", "trust", "run_dir")


class Resume(NamedTuple):
    """The checkpoint that a run continues."""

    path: Path
    step: int
    content: dict[str, Any]


class Configuration(NamedTuple):
    """The configuration of a run and its origin.

    Attributes:
        settings: resolved, plain containers.
        composed: the same with its interpolations, stored to resume with overrides on top.
        overrides: KEY=VALUE of the command lines that made it.
        choices: group → option.
        resume: the checkpoint that is continued.
        make: builds a node: `instantiate`, or for a checkpoint's configuration its untrusting form.
    """

    settings: dict[str, Any]
    composed: dict[str, Any]
    overrides: list[str]
    choices: dict[str, str]
    resume: Resume | None
    make: Make

    @classmethod
    def of(cls, config: DictConfig) -> "Configuration":
        """Resolve the configuration that Hydra composed, and that of the checkpoint where `ckpt` names one.

        Raises:
            ConfigError: no such checkpoint, a class that is not trusted, ckpt= and init= together.
        """
        own: dict[str, Any] = OmegaConf.to_container(config, resolve=False)  # type: ignore[assignment]
        own["run_dir"] = str(config.run_dir)
        resume = _resume(config.ckpt) if config.ckpt else None
        composed, overrides, choices, named = own, list[str](), dict[str, str](), set[str]()
        if HydraConfig.initialized():  # else a further process of a run, whose configuration rank 0 has merged
            overrides, choices = composition.task_overrides(HydraConfig.get()), _choices(HydraConfig.get())
            if resume:
                composed, overrides, choices, named = _merged(own, overrides, resume)
        composed = _with_usable_variance(composed)
        settings: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(composed), resolve=True)  # type: ignore[assignment]
        make: Make = instantiate
        if resume:
            trust = (*settings["trust"], *named)
            refuse_untrusted({k: v for k, v in settings.items() if k not in _NOT_FROM_CHECKPOINT}, trust)
            make = functools.partial(_make_untrusted, trust=trust)
            settings["ckpt"] = str(resume.path.absolute())  # `latest` resolved, for every process
            if settings["init"]:
                raise ConfigError("ckpt= resumes a run and init= begins one from weights: write one of them")
        return cls(settings, composed, overrides, choices, resume, make)


def _resume(ckpt: str) -> Resume:
    path = checkpoints.find(ckpt)
    if path.suffix == ".safetensors":
        raise ConfigError(f"{path} holds weights alone, and resuming needs the optimizer's state: write init={path}")
    content = checkpoints.read(path)
    return Resume(path, int(content["global_step"]), content)


def _make_untrusted(node: Any, where: str = "", *, trust: tuple[str, ...], **arguments: Any) -> Any:
    return instantiate_untrusted(node, trust, where, **arguments)


def _merged(
    own: dict[str, Any], overrides: list[str], resume: Resume
) -> tuple[dict[str, Any], list[str], dict[str, str], set[str]]:
    """The checkpoint's configuration, with what the overrides of this command line name on top.

    Their values are composed from the files and the overrides of both command lines: trainer=ddp keeps a trainer.max_steps=
    of the first run. Returns the configuration, the overrides of both, the choices, and the classes named by this command
    line, which are trusted.
    """
    now = composition.parse(overrides)
    before = _without_replaced_classes(composition.parse(resume.content["overrides"]), now)
    latest = {o.key_or_group: str(o.input_line) for o in [*before, *now]}
    lines = [line for key, line in latest.items() if key not in _NOT_FROM_CHECKPOINT]
    try:
        composed = composition.composed("train", lines)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; an option that the first run had from a --config-dir needs that flag again"
        ) from None
    both = OmegaConf.to_container(composed, resolve=False)
    merged, named = OmegaConf.create(resume.content["composed"]), set[str]()
    for override in now:
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
        OmegaConf.update(merged, key, None if value is both else value, merge=False, force_add=True)
    for key in _NOT_FROM_CHECKPOINT:
        merged[key] = own[key]
    plain: dict[str, Any] = OmegaConf.to_container(merged, resolve=False)  # type: ignore[assignment]
    return plain, lines, _choices(composed.hydra), named


def _without_replaced_classes(before: Sequence[Override], now: Sequence[Override]) -> list[Override]:
    """The overrides of a checkpoint without a class named by `_target_` and its added arguments, where this command line
    chooses an option of that group: lr_scheduler=cosine replaces a lr_scheduler=custom whole."""
    chosen = {o.key_or_group for o in now if composition.is_group(o.key_or_group)}
    replaced = {g for g in chosen if any(o.key_or_group == f"{g}._target_" for o in before)}

    def belongs(o: Override) -> bool:
        group, _, key = o.key_or_group.partition(".")
        return group in replaced and (key == "_target_" or o.is_add() or o.is_force_add())

    return [o for o in before if not belongs(o)]


def _with_usable_variance(composed: dict[str, Any]) -> dict[str, Any]:
    """The configuration with fixed_small for a sampler that cannot use the learned one, unless sampler.variance names one."""
    sampler = composed["sampler"]
    if not isinstance(sampler, dict) or sampler.get("variance") != "${variance}":
        return composed
    ancestral = getattr(locate(sampler, "sampler"), "ancestral", True)
    if locate(composed["variance"], "variance") is not Learned or ancestral:
        return composed  # other variances are of the sampler alone, which refuses what it cannot use
    if rank() == 0:
        name = locate(sampler).__name__
        print(
            f"{name} samples with variance=fixed_small, since Learned is for ancestral steps (sampler=ddpm)", flush=True
        )
    return {**composed, "sampler": {**sampler, "variance": {"_target_": "diffusion_lab.variances.FixedSmall"}}}


def _choices(hydra: Any) -> dict[str, str]:
    """Group → option, without Hydra's own groups."""
    return {g: str(o) for g, o in hydra.runtime.choices.items() if o is not None and not str(g).startswith("hydra/")}


def refuse_other_optimizer(resume: Resume, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError where a resumed run has another class of optimizer, whose state the checkpoint does not hold."""
    before, now = resume.content["config"]["optimizer"]["_target_"], settings["optimizer"]["_target_"]
    if before != now:
        raise ConfigError(
            f"optimizer._target_={now} cannot continue the state of {before} in {resume.path}: write init={resume.path} to "
            "begin another run with its weights, or leave the optimizer out"
        )
