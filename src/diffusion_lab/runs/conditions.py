"""What a command asks of a conditional network: from options to the tensors that go beside each image."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.runs.checkpoints import Run


def asked(settings: Mapping[str, Any], loaded: Run, n: int) -> dict[str, Tensor]:
    """Keyword arguments for the network, each with n rows; none for an unconditional checkpoint.

    Raises:
        ValueError: something asked for that this checkpoint does not know.
    """
    label = labels(settings["labels"], loaded, n)
    return {} if label is None else {"label": label}


def labels(asked: str | list[int], loaded: Run, n: int) -> Tensor | None:
    """The labels that `labels=` asks for, int64 (n,); None for an unconditional checkpoint. ValueError: not to be had."""
    count = loaded.num_classes
    if count is None:
        if asked != "cycle":
            raise ValueError("labels= needs a checkpoint that was trained with condition=label")
        return None
    if asked == "cycle":
        return torch.arange(n) % count
    if not isinstance(asked, list) or not asked or not all(isinstance(label, int) for label in asked):
        raise ValueError(f"labels={asked} must be cycle or a list of classes, e.g. labels=[0,1,2]")
    bad = [label for label in asked if not 0 <= label < count]
    if bad:
        raise ValueError(f"label {bad[0]} is out of range: this checkpoint knows 0 … {count - 1}")
    return torch.tensor(asked).repeat(-(-n // len(asked)))[:n]
