"""Checks of the composed configuration, as a Hydra callback: before torch is imported and before a file is written.

Hydra turns exceptions of its callbacks into warnings, so a refusal ends the process by SystemExit.
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
from diffusion_lab.cli import sweeps
from diffusion_lab.cli.schema import COMMANDS, OUT_FILE, Node
from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation import coerce
from diffusion_lab.io import refuse_filled
from diffusion_lab.processes import one_line


class Checks(Callback):
    """Refuse unknown keys, values of another type than their keys, and an output folder that is not empty."""

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
    """End the process on an error: 2 for a ConfigError, 1 with a traceback for a defect."""
    try:
        with one_line():
            yield
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


def check_configuration(config: DictConfig, name: str) -> None:
    """Check root keys and their types, every value of a sweep, numeric keys, and that all interpolations resolve.

    Raises:
        ConfigError: an unknown or missing root key, a value of another type, an unknown option, an interpolation without a value.
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
        OmegaConf.to_container(OmegaConf.create({**plain, "run_dir": "."}), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration cannot be resolved: {composition.first_line(error)}") from None


def _without_hydra(config: DictConfig) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(config, resolve=False)
    return {str(key): value for key, value in values.items() if key != "hydra"}


def _check_root(values: Mapping[str, Any], schema: type, prefix: str) -> None:
    """Compare keys and types with a dataclass of `cli.schema`, nested ones included; `prefix` is the dotted key of `values`."""
    fields = {field.name: field for field in dataclasses.fields(schema)}
    types = typing.get_type_hints(schema)
    for key, value in values.items():
        if key not in fields:
            hint = composition.closest(prefix + key, [prefix + name for name in fields])
            raise ConfigError(f"nothing reads the key {prefix}{key}{hint}: leave it out; --help lists all keys")
        if dataclasses.is_dataclass(types[key]) and isinstance(value, dict):
            _check_root(value, types[key], f"{prefix}{key}.")
        elif not (isinstance(value, str) and "${" in value):
            coerce(value, types[key], prefix + key)
    for key, field in fields.items():
        if key not in values and field.default is dataclasses.MISSING:
            if types[key] == Node:
                raise ConfigError(f"a {schema.__name__.lower()} run needs every group: write {key}=OPTION")
            raise ConfigError(f"the key {prefix}{key} is missing: write {prefix}{key}=VALUE")


def _check_values(overrides: Sequence[Override], config: DictConfig, name: str) -> None:
    """Check the values of overrides, each value of a sweep included, against the types of their keys.

    `cli.schema` has the types of root keys. A key whose default is a number or a boolean takes no mapping, and no text but
    `auto`.
    """
    types = typing.get_type_hints(COMMANDS[name])
    defaults: DictConfig | None = None
    for override in overrides:
        key = override.key_or_group.split("@")[0]
        if override.is_delete():
            continue
        if composition.is_group(override.key_or_group):
            _check_choices(override, key)
            continue
        if override.is_interval_sweep() and "Basic" in config.hydra.sweeper._target_:
            raise ConfigError(
                f"{override.input_line} is an interval: name its values, {key}=A,B or {key}=range(1,4), or write "
                "hydra/sweeper=optuna"
            )
        added = override.is_add() or override.is_force_add()
        if override.is_sweep_override() and not added and key not in composition.keys(config):
            raise ConfigError(composition.unknown_key(override, name, None))
        for value in _values(override):
            text = isinstance(value, str)
            if text and "${" in value:  # an interpolation, whose value has been checked under its own key
                continue
            if key in types:
                coerce(value, types[key], key)
            elif isinstance(value, dict) or (text and value != "auto"):
                if defaults is None:
                    choices = composition.group_choices([str(o.input_line) for o in overrides])
                    defaults = composition.composed(name, choices)
                _check_number(key, value, OmegaConf.select(defaults, key, throw_on_missing=False))


def _check_number(key: str, value: Any, default: Any) -> None:
    """Raise ConfigError where `default` is a number or a boolean, since `value` is neither."""
    if isinstance(default, bool | int | float):
        words = {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
        raise ConfigError(f"{key}={value} has the wrong type: {words} is needed, e.g. {key}={str(default).lower()}")


def _check_choices(override: Override, group: str) -> None:
    """Raise ConfigError for an unknown option. Hydra looks up neither those of a sweep nor that of model=, which is optional."""
    if not group.startswith("hydra/"):
        known = composition.options(group)
        for value in _values(override):
            for option in value if isinstance(value, list) else [value]:
                if option is not None and str(option) not in known:
                    raise ConfigError(composition.unknown_option(group, str(option), known))


def _values(override: Override) -> list[Any]:
    """Return the value of an override, or each value of a sweep; Hydra's sweeper expands globs and intervals."""
    value = override.value()
    values: list[Any] = [] if override.is_sweep_override() else [value]
    if isinstance(value, ChoiceSweep):
        values = [member for member in value.list if not isinstance(member, Sweep)]
    elif override.is_discrete_sweep() and not isinstance(value, IntervalSweep | Glob):
        values = list(override.sweep_iterator())
    return [member.text if isinstance(member, QuotedString) else member for member in values]


def _output_folder(config: DictConfig, name: str, key: str, node: DictConfig) -> Path:
    """Return the folder that Hydra will write into, `node.dir`. Raises ConfigError: it, or the folder of out=, is not empty."""
    overwrite = bool(config.get("overwrite"))
    try:
        folder = Path(str(node.dir))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key} cannot be resolved: {composition.first_line(error)}") from None
    refuse_filled(folder, key, overwrite)
    if config.get("out") and name not in OUT_FILE:
        refuse_filled(Path(str(config.out)), "out", overwrite)
    return folder
