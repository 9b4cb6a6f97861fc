"""Discretizations of the reverse SDE dx = [f x − g² score] dt + g dw, score = −ε̂/σ, and Langevin corrector steps.

f and g² follow from the curve (`Schedule.drift_diffusion`), so every sampler here works with every schedule. The score follows
from the noise estimate, so every objective works. The step into data adds no noise and returns x̂_0.
"""

from abc import abstractmethod
from collections.abc import Iterable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import ConfigError, check_number
from diffusion_lab.gaussian import transition
from diffusion_lab.samplers.base import EvaluationContext, Sampler
from diffusion_lab.schedules import Schedule, append_dims_like

CHAIN = 1000  # number of steps of the chain in the published corrector's 1 − β_i


class ReverseSDE(Sampler):
    """Base class of the steps x_s = a x_t + b ε̂ + c z. A subclass implements `coefficients`.

    Args:
        steps: number of steps; None: every step of the schedule.
        grid: the time grid.
        budget: maximal number of network evaluations, one a step; replaces `steps`.
    """

    deterministic = False

    def __init__(self, steps: int | None = 1000, grid: str = "linspace", budget: int | None = None) -> None:
        super().__init__(steps, grid, budget)

    @abstractmethod
    def coefficients(
        self, schedule: Schedule, t: Float64[Tensor, " n"], s: Float64[Tensor, " n"]
    ) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"], Float64[Tensor, " n"]]:
        """Return (a, b, c) of the steps from t to s < t. Values at s = 0 are not used."""

    def integrate(
        self,
        x: Float[Tensor, "b c h w"],
        times: Float64[Tensor, " n_plus_1"],
        context: EvaluationContext,
        steps: Iterable[int],
    ) -> Float[Tensor, "b c h w"]:
        a, b, c = (v.tolist() for v in self.coefficients(context.schedule, times[:-1], times[1:]))
        for i in steps:
            prediction = context.predict(i, x, times[i], times[i + 1])
            if times[i + 1] == 0:
                return prediction.x0
            x = a[i] * x + b[i] * prediction.noise + c[i] * context.noise(i)
        return x


class EulerMaruyama(ReverseSDE):
    """x_s = x − f x h − g² h ε̂/σ + g √h z with h = t − s and f, g, σ at t (Song et al. 2021, section 4.1).

    The drift must be finite at the start, so α > 0 there. A step is stable if g² h/σ² < 2, which needs many steps near t = 1 on
    curves with a steep α (cosine); `ReverseDiffusion` is stable on every curve. Arguments as in `ReverseSDE`.
    """

    def time_grid(self, denoiser: Denoiser, start: float = 1.0, stop: float = 0.0) -> Float64[Tensor, " n_plus_1"]:
        if start == 1 and denoiser.schedule.zero_terminal_snr:
            raise ConfigError(
                "sampler=euler_maruyama needs a finite drift, but this schedule ends in alpha = 0, where the drift is "
                "infinite: write sampler=reverse_diffusion"
            )
        return super().time_grid(denoiser, start, stop)

    def coefficients(
        self, schedule: Schedule, t: Float64[Tensor, " n"], s: Float64[Tensor, " n"]
    ) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"], Float64[Tensor, " n"]]:
        f, g2 = schedule.drift_diffusion(t)
        h = t - s
        return 1 - f * h, -g2 * h / schedule.alpha_sigma(t)[1], (g2 * h).sqrt()


class ReverseDiffusion(ReverseSDE):
    """x_s = (2 − α_{t|s}) x − σ²_{t|s} ε̂/σ_t + σ_{t|s} z, the reversed forward step (Song et al. 2021, appendix E).

    The forward step is x_t = x_s + (α_{t|s} − 1) x_s + σ_{t|s} z; its discrete drift and diffusion replace f and g² in the
    reverse SDE. On the chains of DDPM and VE these are the published rules; the transition generalizes them to every curve and
    stride. Finite at α = 0. Arguments as in `ReverseSDE`.
    """

    def coefficients(
        self, schedule: Schedule, t: Float64[Tensor, " n"], s: Float64[Tensor, " n"]
    ) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"], Float64[Tensor, " n"]]:
        q = transition(schedule, t, s)
        variance = q.variance.clamp(min=0)
        return 2 - q.alpha, -variance / schedule.alpha_sigma(t)[1], variance.sqrt()


PREDICTORS: dict[str, type[ReverseSDE]] = {"reverse_diffusion": ReverseDiffusion, "euler_maruyama": EulerMaruyama}


class PredictorCorrector(Sampler):
    """M Langevin steps at every time, then a predictor step (Song et al. 2021, algorithms 2–5). N(M + 1) evaluations.

    A Langevin step is x ← x + κ g + √(2κ) z with the score g = −ε̂/σ and κ = 2a (r ‖z‖/‖g‖)². The norms are per image;
    published code averages them over the batch, so its images depend on the rest of the batch. a is 1 − β_i of a chain of 1000
    steps, generalized to every curve as α²_{t|s} with s = t − 1/1000; it is 1 on VE.

    The norms of one image must be taken over many pixels: with few pixels κ has no finite mean.

    Noise of step i: noise(i(M + 1) + m), with m < M for the corrector and m = M for the predictor.

    Args:
        steps: N, the number of steps; None: every step of the schedule.
        grid: the time grid.
        budget: maximal number of network evaluations, M + 1 a step; replaces `steps`.
        predictor: reverse_diffusion or euler_maruyama.
        corrector_steps: M in [0, 1000]; 0 is the predictor alone.
        snr: r in (0, 10], signal-to-noise ratio of a Langevin step; 0.16 is the published value for CIFAR-10 on VE.

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
        check_number("sampler.corrector_steps", corrector_steps, "[0, 1000]", "0 is the predictor alone", whole=True)
        check_number("sampler.snr", snr, "(0, 10]", "the published value is 0.16")
        self.corrector_steps, self.snr = corrector_steps, snr
        super().__init__(steps, grid, budget)
        self.predictor = PREDICTORS[predictor](self.steps, grid)

    def steps_for_budget(self, budget: int) -> int:
        return budget // (self.corrector_steps + 1)

    def time_grid(self, denoiser: Denoiser, start: float = 1.0, stop: float = 0.0) -> Float64[Tensor, " n_plus_1"]:
        return self.predictor.time_grid(denoiser, start, stop)

    def integrate(
        self,
        x: Float[Tensor, "b c h w"],
        times: Float64[Tensor, " n_plus_1"],
        context: EvaluationContext,
        steps: Iterable[int],
    ) -> Float[Tensor, "b c h w"]:
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

    def scale(self, schedule: Schedule, t: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
        """Return a at times t."""
        return transition(schedule, t, (t - 1 / CHAIN).clamp(min=0)).alpha.square()

    def langevin(
        self,
        x: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b c h w"],
        sigma: float,
        scale: float,
        z: Float[Tensor, "b c h w"],
    ) -> Float[Tensor, "b c h w"]:
        """Return x + κg + √(2κ)z = x + 2σq(z − q ε̂), q = √a r ‖z‖/‖ε̂‖ per image; x itself for an image with ε̂ = 0.

        Args:
            x: the state.
            noise: ε̂ at x.
            sigma: σ at the time of x.
            scale: a.
            z: standard normal.
        """
        norm = torch.linalg.vector_norm(noise.flatten(1), dim=1)
        ratio = torch.linalg.vector_norm(z.flatten(1), dim=1) / norm
        q = append_dims_like(torch.where(norm > 0, scale**0.5 * self.snr * ratio, 0.0), x)
        return x + 2 * sigma * q * (z - q * noise)
