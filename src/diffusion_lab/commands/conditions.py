"""What a command asks of a conditional network: from options to the tensors that go beside each image."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.checkpoint import Run
from diffusion_lab.conditions import Attributes, LowResolution
from diffusion_lab.data.images import Examples
from diffusion_lab.data.inputs import arrays, read
from diffusion_lab.errors import ConfigError

Settings = Mapping[str, Any]


def asked(settings: Settings, run: Run, n: int) -> dict[str, Tensor]:
    """Keyword arguments for the network, each with n rows; none for an unconditional checkpoint.

    Classes and attributes come from `labels`. Any other condition is made of `condition_data`: an image, a folder or
    .zip of them, or an .npz of images (arr_0) and further arrays; image i is given its row i mod their number.

    Raises:
        ValueError: something asked for that this checkpoint does not know, or nothing where it needs something.
    """
    condition, given = run.condition, settings.get("condition_data")
    found: dict[str, Tensor] = {}
    if condition.of_data:
        if not given:
            raise ConfigError(
                f"this checkpoint was trained with condition={_name(condition)}: write condition_data=PATH of what it is made of"
            )
        rows = condition(_batch(Path(given), run))
        found = {name: value[torch.arange(n) % len(value)] for name, value in rows.items()}
    elif given:
        raise ConfigError(
            f"condition_data= is for conditions made of data, and this checkpoint has condition={_name(condition)}: leave it out"
        )
    if isinstance(condition, Attributes):
        return {**found, "label": attributes(settings["labels"], condition, n)}
    label = labels(settings["labels"], run, n)
    return found if label is None else {**found, "label": label}


def of_examples(run: Run, examples: Examples, n: int) -> dict[str, Tensor]:
    """The condition of n real examples, in turn, as the network was trained on it."""
    return run.condition(examples.take(np.arange(n) % len(examples)))


def attributes(wanted: str | list[Any], condition: Attributes, n: int) -> Tensor:
    """±1 for what labels=[Smiling,-Male] names, 0 for the rest, the same for all: float (n, A). ValueError: unknown names."""
    row = torch.zeros(condition.num_classes)
    if wanted != "cycle":
        for entry in wanted if isinstance(wanted, list) else [wanted]:
            name = str(entry).lstrip("+-")
            if name not in condition.names:
                raise ConfigError(
                    f"attribute {name} is unknown: write some of {', '.join(condition.names)}, -NAME for its absence"
                )
            row[condition.names.index(name)] = -1.0 if str(entry).startswith("-") else 1.0
    return row.expand(n, -1)


def labels(wanted: str | list[Any], run: Run, n: int) -> Tensor | None:
    """The classes that `labels=` asks for, int64 (n,); None for a network without. ValueError: not to be had."""
    count = run.num_classes
    if count is None:
        if wanted != "cycle":
            raise ConfigError(
                "labels= needs a checkpoint that was trained with condition=label, or guidance=classifier guidance.ckpt=…"
            )
        return None
    if wanted == "cycle":
        return torch.arange(n) % count
    if not isinstance(wanted, list) or not wanted or not all(type(label) is int for label in wanted):
        raise ConfigError(f"labels={wanted} must be cycle or a list of classes, e.g. labels=[0,1,2]")
    bad = [label for label in wanted if not 0 <= label < count]
    if bad:
        raise ConfigError(f"label {bad[0]} is out of range: this checkpoint knows 0 … {count - 1}")
    return torch.tensor(wanted).repeat(-(-n // len(wanted)))[:n]


def _name(condition: Any) -> str:
    """The option that means a condition; its class for one's own."""
    words = re.sub(r"(?<!^)(?=[A-Z])", "_", type(condition).__name__).lower()
    return {"unconditional": "none"}.get(words, words)


def _batch(path: Path, run: Run) -> dict[str, Any]:
    """What a data module would yield for the images, or the arrays, of a file or folder."""
    if not path.exists():
        raise ConfigError(f"condition_data={path}: there is no such file or folder")
    if path.suffix != ".npz":
        return {"image": _images(path, run)}
    found = arrays("condition_data", path)
    batch: dict[str, Any] = {name: torch.from_numpy(v) for name, v in found.items() if name not in ("arr_0", "arr_1")}
    return {**batch, "image": _images(path, run)} if "arr_0" in found else batch


def _images(path: Path, run: Run) -> Tensor:
    """Images of the run's size; where the condition is a lower resolution of them, images of that are enlarged."""
    condition, (channels, height, width) = run.condition, run.shape
    try:
        return read("condition_data", path, run.shape)[0]
    except ConfigError:
        if not isinstance(condition, LowResolution):
            raise
        factor = condition.factor
        try:
            small, _ = read("condition_data", path, (channels, height // factor, width // factor))
        except ConfigError:
            small = None
        if small is None:
            raise
        return small.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
