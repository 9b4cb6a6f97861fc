"""The waist of the hourglass: network + schedule + objective → Prediction(x0, noise, …).

Everything above (samplers, losses, likelihood, guidance) knows only a denoiser; everything below knows nothing of networks.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffusion_lab.objectives import Objective, Prediction
from diffusion_lab.schedules import Schedule, match, move

__all__ = ["Clip", "Denoiser", "Prediction"]

Clip = float | Callable[[Tensor], Tensor] | None


class Denoiser:
    """Solves the network's output for (x̂_0, ε̂).

    Args:
        network: called as network(scale · x_t, c, **condition) with c float (B,); returns (B, C or more, H, W).
        schedule: the curve (α, σ).
        objective: what the network's output means.
        clip: None, a limit for |x̂_0|, or a function of x̂_0 (see guidance.py for dynamic thresholding).

    Raises:
        ValueError: the objective cannot work on the schedule.
    """

    def __init__(
        self, network: Callable[..., Tensor], schedule: Schedule, objective: Objective, clip: Clip = None
    ) -> None:
        objective.check(schedule)
        self.network, self.schedule, self.objective, self.clip = network, schedule, objective, clip
        #: whether it is the mean of ancestral steps that a classifier moves (guidance.py); other samplers refuse such a denoiser
        self.moves_mean = False
        #: whether the network takes x̂_0 of the step before; samplers pass it always, it goes on only where it is wanted
        self.self_conditioning = bool(getattr(network, "self_conditioning", False))

    def __call__(
        self, x_t: Tensor, t: Tensor | float, previous: Tensor | None = None, **condition: Tensor
    ) -> Prediction:
        """The prediction at state x_t (B, C, H, W) and times t ∈ (0, 1], a number or a float tensor, 0-d or (B,).

        Args:
            x_t: the noisy images.
            t: the time, one for all or one for each image.
            previous: x̂_0 of the step before, for a self-conditioning network; None is zeros.
            condition: keyword arguments for the network, e.g. label int64 (B,).
        """
        t = as_time(t)
        return self.solved(x_t, t, *self.output(x_t, t, previous, **condition))

    def solved(self, x_t: Tensor, t: Tensor, output: Tensor, extra: Tensor | None) -> Prediction:
        """What an output y (B, C, H, W) at x_t and times t, 0-d or (B,), says of x_0 and ε, clipped."""
        x0, noise = self.objective.solve(self.schedule, t, x_t, output)
        if self.clip is None:
            return Prediction(x0, noise, output, extra)
        x0 = self.clip(x0) if callable(self.clip) else x0.clamp(-self.clip, self.clip)
        alpha, sigma = self.schedule.alpha_sigma(t.double())
        return Prediction(x0, (x_t - match(alpha, x_t) * x0) / match(sigma, x_t), output, extra, unclipped=noise)

    def output(
        self, x_t: Tensor, t: Tensor | float, previous: Tensor | None = None, **condition: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The network's y (B, C, H, W) in x_t's dtype and its channels beyond C, if any. Arguments as for a call."""
        t = as_time(t)
        dtype = _dtype(self.network, x_t)
        scale = self.objective.input_scale(self.schedule, t)
        c = self.objective.conditioning(self.schedule, t).to(dtype)
        c = torch.full((len(x_t),), float(c), dtype=dtype, device=x_t.device) if _host(c) else move(c, x_t.device)
        inputs: dict[str, Tensor | None] = {**condition}
        if self.self_conditioning:
            inputs["previous"] = None if previous is None else previous.to(dtype)
        y = self.network((match(scale, x_t) * x_t).to(dtype), c.expand(len(x_t)), **inputs).to(x_t.dtype)
        channels = x_t.shape[1]
        return (y, None) if y.shape[1] == channels else (y[:, :channels], y[:, channels:])


def as_time(t: Tensor | float) -> Tensor:
    """A time as a tensor; a number in float64."""
    return torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64)


def _host(c: Tensor) -> bool:
    """Whether reading c as a number costs no device synchronisation."""
    return c.ndim == 0 and c.device.type == "cpu"


def _dtype(network: Callable[..., Tensor], x: Tensor) -> torch.dtype:
    """The dtype of the network's weights; x's where it has none."""
    parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    return x.dtype if parameter is None else parameter.dtype
