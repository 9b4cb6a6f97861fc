"""Decide which classes a node that was read from a file may name."""

import functools
import pkgutil
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from diffusion_lab.errors import ConfigError, UntrustedNode

PACKAGE = "diffusion_lab"
CONF = Path(__file__).resolve().parents[3] / "conf"
FORMER_TARGETS = ("pytorch_lightning.loggers.CSVLogger",)  # of conf/ in earlier versions, named by their checkpoints


def untrusted(value: Any) -> Any:
    """Return a copy of the containers in which every mapping is an `UntrustedNode`."""
    if isinstance(value, Mapping):
        return UntrustedNode({key: untrusted(child) for key, child in value.items()})
    return [untrusted(child) for child in value] if isinstance(value, list | tuple) else value


def refuse_untrusted(value: Any, trust: Collection[str]) -> None:
    """Raise ConfigError if containers from a file name a class that is not trusted, or contain an interpolation.

    A resolved configuration has no interpolations. One in a manipulated file would be evaluated later.
    """
    if isinstance(value, str) and "${" in value:
        raise ConfigError(
            f"the checkpoint's configuration contains an interpolation ({value[:60]!r}), which src/train.py does not write: "
            "use another checkpoint"
        )
    if isinstance(value, Mapping):
        target = value.get("_target_")
        if target is not None and not _is_trusted(str(target), trust):
            module = str(target).rsplit(".", 1)[0]
            raise ConfigError(
                f"the checkpoint names {target}, which is not a class of this package: if you trust it, write "
                f"trust=[{module}]"
            )
        if "_args_" in value and not _names(trust, str(target)):
            # Arguments by position would pass the checks of arguments by name, e.g. of folders.
            raise ConfigError(
                f"the checkpoint gives {target} arguments by _args_, which src/train.py needs for no class of its own"
            )
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for child in value:
            refuse_untrusted(child, trust)


def targets(value: Any) -> set[str]:
    """Return all values of `_target_` in plain containers."""
    if isinstance(value, Mapping):
        outermost = {str(value["_target_"])} if value.get("_target_") else set()
        return outermost.union(*(targets(child) for child in value.values()))
    return set().union(*(targets(child) for child in value)) if isinstance(value, list | tuple) else set()


def untrusted_modules(value: Any) -> list[str]:
    """Return the modules that `trust` must include so that these containers can be built from a file."""
    return sorted({target.rsplit(".", 1)[0] for target in targets(value) if not _is_trusted(target, ())})


@functools.cache
def shipped_targets() -> frozenset[str]:
    """Return all values of `_target_` in the files of this project's conf/, now or in earlier versions."""
    lines = (line for file in CONF.rglob("*.yaml") for line in file.read_text().splitlines())
    matches = (re.match(r"\s*(?:- )?_target_: *([\w.]+)", line) for line in lines)
    return frozenset((*FORMER_TARGETS, *(match.group(1) for match in matches if match)))


def _names(trust: Collection[str], target: str) -> bool:
    return any(target == name or target.startswith(name + ".") for name in trust)


def _is_trusted(target: str, trust: Collection[str]) -> bool:
    if target in shipped_targets() or _names(trust, target):
        return True
    if not target.startswith((PACKAGE + ".", "torch.optim.")):
        return False
    try:
        located = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError):
        return False
    if not isinstance(located, type):
        return False
    if located.__module__.startswith(PACKAGE + "."):
        return True
    import torch

    kinds = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
    return located.__module__.startswith("torch.optim") and issubclass(located, kinds)
