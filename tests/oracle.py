"""Data whose best denoiser is known in closed form, as a network for any objective on any schedule.

For x_0 from a mixture of Gaussians, E[x_0 | x_t] is a sum of a few terms, so every sampler can be judged by the distribution
that it must return, with no trained network in between.
"""

from typing import Any

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.objectives import Objective
from diffusion_lab.schedules import Schedule


class Mixture:
    """x_0 ~ Σ_k w_k N(m_k, s_k² I): means (K, C, H, W), weights and standard deviations (K,)."""

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor | None = None) -> None:
        self.means, self.stds = means.double(), stds.double()
        self.weights = torch.ones(len(means)).double() / len(means) if weights is None else weights.double()

    def denoise(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_t] for x_t (B, C, H, W), α and σ 0-d."""
        spread = (alpha * self.stds).square() + sigma.square()  # (K,) variance of x_t given k
        gap = x_t[:, None] - alpha * self.means  # (B, K, C, H, W)
        size = gap[0, 0].numel()
        log = self.weights.log() - 0.5 * (gap.square().flatten(2).sum(2) / spread + size * spread.log())
        given = self.means + (alpha * self.stds.square() / spread)[:, None, None, None] * gap
        return (log.softmax(1)[..., None, None, None] * given).sum(1)


class Gaussian(Mixture):
    """One component: x_0 ~ N(m, s² I)."""

    def __init__(self, mean: Tensor, std: float) -> None:
        super().__init__(mean[None], torch.tensor([std]))

    def flow(self, x_t: Tensor, schedule: Schedule, t: float, s: float) -> Tensor:
        """The exact solution at s of the probability-flow ODE that passes x_t at t."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            schedule.alpha_sigma(torch.tensor(r, dtype=torch.float64)) for r in (t, s)
        )
        var = self.stds[0].square()
        ratio = ((alpha_s.square() * var + sigma_s.square()) / (alpha_t.square() * var + sigma_t.square())).sqrt()
        return alpha_s * self.means[0] + ratio * (x_t - alpha_t * self.means[0])


class Network:
    """The best network for `data`: called as any network is, with scale · x_t and what it is told of the time."""

    def __init__(self, data: Mixture, schedule: Schedule, objective: Objective) -> None:
        self.data, self.schedule, self.objective = data, schedule, objective

    def time(self, c: Tensor) -> Tensor:
        """t from what the network is told: each published way is inverted, and the one that gives c back is right."""
        steps = self.schedule.steps
        for invert in (lambda: (c + 1) / (steps or 1), lambda: c / 999, lambda: self.schedule.time(-4 * c)):
            t = invert()
            if 0 < t <= 1 and torch.allclose(self.objective.conditioning(self.schedule, t), c, rtol=1e-9, atol=1e-9):
                return t
        raise AssertionError(f"no time tells the network {c}")

    def __call__(self, scaled: Tensor, c: Tensor, **_: Any) -> Tensor:
        assert scaled.dtype == c.dtype == torch.float64, "the oracle is exact in float64 only"
        assert c.shape == scaled.shape[:1]
        assert bool((c == c[0]).all()), "one time for the batch"
        t = self.time(c[0])
        alpha, sigma = self.schedule.alpha_sigma(t)
        x_t = scaled / self.objective.input_scale(self.schedule, t)
        x0 = self.data.denoise(x_t, alpha, sigma)
        a, b = self.objective.coefficients(self.schedule, t)
        return a * x0 + b * (x_t - alpha * x0) / sigma


def oracle(data: Mixture, schedule: Schedule, objective: Objective, **options: Any) -> Denoiser:
    """A denoiser that knows the data."""
    return Denoiser(Network(data, schedule, objective), schedule, objective, **options)
