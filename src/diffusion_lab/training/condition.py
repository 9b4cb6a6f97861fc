"""Which tensors of a batch reach the network as keyword arguments, and when they are dropped."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.noise import Stream, uniform
from diffusion_lab.schedules import move


class Condition(ABC):
    """condition(batch, seed) → keyword arguments for the network."""

    num_classes: int | None = None  # for the network's embedding; its null label is num_classes

    @abstractmethod
    def __call__(self, batch: dict[str, Any], seed: int | None = None) -> dict[str, Tensor]:
        """The condition of a batch.

        Args:
            batch: what the data module yields.
            seed: in training, the key of what is dropped, with the step and position of each example; None drops nothing.
        """


class Unconditional(Condition):
    """Nothing but the noisy image."""

    def __init__(self, num_classes: None = None) -> None:
        self.num_classes = num_classes

    def __call__(self, batch: dict[str, Any], seed: int | None = None) -> dict[str, Tensor]:
        return {}


class Label(Condition):
    """The class label, replaced by the null label with probability `drop` while training (Ho & Salimans 2022).

    Args:
        num_classes: of the data.
        drop: probability in [0, 1); > 0 also trains the unconditional model that classifier-free guidance needs.
    """

    def __init__(self, num_classes: int, drop: float = 0.1) -> None:
        if num_classes < 1:
            raise ValueError(
                "condition=label needs labelled data, and this data set has no labels: write condition=none"
            )
        if not 0 <= drop < 1:
            raise ValueError(f"condition.drop={drop} is outside [0, 1): the published value is 0.1")
        self.num_classes: int = num_classes
        self.drop = drop

    def __call__(self, batch: dict[str, Any], seed: int | None = None) -> dict[str, Tensor]:
        label: Tensor = batch["label"]
        if seed is not None and self.drop > 0:
            coin = uniform((), seed=seed, index=batch["position"], draw=batch["step"], stream=Stream.LABEL)
            label = torch.where(move(coin < self.drop, label.device), self.num_classes, label)
        return {"label": label}
