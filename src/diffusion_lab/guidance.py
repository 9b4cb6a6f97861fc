"""Guidance towards a class: transforms of the network's output y, which a denoiser carries in `on_output`.

y is affine in ε̂ at a given (x_t, t), so a mean of outputs with weights that sum to 1 is that mean of ε̂. Outputs are combined
before the objective is solved and x̂_0 clipped, once, so that every sampler, objective and variance works with them, and one
guidance may stand on another: each evaluates what the denoiser has before it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diffusion_lab.denoiser import Denoiser, Evaluate, Output
from diffusion_lab.errors import ConfigError
from diffusion_lab.objectives import Objective
from diffusion_lab.schedules import Schedule, append_dims_like, to_device


def Unguided(denoiser: Denoiser) -> Denoiser:
    """Return the denoiser unchanged."""
    return denoiser


def ClassifierFree(
    denoiser: Denoiser,
    scale: float = 2.0,
    rescale: float = 0.0,
    interval: Sequence[float] = (0.0, 1.0),
    num_classes: int | None = None,
) -> Denoiser:
    """Append y = y_u + s (y_c − y_u), of one network with and without its label (Ho & Salimans 2022, whose w is s − 1).

    Both come from one call on twice the batch. Scale 1 is the conditional network itself, bit for bit and at no cost, and so is
    any scale outside the interval. Channels beyond C (a learned variance, a second head) stay those of the conditional half:
    only the mean is guided.

    Args:
        denoiser: of a network that takes `label`, int64 (B,) with a null label or float (B, K) where zeros are no label.
        scale: s ≥ 0; 0 is the unconditional model.
        rescale: φ in [0, 1]; φ of the guided output is scaled to the standard deviation, image by image, of the conditional one
            (Lin et al. 2024, eq. 15 and 16, who publish 0.7).
        interval: guide at times t in (low, high] of [0, 1] only (Kynkäänniemi et al. 2024, who state it in σ).
        num_classes: K, which is also the null label; None reads the network's attribute.

    Returns:
        The denoiser with this transform appended to `on_output`.

    Raises:
        ConfigError: a network without a null label, a scale, rescale or interval out of range; in a call, no label.
    """
    classes = getattr(denoiser.network, "num_classes", None) if num_classes is None else num_classes
    if classes is None:
        raise ConfigError(
            "guidance=cfg needs a network with a null label, and this one takes no labels: train with condition=label, or "
            "write guidance=classifier"
        )
    low, high = _interval(interval)
    transform = ClassifierFreeTransform(_scale(scale), float(rescale), (low, high), int(classes))
    return replace(denoiser, on_output=(*denoiser.on_output, transform))


def ClassifierGuidance(
    denoiser: Denoiser,
    classifier: Callable[[Tensor, Tensor], Tensor],
    num_classes: int | None = None,
    scale: float = 1.0,
    interval: Sequence[float] = (0.0, 1.0),
    form: str = "exact",
    labelled: bool | None = None,
) -> Denoiser:
    """Append ε̂ − s σ_t ∇ log p(y | x_t) with the gradient of a classifier of noisy images (Dhariwal & Nichol 2021).

    The `exact` form moves ε̂, which moves x̂_0 by s (σ²/α) ∇ and serves every sampler (their algorithm 2). The `published` form
    moves the mean of ancestral steps by s Σ ∇ (their algorithm 1), Σ the variance of the step: the same in the limit of
    small steps, weaker at few. The gradient is zero at α = 0, where x_t is independent of the class, and for the null label.

    Args:
        denoiser: what is guided; a network that takes labels gets them too.
        classifier: (x_t (B, C, H, W), t 0-d or (B,)) → logits (B, K), differentiable.
        num_classes: K, from which on a label is the null label; None takes the number of logits.
        scale: s ≥ 0.
        interval: guide at times t in (low, high] of [0, 1] only.
        form: "exact" or "published".
        labelled: whether the network takes labels itself; None: if it has `num_classes`. The label is removed if not, unless
            a guidance before this one in `on_output` reads it, which then decides.

    Returns:
        The denoiser with this transform appended to `on_output`.

    Raises:
        ConfigError: an unknown form, a scale or interval out of range; in a call, no int64 label.
    """
    if form not in ("exact", "published"):
        raise ConfigError(f"guidance.form={form} is unknown: write exact or published")
    if labelled is None:
        labelled = getattr(denoiser.network, "num_classes", None) is not None
    read_before = any(isinstance(f, ClassifierFreeTransform | ClassifierTransform) for f in denoiser.on_output)
    transform = ClassifierTransform(
        denoiser.schedule,
        denoiser.objective,
        classifier,
        num_classes,
        _scale(scale),
        _interval(interval),
        form,
        passes_label=labelled or read_before,
    )
    return replace(denoiser, on_output=(*denoiser.on_output, transform))


@dataclass(frozen=True, eq=False)
class ClassifierFreeTransform:
    """The transform of `ClassifierFree`, whose arguments are its attributes."""

    scale: float
    rescale: float
    interval: tuple[float, float]
    num_classes: int

    def __post_init__(self) -> None:
        if not 0 <= self.rescale <= 1:
            raise ConfigError(f"guidance.rescale={self.rescale} is outside [0, 1]: the published value is 0.7")

    def __call__(
        self, evaluate: Evaluate, x_t: Tensor, t: Tensor, previous: Tensor | None, condition: dict[str, Tensor]
    ) -> Output:
        """Combine the conditional and the unconditional output, and their gradients, with the weights s and 1 − s."""
        label, inside = condition.get("label"), _inside(self.interval, t)
        if label is None:
            raise ConfigError("guidance=cfg was given no labels to guide towards: pass condition={'label': …}")
        if self.scale == 1 or not bool(inside.any()):
            return evaluate(x_t, t, previous, **condition)
        null = torch.zeros_like(label) if label.is_floating_point() else torch.full_like(label, self.num_classes)
        if self.scale == 0 and t.ndim == 0:
            return evaluate(x_t, t, previous, **{**condition, "label": null})
        both = evaluate(
            torch.cat([x_t, x_t]),
            t if t.ndim == 0 else torch.cat([t, t]),
            None if previous is None else torch.cat([previous, previous]),
            **{name: torch.cat([v, null if name == "label" else v]) for name, v in condition.items()},
        )
        conditional, y = self._combine(both.y, inside)
        if self.rescale:
            own, target = (v.flatten(1).std(1, correction=0) for v in (y, conditional))
            rescaled = y * append_dims_like(1 + self.rescale * (target / own - 1), y)
            y = rescaled if t.ndim == 0 else torch.where(append_dims_like(inside, y) > 0, rescaled, conditional)
        return Output(
            y,
            None if both.extra is None else both.extra.chunk(2)[0],
            conditional if both.own is None else both.own.chunk(2)[0],
            None if both.gradient is None else self._combine(both.gradient, inside)[1],
        )

    def _combine(self, both: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        """The conditional half, and u + s (c − u), which outside the interval is the conditional half."""
        conditional, unconditional = both.chunk(2)
        value = unconditional + self.scale * (conditional - unconditional)
        return conditional, value if inside.ndim == 0 else torch.where(
            append_dims_like(inside, value) > 0, value, conditional
        )


@dataclass(frozen=True, eq=False)
class ClassifierTransform:
    """The transform of `ClassifierGuidance`, whose arguments are its attributes."""

    schedule: Schedule
    objective: Objective
    classifier: Callable[[Tensor, Tensor], Tensor]
    num_classes: int | None
    scale: float
    interval: tuple[float, float]
    form: str
    passes_label: bool

    @property
    def moves_mean(self) -> bool:
        """Whether the gradient is for the mean of ancestral steps."""
        return self.form == "published"

    def __call__(
        self, evaluate: Evaluate, x_t: Tensor, t: Tensor, previous: Tensor | None, condition: dict[str, Tensor]
    ) -> Output:
        """Shift y, or add to the gradient of the output."""
        gradient = self.gradient(x_t, t, condition)
        if not self.passes_label:
            condition = {name: v for name, v in condition.items() if name != "label"}
        output = evaluate(x_t, t, previous, **condition)
        if gradient is None:
            return output
        if self.moves_mean:
            return output._replace(gradient=gradient if output.gradient is None else output.gradient + gradient)
        return output._replace(
            y=self.shifted(output.y, t, gradient), own=output.y if output.own is None else output.own
        )

    def shifted(self, y: Tensor, t: Tensor, gradient: Tensor) -> Tensor:
        """Return y after ε̂ ← ε̂ − σ gradient at the same x_t: Δy = (D/α) Δε. 0-d or (B,) t, y and gradient (B, …)."""
        t = t.double()
        alpha, sigma = self.schedule.alpha_sigma(t)
        slope = torch.where(alpha > 0, self.objective.determinant(self.schedule, t) * sigma / alpha, 0.0)
        return y - append_dims_like(slope, y) * gradient

    def gradient(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor | None:
        """Return s ∇ log p(y | x_t), (B, C, H, W); None where no image is guided."""
        label = condition.get("label")
        if label is None or label.is_floating_point():
            raise ConfigError(
                "guidance=classifier was given no classes to guide towards: pass condition={'label': int64 (B,)}"
            )
        inside = _inside(self.interval, t) & (self.schedule.alpha_sigma(t.double())[0] > 0)
        if self.scale == 0 or not bool(inside.any()):
            return None
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            log_p = self.classifier(x, t).log_softmax(1)
            classes = log_p.shape[1] if self.num_classes is None else self.num_classes
            (gradient,) = torch.autograd.grad(log_p.gather(1, label.clamp(max=classes - 1)[:, None]).sum(), x)
        guided = label < classes
        if t.ndim:
            guided = guided & to_device(inside, label.device)
        return torch.where(append_dims_like(guided, gradient) > 0, self.scale * gradient, 0.0)


def _scale(scale: float) -> float:
    if not 0 <= scale < math.inf:
        raise ConfigError(f"guidance.scale={scale}: write a number from 0 on")
    return float(scale)


def _interval(interval: Sequence[float]) -> tuple[float, float]:
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise ConfigError(f"guidance.interval={list(interval)}: write two times [low,high] with 0 <= low < high <= 1")
    return float(interval[0]), float(interval[1])


def _inside(interval: tuple[float, float], t: Tensor) -> Tensor:
    """Whether times t lie in (low, high]: bool, of t's shape."""
    return (t > interval[0]) & (t <= interval[1])


class NoisyClassifier:
    """(x_t, t) → logits along any curve, by a classifier that was trained on x_t along another.

    p(y | x_t) does not depend on the scale of x_t, so the classifier is evaluated at its own time of equal ln(α/σ), with x_t
    scaled to that time's α.

    Args:
        network: called as network(x, c), c = own.conditioning(t) (B,).
        own: the curve that it was trained along.
        schedule: the curve of x_t.
    """

    def __init__(self, network: nn.Module, own: Schedule, schedule: Schedule) -> None:
        self.network, self.own, self.schedule = network, own, schedule

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Logits (B, K) of x_t (B, C, H, W) at times t in (0, 1], 0-d or (B,)."""
        t = t.double()
        time = t if self.own is self.schedule else self.own.time(self.schedule.lam(t)).clamp(self.own.t_min, 1)
        ratio = self.own.alpha_sigma(time)[0] / self.schedule.alpha_sigma(t)[0]
        c = to_device(self.own.conditioning(time).float().expand(len(x_t)), x_t.device)
        logits: Tensor = self.network((append_dims_like(ratio, x_t) * x_t).float(), c)
        return logits.to(x_t.dtype)
