"""Named options of the networks, and a bound on their size."""

import os
from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from diffusion_lab.errors import ConfigError

T = TypeVar("T")

BYTES = 4  # of a float32

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "relu": nn.ReLU, "gelu": nn.GELU}


def choose(kind: str, name: str, options: Mapping[str, T]) -> T:
    """Return `options[name]`.

    Args:
        kind: description of the option, for the message.
        name: the chosen name.
        options: the allowed names and their values.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in options:
        raise ConfigError(f"unknown {kind} {name!r}: write one of {', '.join(options)}")
    return options[name]


def require_memory(weights: int, sizes: str) -> None:
    """Raise ConfigError if so many float32 weights exceed the memory of this machine, before any is allocated.

    Args:
        weights: a lower bound of their number.
        sizes: the options that determine it, for the message.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else float("inf")
    if weights * BYTES > memory:
        raise ConfigError(
            f"{sizes}: the weights take {weights * BYTES / 2**30:,.0f} GiB at least, and this machine has "
            f"{memory / 2**30:,.0f} GiB of memory: write smaller sizes"
        )
