"""The reverse SDE dx = [f x − g² score] dt + g dw, score = −ε̂/σ: its discretisations, and Langevin steps between them.

f and g² follow from the curve (`Schedule.drift_diffusion`), so each sampler here works on all of them. The score needs no
objective of its own: it is the noise estimate over −σ. The step into data adds no noise and is x̂_0.
"""

from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import ConfigError
from diffusion_lab.gaussian import transition
from diffusion_lab.samplers.base import EvaluationContext, Sampler
from diffusion_lab.schedules import Schedule, append_dims_like

CHAIN = 1000  # steps of the chain for which the published corrector's 1 − β_i is stated


class ReverseSDE(Sampler):
    """x_s = a x_t + b ε̂ + c z. What a subclass gives: `coefficients`.

    Args:
        steps: how many; None is every step of the schedule.
        grid: the time grid.
        budget: network evaluations, instead of `steps`; one a step.
    """

    deterministic = False

    def __init__(self, steps: int | None = 1000, grid: str = "linspace", budget: int | None = None) -> None:
        super().__init__(steps, grid, budget)

    @abstractmethod
    def coefficients(self, schedule: Schedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(a, b, c) of the steps from t to s < t, float64 (N,); those with s = 0 are not used."""

    def integrate(self, x: Tensor, times: Tensor, context: EvaluationContext, steps: Iterable[int]) -> Tensor:
        a, b, c = (v.tolist() for v in self.coefficients(context.schedule, times[:-1], times[1:]))
        for i in steps:
            prediction = context.predict(i, x, times[i], times[i + 1])
            if times[i + 1] == 0:
                return prediction.x0
            x = a[i] * x + b[i] * prediction.noise + c[i] * context.noise(i)
        return x


class EulerMaruyama(ReverseSDE):
    """x_s = x − f x h − g² h ε̂/σ + g √h z with h = t − s and f, g, σ at t (Song et al. 2021, section 4.1).

    Needs a finite drift where it begins, hence α > 0 there. A step is stable where g² h/σ² stays below 2, which takes many
    steps near t = 1 on curves whose α falls steeply there (cosine); `ReverseDiffusion` is stable on all. Arguments as
    `ReverseSDE`.
    """

    def time_grid(self, denoiser: Denoiser, start: float = 1.0, stop: float = 0.0) -> Tensor:
        if start == 1 and denoiser.schedule.zero_terminal_snr:
            raise ConfigError(
                "sampler=euler_maruyama needs a finite drift, and on this schedule, which ends in alpha = 0, that at t = 1 is "
                "infinite: write sampler=reverse_diffusion"
            )
        return super().time_grid(denoiser, start, stop)

    def coefficients(self, schedule: Schedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f, g2 = schedule.drift_diffusion(t)
        h = t - s
        return 1 - f * h, -g2 * h / schedule.alpha_sigma(t)[1], (g2 * h).sqrt()


class ReverseDiffusion(ReverseSDE):
    """x_s = (2 − α_{t|s}) x − σ²_{t|s} ε̂/σ_t + σ_{t|s} z, the forward step turned round (Song et al. 2021, appendix E).

    The forward process goes x_t = x_s + (α_{t|s} − 1) x_s + σ_{t|s} z, so its own discrete drift and diffusion stand in the
    reverse SDE. On DDPM's chain and on VE's these are the published rules; the transition defines them on every other curve,
    and for any stride. Finite also at α = 0. Arguments as `ReverseSDE`.
    """

    def coefficients(self, schedule: Schedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = transition(schedule, t, s)
        variance = q.variance.clamp(min=0)
        return 2 - q.alpha, -variance / schedule.alpha_sigma(t)[1], variance.sqrt()


PREDICTORS: dict[str, type[ReverseSDE]] = {"reverse_diffusion": ReverseDiffusion, "euler_maruyama": EulerMaruyama}


class PredictorCorrector(Sampler):
    """At every time M Langevin steps, then the predictor's step (Song et al. 2021, algorithms 2–5). N(M + 1) evaluations.

    A Langevin step is x ← x + κ g + √(2κ) z with the score g = −ε̂/σ and κ = 2a (r ‖z‖/‖g‖)². Its norms are those of the
    image; published codes take their mean over the batch, so that an image there depends on its neighbours. a is 1 − β_i of a
    chain of 1000 steps, that is α²_{t|s} with s = t − 1/1000, which makes it 1 on VE and defines it on every curve.

    A step size from the norms of one image needs an image of many pixels: for few κ has no finite mean.

    Draws: the noise of step i is noise(i(M + 1) + m), m < M of the corrector, m = M of the predictor.

    Args:
        steps: N; None is every step of the schedule.
        grid: the time grid.
        budget: network evaluations, instead of `steps`; M + 1 a step.
        predictor: reverse_diffusion or euler_maruyama.
        corrector_steps: M ≥ 0; with 0 it is the predictor alone.
        snr: r > 0, the ratio of a Langevin step's drift to its noise; 0.16 is the published value of CIFAR-10 on VE.

    Raises:
        ConfigError: an unknown predictor, or an argument out of range.
    """

    deterministic = False

    def __init__(
        self,
        steps: int | None = 1000,
        grid: str = "linspace",
        budget: int | None = None,
        predictor: str = "reverse_diffusion",
        corrector_steps: int = 1,
        snr: float = 0.16,
    ) -> None:
        if predictor not in PREDICTORS:
            raise ConfigError(f"unknown predictor {predictor!r}: write one of {', '.join(PREDICTORS)}")
        if not (corrector_steps >= 0 and snr > 0):
            raise ConfigError(
                f"sampler=predictor_corrector needs corrector_steps >= 0 and snr > 0, not corrector_steps={corrector_steps} "
                f"and snr={snr}"
            )
        self.corrector_steps, self.snr = corrector_steps, snr
        super().__init__(steps, grid, budget)
        self.predictor = PREDICTORS[predictor](self.steps, grid)

    def steps_for_budget(self, budget: int) -> int:
        return budget // (self.corrector_steps + 1)

    def time_grid(self, denoiser: Denoiser, start: float = 1.0, stop: float = 0.0) -> Tensor:
        return self.predictor.time_grid(denoiser, start, stop)

    def integrate(self, x: Tensor, times: Tensor, context: EvaluationContext, steps: Iterable[int]) -> Tensor:
        a, b, c = (v.tolist() for v in self.predictor.coefficients(context.schedule, times[:-1], times[1:]))
        scale = self.scale(context.schedule, times[:-1]).tolist()
        sigma = context.schedule.alpha_sigma(times)[1].tolist()
        draws = self.corrector_steps + 1
        for i in steps:
            prediction = context.predict(i, x, times[i], times[i + 1])
            for m in range(self.corrector_steps):
                x = self.langevin(x, prediction.noise, sigma[i], scale[i], context.noise(i * draws + m))
                prediction = context(x, times[i])
            if times[i + 1] == 0:
                return prediction.x0
            x = a[i] * x + b[i] * prediction.noise + c[i] * context.noise(i * draws + self.corrector_steps)
        return x

    def scale(self, schedule: Schedule, t: Tensor) -> Tensor:
        """a at times t, float64."""
        return transition(schedule, t, (t - 1 / CHAIN).clamp(min=0)).alpha.square()

    def langevin(self, x: Tensor, noise: Tensor, sigma: float, scale: float, z: Tensor) -> Tensor:
        """x + κg + √(2κ)z = x + 2σq(z − q ε̂), q = √a r ‖z‖/‖ε̂‖ of each image; where ε̂ = 0 there is no score to follow."""
        size = torch.linalg.vector_norm(noise.flatten(1), dim=1)
        ratio = torch.linalg.vector_norm(z.flatten(1), dim=1) / size
        q = append_dims_like(torch.where(size > 0, scale**0.5 * self.snr * ratio, 0.0), x)
        return x + 2 * sigma * q * (z - q * noise)
