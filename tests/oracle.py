"""Data whose optimal denoiser has a closed form, as a network for any objective on any schedule.

For x_0 from a mixture of Gaussians, E[x_0 | x_t] is a sum of a few terms, so every sampler can be compared with the exact
distribution of its samples, without a trained network.
"""

from typing import Any

import torch
from torch import Tensor

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.objectives import Objective
from diffusion_lab.schedules import Schedule, append_dims_like


class Mixture:
    """x_0 ~ Σ_k w_k N(m_k, s_k² I): means (K, C, H, W), weights and standard deviations (K,)."""

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor | None = None) -> None:
        self.means, self.stds = means.double(), stds.double()
        self.weights = torch.ones(len(means)).double() / len(means) if weights is None else weights.double()

    def denoise(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return E[x_0 | x_t] for x_t (B, C, H, W), α and σ 0-d or (B,)."""
        alpha, sigma = alpha.reshape(-1, 1), sigma.reshape(-1, 1)
        spread = (alpha * self.stds).square() + sigma.square()  # (1 or B, K), the variance of x_t given k
        gap = x_t[:, None] - alpha[..., None, None, None] * self.means  # (B, K, C, H, W)
        size = gap[0, 0].numel()
        log = self.weights.log() - 0.5 * (gap.square().flatten(2).sum(2) / spread + size * spread.log())
        conditional = self.means + (alpha * self.stds.square() / spread)[..., None, None, None] * gap  # E[x_0 | x_t, k]
        return (log.softmax(1)[..., None, None, None] * conditional).sum(1)

    def spread(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return Var[x_0 | x_t] of each element, (B, C, H, W); α and σ 0-d or (B,)."""
        alpha, sigma = alpha.reshape(-1, 1), sigma.reshape(-1, 1)
        total = (alpha * self.stds).square() + sigma.square()
        gap = x_t[:, None] - alpha[..., None, None, None] * self.means
        log = self.weights.log() - 0.5 * (gap.square().flatten(2).sum(2) / total + gap[0, 0].numel() * total.log())
        conditional = self.means + (alpha * self.stds.square() / total)[..., None, None, None] * gap
        within = (self.stds * sigma).square() / total
        share = log.softmax(1)[..., None, None, None]
        mean = (share * conditional).sum(1)
        return (share * (within[..., None, None, None] + (conditional - mean[:, None]).square())).sum(1)


class Gaussian(Mixture):
    """One component: x_0 ~ N(m, s² I)."""

    def __init__(self, mean: Tensor, std: float) -> None:
        super().__init__(mean[None], torch.tensor([std]))

    def flow(self, x_t: Tensor, schedule: Schedule, t: float, s: float) -> Tensor:
        """Return the exact solution at s of the probability-flow ODE through x_t at t."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            schedule.alpha_sigma(torch.tensor(r, dtype=torch.float64)) for r in (t, s)
        )
        var = self.stds[0].square()
        ratio = ((alpha_s.square() * var + sigma_s.square()) / (alpha_t.square() * var + sigma_t.square())).sqrt()
        return alpha_s * self.means[0] + ratio * (x_t - alpha_t * self.means[0])


class Network:
    """The optimal network for `data`, called with scale · x_t and the time-conditioning input c."""

    def __init__(self, data: Mixture, schedule: Schedule, objective: Objective) -> None:
        self.data, self.schedule, self.objective = data, schedule, objective

    def time(self, c: Tensor) -> Tensor:
        """Return t (B,) for the input c: invert each published conditioning and select the one that reproduces c."""
        line = c / 999  # t, or σ of the shifted line
        lam_of_noise_level, lam_of_line = -4 * c, (1 - line).log() - line.log()
        for t in (
            (c + 1) / (self.schedule.steps or 1), line, self.schedule.time(lam_of_noise_level), self.schedule.time(lam_of_line)
        ):  # fmt: skip
            conditioning = self.objective.conditioning(self.schedule, t)
            if ((t > 0) & (t <= 1)).all() and torch.allclose(conditioning, c, rtol=1e-9, atol=1e-9):
                return t
        raise AssertionError(f"no time has the conditioning input {c}")

    def __call__(self, scaled: Tensor, c: Tensor, **_: Any) -> Tensor:
        assert scaled.dtype == c.dtype == torch.float64, "the oracle is exact in float64 only"
        assert c.shape == scaled.shape[:1]
        t = self.time(c)
        alpha, sigma = self.schedule.alpha_sigma(t)
        x_t = scaled / append_dims_like(self.objective.input_scale(self.schedule, t), scaled)
        x0 = self.data.denoise(x_t, alpha, sigma)
        noise = (x_t - append_dims_like(alpha, x_t) * x0) / append_dims_like(sigma, x_t)
        return self.objective.target(self.schedule, t, x0, noise)


def oracle(data: Mixture, schedule: Schedule, objective: Objective, **options: Any) -> Denoiser:
    """Return the optimal denoiser of `data`."""
    return Denoiser(Network(data, schedule, objective), schedule, objective, **options)


class WithHead(Network):
    """The optimal network with the optimal second head: E[ε² | x_t] for kind "sn", E[(ε − ε̂)² | x_t] for "npr"."""

    def __init__(self, data: Mixture, schedule: Schedule, objective: Objective, kind: str) -> None:
        super().__init__(data, schedule, objective)
        self.extra = kind

    def __call__(self, scaled: Tensor, c: Tensor, **condition: Any) -> Tensor:
        t = self.time(c)
        alpha, sigma = (append_dims_like(v, scaled) for v in self.schedule.alpha_sigma(t))
        x_t = scaled / append_dims_like(self.objective.input_scale(self.schedule, t), scaled)
        head = self.data.spread(x_t, *self.schedule.alpha_sigma(t)) * (alpha / sigma).square()
        if self.extra == "sn":
            head = head + ((x_t - alpha * self.data.denoise(x_t, *self.schedule.alpha_sigma(t))) / sigma).square()
        return torch.cat([super().__call__(scaled, c, **condition), head], dim=1)
