"""Which tensors of a batch reach the network as keyword arguments, and when they are dropped."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Condition(ABC):
    """condition(batch, dropped) → keyword arguments for the network."""

    num_classes: int | None = None  # for the network's embedding; its null label is num_classes

    @abstractmethod
    def __call__(self, batch: dict[str, Any], dropped: Tensor | None = None) -> dict[str, Tensor]:
        """The condition of a batch.

        Args:
            batch: what the data module yields.
            dropped: in training, a uniform number in (0, 1) for each example, float (B,); None drops nothing.
        """


class Unconditional(Condition):
    """Nothing but the noisy image."""

    def __init__(self, num_classes: None = None) -> None:
        self.num_classes = num_classes

    def __call__(self, batch: dict[str, Any], dropped: Tensor | None = None) -> dict[str, Tensor]:
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

    def __call__(self, batch: dict[str, Any], dropped: Tensor | None = None) -> dict[str, Tensor]:
        label: Tensor = batch["label"]
        if dropped is not None:
            label = torch.where(dropped.to(label.device) < self.drop, self.num_classes, label)
        return {"label": label}
