"""Combine a network with its schedule and objective; predict x_0 and ε.

    network → y → on_output (guidance) → solve for (x̂_0, ε̂) → clip → on_x0 (known pixels) → Prediction

A denoiser is a value: frozen, with its transforms in two tuples, so that `dataclasses.replace(denoiser, clip=None)` keeps the
guidance, and one transform on top of another applies both. Samplers, losses and likelihoods depend on a denoiser alone, and
no module below this one depends on a network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from diffusion_lab.objectives import Objective, Prediction
from diffusion_lab.schedules import Schedule, append_dims_like, to_device

__all__ = ["Clip", "Denoiser", "Evaluate", "OnOutput", "OnX0", "Output", "Prediction"]


class Output(NamedTuple):
    """The network's output at x_t, or that of a transform of it."""

    y: Tensor  # (B, C, H, W) in x_t's dtype; what the objective solves for x_0 and ε
    extra: Tensor | None = None  # the network's channels beyond C: a learned variance, a second head
    own: Tensor | None = None  # the conditional, unguided y, which `extra` belongs to; None: y itself
    gradient: Tensor | None = None  # s ∇ log p(y | x_t), which ancestral steps multiply by their variance and add


@runtime_checkable  # for the type checker of the tests
class Evaluate(Protocol):
    """The network and the transforms before this one, on any number of rows."""

    def __call__(
        self, x_t: Tensor, t: Tensor | float, previous: Tensor | None = None, **condition: Tensor
    ) -> Output: ...


Clip = float | Callable[[Tensor], Tensor] | None
# f(evaluate, x_t, t, previous, condition): `evaluate` may be called on other rows, several times, or not at all
OnOutput = Callable[[Evaluate, Tensor, Tensor, Tensor | None, dict[str, Tensor]], Output]
# f(x0, x_t, t)
OnX0 = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Denoiser:
    """Evaluate the network and solve its output for (x̂_0, ε̂).

    Args:
        network: called as network(scale · x_t, c, **condition) with c float (B,); returns (B, C or more, H, W).
        schedule: the curve (α, σ).
        objective: what the network's output means.
        clip: None, a limit for |x̂_0|, or a function of x̂_0 (see clipping.py). A function whose attribute `identity` is true
            counts as None.
        on_output: transforms of the output y in order, each f(evaluate, x_t, t, previous, condition) → Output. An attribute
            `moves_mean` that is true marks its `gradient` as one for the mean of ancestral steps; other samplers refuse it.
        on_x0: transforms of x̂_0 after clipping, in order, each f(x0, x_t, t) → x0. Where one changes x̂_0, ε̂ is derived
            again and `gradient` is 0. An attribute `fixed`, bool and broadcastable to x̂_0, marks the pixels that it sets
            whatever x̂_0 is: they count as changed also where the two are equal (both −1 after clipping).

    Raises:
        ConfigError: the objective cannot be used with the schedule.
    """

    network: Callable[..., Tensor]
    schedule: Schedule
    objective: Objective
    clip: Clip = None
    on_output: tuple[OnOutput, ...] = ()
    on_x0: tuple[OnX0, ...] = ()

    def __post_init__(self) -> None:
        self.objective.check(self.schedule)
        if getattr(self.clip, "identity", False):
            object.__setattr__(self, "clip", None)  # the fast path, where ε̂ is not derived a second time
        object.__setattr__(self, "on_output", tuple(self.on_output))
        object.__setattr__(self, "on_x0", tuple(self.on_x0))

    @property
    def self_conditioning(self) -> bool:
        """Whether the network reads x̂_0 of the step before, the argument `previous`. Samplers pass it always."""
        return bool(getattr(self.network, "self_conditioning", False))

    @property
    def moves_mean(self) -> bool:
        """Whether guidance moves the mean of ancestral steps, which the other samplers do not have."""
        return any(getattr(transform, "moves_mean", False) for transform in self.on_output)

    def __call__(
        self, x_t: Tensor, t: Tensor | float, previous: Tensor | None = None, **condition: Tensor
    ) -> Prediction:
        """Predict x_0 and ε at state x_t (B, C, H, W) and times t ∈ (0, 1], a number or a float tensor, 0-d or (B,).

        Args:
            x_t: the noisy images.
            t: the time, one for all or one for each image.
            previous: x̂_0 of the step before, for a self-conditioning network; None is zeros.
            condition: keyword arguments for the network, e.g. label int64 (B,).
        """
        t = as_time(t)
        return self.solve(x_t, t, self.output(x_t, t, previous, **condition))

    def output(self, x_t: Tensor, t: Tensor | float, previous: Tensor | None = None, **condition: Tensor) -> Output:
        """Return the network's output after all transforms of it. Arguments as for a call."""
        return self._evaluate(len(self.on_output))(x_t, as_time(t), previous, **condition)

    def solve(self, x_t: Tensor, t: Tensor, output: Output) -> Prediction:
        """Solve an output at x_t and times t, 0-d or (B,), for x_0 and ε; then clip, and apply `on_x0`."""
        x0, noise = self.objective.solve(self.schedule, t, x_t, output.y)
        changes = self.clip is not None or bool(self.on_x0)
        unclipped = noise if changes else None
        if output.own is not None:
            unclipped = self.objective.solve(self.schedule, t, x_t, output.own)[1]
        if not changes:
            return Prediction(x0, noise, output.y, output.extra, unclipped, output.gradient)
        alpha, sigma = (append_dims_like(v, x_t) for v in self.schedule.alpha_sigma(t.double()))
        if self.clip is not None:
            x0 = self.clip(x0) if callable(self.clip) else x0.clamp(-self.clip, self.clip)
            noise = (x_t - alpha * x0) / sigma
        gradient = output.gradient
        for transform in self.on_x0:
            x0, before = transform(x0, x_t, t), x0
            changed, fixed = x0 != before, getattr(transform, "fixed", None)
            if fixed is not None:
                changed = changed | fixed
            noise = torch.where(changed, (x_t - alpha * x0) / sigma, noise)
            gradient = None if gradient is None else torch.where(changed, 0.0, gradient)
        return Prediction(x0, noise, output.y, output.extra, unclipped, gradient)

    def _evaluate(self, count: int) -> Evaluate:
        """The network and the first `count` transforms of its output."""
        if count == 0:
            return self._network
        transform, before = self.on_output[count - 1], self._evaluate(count - 1)

        def evaluate(x_t: Tensor, t: Tensor | float, previous: Tensor | None = None, **condition: Tensor) -> Output:
            return transform(before, x_t, as_time(t), previous, condition)

        return evaluate

    def _network(self, x_t: Tensor, t: Tensor | float, previous: Tensor | None = None, **condition: Tensor) -> Output:
        """The network's y in x_t's dtype and its channels beyond C."""
        t = as_time(t)
        dtype = _dtype(self.network, x_t)
        scale = self.objective.input_scale(self.schedule, t)
        c = self.objective.conditioning(self.schedule, t).to(dtype)
        c = torch.full((len(x_t),), float(c), dtype=dtype, device=x_t.device) if _host(c) else to_device(c, x_t.device)
        inputs: dict[str, Tensor | None] = {**condition}
        if self.self_conditioning:
            inputs["previous"] = None if previous is None else previous.to(dtype)
        y = self.network((append_dims_like(scale, x_t) * x_t).to(dtype), c.expand(len(x_t)), **inputs).to(x_t.dtype)
        channels = x_t.shape[1]
        return Output(y) if y.shape[1] == channels else Output(y[:, :channels], y[:, channels:])


def as_time(t: Tensor | float) -> Tensor:
    """Return a time as a tensor; a number in float64."""
    return torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64)


def _host(c: Tensor) -> bool:
    """Whether reading c as a number costs no device synchronization."""
    return c.ndim == 0 and c.device.type == "cpu"


def _dtype(network: Callable[..., Tensor], x: Tensor) -> torch.dtype:
    """The dtype of the network's weights; x's where it has none."""
    parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    return x.dtype if parameter is None else parameter.dtype
