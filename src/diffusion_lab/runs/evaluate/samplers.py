"""The samplers of an evaluation: every file of conf/sampler is one, with every number of steps asked for."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffusion_lab.errors import ConfigError
from diffusion_lab.runs.checkpoints import Run
from diffusion_lab.runs.guidance import guided
from diffusion_lab.runs.options import CONF, first_line, group_options
from diffusion_lab.runs.variances import sampler_for
from diffusion_lab.samplers import Sampler


class Asked(NamedTuple):
    """A sampler, by the name that the results give it, and the run to use it on (a fitted variance may add to its network)."""

    name: str
    sampler: Sampler
    run: Run


def build(settings: Mapping[str, Any], run: Run) -> list[Asked]:
    """samplers × steps (or × budget), in that order; a sampler that chooses its own steps comes once.

    Raises:
        ValueError: an unknown sampler or option, or one that cannot work with that checkpoint.
    """
    learned = (
        (settings["variance"] or {}).get("_target_", "").endswith("Learned")
    )  # variance=learned names a sampler as well
    if settings.get("sampler") and not learned:
        raise ConfigError(
            "sampler= is sample.py's: write samplers=[ddim,ddpm] steps=[10,50], or samplers=[{ddim:{eta:1}}]"
        )
    known = group_options("sampler")
    asked: list[Asked] = []
    for name, options in _named(settings["samplers"]):
        if name not in known:
            raise ConfigError(f"samplers={name} is unknown: write some of {', '.join(known)}")
        node = _node(name, settings)
        strange = [key for key in options if key not in node]
        if strange:
            raise ConfigError(f"samplers={name} has no option {strange[0]}: write some of {', '.join(list(node)[1:])}")
        shown = name + ("(" + ",".join(f"{k}={v}" for k, v in options.items()) + ")" if options else "")
        for length in _lengths(settings, node, options):
            sampler, own = sampler_for({**node, **options, **length}, run)
            own = guided(settings["guidance"], own)
            sampler.check(own.denoiser)
            asked.append(Asked(shown, sampler, own))
    if not asked:
        raise ConfigError("samplers=[] asks for nothing: write e.g. samplers=[ddim] steps=[50]")
    return asked


def _named(asked: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and options of each entry: ddim, or {ddim: {eta: 1}}."""
    for entry in asked:
        if isinstance(entry, dict):
            yield from ((str(name), dict(options or {})) for name, options in entry.items())
        else:
            yield str(entry), {}


def _node(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the sampler's file says, with its references to other groups resolved."""
    file = OmegaConf.load(CONF / "sampler" / f"{name}.yaml")
    try:
        whole = OmegaConf.to_container(OmegaConf.create({**settings, "sampler": file}), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"samplers={name}: conf/sampler/{name}.yaml cannot be resolved ({first_line(error)})"
        ) from None
    assert isinstance(whole, dict)
    return {str(key): value for key, value in whole["sampler"].items()}


def _lengths(settings: Mapping[str, Any], node: Mapping[str, Any], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    if "steps" not in node or {"steps", "budget"} & set(options):
        return [{}]
    if settings["budget"] is not None:
        budgets = settings["budget"] if isinstance(settings["budget"], list) else [settings["budget"]]
        return [{"steps": None, "budget": budget} for budget in budgets]
    return [{"steps": steps} for steps in settings["steps"]]
