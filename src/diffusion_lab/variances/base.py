"""The base classes of all reverse variances."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from diffusion_lab.errors import ConfigError
from diffusion_lab.objectives import Prediction
from diffusion_lab.schedules import PerExample, Scalars, Schedule

StepVariance = Float[Tensor, ""] | Float[Tensor, "#b #c #h #w"]  # σ² of a step, broadcastable to x_t


class Variance(ABC):
    """variance(schedule, t, s, prediction, floor) → σ² ≥ 0 of the step from t to s < t.

    At s = 0, which only a likelihood evaluates, σ̃² of the posterior is 0, and the caller chooses the floor (improved DDPM uses
    σ̃² of the next pair). Every variance except the learned one then equals the floor, if that is positive.

    Attributes:
        ancestral_only: whether it ignores the floor, so that DDIM refuses it.
        extra_channels: whether it reads C channels of the network's output beyond the first C.
        max_final_noise: default of a sampler's `max_final_noise`, in 8-bit levels.
    """

    ancestral_only = False
    extra_channels = False
    max_final_noise: float | None = None

    @abstractmethod
    def __call__(
        self, schedule: Schedule, t: PerExample, s: PerExample, prediction: Prediction, floor: PerExample | float = 0.0
    ) -> StepVariance:
        """Return σ², broadcastable to x_t.

        Args:
            schedule: the curve.
            t: time of x_t.
            s: time of the next state, of t's shape.
            prediction: the denoiser's output at x_t.
            floor: variance of the sampler's own noise.
        """

    def extra_time(self, schedule: Schedule, t: Float64[Tensor, ""]) -> Float64[Tensor, ""] | None:
        """Return the time at which `prediction.extra` is evaluated in place of t; None: at t itself."""
        return None

    def check(self, network: object) -> None:  # noqa: B027 most variances work with every network
        """Raise ConfigError if `network.extra` names channels that this variance cannot read."""


class FromExtra(Variance):
    """A variance that reads `prediction.extra`.

    Attributes:
        kind: value of the attribute `extra` of a network that outputs these channels.
        remedy: end of the error message: how to train such a network.
    """

    extra_channels = True
    kind: str
    remedy: str

    def check(self, network: object) -> None:
        if getattr(network, "extra", self.kind) != self.kind:  # without the attribute, `read` checks the first output
            raise self._refusal(f"this network gives none (extra={getattr(network, 'extra', None)})")

    def read(self, prediction: Prediction) -> Float[Tensor, "b c h w"]:
        """Return prediction.extra.

        Raises:
            ConfigError: it is missing, or its shape differs from that of x̂_0.
        """
        if prediction.extra is None or prediction.extra.shape != prediction.x0.shape:
            channels = 0 if prediction.extra is None else prediction.extra.shape[1]
            raise self._refusal(f"the network gives {channels} of them for images of {prediction.x0.shape[1]} channels")
        return prediction.extra

    def _refusal(self, problem: str) -> ConfigError:
        return ConfigError(f"variance={self.kind} needs extra channels, and {problem}: {self.remedy}")


def floor_is_variance(s: Scalars, floor: Float[Tensor, "*#shape"]) -> Bool[Tensor, "*shape"]:
    """Return whether σ² of the step equals the floor: at s = 0 with a positive floor."""
    return (s == 0) & (floor > 0)


def to_float64(floor: PerExample | float, s: PerExample) -> Float64[Tensor, ""] | Float64[Tensor, " b"]:
    """Return the floor in float64 on the device of s."""
    return torch.as_tensor(floor, dtype=torch.float64, device=s.device)
