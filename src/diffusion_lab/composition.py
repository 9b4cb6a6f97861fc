"""Compose a configuration by Hydra, with errors of one line: what was found, what is allowed, what to write."""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, QuotedString
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffusion_lab import renames
from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation import CONF

LISTS = ("logger", "metrics")  # groups of which several options can be selected; each file declares its package
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError)  # ValueError for a key below a list


def task_overrides(hydra: Any) -> list[str]:
    """Return the overrides of a job as they were written. `hydra` is the node `hydra` of the configuration."""
    lines: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    return [str(line) for line in lines]


def parse(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides. Raises ConfigError if one cannot be parsed."""
    parsed = []
    for text in overrides:
        try:
            parsed += OverridesParser.create().parse_overrides([text])
        except HydraException as error:
            raise ConfigError(f"cannot read the override {text!r} ({first_line(error)}): write KEY=VALUE") from None
    return parsed


def checked_overrides(overrides: Sequence[str]) -> list[str]:
    """Check overrides and convert them to the form that is passed to Hydra.

    `+KEY=VALUE` is replaced by `++KEY=VALUE`, which Hydra also accepts if KEY exists, since it depends on the recipe of the data
    set whether, e.g., optimizer=custom has an lr. Overrides that select an option, and `~KEY`, are not changed.

    Raises:
        ConfigError: if an override cannot be parsed, a key or an option was renamed, or a list of options is null.
    """
    lines = []
    for text, override in zip(overrides, parse(overrides), strict=True):
        key, value = override.key_or_group, "" if override.is_delete() else text.split("=", 1)[-1]
        if new := renames.renamed(key.split("@")[0], value):
            raise ConfigError(f"{text} was renamed: write {new}")
        if key in LISTS and not override.is_delete() and override.value() is None:  # Hydra raises a TypeError for it
            raise ConfigError(f"{key}=null is not a list of options: write {key}=[] for none, or {key}=[OPTION,…]")
        if not override.is_delete() and is_group(key):
            _check_names(override)
        lines.append(f"+{text}" if override.is_add() and not is_group(key) else text)
    return lines


@contextmanager
def standalone_hydra(config_dir: str | None = None) -> Iterator[list[str]]:
    """Initialize Hydra for `compose` outside a running command. Yield the overrides that add `config_dir` to the search path."""
    instance = GlobalHydra.instance()
    running, instance.hydra = instance.hydra, None
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            yield [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"] if config_dir else []
    finally:
        instance.hydra = running


def composed(name: str, overrides: Sequence[str] = (), config_dir: str | None = None) -> DictConfig:
    """Compose the unresolved configuration of a command line, including the node `hydra`.

    Within a running command, its search path is used.

    Args:
        name: the command.
        overrides: the overrides.
        config_dir: an additional folder of options (--config-dir).

    Raises:
        ConfigError: if a group, option or key is unknown, or an override cannot be parsed.
    """
    overrides = checked_overrides(overrides)
    try:
        if GlobalHydra.instance().is_initialized() and config_dir is None:
            return compose(name, overrides, return_hydra_config=True)
        with standalone_hydra(config_dir) as search:
            return compose(name, [*search, *overrides], return_hydra_config=True)
    except COMPOSITION_ERRORS as error:
        raise ConfigError(explain(error, name, overrides, config_dir)) from None


def _check_names(override: Override) -> None:
    """Raise ConfigError for a choice that is not a name: null, a number or a mapping, for which Hydra raises a ValueError."""
    group, value = override.key_or_group.split("@")[0], override.value()
    if isinstance(value, Glob):  # of options that exist
        return
    chosen = list(override.sweep_iterator()) if override.is_discrete_sweep() else [value]
    names = [name for choice in chosen for name in (choice if isinstance(choice, list) else [choice])]
    if override.is_interval_sweep() or any(not isinstance(name, str | QuotedString) for name in names):
        known = [option for option in options(group) if "/" not in option]
        raise ConfigError(f"{override.input_line} names no option: leave it out, or write one of {', '.join(known)}")


def explain(error: Exception, name: str, overrides: Sequence[str], config_dir: str | None = None) -> str:
    """Return a one-line message for an error that Hydra raised while composing the configuration of the command `name`."""
    line = first_line(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and "/" in error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return unknown_option(group, option, options(group, config_dir))
    if isinstance(error, OverrideParseException):
        return f"cannot read the override {error.override!r} ({line}): write KEY=VALUE"
    parsed = parse(overrides)
    if not isinstance(error, HydraException | OmegaConfBaseException):
        below = next((o for o in parsed if repr(o.key_or_group.rsplit(".", 1)[-1]) in line), None)
        return f"{below.key_or_group if below else line}: there is no such key in a list: write the whole list, KEY=[…]"
    several = next((o for o in parsed if o.is_sweep_override()), None)
    if several is not None and ("--multirun" in str(error) or "Ambiguous" in line):
        return f"{several.input_line} has several values: add --multirun to run each of them, or write [...] for a list"
    nested = re.search(r"In '(\S+)': Could not override '([\w/]+)'", line)
    if nested and is_group(nested.group(2)):
        group = nested.group(1).partition("/")[0]
        chosen = next((o for o in parsed if o.key_or_group == group), None)
        if chosen is not None:
            return _not_of_this_command(chosen, name, {group, nested.group(2)})
    quoted = next((o for o in parsed if f"'{o.key_or_group}'" in line or str(o.input_line) in line), None)
    if quoted is not None and ("Could not override" in line or "Could not delete" in line or "Key" in line):
        return unknown_key(quoted, name, config_dir)
    cause = error.__cause__
    reason = f" ({first_line(cause)})" if isinstance(cause, Exception) else ""
    return f"{line}{reason}; --help lists all options"


def unknown_option(group: str, option: str, options: Sequence[str]) -> str:
    """Return the error message for an option that does not exist in a group."""
    known = [o for o in options if "/" not in o]
    if new := renames.FOREIGN_OPTIONS.get((group, option.lower())):
        return f"unknown option {group}={option}: write {group}={new}"
    return f"unknown option {group}={option}{closest(option, known)}: write one of {', '.join(known)}"


def unknown_key(override: Override, name: str, config_dir: str | None) -> str:
    """Return the error message for a key that does not exist in the configuration of the command `name`."""
    key = override.key_or_group.split("@")[0]
    if (CONF / key).is_dir():
        if f"{key}s" in OmegaConf.load(CONF / f"{name}.yaml"):  # evaluate.py's list of samplers
            return f"{override.input_line} is not an option of {name}.py: write {key}s=[{override.value()}]"
        return _not_of_this_command(override, name, {key})
    if new := renames.FOREIGN_KEYS.get(key.rsplit(".", 1)[-1]):
        return f"unknown key {key}: write {new}"
    with standalone_hydra(config_dir) as search:
        try:
            base = compose(name, [*search, *group_choices(search)])
            known = sorted(keys(base))
        except COMPOSITION_ERRORS:
            known = []
    if "." not in key:
        groups = [path.name for path in CONF.iterdir() if path.is_dir() and path.name != "base"]
        known = [k for k in known if "." not in k] + groups
    if key in known:
        return f"unknown key {key}, which another override of this command line removes: write one of the two"
    return f"unknown key {key}{closest(key, known)}; --help lists all keys"


def _not_of_this_command(override: Override, name: str, groups: set[str]) -> str:
    users = [path.stem for path in sorted(CONF.glob("*.yaml")) if groups <= groups_of(path)]
    others = " or ".join(f"python src/{user}.py {override.input_line}" for user in users)
    return f"{override.input_line} is not an option of {name}.py: remove it, or write {others}"


def group_choices(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that select options, each with its first value; overrides that set values are dropped."""
    return [single(o) for o in parse(overrides) if is_group(o.key_or_group)]


def is_group(key: str) -> bool:
    """Whether a key selects an option: a group of conf/ or of Hydra."""
    return (CONF / key.split("@")[0]).is_dir() or key.startswith("hydra/")


def single(override: Override) -> str:
    """Return an override as text; a sweep is replaced by its first value."""
    if not override.is_discrete_sweep():
        return str(override.input_line)
    value = override.value()
    if isinstance(value, Glob):
        matching = value.filter(options(override.key_or_group.split("@")[0]))
        return f"{override.key_or_group}={matching[0]}" if matching else str(override.input_line)
    return f"{str(override.input_line).split('=', 1)[0]}={next(iter(override.sweep_string_iterator()))}"


def options(group: str, config_dir: str | None = None) -> list[str]:
    """Return the options of a group in all folders of Hydra's search path."""
    from hydra.core.object_type import ObjectType

    if GlobalHydra.instance().is_initialized():
        return sorted(GlobalHydra.instance().config_loader().get_group_options(group, ObjectType.CONFIG))
    with standalone_hydra():
        names = set(GlobalHydra.instance().config_loader().get_group_options(group, ObjectType.CONFIG))
    return sorted(names | {path.stem for path in (Path(config_dir) / group).glob("*.yaml")} if config_dir else names)


def groups_of(path: Path) -> set[str]:
    """Return the groups in the defaults list of a file of conf/."""
    entries: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    names = [str(name) for entry in entries.get("defaults", []) if isinstance(entry, dict) for name in entry]
    return {name.removeprefix("optional ").removeprefix("override ").removeprefix("/") for name in names}


def keys(config: DictConfig, prefix: str = "") -> set[str]:
    """Return all dotted keys of a configuration."""
    dotted: set[str] = set()
    for name in config:
        key, node = f"{prefix}{name!s}", config._get_node(name)
        dotted.add(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
            dotted |= keys(node, key + ".")
    return dotted


def closest(word: str, words: Sequence[str]) -> str:
    """Return " (did you mean …?)" with the most similar word, or one with the same last part; "" if there is none."""
    match = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    match = match or [w for w in words if w.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]][:1]
    return f" (did you mean {match[0]}?)" if match else ""


def first_line(error: BaseException) -> str:
    """Return the first non-empty line of the message of an error, or the name of its class if the message is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
