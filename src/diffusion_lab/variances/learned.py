"""The learned variance of improved DDPM."""

from torch import Tensor

from diffusion_lab.errors import ConfigError
from diffusion_lab.gaussian import transition
from diffusion_lab.objectives import Prediction
from diffusion_lab.schedules import Scalars, Schedule, append_dims_like
from diffusion_lab.variances.base import FromExtra, wide

LOSSES = ("hybrid", "vlb")


class Learned(FromExtra):
    """log σ² = f log σ²_{t|s} + (1 − f) log floor, f = (v + 1)/2, v the network's second half, unbounded (Nichol & Dhariwal
    2021, eq. 15). A strided step takes the same v between the bounds of its own pair (their section 4).

    Args:
        loss: how it is trained (see `losses.py`): `hybrid`, the weighted error and a little of the variational bound, the mean
            detached there; or `vlb`, the bound alone, the mean as well.

    Raises:
        ConfigError: another loss.
    """

    ancestral_only = True
    kind = "learned"
    remedy = "train with variance=learned, or write variance=fixed_small"

    def __init__(self, loss: str = "hybrid") -> None:
        if loss not in LOSSES:
            raise ConfigError(f"variance.loss={loss} is unknown: write one of {', '.join(LOSSES)}")
        self.loss = loss

    def __call__(
        self, schedule: Schedule, t: Scalars, s: Scalars, prediction: Prediction, floor: Tensor | float = 0.0
    ) -> Tensor:
        lower, growth = self._range(schedule, t, s, prediction, floor)
        return append_dims_like(lower, growth) * growth.exp()

    def log(
        self, schedule: Schedule, t: Scalars, s: Scalars, prediction: Prediction, floor: Tensor | float = 0.0
    ) -> Tensor:
        """ln σ², (B, C, H, W), also where σ² itself is too small for its dtype."""
        lower, growth = self._range(schedule, t, s, prediction, floor)
        return append_dims_like(lower.log(), growth) + growth

    def _range(
        self, schedule: Schedule, t: Scalars, s: Scalars, prediction: Prediction, floor: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """The lower bound in float64 and ln(σ²/lower) = f ln(σ²_{t|s}/lower), whose factor is rounded once."""
        v, lower = self.read(prediction), wide(floor, s)
        if lower.device.type == "cpu" and not bool((lower > 0).all()):
            raise ConfigError(
                "variance=learned needs a positive floor, for its logarithm: σ̃² of the pair, at s = 0 that of the next pair"
            )
        ratio = transition(schedule, t.double(), s.double()).variance / lower
        return lower, append_dims_like(ratio.log(), v) * (v + 1) / 2
