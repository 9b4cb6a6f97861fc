"""Check the composed configuration in a Hydra callback, before torch is imported or a file is written.

Hydra converts exceptions in callbacks to warnings. Therefore an error ends the process with SystemExit.
"""

import dataclasses
import traceback
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import (
    ChoiceSweep,
    Glob,
    IntervalSweep,
    Override,
    OverrideType,
    QuotedString,
    Sweep,
)
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffusion_lab import composition, processes
from diffusion_lab.cli import folders, sweeps
from diffusion_lab.cli.schema import COMMANDS, OUT_FILE, READ, Node
from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation import coerce
from diffusion_lab.io import os_errors, refuse_filled, require_writable
from diffusion_lab.processes import one_line


class Checks(Callback):
    """Reject unknown keys, values of the wrong type, and an output folder that is not empty."""

    def on_run_start(self, config: DictConfig, config_name: str | None = None, **kwargs: Any) -> None:
        name = str(config_name)
        with _exit_on_error():
            check_configuration(config, name)
            _output_folder(config, name, "hydra.run.dir", config.hydra.run)

    def on_multirun_start(self, config: DictConfig, config_name: str | None = None, **kwargs: Any) -> None:
        name = str(config_name)
        with _exit_on_error():
            check_configuration(config, name)
            if name == "train":
                processes.check_sweep(OmegaConf.to_container(config.trainer))  # type: ignore[arg-type]
            sweeps.begin(_output_folder(config, name, "hydra.sweep.dir", config.hydra.sweep))


@contextmanager
def _exit_on_error() -> Iterator[None]:
    """Exit with code 2 on a ConfigError, and with code 1 and a traceback on any other exception."""
    try:
        with one_line(), os_errors():
            yield
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


def check_configuration(config: DictConfig, name: str) -> None:
    """Check the root keys and their types, every value of a sweep, numeric keys, and interpolations.

    Raises:
        ConfigError: if a root key is unknown or missing, a value has the wrong type, an option is unknown, or an interpolation
            cannot be resolved.
    """
    plain = _without_hydra(config)
    overrides = composition.parse(composition.task_overrides(config.hydra))
    named = {o.get_key_element() for o in overrides}
    swept = (config.hydra.sweeper.get("params") or {}).items()  # what conf/sweep/NAME.yaml varies
    overrides += composition.parse([f"{key}={value}" for key, value in swept if key not in named])
    _check_values(overrides, config, name)
    _check_root(plain, COMMANDS[name], "")
    if any(o.is_discrete_sweep() and o.type in (OverrideType.ADD, OverrideType.FORCE_ADD) for o in overrides):
        first = composition.composed(name, [composition.single(o) for o in overrides if not o.is_interval_sweep()])
        _check_root(_without_hydra(first), COMMANDS[name], "")
    try:
        resolved: Any = OmegaConf.to_container(OmegaConf.create({**plain, "run_dir": "."}), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration cannot be resolved: {composition.first_line(error)}") from None
    _check_root(resolved, COMMANDS[name], "")
    for group, keys in READ.items() if name == "train" else ():
        for key in keys:
            if key not in resolved[group]:
                raise ConfigError(f"the key {group}.{key} is missing: write {group}.{key}=VALUE")


def _without_hydra(config: DictConfig) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(config, resolve=False)
    return {str(key): value for key, value in values.items() if key != "hydra"}


def _check_root(values: Mapping[str, Any], schema: type, prefix: str) -> None:
    """Compare keys and types with a dataclass of `cli.schema` and its nested dataclasses.

    Args:
        values: the mapping to check.
        schema: the dataclass.
        prefix: the dotted key of `values`, ending in a dot; empty for the root.
    """
    fields = {field.name: field for field in dataclasses.fields(schema)}
    types = typing.get_type_hints(schema, include_extras=True)
    for key, value in values.items():
        if key not in fields:
            hint = composition.closest(prefix + key, [prefix + name for name in fields])
            raise ConfigError(f"unknown key {prefix}{key}{hint}: remove it; --help lists all keys")
        if dataclasses.is_dataclass(types[key]) and isinstance(value, dict):
            _check_root(value, types[key], f"{prefix}{key}.")
        elif not (isinstance(value, str) and "${" in value):
            coerce(value, types[key], prefix + key)
    for key, field in fields.items():
        if key not in values and field.default is dataclasses.MISSING:
            if types[key] == Node:
                raise ConfigError(f"no option of the group {key} is selected: write {key}=OPTION")
            raise ConfigError(f"the key {prefix}{key} is missing: write {prefix}{key}=VALUE")


def _check_values(overrides: Sequence[Override], config: DictConfig, name: str) -> None:
    """Check the values of overrides, including each value of a sweep, against the types of their keys.

    The types of root keys are defined in `cli.schema`. A key whose default is a number or a boolean accepts neither a mapping
    nor text other than `auto`.
    """
    types = typing.get_type_hints(COMMANDS[name], include_extras=True)
    defaults: DictConfig | None = None
    for override in overrides:
        key = override.key_or_group.split("@")[0]
        if override.is_delete():
            continue
        if key == "run_dir":
            raise ConfigError(f"{override.input_line} is set by Hydra: write hydra.run.dir=FOLDER")
        if composition.is_group(override.key_or_group):
            _check_choices(override, key)
            continue
        if override.is_interval_sweep() and "Basic" in config.hydra.sweeper._target_:
            raise ConfigError(
                f"{override.input_line} is an interval, which Hydra's basic sweeper does not support: write {key}=A,B, "
                f"{key}=range(1,4), or hydra/sweeper=optuna"
            )
        added = override.is_add() or override.is_force_add()
        if override.is_sweep_override() and not added and key not in composition.keys(config):
            raise ConfigError(composition.unknown_key(override, name, None))
        values = _values(override)
        if not values and override.is_discrete_sweep() and not isinstance(override.value(), Glob):
            raise ConfigError(f"{override.input_line} has no values: write {key}=A,B or {key}=range(1,4)")
        for value in values:
            text = isinstance(value, str)
            if text and "${" in value:  # an interpolation: the value is checked with the key to which it refers
                continue
            if key in types:
                coerce(value, types[key], key)
            elif isinstance(value, dict) or (text and value != "auto"):
                if defaults is None:
                    choices = composition.group_choices([str(o.input_line) for o in overrides])
                    defaults = composition.composed(name, choices)
                _check_number(key, value, OmegaConf.select(defaults, key, throw_on_missing=False))


def _check_number(key: str, value: Any, default: Any) -> None:
    """Raise ConfigError if `default` is a number or a boolean. `value` is a mapping or text."""
    if isinstance(default, bool | int | float):
        words = {bool: "true or false", int: "an integer", float: "a number"}[type(default)]
        raise ConfigError(f"{key}={value} has the wrong type: write {words}, e.g. {key}={str(default).lower()}")


def _check_choices(override: Override, group: str) -> None:
    """Raise ConfigError for an unknown option. Hydra does not check the options of a sweep, nor those of the optional model=."""
    if not group.startswith("hydra/"):
        known = composition.options(group)
        for value in _values(override):
            for option in value if isinstance(value, list) else [value]:
                if option is not None and str(option) not in known:
                    raise ConfigError(composition.unknown_option(group, str(option), known))


def _values(override: Override) -> list[Any]:
    """Return the value of an override, or the values of a sweep except globs and intervals, which Hydra's sweeper expands."""
    value = override.value()
    values: list[Any] = [] if override.is_sweep_override() else [value]
    if isinstance(value, ChoiceSweep):
        values = [member for member in value.list if not isinstance(member, Sweep)]
    elif override.is_discrete_sweep() and not isinstance(value, IntervalSweep | Glob):
        values = list(override.sweep_iterator())
    return [member.text if isinstance(member, QuotedString) else member for member in values]


def _output_folder(config: DictConfig, name: str, key: str, node: DictConfig) -> Path:
    """Return `node.dir`, the folder to which Hydra writes.

    Raises:
        ConfigError: if this folder or the one of out= is not empty and overwrite is false.
    """
    overwrite = bool(config.get("overwrite"))
    try:
        if node.dir is None:
            raise ConfigError(f"{key}=null names no folder: write {key}=FOLDER, or leave it out")
        folder = Path(str(node.dir))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key} cannot be resolved: {composition.first_line(error)}") from None
    refuse_filled(folder, key, overwrite)
    if config.get("out") and name not in OUT_FILE:
        refuse_filled(Path(str(config.out)), "out", overwrite)
    elif config.get("out"):
        require_writable(Path(str(config.out)).parent, "out")
    folders.begin(folder)
    return folder
