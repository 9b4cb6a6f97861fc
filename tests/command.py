"""Run a command line in this process: the checks, Hydra and the task of src/*.py, without the seconds of the imports."""

import copy
import functools
import json
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.plugins.config_source import ConfigResult
from omegaconf import OmegaConf
from torch import nn

from diffusion_lab import cli, composition
from diffusion_lab.commands.train import build
from diffusion_lab.conditions import Condition
from diffusion_lab.instantiation import CONF
from diffusion_lab.training.module import DiffusionModule

ROOT = Path(__file__).resolve().parents[1]

# A training run of a second: the smallest network, no grids, no service.
TINY = (
    "model.width=8",
    "model.multipliers=[1]",
    "logger=csv",
    "callbacks.progress=null",
    "callbacks.samples=null",
    "trainer=cpu",
    "validation.every=0",
    "trainer.log_every_n_steps=1",
    "data.batch_size=16",
    "lr_scheduler=constant",
    "lr_scheduler.warmup=0",
)


_load_config = FileConfigSource.load_config
_loaded: dict[tuple[Path, int], ConfigResult] = {}


def _load_config_once(self: FileConfigSource, config_path: str) -> ConfigResult:
    """Read a configuration file as Hydra does, but parse each version of it once: that is a quarter of a composition."""
    path = Path(self.path, self._normalize_file_name(config_path))
    if not path.is_file():
        return _load_config(self, config_path)
    state = path.resolve(), path.stat().st_mtime_ns
    if state not in _loaded:
        _loaded[state] = _load_config(self, config_path)
    result = copy.copy(_loaded[state])
    result.config, result.header = copy.deepcopy(result.config), dict(result.header)
    result.path, result.provider = f"{self.scheme()}://{self.path}", self.provider
    return result


FileConfigSource.load_config = _load_config_once  # type: ignore[method-assign]


class Outcome(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def code(name: str, arguments: Sequence[str]) -> int:
    """Return the exit code of `python src/{name}.py ARGUMENTS`."""
    before = sys.argv
    sys.argv = [str(ROOT / "src" / f"{name}.py"), *arguments]
    try:
        return cli.main(name)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    except Exception:  # as the interpreter does: a traceback and exit code 1
        traceback.print_exc()
        return 1
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None  # otherwise interpolations of the next command line resolve in this one


def command(name: str, arguments: Sequence[str], capfd: pytest.CaptureFixture[str]) -> Outcome:
    """Return the exit code and the output of `python src/{name}.py ARGUMENTS`."""
    capfd.readouterr()
    return Outcome(code(name, arguments), *capfd.readouterr())


@functools.cache
def unresolved(name: str, *overrides: str) -> dict[str, Any]:
    """Return the configuration of a command line, unresolved, without Hydra's own node. Cached: do not change it."""
    plain = OmegaConf.to_container(composition.composed(name, overrides), resolve=False)
    assert isinstance(plain, dict)
    return {key: value for key, value in plain.items() if key != "hydra"}


@functools.cache
def composed(name: str, *overrides: str) -> dict[str, Any]:
    """Return the resolved configuration of a command line, without Hydra's own node. Cached: do not change it."""
    return _resolved(unresolved(name, *overrides))


def with_options(name: str, **options: str) -> dict[str, Any]:
    """Return the resolved configuration of a command line with these options, GROUP=OPTION.

    The nodes are read from the files of the options, without a composition: for groups whose files have no defaults list and
    no @package. test_options.py composes every option.
    """
    nodes = {group: OmegaConf.load(CONF / group / f"{option}.yaml") for group, option in options.items()}
    return _resolved({**unresolved(name), **nodes})


def _resolved(plain: dict[str, Any]) -> dict[str, Any]:
    resolved = OmegaConf.to_container(OmegaConf.create({**plain, "run_dir": "RUN"}), resolve=True)
    assert isinstance(resolved, dict)
    return resolved


def network(config: dict[str, Any]) -> tuple[nn.Module, Condition, dict[str, Any]]:
    """Return the network of a resolved configuration, its condition, and the configuration with the values of the data."""
    condition, node = build.condition(config, build.data(config))
    config = {**config, "condition": node}
    net, model = build.model(config, condition, config["variance"]["_target_"].endswith(".Learned"))
    return net, condition, {**config, "model": model}


def module(config: dict[str, Any]) -> DiffusionModule:
    """Return the Lightning module of a resolved configuration."""
    net, condition, filled = network(config)
    return build.module(filled, net, condition, {})


def train(folder: Path, *arguments: str, capfd: pytest.CaptureFixture[str]) -> Outcome:
    """Train a tiny run into `folder`, or continue one by ckpt=, and assert that it succeeds."""
    resumed = any(argument.startswith("ckpt=") for argument in arguments)
    outcome = command("train", [*(() if resumed else TINY), f"hydra.run.dir={folder}", *arguments], capfd)
    assert outcome.code == 0, outcome.err
    return outcome


def evaluated(arguments: Sequence[str], out: Path, capfd: pytest.CaptureFixture[str], code: int = 0) -> Any:
    """`evaluate.py` into `out`: (outcome, rows of metrics.json), or the one line of a refusal where `code` is expected."""
    outcome = command("evaluate", [f"out={out}", "overwrite=true", *arguments], capfd)
    assert outcome.code == code, outcome.err
    if code:
        assert not out.exists()
        assert len(re.findall(r"(?:^|[\r\n])error: ", outcome.err)) == 1
        assert "Traceback" not in outcome.err
        return outcome.err.splitlines()[-1]
    return outcome, json.loads((out / "metrics.json").read_text())
