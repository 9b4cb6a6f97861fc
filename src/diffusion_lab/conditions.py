"""Conditions: which tensors of a batch the network receives as keyword arguments, and when they are dropped.

`requested_condition` makes the same arguments for samples, from labels or from given data.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_lab.errors import ConfigError
from diffusion_lab.noise import Stream, uniform
from diffusion_lab.schedules import to_device

Arguments = dict[str, Tensor]


class Condition(ABC):
    """condition(batch, seed) → keyword arguments for the network."""

    num_classes: int | None = None  # for the network's embedding; its null label is num_classes
    given_channels: int = 0  # of images that the network reads as further input channels
    of_data = True  # whether it is made of images or tensors, which whoever samples must give; False for labels and attributes

    @abstractmethod
    def __call__(self, batch: Mapping[str, Any], seed: int | None = None) -> Arguments:
        """The condition of a batch.

        Args:
            batch: what the data module yields.
            seed: in training, the key of what is dropped, with the step and position of each example; None drops nothing.
        """

    def sampled(self, index: Tensor, batch: Callable[[Tensor], Mapping[str, Any]]) -> Arguments:
        """What samples are asked for while training: the condition of `batch(index)`, unless it needs no data.

        Args:
            index: int64 (n,), of the samples.
            batch: gives real examples, on the device, one for each index.
        """
        return self(batch(index))


class Unconditional(Condition):
    """Nothing but the noisy image."""

    of_data = False

    def __call__(self, batch: Mapping[str, Any], seed: int | None = None) -> Arguments:
        return {}

    def sampled(self, index: Tensor, batch: Callable[[Tensor], Mapping[str, Any]]) -> Arguments:
        return {}


class Label(Condition):
    """The class label, replaced by the null label with probability `drop` while training (Ho & Salimans 2022).

    Args:
        num_classes: of the data.
        drop: probability in [0, 1); > 0 also trains the unconditional model that classifier-free guidance needs.

    Raises:
        ValueError: data without labels, a probability out of range.
    """

    of_data = False

    def __init__(self, num_classes: int, drop: float = 0.1) -> None:
        if num_classes < 1:
            raise ConfigError(
                f"data.num_classes={num_classes}, but condition=label needs the number of classes: write data.num_classes=K for "
                "a labelled data set of K classes, or condition=none"
            )
        self.num_classes: int = num_classes
        self.drop = _probability("drop", drop)

    def __call__(self, batch: Mapping[str, Any], seed: int | None = None) -> Arguments:
        label: Tensor = batch["label"]
        if seed is not None and self.drop > 0:
            coin = uniform((), seed=seed, index=batch["position"], draw=batch["step"], stream=Stream.LABEL)
            label = torch.where(to_device(coin < self.drop, label.device), self.num_classes, label)
        return {"label": label}

    def sampled(self, index: Tensor, batch: Callable[[Tensor], Mapping[str, Any]]) -> Arguments:
        return {"label": index % self.num_classes}  # every class in turn


class Attributes(Condition):
    """Several labels at once, ±1 each: `label` float (B, A), 0 where nothing is said (CelebA's smiling, male, young, …).

    Args:
        num_attributes: A, the attributes of the data.
        drop: probability that an example says nothing at all, which classifier-free guidance needs; in [0, 1).
        drop_each: probability, besides, of each attribute alone, so that a sample may be asked for a few of them; in [0, 1).
        names: of the attributes, in order; what sample.py's labels= are looked up in.

    Raises:
        ValueError: data without attributes, a probability out of range.
    """

    of_data = False

    def __init__(
        self, num_attributes: int, drop: float = 0.1, drop_each: float = 0.5, names: Sequence[str] | None = None
    ) -> None:
        if num_attributes < 1:
            raise ConfigError(
                "condition=attributes needs data with attributes, and these have none: write data=celeba, or condition=label"
            )
        self.num_classes: int = num_attributes
        self.drop, self.drop_each = _probability("drop", drop), _probability("drop_each", drop_each)
        self.names = tuple(names or ())
        if self.names and len(self.names) != num_attributes:
            raise ConfigError(
                f"condition.names holds {len(self.names)} names for {num_attributes} attributes: name each"
            )

    def __call__(self, batch: Mapping[str, Any], seed: int | None = None) -> Arguments:
        label: Tensor = batch["attributes"]
        if seed is not None and (self.drop > 0 or self.drop_each > 0):
            key: dict[str, Any] = {"seed": seed, "index": batch["position"], "draw": batch["step"]}
            coins = uniform((1 + self.num_classes,), stream=Stream.LABEL, **key)
            said = (coins[:, :1] >= self.drop) & (coins[:, 1:] >= self.drop_each)
            label = label * to_device(said, label.device)
        return {"label": label}


class Tensors(Condition):
    """Tensors of the batch by their names, as they are: whatever a data set gives beside its images (`Examples.more`).

    Args:
        keys: their names, which are the network's keyword arguments.

    Raises:
        ValueError: no names, or (when called) one that the data do not have.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        if not keys:
            raise ConfigError("condition.keys=[] names nothing: write the tensors of the batch, or condition=none")
        self.keys = tuple(keys)

    def __call__(self, batch: Mapping[str, Any], seed: int | None = None) -> Arguments:
        missing = [key for key in self.keys if key not in batch]
        if missing:
            has = ", ".join(key for key, value in batch.items() if isinstance(value, Tensor))
            raise ConfigError(f"condition.keys names {missing[0]}, and the data give {has}: write some of these")
        return {key: batch[key] for key in self.keys}


class LowResolution(Condition):
    """The image itself, averaged over factor × factor pixels and enlarged again: super-resolution (Saharia et al. 2021, "SR3").

    The network gets it as `given`, float (B, C, H, W), and reads it as further input channels.

    Args:
        channels: C, which the network's `given_channels` follow.
        factor: at least 2.

    Raises:
        ValueError: a factor below 2, or (when called) one that does not divide the image's sides.
    """

    def __init__(self, channels: int, factor: int = 2) -> None:
        if factor < 2:
            raise ConfigError(f"condition.factor={factor}: write at least 2")
        self.channels, self.factor, self.given_channels = channels, factor, channels

    def __call__(self, batch: Mapping[str, Any], seed: int | None = None) -> Arguments:
        image: Tensor = batch["image"]
        height, width = image.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ConfigError(f"condition.factor={self.factor} does not divide {height}×{width}: write one that does")
        small = F.avg_pool2d(image, self.factor)
        return {"given": F.interpolate(small, scale_factor=float(self.factor), mode="nearest")}


def _probability(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise ConfigError(f"condition.{name}={value} is outside [0, 1): the published value is 0.1")
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
        condition: the network's.
        num_classes: the number of classes of the network or of its guidance; None without classes.
        n: number of samples.
        labels: "cycle" (sample i gets class i mod K) or a list of classes, repeated; of attributes a list of names.
        batch: for a condition made of data, the tensors of a batch of any length N; sample i gets row i mod N.

    Raises:
        ConfigError: labels that the network does not have; a condition made of data without a batch.
    """
    if condition.of_data and batch is None:
        raise ConfigError(
            f"this checkpoint was trained with condition={option_name(condition)}: write condition_data=PATH with the data that "
            "it is made of"
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
