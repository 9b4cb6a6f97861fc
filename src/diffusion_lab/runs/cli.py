"""What every command line does around its task: check early, run under Hydra, refuse in one line with exit code 2.

Nothing heavy is imported here: a wrong option is reported before torch is loaded.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from diffusion_lab.runs import files, options

REFUSED = 2  # the exit code of every refusal
CONFIG_ENV = "DIFFUSION_LAB_CONFIG"  # in further processes of a run: the configuration that the first one resolved
_INFORMATION = {"--help", "-h", "--hydra-help", "--version", "--info", "-i", "--shell-completion", "-sc"}

Task = Callable[[DictConfig], int]


class Refusal(SystemExit):
    """Ends the command with exit code 2; the line is on stderr already."""


@contextmanager
def refusals(*more: type[Exception]) -> Iterator[None]:
    """Turns a ValueError that this package raised, and any of `more`, into one line on stderr and exit code 2.

    A ValueError from elsewhere is a defect, and keeps its traceback.
    """
    try:
        yield
    except Exception as error:
        if not (isinstance(error, more) or (isinstance(error, ValueError) and _ours(error))):
            raise
        if os.environ.get("DIFFUSION_LAB_DEBUG"):
            raise
        refuse(error)


def _ours(error: BaseException) -> bool:
    """Whether the innermost frame of the error's traceback is this package's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("diffusion_lab")


def refuse(error: BaseException) -> None:
    """One line on stderr, exit code 2. DIFFUSION_LAB_DEBUG=1 shows tracebacks instead."""
    line = " ".join(str(error).split())
    print(f"error: {line}", file=sys.stderr, flush=True)
    raise Refusal(REFUSED)


def main(config_name: str, task: str) -> int:
    """Run a command.

    Args:
        config_name: the file of conf/ that it composes, without its suffix.
        task: "module:function" of this package's runs, imported after the checks; it gets the configuration and returns the
            exit code.
    """
    inherited = os.environ.get(CONFIG_ENV)
    if int(os.environ.get("LOCAL_RANK", "0")) > 0 and inherited:
        return _call(task, OmegaConf.load(inherited))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        with refusals():
            raise ValueError(
                "started by torchrun: start one process, python src/train.py trainer=ddp, which starts the others"
            )
    arguments = sys.argv[1:]
    flags = [a for a in arguments if a.startswith("-")]
    overrides = [a for a in arguments if (not a.startswith("-") and "=" in a) or a.startswith(("~", "+"))]
    stray = [
        a for a in arguments if not a.startswith(("-", "~", "+")) and "=" not in a and not _is_flag_value(arguments, a)
    ]
    if not _INFORMATION & set(flags):
        with refusals():
            if stray:
                raise ValueError(f"{stray[0]!r} is neither KEY=VALUE nor a flag; --help lists what can be written")
            sweep = "--multirun" in flags or "-m" in flags
            config = options.check(config_name, overrides, sweep)
            if "--cfg" not in flags and "-c" not in flags:
                _check_folder(config, sweep)
    import hydra

    sweep = bool({"--multirun", "-m"} & set(flags))
    outcome: list[int] = []

    def job(config: DictConfig) -> None:
        try:
            outcome.append(_call(task, config))  # Hydra returns nothing of a job, so the exit code is kept aside
        except Refusal:
            if not sweep:
                raise
            outcome.append(REFUSED)  # the other jobs of a sweep go on
        if sweep and outcome[-1] > 128:  # a signal ends the sweep, not one job of it
            raise SystemExit(outcome[-1])

    hydra.main(str(options.CONF), config_name, version_base="1.3")(job)()
    return max(outcome, default=0)


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


def _call(task: str, config: Any) -> int:
    import importlib

    module, function = task.split(":")
    call: Task = getattr(importlib.import_module(f"diffusion_lab.runs.{module}"), function)
    return call(config)


def _check_folder(config: DictConfig, sweep: bool) -> None:
    """Refuse an output folder that was named and is not empty, before Hydra writes into it."""
    key, node = ("hydra.sweep.dir", config.hydra.sweep) if sweep else ("hydra.run.dir", config.hydra.run)
    overwrite = bool(config.get("overwrite"))
    try:
        folder = Path(str(node.dir))
    except OmegaConfBaseException as error:
        raise ValueError(f"{key} cannot be resolved: {options.first_line(error)}") from None
    files.refuse_filled(folder, key, overwrite)
    if config.get("out"):
        files.refuse_filled(Path(str(config.out)), "out", overwrite)
