"""Hydra's composition with errors of one line: what was found, what is allowed, what to write."""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffusion_lab import renames
from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation import CONF

LISTS = ("logger", "metrics")  # groups of which several options are chosen; each file states its package
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException)


def task_overrides(hydra: Any) -> list[str]:
    """The overrides of a job, as they were written; `hydra` is the node of that name."""
    lines: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    return [str(line) for line in lines]


def parse(overrides: Sequence[str]) -> list[Override]:
    """Hydra's overrides. ConfigError: one that cannot be read."""
    parsed = []
    for text in overrides:
        try:
            parsed += OverridesParser.create().parse_overrides([text])
        except HydraException as error:
            raise ConfigError(f"cannot read the override {text!r} ({first_line(error)}): write KEY=VALUE") from None
    return parsed


def added(text: str) -> str:
    """`+KEY=VALUE` as `++KEY=VALUE`, which Hydra also takes where KEY exists: whether optimizer=custom has an lr depends on the
    recipe of the data set. Choices of a group, and what is no override, stay."""
    key = text.split("=", 1)[0]
    plain = text.startswith("+") and not text.startswith("++") and "=" in text and not is_group(key.lstrip("+"))
    return f"+{text}" if plain else text


def accepted(overrides: Sequence[str]) -> list[str]:
    """The overrides as Hydra is given them. ConfigError: one that cannot be read, or that `refuse_…` below names."""
    parsed = parse(overrides)
    refuse_renamed(parsed)
    refuse_null_list(parsed)
    return [added(text) for text in overrides]


def refuse_renamed(overrides: Sequence[Override]) -> None:
    """Raise ConfigError for the old name of a key, an option or a value, with the new one."""
    for override in overrides:
        key = override.key_or_group.split("@")[0]
        value = "" if override.is_delete() else str(override.input_line).split("=", 1)[-1]
        if new := renames.renamed(key, value):
            raise ConfigError(f"{override.input_line} was renamed: write {new}")


def refuse_null_list(overrides: Sequence[Override]) -> None:
    """Raise ConfigError for metrics=null or logger=null, of which Hydra makes a defect: their choice is a list."""
    for override in overrides:
        key = override.key_or_group
        if key in LISTS and not override.is_delete() and override.value() is None:
            raise ConfigError(f"{key}=null is no list of options: write {key}=[] for none, or {key}=[OPTION,…]")


@contextmanager
def hydra_of_its_own(config_dir: str | None = None) -> Iterator[list[str]]:
    """Hydra for `compose` outside a running command; yields the overrides that add `config_dir` to its search path."""
    instance = GlobalHydra.instance()
    held, instance.hydra = instance.hydra, None
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            yield [f"hydra.searchpath=[file://{Path(config_dir).absolute()}]"] if config_dir else []
    finally:
        instance.hydra = held


def composed(name: str, overrides: Sequence[str] = (), config_dir: str | None = None) -> DictConfig:
    """The configuration of a command line, with Hydra's own node, unresolved; under a running command with its search path.

    Raises:
        ConfigError: one line that names what is wrong and what to write instead.
    """
    overrides = accepted(overrides)
    try:
        if GlobalHydra.instance().is_initialized() and config_dir is None:
            return compose(name, overrides, return_hydra_config=True)
        with hydra_of_its_own(config_dir) as search:
            return compose(name, [*search, *overrides], return_hydra_config=True)
    except COMPOSITION_ERRORS as error:
        raise ConfigError(explain(error, name, overrides, config_dir)) from None


def explain(error: Exception, name: str, overrides: Sequence[str], config_dir: str | None = None) -> str:
    """One line for an error of Hydra's composition of the command `name`."""
    line = first_line(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and "/" in error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return unknown_option(group, option, options(group, config_dir))
    if isinstance(error, OverrideParseException):
        return f"cannot read the override {error.override!r} ({line}): write KEY=VALUE"
    parsed = parse(overrides)
    several = next((o for o in parsed if o.is_sweep_override()), None)
    if several is not None and ("--multirun" in str(error) or "Ambiguous" in line):
        return f"{several.input_line} names several values: add --multirun for a run of each, or write [...] for a list"
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
    return f"{line}{reason}; --help lists what can be written"


def unknown_option(group: str, option: str, options: Sequence[str]) -> str:
    known = [o for o in options if "/" not in o]
    if new := renames.FOREIGN_OPTIONS.get((group, option.lower())):
        return f"unknown option {group}={option}: write {group}={new}"
    return f"unknown option {group}={option}{closest(option, known)}: write one of {', '.join(known)}"


def unknown_key(override: Override, name: str, config_dir: str | None) -> str:
    key = override.key_or_group.split("@")[0]
    if (CONF / key).is_dir():
        if f"{key}s" in OmegaConf.load(CONF / f"{name}.yaml"):  # evaluate.py's list of samplers
            return f"{override.input_line} is not an option of {name}.py: write {key}s=[{override.value()}]"
        return _not_of_this_command(override, name, {key})
    if new := renames.FOREIGN_KEYS.get(key.rsplit(".", 1)[-1]):
        return f"unknown key {key}: write {new}"
    with hydra_of_its_own(config_dir) as search:
        try:
            base = compose(name, [*search, *group_choices(search)])
            known = sorted(keys(base))
        except COMPOSITION_ERRORS:
            known = []
    if "." not in key:
        known = [k for k in known if "." not in k] + [p.name for p in CONF.iterdir() if p.is_dir() and p.name != "base"]
    return f"unknown key {key}{closest(key, known)}; --help lists all keys"


def _not_of_this_command(override: Override, name: str, groups: set[str]) -> str:
    users = [path.stem for path in sorted(CONF.glob("*.yaml")) if groups <= _groups_of(path)]
    others = " or ".join(f"python src/{user}.py {override.input_line}" for user in users)
    return f"{override.input_line} is not an option of {name}.py: leave it out, or write {others}"


def group_choices(overrides: Sequence[str]) -> list[str]:
    """The overrides that choose options, each with its first value; those that set values are left out."""
    return [single(o) for o in parse(overrides) if is_group(o.key_or_group)]


def is_group(key: str) -> bool:
    """Whether an override's key chooses an option: a group of conf/ or one of Hydra's."""
    return (CONF / key.split("@")[0]).is_dir() or key.startswith("hydra/")


def single(override: Override) -> str:
    """An override as text, with the first value of a sweep."""
    if not override.is_discrete_sweep():
        return str(override.input_line)
    value = override.value()
    if isinstance(value, Glob):
        matching = value.filter(options(override.key_or_group.split("@")[0]))
        return f"{override.key_or_group}={matching[0]}" if matching else str(override.input_line)
    return f"{str(override.input_line).split('=', 1)[0]}={next(iter(override.sweep_string_iterator()))}"


def options(group: str, config_dir: str | None = None) -> list[str]:
    """The options of a group, on Hydra's whole search path."""
    from hydra.core.object_type import ObjectType

    if GlobalHydra.instance().is_initialized():
        return sorted(GlobalHydra.instance().config_loader().get_group_options(group, ObjectType.CONFIG))
    with hydra_of_its_own():
        found = set(GlobalHydra.instance().config_loader().get_group_options(group, ObjectType.CONFIG))
    return sorted(found | {path.stem for path in (Path(config_dir) / group).glob("*.yaml")} if config_dir else found)


def _groups_of(path: Path) -> set[str]:
    """The groups in the defaults list of a file."""
    entries: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    names = [str(name) for entry in entries.get("defaults", []) if isinstance(entry, dict) for name in entry]
    return {name.removeprefix("optional ").removeprefix("override ").removeprefix("/") for name in names}


def keys(config: DictConfig, prefix: str = "") -> set[str]:
    """Every dotted key of a configuration."""
    found: set[str] = set()
    for name in config:
        key, node = f"{prefix}{name!s}", config._get_node(name)
        found.add(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
            found |= keys(node, key + ".")
    return found


def closest(word: str, words: Sequence[str]) -> str:
    """' (did you mean …?)' with the word that is most like it, or one with the same last part; else nothing."""
    match = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    match = match or [w for w in words if w.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]][:1]
    return f" (did you mean {match[0]}?)" if match else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
