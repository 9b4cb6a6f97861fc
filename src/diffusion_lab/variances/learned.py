"""The learned variance of improved DDPM."""

from jaxtyping import Float, Float64
from torch import Tensor

from diffusion_lab.errors import ConfigError
from diffusion_lab.gaussian import transition
from diffusion_lab.objectives import Prediction
from diffusion_lab.schedules import PerExample, Schedule, append_dims_like
from diffusion_lab.variances.base import FromExtra, StepVariance, to_float64

LOSSES = ("hybrid", "vlb")


class Learned(FromExtra):
    """log σ² = f log σ²_{t|s} + (1 − f) log floor with f = (v + 1)/2 (Nichol & Dhariwal 2021, eq. 15).

    v is the network's channels beyond C, unbounded. A strided step interpolates with the same v between the bounds of its own
    pair (their section 4).

    Args:
        loss: training loss (see `losses.py`). `hybrid`: the weighted error plus a small multiple of the variational bound, in
            which the mean is detached. `vlb`: only the bound, which also trains the mean.

    Raises:
        ConfigError: an unknown loss.
    """

    ancestral_only = True
    kind = "learned"
    remedy = "train with variance=learned, or write variance=fixed_small"

    def __init__(self, loss: str = "hybrid") -> None:
        if loss not in LOSSES:
            raise ConfigError(f"variance.loss={loss} is unknown: write one of {', '.join(LOSSES)}")
        self.loss = loss

    def __call__(
        self, schedule: Schedule, t: PerExample, s: PerExample, prediction: Prediction, floor: PerExample | float = 0.0
    ) -> StepVariance:
        lower, growth = self._range(schedule, t, s, prediction, floor)
        return append_dims_like(lower, growth) * growth.exp()

    def log(
        self, schedule: Schedule, t: PerExample, s: PerExample, prediction: Prediction, floor: PerExample | float = 0.0
    ) -> Float[Tensor, "b c h w"]:
        """Return ln σ², finite also where σ² underflows. Arguments as for a call."""
        lower, growth = self._range(schedule, t, s, prediction, floor)
        return append_dims_like(lower.log(), growth) + growth

    def _range(
        self, schedule: Schedule, t: PerExample, s: PerExample, prediction: Prediction, floor: PerExample | float
    ) -> tuple[Float64[Tensor, ""] | Float64[Tensor, " b"], Float[Tensor, "b c h w"]]:
        """Return the lower bound in float64 and ln(σ²/lower) = f ln(σ²_{t|s}/lower), whose second factor is rounded once."""
        v, lower = self.read(prediction), to_float64(floor, s)
        if lower.device.type == "cpu" and not bool((lower > 0).all()):
            raise ConfigError(
                "variance=learned needs a floor > 0, because it takes the logarithm: pass σ̃² of the pair (t, s), and at s = 0 "
                "that of the next pair"
            )
        ratio = transition(schedule, t.double(), s.double()).variance / lower
        return lower, append_dims_like(ratio.log(), v) * (v + 1) / 2
