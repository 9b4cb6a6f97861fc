"""What acts on a prediction while sampling: thresholding of x̂_0, and guidance towards a class.

A guided denoiser is a denoiser: it combines outputs y, then solves and clips once, so that every sampler, objective and
variance works with it. y is affine in ε̂ at a given (x_t, t), so a mean of outputs with weights that sum to 1 is that mean of ε̂.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from diffusion_lab.denoiser import Denoiser, Prediction, as_time
from diffusion_lab.errors import ConfigError
from diffusion_lab.schedules import Schedule, like, match, move


class StaticThreshold:
    """Clamps x̂_0 to [−limit, limit] (Ho et al. 2020, the published sampler).

    Args:
        limit: > 0; 1 is the range of the images.
    """

    def __init__(self, limit: float = 1.0) -> None:
        if limit <= 0:
            raise ConfigError(f"clip static needs limit > 0, not limit={limit}")
        self.limit = limit

    def __call__(self, x0: Tensor) -> Tensor:
        return x0.clamp(-self.limit, self.limit)


class DynamicThreshold:
    """Clamps each image to its own quantile s of |x̂_0|, s ≥ 1, and divides by s (Saharia et al. 2022, section 2.3).

    Args:
        quantile: in (0, 1]; the published value is 0.995.
        maximum: an upper bound for s, or None.
    """

    def __init__(self, quantile: float = 0.995, maximum: float | None = None) -> None:
        if not 0 < quantile <= 1:
            raise ConfigError(f"clip dynamic needs a quantile in (0, 1], not {quantile}: the published value is 0.995")
        if maximum is not None and maximum < 1:
            raise ConfigError(f"clip dynamic needs maximum >= 1, not {maximum}: images lie in [-1, 1]")
        self.quantile, self.maximum = quantile, maximum

    def __call__(self, x0: Tensor) -> Tensor:
        size = like(x0.abs().flatten(1), x0)  # float32 at least: there is no quantile of halves
        s = match(size.quantile(self.quantile, dim=1).clamp(1, self.maximum), x0)
        return x0.clamp(-s, s) / s


class Guided(Denoiser):
    """A denoiser that is guided between two times; what a subclass gives is the guidance.

    Args:
        denoiser: what is guided; its network, schedule, objective and clipping are this one's.
        scale: s ≥ 0.
        interval: guide at times t in (low, high] of [0, 1] only (Kynkäänniemi et al. 2024, who state it in σ).

    Raises:
        ValueError: a scale or an interval out of range.
    """

    def __init__(self, denoiser: Denoiser, scale: float, interval: Sequence[float] = (0.0, 1.0)) -> None:
        super().__init__(denoiser.network, denoiser.schedule, denoiser.objective, denoiser.clip)
        if not 0 <= scale < float("inf"):
            raise ConfigError(f"guidance.scale={scale}: write a number from 0 on")
        if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            raise ConfigError(
                f"guidance.interval={list(interval)}: write two times [low,high] with 0 <= low < high <= 1"
            )
        self.scale, self.interval = float(scale), (float(interval[0]), float(interval[1]))

    def inside(self, t: Tensor) -> Tensor:
        """Where times t lie in the interval: bool, of t's shape."""
        low, high = self.interval
        return (t > low) & (t <= high)


class ClassifierFree(Guided):
    """y = y_u + s (y_c − y_u), of one network with and without its label (Ho & Salimans 2022, whose w is s − 1).

    Both come from one call on twice the batch. Scale 1 is the conditional network itself, bit for bit and at no cost, and so is
    any scale outside the interval. Channels beyond C (a learned variance, a second head) stay those of the conditional half:
    only the mean is guided.

    Args:
        denoiser: of a network that takes `label`, int64 (B,) with a null label or float (B, K) where zeros say nothing.
        scale: s; 0 is the unconditional model.
        rescale: φ in [0, 1]; φ of the guided output is scaled to the standard deviation, image by image, of the conditional one
            (Lin et al. 2024, eq. 15 and 16, who publish 0.7).
        interval: as `Guided`.
        num_classes: K, which is also the null label; None asks the network.

    Raises:
        ValueError: a network without a null label, and as `Guided`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scale: float = 2.0,
        rescale: float = 0.0,
        interval: Sequence[float] = (0.0, 1.0),
        num_classes: int | None = None,
    ) -> None:
        super().__init__(denoiser, scale, interval)
        if not 0 <= rescale <= 1:
            raise ConfigError(f"guidance.rescale={rescale} is outside [0, 1]: the published value is 0.7")
        known = getattr(denoiser.network, "num_classes", None) if num_classes is None else num_classes
        if known is None:
            raise ConfigError(
                "guidance=cfg needs a network with a null label, and this one takes no labels: train with condition=label, or "
                "write guidance=classifier"
            )
        self.rescale, self.num_classes = rescale, int(known)

    def __call__(
        self, x_t: Tensor, t: Tensor | float, previous: Tensor | None = None, **condition: Tensor
    ) -> Prediction:
        t = as_time(t)
        guided, conditional, extra = self._outputs(x_t, t, previous, condition)
        prediction = self.solved(x_t, t, guided, extra)
        if extra is None or guided is conditional:
            return prediction
        return prediction._replace(unclipped=self.objective.solve(self.schedule, t, x_t, conditional)[1])

    def output(
        self, x_t: Tensor, t: Tensor | float, previous: Tensor | None = None, **condition: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        t = as_time(t)
        guided, _, extra = self._outputs(x_t, t, previous, condition)
        return guided, extra

    def _outputs(
        self, x_t: Tensor, t: Tensor, previous: Tensor | None, condition: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The guided y, the conditional y, and the channels beyond it."""
        label, here = condition.get("label"), self.inside(t)
        if label is None:
            raise ConfigError("guidance=cfg was given no labels to guide towards: pass condition={'label': …}")
        if self.scale == 1 or not bool(here.any()):
            y, extra = super().output(x_t, t, previous, **condition)
            return y, y, extra
        null = torch.zeros_like(label) if label.is_floating_point() else torch.full_like(label, self.num_classes)
        if self.scale == 0 and t.ndim == 0:
            y, extra = super().output(x_t, t, previous, **{**condition, "label": null})
            return y, y, extra
        twice = {name: torch.cat([value, null if name == "label" else value]) for name, value in condition.items()}
        both, extra = super().output(
            torch.cat([x_t, x_t]),
            t if t.ndim == 0 else torch.cat([t, t]),
            None if previous is None else torch.cat([previous, previous]),
            **twice,
        )
        conditional, unconditional = both.chunk(2)
        y = unconditional + self.scale * (conditional - unconditional)
        if self.rescale:
            own, wanted = (v.flatten(1).std(1, correction=0) for v in (y, conditional))
            y = y * match(1 + self.rescale * (wanted / own - 1), y)
        if t.ndim:
            y = torch.where(match(here, y) > 0, y, conditional)
        return y, conditional, None if extra is None else extra.chunk(2)[0]


class ClassifierGuidance(Guided):
    """ε̂ − s σ_t ∇ log p(y | x_t) with the gradient of a classifier of noisy images (Dhariwal & Nichol 2021).

    In `exact` form it moves ε̂, which moves x̂_0 by s (σ²/α) ∇ and serves every sampler (their algorithm 2). The `published` form
    moves the mean of ancestral steps by s Σ ∇ (their algorithm 1), Σ the variance of the step: the same in the limit of
    small steps, weaker at few. The gradient is zero at α = 0, where x_t says nothing of the class, and towards the null label.

    Args:
        denoiser: what is guided; a network that takes labels gets them too.
        classifier: (x_t (B, C, H, W), t 0-d or (B,)) → logits (B, K), differentiable.
        num_classes: K.
        scale: s.
        interval: as `Guided`.
        form: "exact" or "published".
        labelled: whether the network takes labels itself; None asks it.

    Raises:
        ValueError: an unknown form, and as `Guided`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        classifier: Callable[[Tensor, Tensor], Tensor],
        num_classes: int,
        scale: float = 1.0,
        interval: Sequence[float] = (0.0, 1.0),
        form: str = "exact",
        labelled: bool | None = None,
    ) -> None:
        super().__init__(denoiser, scale, interval)
        if form not in ("exact", "published"):
            raise ConfigError(f"guidance.form={form} is unknown: write exact or published")
        self.classifier, self.num_classes, self.form = classifier, num_classes, form
        self.moves_mean = form == "published"
        own = getattr(denoiser.network, "num_classes", None) is not None
        self.labelled = own if labelled is None else labelled

    def __call__(
        self, x_t: Tensor, t: Tensor | float, previous: Tensor | None = None, **condition: Tensor
    ) -> Prediction:
        t = as_time(t)
        gradient = self._gradient(x_t, t, condition)
        own, extra = super().output(x_t, t, previous, **self._passed(condition))
        if gradient is None:
            return self.solved(x_t, t, own, extra)
        if self.moves_mean:
            return self.solved(x_t, t, own, extra)._replace(gradient=gradient)
        prediction = self.solved(x_t, t, self._moved(own, t, gradient), extra)
        return prediction._replace(unclipped=self.objective.solve(self.schedule, t, x_t, own)[1])

    def output(
        self, x_t: Tensor, t: Tensor | float, previous: Tensor | None = None, **condition: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        t = as_time(t)
        own, extra = super().output(x_t, t, previous, **self._passed(condition))
        gradient = None if self.moves_mean else self._gradient(x_t, t, condition)
        return own if gradient is None else self._moved(own, t, gradient), extra

    def _passed(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        return condition if self.labelled else {name: v for name, v in condition.items() if name != "label"}

    def _moved(self, y: Tensor, t: Tensor, gradient: Tensor) -> Tensor:
        """y after ε̂ ← ε̂ − σ gradient at the same x_t: Δy = (D/α) Δε."""
        t = t.double()
        alpha, sigma = self.schedule.alpha_sigma(t)
        slope = torch.where(alpha > 0, self.objective.determinant(self.schedule, t) * sigma / alpha, 0.0)
        return y - match(slope, y) * gradient

    def _gradient(self, x_t: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor | None:
        """s ∇ log p(y | x_t), (B, C, H, W); None where nothing guides."""
        label = condition.get("label")
        if label is None or label.is_floating_point():
            raise ConfigError(
                "guidance=classifier was given no classes to guide towards: pass condition={'label': int64 (B,)}"
            )
        here = self.inside(t) & (self.schedule.alpha_sigma(t.double())[0] > 0)
        if self.scale == 0 or not bool(here.any()):
            return None
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            log_p = self.classifier(x, t).log_softmax(1)
            asked = log_p.gather(1, label.clamp(max=self.num_classes - 1)[:, None])[:, 0]
            (gradient,) = torch.autograd.grad(asked.sum(), x)
        guided = label < self.num_classes
        if t.ndim:
            guided = guided & move(here, label.device)
        return torch.where(match(guided, gradient) > 0, self.scale * gradient, 0.0)


class NoisyClassifier:
    """(x_t, t) → logits along any curve, by a classifier that was trained on x_t along another.

    Scaling does not change what x_t says of the class, so the classifier is asked at its own time of equal ln(α/σ), with x_t
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
        time = t if self.own is self.schedule else self.own.time(self.schedule.lam(t)).clamp(self.own.least, 1)
        ratio = self.own.alpha_sigma(time)[0] / self.schedule.alpha_sigma(t)[0]
        c = move(self.own.conditioning(time).float().expand(len(x_t)), x_t.device)
        logits: Tensor = self.network((match(ratio, x_t) * x_t).float(), c)
        return logits.to(x_t.dtype)
