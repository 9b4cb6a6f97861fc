"""Conditions: from a batch to the network's keyword arguments, with random dropping in training.

`requested_condition` returns the same arguments for samples, from labels or from conditioning data.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor

from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.noise import Stream, uniform
from diffusion_lab.schedules import to_device

Arguments = dict[str, Tensor]


class Condition(ABC):
    """condition(batch, seed) → keyword arguments for the network."""

    num_classes: int | None = None  # for the network's embedding, whose null label is num_classes
    given_channels: int = 0  # channels of conditioning images that the network reads as further input channels
    of_data = True  # whether sampling needs images or tensors from data; False for labels and attributes

    @abstractmethod
    def __call__(self, batch: Mapping[str, Any], seed: int | None = None) -> Arguments:
        """Return the condition of a batch.

        Args:
            batch: a batch of the data module.
            seed: in training, with the step and position of each example the key of random dropping; None drops nothing.
        """

    def sampled(self, index: Int64[Tensor, " n"], batch: Callable[[Tensor], Mapping[str, Any]]) -> Arguments:
        """Return the condition of samples drawn during training: that of `batch(index)`, unless it needs no data.

        Args:
            index: indices of the samples.
            batch: maps indices to real examples on the device.
        """
        return self(batch(index))


class Unconditional(Condition):
    """No condition."""

    of_data = False

    def __call__(self, batch: Mapping[str, Any], seed: int | None = None) -> Arguments:
        return {}

    def sampled(self, index: Int64[Tensor, " n"], batch: Callable[[Tensor], Mapping[str, Any]]) -> Arguments:
        return {}


class Label(Condition):
    """The class label, `label` int64 (B,), replaced by the null label with probability `drop` in training (Ho & Salimans 2022).

    Args:
        num_classes: number of classes of the data, at most a million.
        drop: probability in [0, 1); above 0 it also trains the unconditional model that classifier-free guidance uses.

    Raises:
        ConfigError: data without labels, or a probability out of range.
    """

    of_data = False

    def __init__(self, num_classes: int, drop: float = 0.1) -> None:
        check_number("data.num_classes", num_classes, "[0, 1000000]", whole=True)
        if num_classes < 1:
            raise ConfigError(
                f"data.num_classes={num_classes}, but condition=label needs the number of classes: write data.num_classes=K for "
                "a labeled data set of K classes, or condition=none"
            )
        self.num_classes: int = num_classes
        self.drop = _probability("drop", drop)

    def __call__(self, batch: Mapping[str, Any], seed: int | None = None) -> Arguments:
        label: Tensor = batch["label"]
        if seed is not None and self.drop > 0:
            u = uniform((), seed=seed, index=batch["position"], draw=batch["step"], stream=Stream.LABEL)
            label = torch.where(to_device(u < self.drop, label.device), self.num_classes, label)
        return {"label": label}

    def sampled(self, index: Int64[Tensor, " n"], batch: Callable[[Tensor], Mapping[str, Any]]) -> Arguments:
        return {"label": index % self.num_classes}  # cycles through the classes


class Attributes(Condition):
    """Binary attributes, `label` float (B, A): ±1, or 0 for an unspecified attribute (CelebA's smiling, male, young, …).

    Args:
        num_attributes: A, the number of attributes of the data.
        drop: probability in [0, 1) of dropping all attributes of an example, for classifier-free guidance.
        drop_each: additional probability in [0, 1) of dropping each attribute independently, so that samples may specify a few.
        names: names of the attributes, in order, for `labels=` of sample.py.

    Raises:
        ConfigError: data without attributes, a number of names that differs from A, or a probability out of range.
    """

    of_data = False

    def __init__(
        self, num_attributes: int, drop: float = 0.1, drop_each: float = 0.5, names: Sequence[str] | None = None
    ) -> None:
        check_number("data.num_attributes", num_attributes, "[0, 100000]", whole=True)
        if num_attributes < 1:
            raise ConfigError(
                "condition=attributes needs data with attributes, and this data set has none: write data=celeba, or "
                "condition=label"
            )
        self.num_classes: int = num_attributes
        self.drop, self.drop_each = _probability("drop", drop), _probability("drop_each", drop_each)
        self.names = tuple(names or ())
        if self.names and len(self.names) != num_attributes:
            raise ConfigError(
                f"condition.names has {len(self.names)} names for {num_attributes} attributes: name each of them"
            )

    def __call__(self, batch: Mapping[str, Any], seed: int | None = None) -> Arguments:
        label: Tensor = batch["attributes"]
        if seed is not None and (self.drop > 0 or self.drop_each > 0):
            key: dict[str, Any] = {"seed": seed, "index": batch["position"], "draw": batch["step"]}
            u = uniform((1 + self.num_classes,), stream=Stream.LABEL, **key)
            kept = (u[:, :1] >= self.drop) & (u[:, 1:] >= self.drop_each)
            label = label * to_device(kept, label.device)
        return {"label": label}


class Tensors(Condition):
    """Tensors of the batch by name, unchanged: the further tensors of a data set (`Examples.more`).

    Args:
        keys: names of the tensors and of the network's keyword arguments.

    Raises:
        ConfigError: no names; in a call, a name that is not in the batch.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        if not keys:
            raise ConfigError("condition.keys=[] is empty: write the names of tensors of the batch, or condition=none")
        self.keys = tuple(keys)

    def __call__(self, batch: Mapping[str, Any], seed: int | None = None) -> Arguments:
        missing = [key for key in self.keys if key not in batch]
        if missing:
            available = ", ".join(key for key, value in batch.items() if isinstance(value, Tensor))
            raise ConfigError(f"condition.keys names {missing[0]}, but the batch has {available}: write some of these")
        return {key: batch[key] for key in self.keys}


class LowResolution(Condition):
    """The image averaged over factor × factor pixels and upsampled again, for super-resolution (Saharia et al. 2021, "SR3").

    The network receives it as `given`, float (B, C, H, W), and reads it as further input channels.

    Args:
        channels: C, the value of the network's `given_channels`.
        factor: in [2, 1024].

    Raises:
        ConfigError: an argument out of range; in a call, a factor that does not divide height and width.
    """

    def __init__(self, channels: int, factor: int = 2) -> None:
        check_number("condition.channels", channels, "[1, 1024]", whole=True)
        check_number("condition.factor", factor, "[2, 1024]", "a divisor of height and width", whole=True)
        self.channels, self.factor, self.given_channels = channels, factor, channels

    def __call__(self, batch: Mapping[str, Any], seed: int | None = None) -> Arguments:
        image: Tensor = batch["image"]
        height, width = image.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ConfigError(
                f"condition.factor={self.factor} does not divide {height}×{width}: write a common divisor of both"
            )
        small = F.avg_pool2d(image, self.factor)
        return {"given": F.interpolate(small, scale_factor=float(self.factor), mode="nearest")}


def _probability(name: str, value: float) -> float:
    """Return `value`. Raises ConfigError: it is outside [0, 1)."""
    check_number(f"condition.{name}", value, "[0, 1)", "the published value is 0.1")
    return value


# requests of samples --------------------------------------------------------------------------------------------------------


def requested_condition(
    condition: Condition,
    num_classes: int | None,
    n: int,
    labels: str | list[Any] = "cycle",
    batch: Mapping[str, Any] | None = None,
) -> Arguments:
    """Return the keyword arguments of the network for n samples, each with n rows; empty for an unconditional network.

    Args:
        condition: the condition of the network.
        num_classes: number of classes of the network or of its guidance; None without classes.
        n: number of samples.
        labels: "cycle" (sample i has class i mod K), a list of classes, which is repeated, or a list of attribute names.
        batch: tensors of a batch with N rows, if the condition depends on data; sample i uses row i mod N.

    Raises:
        ConfigError: if the network does not have the labels, or the condition depends on data and there is no batch.
    """
    if condition.of_data and batch is None:
        raise ConfigError(
            f"this checkpoint was trained with condition={option_name(condition)}, which needs data: write condition_data=PATH"
        )
    arguments: Arguments = {}
    if batch is not None:
        arguments = {key: value[torch.arange(n) % len(value)] for key, value in condition(batch).items()}
    if isinstance(condition, Attributes):
        return {**arguments, "label": requested_attributes(condition, n, labels)}
    label = requested_labels(num_classes, n, labels)
    return arguments if label is None else {**arguments, "label": label}


def requested_attributes(condition: Attributes, n: int, labels: str | list[Any]) -> Tensor:
    """Return ±1 for the attributes that `labels` names (-NAME for −1) and 0 for the others, float (n, A), all rows equal.

    Raises:
        ConfigError: an unknown name.
    """
    row = torch.zeros(condition.num_classes)
    if labels != "cycle":
        for entry in labels if isinstance(labels, list) else [labels]:
            name = str(entry).lstrip("+-")
            if name not in condition.names:
                raise ConfigError(
                    f"attribute {name} is unknown: write some of {', '.join(condition.names)}, -NAME for its absence"
                )
            row[condition.names.index(name)] = -1.0 if str(entry).startswith("-") else 1.0
    return row.expand(n, -1)


def requested_labels(num_classes: int | None, n: int, labels: str | list[Any]) -> Tensor | None:
    """Return the requested classes, int64 (n,); None for a network without classes. Raises ConfigError: out of range."""
    if num_classes is None:
        if labels != "cycle":
            raise ConfigError(
                "labels= needs a checkpoint that was trained with condition=label, or guidance=classifier guidance.ckpt=…"
            )
        return None
    if labels == "cycle":
        return torch.arange(n) % num_classes
    if not isinstance(labels, list) or not labels or not all(type(label) is int for label in labels):
        raise ConfigError(f"labels={labels} must be cycle or a list of classes, e.g. labels=[0,1,2]")
    for label in labels:
        if not 0 <= label < num_classes:
            raise ConfigError(f"label {label} is out of range: this checkpoint has classes 0 … {num_classes - 1}")
    return torch.tensor(labels).repeat(-(-n // len(labels)))[:n]


def option_name(condition: Condition) -> str:
    """Return the option of conf/condition for a condition of this package; the class name in snake case for others."""
    words = re.sub(r"(?<!^)(?=[A-Z])", "_", type(condition).__name__).lower()
    return {"unconditional": "none"}.get(words, words)
