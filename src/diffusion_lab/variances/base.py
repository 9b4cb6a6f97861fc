"""The one signature of all variances."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffusion_lab.errors import ConfigError
from diffusion_lab.objectives import Prediction
from diffusion_lab.schedules import Scalars, Schedule


class Variance(ABC):
    """variance(schedule, t, s, prediction, floor) → σ² ≥ 0, broadcastable to x_t; t > s and the floor 0-d or (B,).

    At s = 0, which only a likelihood evaluates, the floor is the caller's choice, since σ̃² of the posterior is 0 there
    (improved DDPM takes σ̃² of the next pair). Every variance but the learned one then is that floor, if it is positive.
    """

    ancestral_only = False  # whether DDIM must refuse it, because it ignores the floor
    extra_channels = False  # whether it reads C channels of the network's output beyond the first C
    #: default of a sampler's `max_final_noise`, in 8-bit levels
    max_final_noise: float | None = None

    @abstractmethod
    def __call__(
        self, schedule: Schedule, t: Scalars, s: Scalars, prediction: Prediction, floor: Tensor | float = 0.0
    ) -> Tensor: ...

    def check(self, network: object) -> None:  # noqa: B027 most variances work with every network
        """Raise ConfigError if the attribute `extra` of `network` shows that it does not output what this variance reads."""


class FromExtra(Variance):
    """A variance that reads `prediction.extra`.

    Attributes:
        kind: what a network's attribute `extra` is called if these are its channels.
        remedy: how to get them, and the end of the line that refuses.
    """

    extra_channels = True
    kind: str
    remedy: str

    def check(self, network: object) -> None:
        if getattr(network, "extra", self.kind) != self.kind:  # of one's own network the first call shows it
            raise self._refusal("this network gives none of its kind")

    def read(self, prediction: Prediction) -> Tensor:
        """prediction.extra (B, C, H, W); ConfigError: there is none, or of another shape."""
        if prediction.extra is None or prediction.extra.shape != prediction.x0.shape:
            found = 0 if prediction.extra is None else prediction.extra.shape[1]
            raise self._refusal(f"the network gives {found} of them for images of {prediction.x0.shape[1]}")
        return prediction.extra

    def _refusal(self, found: str) -> ConfigError:
        return ConfigError(f"variance={self.kind} needs extra channels, and {found}: {self.remedy}")


def stands_for_all(s: Scalars, floor: Tensor) -> Tensor:
    """Whether the step is that into data with a floor to go by, bool of their shape."""
    return (s == 0) & (floor > 0)


def wide(floor: Tensor | float, s: Scalars) -> Tensor:
    """The floor in float64, where s is."""
    return torch.as_tensor(floor, dtype=torch.float64, device=s.device)
