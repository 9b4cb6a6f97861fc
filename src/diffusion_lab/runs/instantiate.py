"""From a node of the configuration to the object that it describes; what a checkpoint may name is checked here."""

from collections.abc import Mapping, Sequence
from typing import Any

import hydra.errors
import hydra.utils

from diffusion_lab.errors import ConfigError

PACKAGE = "diffusion_lab."
OPTIMISERS = ("torch.optim.Adam", "torch.optim.AdamW")


def instantiate(node: Any, trust: Sequence[str] | None = None, **kwargs: Any) -> Any:
    """The object that a node's `_target_` and arguments describe.

    Args:
        node: plain containers.
        trust: None where the configuration is the user's own; for one from a checkpoint the modules that it may name beside
            this package.
        kwargs: further arguments.

    Returns:
        The object; None for an empty node, such as that of `clip=none`.

    Raises:
        ValueError: a class that is not trusted or does not exist, or what the class itself refuses.
    """
    if not node:
        return None
    if node.get("_target_") == "???":
        raise ConfigError(
            "an option `own` needs the class that it stands for: write e.g. model._target_=my_package.MyNetwork"
        )
    if trust is not None:
        check_targets(node, trust)
    try:
        return hydra.utils.instantiate(node, _convert_="all", **kwargs)
    except hydra.errors.InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError):
            raise ConfigError(str(cause)) from cause
        if isinstance(cause, (ImportError, TypeError)) or cause is None:
            raise ConfigError(f"{node.get('_target_')}: {cause or str(error).splitlines()[0]}") from error
        raise


def check_targets(node: Any, trust: Sequence[str]) -> None:
    """Raise ValueError where a resolved configuration from a checkpoint names a class that is neither ours nor trusted.

    Nothing in a resolved configuration is an interpolation; one that is there all the same would be evaluated later, into
    whatever it pleases.
    """
    if isinstance(node, str) and "${" in node:
        raise ConfigError(
            f"the checkpoint's configuration holds an interpolation ({node[:60]!r}): it was not written by src/train.py"
        )
    if isinstance(node, Mapping):
        target = node.get("_target_")
        if target is not None and not _trusted(str(target), trust):
            module = str(target).rsplit(".", 1)[0]
            raise ConfigError(
                f"the checkpoint names {target}, no class of this package: if you trust it write trust=[{module}]"
            )
        node = [*node.keys(), *node.values()]
    if isinstance(node, (list, tuple)):
        for child in node:
            check_targets(child, trust)


def _trusted(target: str, trust: Sequence[str]) -> bool:
    """Whether a checkpoint may name it: a class that this package defines, not whatever one can reach through its modules."""
    if target in OPTIMISERS or any(target == module or target.startswith(module + ".") for module in trust):
        return True
    if not target.startswith(PACKAGE):
        return False
    try:
        named = hydra.utils.get_object(target)
    except (ImportError, AttributeError):
        return False
    return isinstance(named, type) and named.__module__.startswith(PACKAGE)
