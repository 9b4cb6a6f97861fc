"""Combine a network with its schedule and objective; predict x_0 and ε.

    network → y → on_output (guidance) → solve for (x̂_0, ε̂) → clip → on_x0 (known pixels) → Prediction

A denoiser is a frozen value with its transforms in two tuples: `dataclasses.replace(denoiser, clip=None)` keeps the guidance,
and appending a second transform applies both. Samplers, losses and likelihoods depend only on a denoiser, and no module
below this one depends on a network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_lab.errors import check_number
from diffusion_lab.objectives import Objective, Prediction
from diffusion_lab.schedules import PerExample, Schedule, append_dims_like, check_float32, to_device

__all__ = ["Clip", "Denoiser", "Evaluate", "OnOutput", "OnX0", "Output", "Prediction"]


class Output(NamedTuple):
    """The network's output at x_t, or the output of a transform of it."""

    y: Float[Tensor, "b c h w"]  # in x_t's dtype; the objective solves it for x_0 and ε
    extra: Float[Tensor, "b extra h w"] | None = None  # channels beyond C: a learned variance or a second head
    own: Float[Tensor, "b c h w"] | None = None  # the conditional, unguided y, which `extra` refers to; None: y itself
    gradient: Float[Tensor, "b c h w"] | None = None  # s ∇ log p(y | x_t); ancestral steps add Σ times it to the mean


@runtime_checkable  # for the type checker of the tests
class Evaluate(Protocol):
    """Evaluate the network and the transforms before the current one, for any number of rows."""

    def __call__(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: PerExample | float,
        previous: Float[Tensor, "b c h w"] | None = None,
        **condition: Tensor,
    ) -> Output: ...


Clip = float | Callable[[Tensor], Tensor] | None
# f(evaluate, x_t, t, previous, condition) → Output; `evaluate` may be called any number of times, on any rows
OnOutput = Callable[[Evaluate, Tensor, Tensor, Tensor | None, dict[str, Tensor]], Output]
# f(x0, x_t, t) → x0
OnX0 = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Denoiser:
    """Evaluate the network and solve its output for (x̂_0, ε̂).

    Args:
        network: called as network(scale · x_t, c, **condition) with c float (B,), the time-conditioning input; returns
            (B, C or more, H, W).
        schedule: the curve (α, σ).
        objective: the quantity that the network predicts.
        clip: None, a limit for |x̂_0|, or a function of x̂_0 (see clipping.py). A function whose attribute `identity` is true
            is replaced by None.
        on_output: transforms of the output y in order, each f(evaluate, x_t, t, previous, condition) → Output. A true
            attribute `moves_mean` marks its `gradient` as a shift of the mean of ancestral steps; other samplers refuse it.
        on_x0: transforms of x̂_0 after clipping, in order, each f(x0, x_t, t) → x0. Where one changes x̂_0, ε̂ is
            recomputed and `gradient` is 0. An attribute `fixed`, bool and broadcastable to x̂_0, marks pixels whose result
            does not depend on x̂_0: they count as changed even where the values are equal (both −1 after clipping).

    Raises:
        ConfigError: the objective cannot be used with the schedule, or α(1) of the schedule underflows float32.
    """

    network: Callable[..., Tensor]
    schedule: Schedule
    objective: Objective
    clip: Clip = None
    on_output: tuple[OnOutput, ...] = ()
    on_x0: tuple[OnX0, ...] = ()

    def __post_init__(self) -> None:
        self.objective.check(self.schedule)
        check_float32(self.schedule)
        if not callable(self.clip):
            check_number("clip", self.clip, "(0, 1000]", "a limit, or a function of x_0", optional=True)
        if getattr(self.clip, "identity", False):
            object.__setattr__(self, "clip", None)  # the fast path, in which ε̂ is not recomputed
        object.__setattr__(self, "on_output", tuple(self.on_output))
        object.__setattr__(self, "on_x0", tuple(self.on_x0))

    @property
    def self_conditioning(self) -> bool:
        """Whether the network reads the argument `previous`, x̂_0 of the previous step, which samplers always pass."""
        return bool(getattr(self.network, "self_conditioning", False))

    @property
    def moves_mean(self) -> bool:
        """Whether guidance shifts the mean of ancestral steps, so that no other sampler applies."""
        return any(getattr(transform, "moves_mean", False) for transform in self.on_output)

    def __call__(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: PerExample | float,
        previous: Float[Tensor, "b c h w"] | None = None,
        **condition: Tensor,
    ) -> Prediction:
        """Predict x_0 and ε at the state x_t and times t.

        Args:
            x_t: the noisy images.
            t: time in (0, 1], one for the batch or one for each image.
            previous: x̂_0 of the previous step, for a self-conditioning network; None means zeros.
            condition: keyword arguments for the network, e.g. label int64 (B,).
        """
        t = as_time(t)
        return self.solve(x_t, t, self.output(x_t, t, previous, **condition))

    def with_extra_at(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: Float[Tensor, ""],
        extra_time: Float[Tensor, ""],
        previous: Float[Tensor, "b c h w"] | None = None,
        **condition: Tensor,
    ) -> Prediction:
        """Predict x_0 and ε at time t, with `extra` and `unclipped` of time `extra_time`, by one call on twice the batch.

        Other arguments as for a call.
        """
        times = torch.stack([t, extra_time]).repeat_interleave(len(x_t))
        twice = {name: torch.cat([value, value]) for name, value in condition.items()}
        both = self.output(
            torch.cat([x_t, x_t]), times, None if previous is None else torch.cat([previous] * 2), **twice
        )
        parts = [(None, None) if v is None else v.chunk(2) for v in both]
        halves = [Output(*(part[k] for part in parts)) for k in range(2)]  # type: ignore[arg-type]  # y is a tensor
        first, second = self.solve(x_t, t, halves[0]), self.solve(x_t, extra_time, halves[1])
        return first._replace(
            extra=second.extra, unclipped=second.noise if second.unclipped is None else second.unclipped
        )

    def output(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: PerExample | float,
        previous: Float[Tensor, "b c h w"] | None = None,
        **condition: Tensor,
    ) -> Output:
        """Return the network's output after all transforms `on_output`. Arguments as for a call."""
        return self._evaluate(len(self.on_output))(x_t, as_time(t), previous, **condition)

    def solve(self, x_t: Float[Tensor, "b c h w"], t: PerExample, output: Output) -> Prediction:
        """Solve an output at x_t and times t for x_0 and ε; then clip x̂_0 and apply `on_x0`."""
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
        """Return the function that evaluates the network and the first `count` transforms of its output."""
        if count == 0:
            return self._network
        transform, before = self.on_output[count - 1], self._evaluate(count - 1)

        def evaluate(
            x_t: Float[Tensor, "b c h w"],
            t: PerExample | float,
            previous: Float[Tensor, "b c h w"] | None = None,
            **condition: Tensor,
        ) -> Output:
            return transform(before, x_t, as_time(t), previous, condition)

        return evaluate

    def _network(
        self,
        x_t: Float[Tensor, "b c h w"],
        t: PerExample | float,
        previous: Float[Tensor, "b c h w"] | None = None,
        **condition: Tensor,
    ) -> Output:
        """Call the network; return y and the channels beyond C in x_t's dtype."""
        t = as_time(t)
        dtype = _dtype(self.network, x_t)
        scale = self.objective.input_scale(self.schedule, t)
        c = self.objective.conditioning(self.schedule, t).to(dtype)
        c = (
            torch.full((len(x_t),), float(c), dtype=dtype, device=x_t.device)
            if _is_cpu_scalar(c)
            else to_device(c, x_t.device)
        )
        inputs: dict[str, Tensor | None] = {**condition}
        if self.self_conditioning:
            inputs["previous"] = None if previous is None else previous.to(dtype)
        y = self.network((append_dims_like(scale, x_t) * x_t).to(dtype), c.expand(len(x_t)), **inputs).to(x_t.dtype)
        channels = x_t.shape[1]
        return Output(y) if y.shape[1] == channels else Output(y[:, :channels], y[:, channels:])


def as_time(t: PerExample | float) -> PerExample:
    """Return a time as a tensor; a Python number becomes float64."""
    return torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64)


def _is_cpu_scalar(c: Tensor) -> bool:
    """Return whether `float(c)` works without a device synchronization."""
    return c.ndim == 0 and c.device.type == "cpu"


def _dtype(network: Callable[..., Tensor], x: Tensor) -> torch.dtype:
    """Return the dtype of the network's weights, or that of x for a network without parameters."""
    parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    return x.dtype if parameter is None else parameter.dtype
