"""Checks of the command line: groups, keys and types, before anything heavy is imported.

Hydra finds these mistakes as well, but says so in five lines and with exit code 1.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, Quote, QuotedString, Sweep
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffusion_lab.errors import ConfigError

CONF = Path(__file__).resolve().parents[3] / "conf"

# What a key takes whose value in the files is null, or for which null is a value as well.
NULLABLE: dict[str, type | tuple[type, ...]] = {
    "ckpt": str,
    "init": str,
    "out": str,
    "given": str,
    "guidance.ckpt": str,
    "condition.names": list,
    "n": int,
    "images": (str, list),
    "image": str,
    "mask": str,
    "latents": str,
    "weights_path": str,
    "reference": str,
    "save_reference": str,
    "budget": (int, list),
    "trainer.max_time": (str, dict),
    "trainer.profiler": str,
    "sampler.steps": int,
    "sampler.budget": int,
    "sampler.max_final_noise": (int, float),
    "nodes": int,
    "ema": (int, float),
    "variance.times": list,
    "variance.moments": list,
    "data.limit": int,
    "data.val": (int, float),
    "data.test": (int, float),
    "callbacks.losses.edges": list,
    "callbacks.samples.strip": list,
    "clip.maximum": (int, float),
    "model.num_classes": int,
    "model.head_channels": int,
    "logger.wandb.name": str,
    "logger.wandb.group": str,
}
# Keys that take values of several types.
MIXED: dict[str, tuple[type, ...]] = {
    "labels": (str, list),
    "condition.keys": (list,),
    "extractor": (str, dict, type(None)),
    "callbacks.ema.decay": (float, int, list),
    "trainer.devices": (int, str, list),
}


def check(config_name: str, arguments: Sequence[str], sweep: bool = False) -> DictConfig:
    """Composes the configuration that the overrides ask for.

    Args:
        config_name: a file of conf/, without its suffix.
        arguments: Hydra overrides; of a sweep every value is checked.
        sweep: whether --multirun was given, without which a key takes one value.

    Returns:
        The composed configuration, with Hydra's own node under `hydra`; of a sweep, its first job's.

    Raises:
        ValueError: one line that names what is wrong and what to write instead.
    """
    try:
        overrides = OverridesParser.create().parse_overrides(list(arguments))
    except HydraException as error:
        raise ConfigError(
            f"cannot read the overrides {' '.join(arguments)!r}: {first_line(error)}; write KEY=VALUE"
        ) from None
    several = next((o.input_line for o in overrides if o.is_sweep_override()), None)
    if several and not sweep:
        raise ConfigError(
            f"{several} names several values: add --multirun for a run of each, or write [...] for a list"
        )
    with _own_hydra(), initialize_config_dir(str(CONF), version_base="1.3", job_name=config_name):
        chosen = [o for o in overrides if _is_group(o.key_or_group)]
        for override in chosen:
            if not override.key_or_group.startswith("hydra/"):
                _check_group(override)
                _check_command(override, config_name)
        base = _compose(config_name, [_single(o) for o in chosen])
        for override in overrides:
            if override not in chosen:
                _check_value(override, base)
        config = base if len(chosen) == len(overrides) else _compose(config_name, [_single(o) for o in overrides])
        _resolve(config)
        interval = next((o.input_line for o in overrides if o.is_interval_sweep()), None)
        if interval and "Basic" in config.hydra.sweeper._target_:
            key = interval.split("=", 1)[0]
            raise ConfigError(
                f"{interval} is an interval: name its values, {key}=A,B or {key}=range(1,4), or write hydra/sweeper=optuna"
            )
    named = {o.get_key_element() for o in overrides}
    swept = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items() if key not in named]
    return check(config_name, [*arguments, *swept], sweep=True) if swept else config


def _resolve(config: DictConfig) -> None:
    """Raise ValueError where an interpolation leads nowhere; `run_dir` is known to a running job only."""
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    try:
        OmegaConf.to_container(OmegaConf.create({**plain, "hydra": None, "run_dir": "."}), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration cannot be resolved: {first_line(error)}") from None


@contextmanager
def _own_hydra() -> Iterator[None]:
    """Hydra keeps one instance; while a job runs under it, a second composition needs its own."""
    instance = GlobalHydra.instance()
    held, instance.hydra = instance.hydra, None
    try:
        yield
    finally:
        instance.hydra = held


def _compose(config_name: str, overrides: list[str]) -> DictConfig:
    try:
        return compose(config_name, overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{' '.join(overrides)}: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something."""
    return next(line.strip() for line in str(error).splitlines() if line.strip())


def _values(override: Override) -> Iterable[Any]:
    """The value, or each value of a sweep."""
    value = override.value()
    if isinstance(value, ChoiceSweep):
        return [v for v in value.list if not isinstance(v, Sweep)]
    if override.is_discrete_sweep():
        return list(override.sweep_iterator())
    return [] if override.is_sweep_override() else [value]  # an interval or a glob is its sweeper's affair


def _plain(value: Any) -> Any:
    return value.text if isinstance(value, QuotedString) else value


def _single(override: Override) -> str:
    """The override as text, with the first value where it sweeps."""
    if not override.is_sweep_override():
        return str(override.input_line)
    key = str(override.input_line).split("=", 1)[0]
    if not override.is_discrete_sweep():
        value = override.value()
        return f"{key}={value.start}" if isinstance(value, IntervalSweep) else str(override.input_line)
    return f"{key}={next(iter(override.sweep_string_iterator()))}"


# groups -----------------------------------------------------------------------------------------------------------------


def _is_group(key: str) -> bool:
    return (CONF / key.split("@")[0]).is_dir() or key.startswith("hydra/")  # of Hydra's own, Hydra knows the options


def group_options(group: str) -> list[str]:
    """The options of a group: the files of its folder."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _check_group(override: Override) -> None:
    if override.is_delete():
        if override.key_or_group not in ("experiment", "recipe", "sweep", "debug", "callbacks", "logger", "clip"):
            raise ConfigError(f"{override.input_line}: a run needs every group; write {override.key_or_group}=OPTION")
        return
    group = override.key_or_group.split("@")[0]
    options = [o for o in group_options(group) if (group, o) not in (("trainer", "base"), ("model", "unet"))]
    for value in _values(override):
        for name in value if isinstance(value, list) else [value]:
            text = str(_plain(name))
            if name is not None and text not in group_options(group):
                raise ConfigError(
                    f"unknown option {group}={text}{_closest(text, options)}: write one of {', '.join(options)}"
                )


def _check_command(override: Override, config_name: str) -> None:
    """Raise ValueError for a group, or a sweep over one, that this command has not, naming those that have it."""
    group = override.key_or_group.split("@")[0]
    groups = {group}
    if group == "sweep" and override.value() is not None:
        groups |= {name for name in _defaults(CONF / group / f"{_plain(override.value())}.yaml") if "hydra" not in name}
    missing = [name for name in sorted(groups) if not _lists(CONF / f"{config_name}.yaml", name)]
    if override.is_add() or not missing:
        return
    users = [path.stem for path in sorted(CONF.glob("*.yaml")) if all(_lists(path, name) for name in groups)]
    others = " or ".join(f"python src/{name}.py {override.input_line}" for name in users)
    raise ConfigError(f"{override.input_line} means nothing to {config_name}.py: leave it out, or write {others}")


def _lists(path: Path, group: str) -> bool:
    """Whether a group stands in the defaults list of a file."""
    return group in _defaults(path)


def _defaults(path: Path) -> list[str]:
    """The groups in the defaults list of a file."""
    entries = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(entries, dict)
    names = [str(name) for entry in entries.get("defaults", []) if isinstance(entry, dict) for name in entry]
    return [name.removeprefix("optional ").removeprefix("override ").removeprefix("/") for name in names]


# values -----------------------------------------------------------------------------------------------------------------


def _check_value(override: Override, base: DictConfig) -> None:
    key = override.key_or_group
    known = _keys(base)
    if (override.is_add() or override.is_force_add()) and key not in known:
        return
    if key not in known:
        if "." not in key and key not in ("seed", "ckpt"):
            known = {k for k in known if "." not in k} | {
                p.name for p in CONF.iterdir() if p.is_dir() and p.name != "hydra"
            }
        raise ConfigError(f"unknown key {key}{_closest(key, sorted(known))}; --help lists all keys")
    if override.is_delete():
        return
    default = _raw(base, key)
    for value in _values(override):
        _check_type(key, default, value)


def _keys(config: DictConfig, prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for name in config:
        key = f"{prefix}{name!s}"
        keys.add(key)
        node = config._get_node(name)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
            keys |= _keys(node, key + ".")
    return keys


def _raw(config: DictConfig, key: str) -> Any:
    """The value of a dotted key without resolving it; interpolations are text."""
    value: Any = OmegaConf.to_container(config, resolve=False)
    for part in key.split("."):
        value = value[part]
    return value


def _check_type(key: str, default: Any, value: Any) -> None:
    quoted = isinstance(value, QuotedString) and value.quote in (Quote.single, Quote.double)
    plain = _plain(value)
    if isinstance(plain, str) and plain.startswith("${"):
        return  # an interpolation: its target has a type of its own
    if key in MIXED:
        allowed: tuple[type, ...] = MIXED[key]
    elif key in NULLABLE:
        kinds = NULLABLE[key]
        allowed = (*kinds, type(None)) if isinstance(kinds, tuple) else (kinds, type(None))
    elif default is None or isinstance(default, Enum) or (isinstance(default, str) and default.startswith("${")):
        return  # nothing is known here; the class that gets it refuses what it cannot use
    elif isinstance(default, dict):
        allowed = (dict, type(None))  # null switches a named part off
    else:
        allowed = (type(default),)
    if float in allowed and bool not in allowed:
        allowed = (*allowed, int)
    if str in allowed and not quoted:
        allowed = (*allowed, int, float)  # a name such as 2026 is text all the same
    wrong = isinstance(plain, bool) and bool not in allowed
    if wrong or not isinstance(plain, allowed):
        shown = default if default is not None else "null"
        text = plain.decode() if isinstance(plain, bytes) else str(plain)
        raise ConfigError(f"{key}={text} has the wrong type: {_words(allowed)} is needed, e.g. {key}={_example(shown)}")


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}


def _words(allowed: tuple[type, ...]) -> str:
    kinds = [k for k in dict.fromkeys(allowed) if not (k is int and float in allowed)]
    if str in kinds:
        kinds = [k for k in kinds if k not in (int, float)]
    return " or ".join(_NAMES[k] for k in kinds)


def _example(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, (list, ListConfig)):
        return "[" + ",".join(str(v) for v in default) + "]"
    if isinstance(default, dict):
        return "null"
    return str(default)


def _closest(word: str, words: Sequence[str]) -> str:
    match = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    if not match:
        tails = [w for w in words if w.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
        match = tails[:1]
    return f" (did you mean {match[0]}?)" if match else ""
