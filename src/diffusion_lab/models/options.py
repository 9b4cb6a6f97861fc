"""Named options of the networks."""

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from diffusion_lab.errors import ConfigError

T = TypeVar("T")

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
