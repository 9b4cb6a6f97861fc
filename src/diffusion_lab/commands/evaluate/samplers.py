"""Build the samplers of an evaluation: each entry of `samplers=` with each number of `steps=` or `budget=`."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from diffusion_lab import composition
from diffusion_lab.checkpoint import Run
from diffusion_lab.checkpoint.fits import sampler_for
from diffusion_lab.checkpoint.guidance import guided
from diffusion_lab.errors import ConfigError
from diffusion_lab.samplers import Sampler


class SamplerSpec(NamedTuple):
    """A sampler, its name in the results, and its run, whose network has the head of a fitted variance."""

    name: str
    sampler: Sampler
    run: Run


def nodes(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Compose the node of every sampler in `samplers` with Hydra. Call it before processes are started.

    Raises:
        ConfigError: if a sampler is unknown.
    """
    names = list(dict.fromkeys(name for name, _ in _named(settings["samplers"])))
    by_name = {}
    for name in names:
        known = composition.options("sampler")
        if name not in known:
            raise ConfigError(
                f"samplers={name} is unknown{composition.closest(name, known)}: write one or more of {', '.join(known)}"
            )
        composed = composition.composed("evaluate", [f"+sampler={name}"])
        node: Any = OmegaConf.to_container(OmegaConf.masked_copy(composed, ["sampler", "variance"]), resolve=True)
        by_name[name] = {
            **node["sampler"],
            **({"variance": settings["variance"]} if "variance" in node["sampler"] else {}),
        }
    return by_name


def build(settings: Mapping[str, Any], run: Run) -> list[SamplerSpec]:
    """Build each sampler with each number of steps (or budget), in that order. A sampler without `steps` is built once.

    Raises:
        ConfigError: if a sampler does not have an option, or cannot be used with the checkpoint.
    """
    specs: list[SamplerSpec] = []
    for name, options in _named(settings["samplers"]):
        node = settings["sampler_nodes"][name]
        unknown = [key for key in options if key not in node]
        if unknown:
            raise ConfigError(f"samplers={name} has no option {unknown[0]}: write one of {', '.join(list(node)[1:])}")
        label = name + ("(" + ",".join(f"{k}={v}" for k, v in options.items()) + ")" if options else "")
        for length in _lengths(settings, node, options):
            sampler, fitted = sampler_for({**node, **options, **length}, run)
            fitted = guided(settings["guidance"], fitted)
            sampler.check(fitted.denoiser)
            specs.append(SamplerSpec(label, sampler, fitted))
    if not specs:
        raise ConfigError("samplers=[] is empty: write e.g. samplers=[ddim] steps=[50]")
    return specs


def _named(entries: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and options of each entry: ddim, or {ddim: {eta: 1}}."""
    for entry in entries:
        if isinstance(entry, dict):
            for name, options in entry.items():
                if not isinstance(options, dict | None):
                    raise ConfigError(f"samplers={name}: write its options, {{{name}:{{OPTION:VALUE}}}}, not {options}")
                yield str(name), dict(options or {})
        else:
            yield str(entry), {}


def _lengths(settings: Mapping[str, Any], node: Mapping[str, Any], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the options `steps`, or `budget`, of each sampler to build."""
    if "steps" not in node or {"steps", "budget"} & set(options):
        return [{}]
    if settings["budget"] is not None:
        budgets = settings["budget"] if isinstance(settings["budget"], list) else [settings["budget"]]
        return [{"steps": None, "budget": budget} for budget in budgets]
    return [{"steps": steps} for steps in settings["steps"]]
