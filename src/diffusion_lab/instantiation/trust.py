"""Nodes that a file supplied: which classes they may name."""

import functools
import pkgutil
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from diffusion_lab.errors import ConfigError, UntrustedNode

PACKAGE = "diffusion_lab"
CONF = Path(__file__).resolve().parents[3] / "conf"


def untrusted(value: Any) -> Any:
    """The same containers with every mapping as an `UntrustedNode`."""
    if isinstance(value, Mapping):
        return UntrustedNode({key: untrusted(child) for key, child in value.items()})
    return [untrusted(child) for child in value] if isinstance(value, list | tuple) else value


def refuse_untrusted(value: Any, trust: Collection[str]) -> None:
    """Raise ConfigError where containers from a file name a class that is not trusted.

    Nothing in a resolved configuration is an interpolation; one that is there all the same would be evaluated later.
    """
    if isinstance(value, str) and "${" in value:
        raise ConfigError(
            f"the checkpoint's configuration holds an interpolation ({value[:60]!r}): it was not written by src/train.py"
        )
    if isinstance(value, Mapping):
        target = value.get("_target_")
        if target is not None and not _is_trusted(str(target), trust):
            module = str(target).rsplit(".", 1)[0]
            raise ConfigError(
                f"the checkpoint names {target}, no class of this package: if you trust it write trust=[{module}]"
            )
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for child in value:
            refuse_untrusted(child, trust)


def targets(value: Any) -> set[str]:
    """Every `_target_` in plain containers."""
    if isinstance(value, Mapping):
        own = {str(value["_target_"])} if value.get("_target_") else set()
        return own.union(*(targets(child) for child in value.values()))
    return set().union(*(targets(child) for child in value)) if isinstance(value, list | tuple) else set()


def untrusted_modules(value: Any) -> list[str]:
    """The modules that `trust` must name before these containers, read from a file, are built."""
    return sorted({target.rsplit(".", 1)[0] for target in targets(value) if not _is_trusted(target, ())})


@functools.cache
def shipped_targets() -> frozenset[str]:
    """Every `_target_` that a file of this project's conf/ names."""
    lines = (line for file in CONF.rglob("*.yaml") for line in file.read_text().splitlines())
    found = (re.match(r"\s*(?:- )?_target_: *([\w.]+)", line) for line in lines)
    return frozenset(match.group(1) for match in found if match)


def _is_trusted(target: str, trust: Collection[str]) -> bool:
    if target in shipped_targets() or any(target == name or target.startswith(name + ".") for name in trust):
        return True
    if not target.startswith((PACKAGE + ".", "torch.optim.")):
        return False
    try:
        named = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError):
        return False
    if not isinstance(named, type):
        return False
    if named.__module__.startswith(PACKAGE + "."):
        return True
    import torch

    kinds = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
    return named.__module__.startswith("torch.optim") and issubclass(named, kinds)
