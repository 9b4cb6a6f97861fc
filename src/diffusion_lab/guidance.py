"""Guidance towards a class: transforms of the network's output y in a denoiser's `on_output`.

y is affine in ε̂ at a fixed (x_t, t), so a combination of outputs whose weights sum to 1 combines ε̂ with the same weights.
Outputs are combined once, before the objective is solved and x̂_0 is clipped. Guidance therefore works with every sampler,
objective and variance, and composes: each transform evaluates those before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diffusion_lab.denoiser import Denoiser, Evaluate, Output
from diffusion_lab.errors import ConfigError, check_number, check_numbers
from diffusion_lab.objectives import Objective
from diffusion_lab.schedules import PerExample, Scalars, Schedule, append_dims_like, to_device

FLAT = 4  # spread in units of the rounding error of the largest pixel, up to which an image counts as constant


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
    """Append y = y_u + s (y_c − y_u), one network with and without its label (Ho & Salimans 2022, where w = s − 1).

    Both outputs come from one call on twice the batch. At scale 1, and outside the interval, the result is that of the
    conditional network, bit for bit, without the second half. Channels beyond C (a learned variance, a second head) are those
    of the conditional half: only the mean is guided.

    Args:
        denoiser: its network takes `label`, int64 (B,) with a null label or float (B, K) where zeros mean no label.
        scale: s in [0, 10⁹]; 0 is the unconditional model.
        rescale: φ in [0, 1]; the guided output is interpolated with weight φ to its rescaling to the standard deviation of the
            conditional one, for each image (Lin et al. 2024, eq. 15 and 16, who publish 0.7).
        interval: (low, high) in [0, 1]; guide at times t in (low, high] only (Kynkäänniemi et al. 2024, who state it in σ).
        num_classes: K, which is also the null label; None reads the network's attribute `num_classes`.

    Returns:
        The denoiser with this transform appended to `on_output`.

    Raises:
        ConfigError: the network has no null label, or an argument is out of range; in a call, the label is missing.
    """
    classes = getattr(denoiser.network, "num_classes", None) if num_classes is None else num_classes
    if classes is None:
        raise ConfigError(
            "guidance=cfg needs a network with a null label, and this network takes no label: train with condition=label, or "
            "write guidance=classifier"
        )
    low, high = _interval(interval)
    transform = ClassifierFreeTransform(_scale(scale), rescale, (low, high), classes)
    return replace(denoiser, on_output=(*denoiser.on_output, transform))


def ClassifierGuidance(
    denoiser: Denoiser,
    classifier: Callable[[Tensor, Tensor], Tensor],
    num_classes: int | None = None,
    scale: float = 1.0,
    interval: Sequence[float] = (0.0, 1.0),
    form: str = "exact",
    labeled: bool | None = None,
) -> Denoiser:
    """Append ε̂ − s σ_t ∇ log p(y | x_t) with the gradient of a classifier of noisy images (Dhariwal & Nichol 2021).

    The `exact` form shifts ε̂ and thereby x̂_0, by s (σ²/α) ∇, and works with every sampler (their algorithm 2). The `published`
    form shifts the mean of ancestral steps by s Σ ∇, Σ the variance of the step (their algorithm 1). The two agree in the limit
    of small steps; with few steps the published form is weaker. The gradient is 0 at α = 0, where x_t is independent of the
    class, and for the null label.

    Args:
        denoiser: the denoiser to guide; a network that takes labels gets them too.
        classifier: (x_t (B, C, H, W), t 0-d or (B,)) → logits (B, K), differentiable.
        num_classes: K; labels ≥ K are null labels. None uses the number of logits.
        scale: s in [0, 10⁹].
        interval: (low, high) in [0, 1]; guide at times t in (low, high] only.
        form: "exact" or "published".
        labeled: whether the network itself takes labels; None means that it has the attribute `num_classes`. Otherwise this
            transform removes the label, unless an earlier guidance in `on_output` reads it, which then removes it itself.

    Returns:
        The denoiser with this transform appended to `on_output`.

    Raises:
        ConfigError: an unknown form, or an argument is out of range; in a call, the label is missing or not int64.
    """
    if form not in ("exact", "published"):
        raise ConfigError(f"guidance.form={form} is unknown: write exact or published")
    if labeled is None:
        labeled = getattr(denoiser.network, "num_classes", None) is not None
    read_earlier = any(isinstance(f, ClassifierFreeTransform | ClassifierTransform) for f in denoiser.on_output)
    transform = ClassifierTransform(
        denoiser.schedule,
        denoiser.objective,
        classifier,
        num_classes,
        _scale(scale),
        _interval(interval),
        form,
        passes_label=labeled or read_earlier,
    )
    return replace(denoiser, on_output=(*denoiser.on_output, transform))


@dataclass(frozen=True, eq=False)
class ClassifierFreeTransform:
    """The transform that `ClassifierFree` appends; attributes as its arguments."""

    scale: float
    rescale: float
    interval: tuple[float, float]
    num_classes: int

    def __post_init__(self) -> None:
        _scale(self.scale)
        _interval(self.interval)
        check_number("guidance.rescale", self.rescale, "[0, 1]", "the published value is 0.7")
        check_number("guidance.num_classes", self.num_classes, "[1, 1000000]", whole=True)

    def __call__(
        self,
        evaluate: Evaluate,
        x_t: Float[Tensor, "b c h w"],
        t: PerExample,
        previous: Float[Tensor, "b c h w"] | None,
        condition: dict[str, Tensor],
    ) -> Output:
        """Combine the conditional and the unconditional output, and their gradients, with the weights s and 1 − s."""
        label, inside = condition.get("label"), _inside(self.interval, t)
        if label is None:
            raise ConfigError(
                "guidance=cfg needs a label to guide towards, and the condition has none: pass condition={'label': …}"
            )
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
            std, target_std = (v.flatten(1).std(1, correction=0) for v in (y, conditional))
            # a constant image has no spread but that of rounding, and no scale gives it another: it is not rescaled
            constant = std <= FLAT * torch.finfo(std.dtype).eps * y.flatten(1).abs().amax(1)
            ratio = torch.where(constant, 1.0, target_std / std)
            rescaled = y * append_dims_like(1 + self.rescale * (ratio - 1), y)
            y = rescaled if t.ndim == 0 else torch.where(append_dims_like(inside, y) > 0, rescaled, conditional)
        return Output(
            y,
            None if both.extra is None else both.extra.chunk(2)[0],
            conditional if both.own is None else both.own.chunk(2)[0],
            None if both.gradient is None else self._combine(both.gradient, inside)[1],
        )

    def _combine(
        self, both: Float[Tensor, "b2 c h w"], inside: Bool[Tensor, ""] | Bool[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
        """Return the conditional half c, and u + s (c − u) inside the interval, c outside it."""
        conditional, unconditional = both.chunk(2)
        value = unconditional + self.scale * (conditional - unconditional)
        return conditional, value if inside.ndim == 0 else torch.where(
            append_dims_like(inside, value) > 0, value, conditional
        )


@dataclass(frozen=True, eq=False)
class ClassifierTransform:
    """The transform that `ClassifierGuidance` appends; attributes as its arguments."""

    schedule: Schedule
    objective: Objective
    classifier: Callable[[Tensor, Tensor], Tensor]
    num_classes: int | None
    scale: float
    interval: tuple[float, float]
    form: str
    passes_label: bool

    def __post_init__(self) -> None:
        _scale(self.scale)
        _interval(self.interval)
        check_number("guidance.num_classes", self.num_classes, "[1, 1000000]", whole=True, optional=True)

    @property
    def moves_mean(self) -> bool:
        """Whether the gradient shifts the mean of ancestral steps instead of ε̂."""
        return self.form == "published"

    def __call__(
        self,
        evaluate: Evaluate,
        x_t: Float[Tensor, "b c h w"],
        t: PerExample,
        previous: Float[Tensor, "b c h w"] | None,
        condition: dict[str, Tensor],
    ) -> Output:
        """Shift y (exact form), or add to the gradient of the output (published form)."""
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

    def shifted(
        self, y: Float[Tensor, "b *chw"], t: PerExample, gradient: Float[Tensor, "b *chw"]
    ) -> Float[Tensor, "b *chw"]:
        """Return y after ε̂ ← ε̂ − σ · gradient at the same x_t: Δy = (D/α) Δε."""
        t = t.double()
        alpha, sigma = self.schedule.alpha_sigma(t)
        slope = torch.where(alpha > 0, self.objective.determinant(self.schedule, t) * sigma / alpha, 0.0)
        return y - append_dims_like(slope, y) * gradient

    def gradient(
        self, x_t: Float[Tensor, "b c h w"], t: PerExample, condition: dict[str, Tensor]
    ) -> Float[Tensor, "b c h w"] | None:
        """Return s ∇ log p(y | x_t); None if no image is guided."""
        label = condition.get("label")
        if label is None or label.is_floating_point():
            raise ConfigError(
                "guidance=classifier needs an int64 label to guide towards, and the condition has none: pass "
                "condition={'label': …}, int64 (B,)"
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
    """Return `scale`. Raises ConfigError: it is outside [0, 10⁹]."""
    check_number("guidance.scale", scale, "[0, 1000000000]")
    return float(scale)


def _interval(interval: Sequence[float]) -> tuple[float, float]:
    """Return (low, high); ConfigError unless 0 ≤ low < high ≤ 1."""
    check_numbers("guidance.interval", interval, "[0, 1]", "[low,high] with low < high", length=2)
    if interval[0] >= interval[1]:
        raise ConfigError(f"guidance.interval={list(interval)}: write two times [low,high] with 0 <= low < high <= 1")
    return float(interval[0]), float(interval[1])


def _inside(interval: tuple[float, float], t: Scalars) -> Bool[Tensor, "*shape"]:
    """Return whether times t are in (low, high]."""
    return (t > interval[0]) & (t <= interval[1])


class NoisyClassifier:
    """(x_t, t) → logits on any curve, from a classifier of noisy images trained on another curve.

    p(y | x_t) does not depend on the scale of x_t. The classifier is therefore evaluated at the time on its curve with equal
    ln(α/σ), on x_t scaled to α of that time.

    Args:
        network: called as network(x, c) with c = trained_along.conditioning(t), (B,).
        trained_along: the curve of the classifier's training.
        schedule: the curve of x_t.
    """

    def __init__(self, network: nn.Module, trained_along: Schedule, schedule: Schedule) -> None:
        self.network, self.trained_along, self.schedule = network, trained_along, schedule

    def __call__(self, x_t: Float[Tensor, "b c h w"], t: PerExample) -> Float[Tensor, "b k"]:
        """Return logits of x_t at times t in (0, 1]."""
        t, curve = t.double(), self.trained_along
        time = t if curve is self.schedule else curve.time(self.schedule.lam(t)).clamp(curve.t_min, 1)
        ratio = curve.alpha_sigma(time)[0] / self.schedule.alpha_sigma(t)[0]
        c = to_device(curve.conditioning(time).float().expand(len(x_t)), x_t.device)
        logits: Tensor = self.network((append_dims_like(ratio, x_t) * x_t).float(), c)
        return logits.to(x_t.dtype)
