"""Parse the command line of `python src/NAME.py`, compose the configuration, and run the command.

A ConfigError is printed as one line on stderr, and the exit code is 2.
"""

import importlib
import os
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from diffusion_lab import composition, processes
from diffusion_lab.cli import folders, sweeps
from diffusion_lab.cli.schema import COMMANDS, POSITIONAL
from diffusion_lab.errors import ConfigError
from diffusion_lab.instantiation import CONF, coerce
from diffusion_lab.io import claimed_folder
from diffusion_lab.processes import CONFIG_ENV, Result, one_line


def run(name: str) -> int:
    """Run the command `name`; return the exit code, as `cli.main`."""
    if os.getcwd() not in sys.path:  # for classes of the user, also found on PYTHONPATH
        sys.path.append(os.getcwd())
    with one_line():
        if int(os.environ.get("LOCAL_RANK", "0")) > 0 and CONFIG_ENV in os.environ:  # started by Lightning
            return _command(name, OmegaConf.load(os.environ[CONFIG_ENV])).code
        arguments, written = _arguments(name, sys.argv[1:])
        if arguments.help:
            from diffusion_lab.cli.help import show

            show(name, arguments.overrides, arguments.config_dir)
            return 0
        flags = [word for word in sys.argv[1:] if word not in written]
        arguments.overrides = composition.checked_overrides(arguments.overrides)
        started = processes.launched()
        if started and not (arguments.cfg or arguments.info or arguments.hydra_help):
            folder = [o for o in arguments.overrides if o.startswith("hydra.run.dir=")]
            processes.check_launch(
                started, name, arguments.multirun, bool(folder), "overwrite=true" in arguments.overrides
            )
            if started.rank > 0:
                config = composition.composed(name, arguments.overrides, arguments.config_dir)
                return _command(
                    name, OmegaConf.load(processes.wait_for(Path(str(config.hydra.run.dir)) / "config.yaml"))
                ).code
        return _under_hydra(name, flags, arguments.overrides, arguments.config_dir)


def _arguments(name: str, argv: Sequence[str]) -> tuple[Any, list[str]]:
    """Parse a command line with Hydra's parser. Positional paths are converted to the override POSITIONAL[name]=[…].

    Returns:
        The namespace with flags and overrides, and the overrides as they were written.

    Raises:
        ConfigError: if a flag is unknown, two modes are combined, or the command does not accept a positional argument.
    """
    parser = get_args_parser()

    def refuse(message: str) -> Any:
        for old in ("out", "title"):  # flags of report.py before it was a Hydra command
            if name == "report" and f"--{old}" in message:
                raise ConfigError(f"--{old} was renamed: write {old}=VALUE")
        raise ConfigError(f"{message}; --help lists all options")

    parser.error = refuse  # type: ignore[method-assign]
    arguments = parser.parse_intermixed_args(list(argv))
    modes = [flag for flag in ("run", "multirun", "cfg", "info", "shell_completion") if getattr(arguments, flag)]
    if len(modes) > 1:
        raise ConfigError(f"--{modes[0]} and --{modes[1]} cannot be combined: write one of them")
    written = list(arguments.overrides)
    words = [word for word in written if not _is_override(name, word)]
    if words and name not in POSITIONAL:
        raise ConfigError(f"{words[0]!r} is neither KEY=VALUE nor a flag; --help lists all options")
    if words:
        quoted = ",".join(map(_quoted, words))
        arguments.overrides = [*(word for word in written if word not in words), f"{POSITIONAL[name]}=[{quoted}]"]
    return arguments, written


def _quoted(word: str) -> str:
    """Quote a word for Hydra's grammar, and escape interpolations of OmegaConf."""
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", word).replace("'", "\\'").replace("${", "\\${")
    return f"'{escaped}'"


def _is_override(name: str, word: str) -> bool:
    """Whether a word is an override. If the command accepts paths, the key must be known: a=b/run is a path."""
    key, equals, _ = word.partition("=")
    if word.startswith(("+", "~")) or name not in POSITIONAL:
        return bool(equals) or word.startswith("~")
    root = key.partition(".")[0]
    return bool(equals) and (root in COMMANDS[name].__annotations__ or root == "hydra" or composition.is_group(key))


def _under_hydra(name: str, flags: list[str], overrides: list[str], config_dir: str | None) -> int:
    """Run the command with `hydra.main`, once or for each job of a sweep, and return the exit code."""
    codes: list[int] = []
    entered = False
    first_process = os.getpid()

    def task(config: DictConfig) -> Any:
        nonlocal entered
        entered = True
        job = HydraConfig.get()
        folder = Path(job.runtime.output_dir)
        if job.mode == RunMode.MULTIRUN:
            outcome = sweeps.job(lambda: _command(name, config), folder, composition.task_overrides(job))
            if outcome["code"] > 128 and os.getpid() == first_process:  # a signal ends the sweep, not one job of it
                raise SystemExit(outcome["code"])
            return outcome
        with one_line():
            codes.append(_command(name, config).code)
        return None

    sys.argv = [sys.argv[0], *flags, *overrides]  # Hydra parses sys.argv
    command = hydra.main(str(CONF), name, version_base="1.3")(task)
    sweeps.begin(None)
    try:
        with _hydra_raises():
            command()
    except composition.COMPOSITION_ERRORS as error:
        if entered or isinstance(error, ConfigError):
            raise
        raise ConfigError(composition.explain(error, name, overrides, config_dir)) from None
    except OSError as error:  # of the run folder, which Hydra creates
        if entered:
            raise
        raise ConfigError(f"{error}: write hydra.run.dir=FOLDER of a folder that can be written") from None
    except (SystemExit, KeyboardInterrupt) as end:
        if (folder := sweeps.folder()) is None:
            raise
        # A signal, or a process of the sweep that was killed: print the summary nevertheless.
        code = 130 if isinstance(end, KeyboardInterrupt) else end.code if isinstance(end.code, int) else 1
        return max(code, sweeps.summarize(folder))
    finally:  # a refused command, or one with out=, leaves nothing in the run folder
        folders.remove_unused()
    if (folder := sweeps.folder()) is not None:
        return sweeps.summarize(folder)
    return max(codes, default=0)


# Commands that write to a folder: `out`, else the run folder. train.py claims its own after its checks.
CLAIMING = ("sample", "evaluate", "fit_variance", "train_classifier")


def _command(name: str, config: Any) -> Result:
    """Run a command; its configuration becomes config.yaml in its output folder."""
    types = typing.get_type_hints(COMMANDS[name])
    for key in [key for key in config if key in types]:
        if isinstance(config[key], int | float):  # a number becomes text where text is needed, out=2026
            config[key] = coerce(config[key], types[key], str(key))
    with processes.stop_signals.held():
        module = importlib.import_module(f"diffusion_lab.commands.{name}")
    if name in CLAIMING:
        folder, key = Path(str(config.get("out") or config.run_dir)), "out" if "out" in config else "hydra.run.dir"
        with claimed_folder(folder, key, OmegaConf.to_yaml(config, resolve=True), bool(config.get("overwrite"))):
            result = module.run(config)
    else:
        result = module.run(config)
    return result if isinstance(result, Result) else Result(result)


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Set HYDRA_FULL_ERROR, so that Hydra raises its errors instead of printing them and exiting with code 1."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before
