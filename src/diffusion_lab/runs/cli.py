"""What every command line does around its task: check early, run under Hydra, refuse in one line with exit code 2.

Nothing heavy is imported here: a wrong option is reported before torch is loaded.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffusion_lab.errors import ConfigError
from diffusion_lab.runs import files, launchers, options, sweeps
from diffusion_lab.runs.sweeps import Refusal, Result

CONFIG_ENV = "DIFFUSION_LAB_CONFIG"  # in further processes of a run: the configuration that the first one resolved
_INFORMATION = {"--help", "-h", "--hydra-help", "--version", "--info", "-i", "--shell-completion", "-sc"}

Task = Callable[[DictConfig], int | Result]


@contextmanager
def refusals(*more: type[Exception]) -> Iterator[None]:
    """Turns a ConfigError, and any of `more`, into one line on stderr and exit code 2. Other exceptions keep their traceback."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (ConfigError, *more)):
            raise
        if os.environ.get("DIFFUSION_LAB_DEBUG"):
            raise
        refuse(error)


def refuse(error: BaseException) -> NoReturn:
    """One line on stderr, exit code 2. DIFFUSION_LAB_DEBUG=1 shows tracebacks instead."""
    line = " ".join(str(error).split())
    print(f"error: {line}", file=sys.stderr, flush=True)
    raise Refusal(line)


def main(config_name: str, task: str) -> int:
    """Run a command.

    Args:
        config_name: the file of conf/ that it composes, without its suffix.
        task: "module:function" of this package's runs, imported after the checks; it gets the configuration and returns the
            exit code, or a Result.
    """
    inherited = os.environ.get(CONFIG_ENV)
    if int(os.environ.get("LOCAL_RANK", "0")) > 0 and inherited:
        return _code(_call(task, OmegaConf.load(inherited)))
    arguments = sys.argv[1:]
    flags = {a for a in arguments if a.startswith("-")}
    overrides = [a for a in arguments if _is_override(a)]
    stray = [a for a in arguments if not a.startswith("-") and not _is_override(a) and not _is_flag_value(arguments, a)]
    sweep = bool(flags & {"--multirun", "-m"})
    folder = None
    if not _INFORMATION & flags:
        with refusals():
            if stray:
                raise ConfigError(f"{stray[0]!r} is neither KEY=VALUE nor a flag; --help lists what can be written")
            config = options.check(config_name, overrides, sweep)
            sweep = sweep or config.hydra.mode == RunMode.MULTIRUN
            if sweep and config_name == "train":
                launchers.check_sweep(OmegaConf.to_container(config.trainer))  # type: ignore[arg-type]
            if not flags & {"--cfg", "-c"}:
                started = launchers.launched()
                if started:
                    named = any(o.startswith("hydra.run.dir=") for o in overrides)
                    launchers.check(started, config_name, sweep, named, bool(config.get("overwrite")))
                    if started.rank > 0:
                        written = launchers.wait_for(Path(str(config.hydra.run.dir)) / "config.yaml")
                        return _code(_call(task, OmegaConf.load(written)))
                folder = _check_folder(config, sweep)
    import hydra

    outcome: list[int] = []
    there = folder is not None and folder.exists()
    first_process = os.getpid()

    def call(config: DictConfig) -> int | Result:
        done = _call(task, config)
        if config_name != "train":  # which writes its own before the first step
            _keep_configuration(config)
        return done

    def run(config: DictConfig) -> Any:
        if not sweep:
            try:
                outcome.append(_code(call(config)))
            finally:
                _tidy(Path(HydraConfig.get().runtime.output_dir), there)
            return None
        hydra_config = HydraConfig.get()
        job = sweeps.job(lambda: call(config), Path(hydra_config.runtime.output_dir), list(hydra_config.overrides.task))
        if job["code"] > 128 and os.getpid() == first_process:  # a signal ends the sweep, not one job of it
            raise SystemExit(job["code"])
        return job

    if sweep and folder:  # said once, so that every part of Hydra means the same moment by ${now:}
        quoted = str(folder).replace("\\", "\\\\").replace('"', '\\"')
        overrides = [*(o for o in overrides if not o.startswith("hydra.sweep.dir=")), f'hydra.sweep.dir="{quoted}"']
    sys.argv = [sys.argv[0], *(a for a in arguments if not _is_override(a)), *overrides]  # Hydra wants flags first
    command = hydra.main(str(options.CONF), config_name, version_base="1.3")(run)
    if not (sweep and folder):
        command()
        return max(outcome, default=0)
    code = 0
    try:
        command()
    except SystemExit as end:  # a signal, or a process of the sweep that died
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:  # in a process of the sweep, or between two jobs
        code = 130
    return max(code, sweeps.summarise(folder))


def _keep_configuration(config: DictConfig) -> None:
    """config.yaml, resolved, in the folder that a command wrote; a file that export.py wrote holds its own."""
    folder = Path(str(config.get("out") or config.run_dir))
    if folder.is_dir() and not (folder / "config.yaml").exists():
        files.write(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))


def _tidy(folder: Path, there: bool) -> None:
    """A command that was refused, or that wrote to out=, leaves no folder that holds Hydra's record of it and nothing else."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {".hydra"}:
        for record in folder.iterdir():
            shutil.rmtree(record)
        if not there:
            folder.rmdir()


def _code(done: int | Result) -> int:
    return done.code if isinstance(done, Result) else done


def _is_override(argument: str) -> bool:
    return argument.startswith(("~", "+")) or ("=" in argument and not argument.startswith("-"))


def _is_flag_value(arguments: list[str], value: str) -> bool:
    """Whether the word follows a flag that takes one (`--cfg job`, `-p model`)."""
    before = arguments[arguments.index(value) - 1] if arguments.index(value) else ""
    return before in (
        "--cfg",
        "-c",
        "--package",
        "-p",
        "--config-path",
        "-cp",
        "--config-name",
        "-cn",
        "--config-dir",
        "-cd",
    )


def _call(task: str, config: Any) -> int | Result:
    import importlib

    module, function = task.split(":")
    call: Task = getattr(importlib.import_module(f"diffusion_lab.runs.{module}"), function)
    return call(config)


def _check_folder(config: DictConfig, sweep: bool) -> Path:
    """The output folder. Refuses one that was named and is not empty, before Hydra writes into it."""
    key, node = ("hydra.sweep.dir", config.hydra.sweep) if sweep else ("hydra.run.dir", config.hydra.run)
    overwrite = bool(config.get("overwrite"))
    try:
        folder = Path(str(node.dir))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{key} cannot be resolved: {options.first_line(error)}") from None
    files.refuse_filled(folder, key, overwrite)
    if config.get("out") and not str(config.out).endswith(".safetensors"):  # the one output that is a file
        files.refuse_filled(Path(str(config.out)), "out", overwrite)
    return folder
