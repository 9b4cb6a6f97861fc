"""What is checked between Hydra's composition and the first file: a Hydra callback, before anything heavy is imported.

Hydra swallows exceptions of its callbacks, so that a refusal ends by SystemExit.
"""

import dataclasses
import traceback
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    """Refuses a configuration that the command would not read as written, and an output folder that is not empty."""

    def on_run_start(self, config: DictConfig, config_name: str | None = None, **kwargs: Any) -> None:
        name = str(config_name)
        with _ending_the_command():
            check_configuration(config, name)
            _refuse_filled(config, name, "hydra.run.dir", config.hydra.run)

    def on_multirun_start(self, config: DictConfig, config_name: str | None = None, **kwargs: Any) -> None:
        name = str(config_name)
        with _ending_the_command():
            check_configuration(config, name)
            if name == "train":
                processes.check_sweep(OmegaConf.to_container(config.trainer))  # type: ignore[arg-type]
            sweeps.begin(_refuse_filled(config, name, "hydra.sweep.dir", config.hydra.sweep))


@contextmanager
def _ending_the_command() -> Iterator[None]:
    """End the command on an error, which Hydra would turn into a warning in a callback."""
    try:
        with one_line():
            yield
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


def check_configuration(config: DictConfig, name: str) -> None:
    """Check root keys and their types, every value of a sweep, numeric keys, and that all interpolations resolve.

    Raises:
        ConfigError: the first that is wrong.
    """
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    overrides = composition.parse(composition.task_overrides(config.hydra))
    named = {o.get_key_element() for o in overrides}
    swept = (config.hydra.sweeper.get("params") or {}).items()  # what conf/sweep/NAME.yaml varies
    overrides += composition.parse([f"{key}={value}" for key, value in swept if key not in named])
    _check_values(overrides, config, name)
    _check_root(_without_hydra(plain), COMMANDS[name], "")
    if any(o.is_discrete_sweep() and o.type in (OverrideType.ADD, OverrideType.FORCE_ADD) for o in overrides):
        first = composition.composed(name, [composition.single(o) for o in overrides if not o.is_interval_sweep()])
        _check_root(_without_hydra(OmegaConf.to_container(first, resolve=False)), COMMANDS[name], "")  # type: ignore[arg-type]
    try:
        OmegaConf.to_container(OmegaConf.create({**plain, "hydra": None, "run_dir": "."}), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration cannot be resolved: {composition.first_line(error)}") from None


def _without_hydra(values: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(k): v for k, v in values.items() if k != "hydra"}


def _check_root(values: Mapping[str, Any], schema: type, prefix: str) -> None:
    fields = {field.name: field for field in dataclasses.fields(schema)}
    types = typing.get_type_hints(schema)
    for key, value in values.items():
        if key not in fields:
            known = composition.closest(prefix + key, [prefix + name for name in fields])
            raise ConfigError(f"nothing reads the key {prefix}{key}{known}: leave it out; --help lists all keys")
        if dataclasses.is_dataclass(types[key]) and isinstance(value, dict):
            _check_root(value, types[key], f"{prefix}{key}.")
        elif not (isinstance(value, str) and "${" in value):
            coerce(value, types[key], prefix + key)
    for key, field in fields.items():
        if key not in values and field.default is dataclasses.MISSING:
            what = f"a {schema.__name__.lower()} run needs every group: write {key}=OPTION"
            raise ConfigError(
                what if types[key] == Node else f"the key {prefix}{key} is missing: write {prefix}{key}=VALUE"
            )


def _check_values(overrides: Sequence[Override], config: DictConfig, name: str) -> None:
    """A value for a key whose default is a number or a boolean is no mapping, and no text but `auto`; each value of a sweep is
    checked. Of a root key the schema says the type."""
    defaults: DictConfig | None = None
    for override in overrides:
        key = override.key_or_group.split("@")[0]
        if override.is_delete():
            continue
        if composition.is_group(override.key_or_group):
            _check_choices(override, key)
            continue
        _refuse_interval(override, config)
        if (
            override.is_sweep_override()
            and not (override.is_add() or override.is_force_add())
            and key not in composition.keys(config)
        ):
            raise ConfigError(composition.unknown_key(override, name, None))
        for value in map(_plain, _values(override)):
            root = next((f for f in dataclasses.fields(COMMANDS[name]) if f.name == key), None)
            if root is not None and not (isinstance(value, str) and "${" in value):
                coerce(value, typing.get_type_hints(COMMANDS[name])[key], key)
            elif root is None and (isinstance(value, dict) or (isinstance(value, str) and value != "auto")):
                if defaults is None:
                    defaults = composition.composed(
                        name, composition.group_choices([str(o.input_line) for o in overrides])
                    )
                _refuse_text(key, value, OmegaConf.select(defaults, key, throw_on_missing=False))


def _refuse_text(key: str, value: Any, default: Any) -> None:
    if isinstance(default, bool | int | float) and not (isinstance(value, str) and "${" in value):
        kind = (
            "true or false"
            if isinstance(default, bool)
            else "a whole number"
            if isinstance(default, int)
            else "a number"
        )
        raise ConfigError(f"{key}={value} has the wrong type: {kind} is needed, e.g. {key}={str(default).lower()}")


def _check_choices(override: Override, group: str) -> None:
    """Each option exists. Hydra looks up neither those of a sweep nor that of model=, which is optional in train.yaml."""
    if not group.startswith("hydra/"):
        known = composition.options(group)
        for option in map(_plain, _values(override)):
            for one in option if isinstance(option, list) else [option]:
                if one is not None and str(one) not in known:
                    raise ConfigError(composition.unknown_option(group, str(one), known))


def _refuse_interval(override: Override, config: DictConfig) -> None:
    if override.is_interval_sweep() and "Basic" in config.hydra.sweeper._target_:
        key = override.key_or_group
        raise ConfigError(
            f"{override.input_line} is an interval: name its values, {key}=A,B or {key}=range(1,4), or write "
            "hydra/sweeper=optuna"
        )


def _values(override: Override) -> Iterable[Any]:
    """The value, or each value of a sweep; a glob or an interval is expanded by Hydra's sweeper."""
    value = override.value()
    if isinstance(value, ChoiceSweep):
        return [v for v in value.list if not isinstance(v, Sweep)]
    if override.is_discrete_sweep() and not isinstance(value, IntervalSweep | Glob):
        return list(override.sweep_iterator())
    return [] if override.is_sweep_override() else [value]


def _plain(value: Any) -> Any:
    return value.text if isinstance(value, QuotedString) else value


def _refuse_filled(config: DictConfig, name: str, key: str, node: DictConfig) -> Path:
    """Return the output folder, refused where it is not empty, before Hydra writes into it."""
    overwrite = bool(config.get("overwrite"))
    try:
        folder = Path(str(node.dir))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key} cannot be resolved: {composition.first_line(error)}") from None
    refuse_filled(folder, key, overwrite)
    if config.get("out") and name not in OUT_FILE:
        refuse_filled(Path(str(config.out)), "out", overwrite)
    return folder
