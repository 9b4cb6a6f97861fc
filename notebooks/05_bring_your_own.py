# %% [markdown]
# # Bring your own
#
# A data set, a network, a schedule and an objective, each a class of about twenty lines, used first from Python, then on the command
# line. Samplers, losses, weightings, likelihood and checks require only the methods below.
#
# The four classes with the imports of the first cell form a module, here `my_lab.py`, which the commands at the end use.

# %%
import dataclasses
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from diffusion_lab import objectives, samplers, schedules
from diffusion_lab.data.images import Examples
from diffusion_lab.data.pictures import grid
from diffusion_lab.data.sources import Dataset, Source
from diffusion_lab.data.stream import BatchStream
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.losses import L2, diffusion_loss
from diffusion_lab.noise import Stream, normal
from diffusion_lab.objectives import Objective
from diffusion_lab.schedules import Table
from diffusion_lab.time_samplers import Stratified
from diffusion_lab.weightings import Native

# %%
plt.style.use("lab.mplstyle")

# %% [markdown]
# ## Data
#
# A `Source` returns arrays: images uint8 $(N, C, H, W)$ and optional labels. Splits, batches, flips, reference statistics and the
# command line work without further code. (Folders, zips and `.npz` of images need no code: `data=image_folder data.root=pictures`.)


# %%
class Shapes(Source):
    """Rings and crosses."""

    def load(self, root, shape, *, download):
        count, (_, height, width) = 1000, shape
        rng = np.random.default_rng(0)
        label = np.arange(count) % 2
        y, x = np.mgrid[:height, :width] + 0.5
        dx, dy = (v - size / 2 - rng.uniform(-0.5, 0.5, (count, 1, 1)) for v, size in ((x, width), (y, height)))
        radius, r = width * rng.uniform(0.2, 0.34, (count, 1, 1)), np.hypot(dx, dy)
        ring = np.abs(r - radius)
        cross = np.where(r < 1.2 * radius, np.minimum(np.abs(dx - dy), np.abs(dx + dy)) / math.sqrt(2), width)
        distance = np.where(label[:, None, None] == 0, ring, cross)  # of a pixel from the line of the shape
        images = (255 * np.clip(1.5 - distance, 0, 1)).astype(np.uint8)[:, None]
        return Dataset(Examples(images, label), class_names=("ring", "cross"))


# %%
examples = Shapes().load(Path("data"), (1, 10, 10), download=False).examples


def show(ax, images, columns, title=""):
    ax.imshow(grid(images, columns=columns))
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, loc="center")
    ax.spines[:].set_visible(False)
    ax.grid(False)


fig, ax = plt.subplots(figsize=(5.4, 1.3))
show(ax, examples.take(np.arange(24))["image"], 12, "images of Shapes")
plt.show()

# %% [markdown]
# ## Network
#
# Any `torch.nn.Module` that is called as `network(x, c, **condition)` and returns an image-shaped tensor; `c`, float $(B,)$, is the schedule's
# time-conditioning input. The network does not depend on the schedule or the objective.


# %%
class Perceptron(nn.Module):
    """Residual fully connected layers over all pixels."""

    def __init__(self, channels, size, width=256, depth=2):
        super().__init__()
        pixels = channels * size**2
        self.register_buffer("frequency", 2.0 ** torch.arange(-4, 4))
        self.time = nn.Linear(16, width)
        self.inward, self.outward = nn.Linear(pixels, width), nn.Linear(width, pixels)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(depth)
        )

    def forward(self, x, c):
        angle = c[:, None] / 100 * self.frequency
        time = self.time(torch.cat([angle.sin(), angle.cos()], dim=1))
        h = self.inward(x.flatten(1))
        for layer in self.layers:
            h = h + layer(h + time)
        return self.outward(h).reshape(x.shape)


# %%
def train(denoiser, steps=500, batch_size=64):
    """Train in ten lines; return the loss of each step."""
    stream, time_sampler, history = BatchStream(examples, batch_size, seed=0), Stratified(), []
    optimizer = torch.optim.AdamW(denoiser.network.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        batch = stream.batch(step)
        x0, position = batch["image"], batch["position"]
        t = time_sampler(denoiser.schedule, position, batch_size, seed=0, step=step)
        noise = normal(x0.shape[1:], seed=0, index=position, draw=step, stream=Stream.NOISE)
        loss = diffusion_loss(denoiser, Native(), L2(), x0, noise, t).weighted.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        history.append(loss.item())
    return history


def sample(denoiser, sampler):
    """Return 24 samples, with x̂_0 clipped to [−1, 1]."""
    clipped = dataclasses.replace(denoiser, clip=1.0)
    start = samplers.prior(denoiser.schedule, normal((1, 10, 10), seed=1, index=torch.arange(24)))
    return sampler(clipped, start).x


torch.manual_seed(0)
first = Denoiser(Perceptron(1, 10), schedules.Cosine(), objectives.PredV())
history = train(first)

fig, axes = plt.subplots(1, 2, figsize=(7.2, 1.9), width_ratios=(1, 2))
axes[0].plot(np.convolve(history, np.ones(20) / 20, "valid"))
axes[0].set(xlabel="step", ylabel="loss", ylim=(0, None))
show(axes[1], sample(first, samplers.DPMSolverPP(budget=20)), 12, "new data set and network, trained for a few seconds")
plt.show()

# %% [markdown]
# ## Schedule
#
# A table is defined by its $\ln\bar\alpha_i$; interpolation, posterior, derivatives, SDE and all samplers follow from it. This one has
# the quantiles of a Laplace distribution as $\ln\mathrm{SNR}$, so that uniform $t$ concentrates training around $\mathrm{SNR} = 1$
# (Hang & Gu 2024). With $\bar\alpha = \mathrm{SNR}/(1 + \mathrm{SNR})$:
#
# $$\ln\mathrm{SNR}(u) = \mu + b\,\mathrm{sgn}(u - \tfrac12)\,\ln\big(1 - 2|u - \tfrac12|\big), \qquad u = \frac{i - 1/2}{T}$$


# %%
class Laplace(Table):
    """ln SNR on the quantiles of a Laplace distribution of mean `mean` and scale `scale`."""

    def __init__(self, steps=1000, mean=0.0, scale=1.0):
        u = (torch.arange(1, steps + 1, dtype=torch.float64) - 0.5) / steps
        log_snr = mean + scale * torch.sign(u - 0.5) * torch.log1p(-2 * (u - 0.5).abs())
        super().__init__(nn.functional.logsigmoid(log_snr))


# %%
laplace = Laplace(steps=500, scale=1.5)
t = torch.arange(1, 501, dtype=torch.float64) / 500
log_snr = 2 * laplace.lam(t)
quantile = 0.5 - 0.5 * log_snr.sign() * (1 - (-log_snr.abs() / 1.5).exp())  # probability of a value above ln SNR
torch.testing.assert_close(quantile, t - 0.001, rtol=0, atol=1e-9)

torch.manual_seed(0)
second = Denoiser(Perceptron(1, 10), laplace, objectives.PredV())
train(second)

fig, axes = plt.subplots(1, 2, figsize=(7.2, 1.9), width_ratios=(1, 2))
for name, schedule in (("Laplace", laplace), ("cosine", schedules.Cosine())):
    axes[0].plot(t, 2 * schedule.lam(t), label=name)
axes[0].set(xlabel="$t$", ylabel=r"$\ln\,$SNR", ylim=(-11, 11))
axes[0].legend()
show(axes[1], sample(second, samplers.DPMSolverPP(budget=20)), 12, "and with the new schedule")
plt.show()

# %% [markdown]
# ## Objective
#
# An objective is a pair of coefficients, $y = a_t x_0 + b_t \varepsilon$. This one is the tangent of the curve, normalized to length 1:
#
# $$y = \frac{\dot\alpha\, x_0 + \dot\sigma\, \varepsilon}{\sqrt{\dot\alpha^2 + \dot\sigma^2}}$$
#
# It has three known objectives as special cases: $v$ on curves with $\alpha^2 + \sigma^2 = 1$, $(\varepsilon - x_0)/\sqrt2$ on the straight line of flow
# matching, and $\varepsilon$ on curves with $\alpha = 1$.


# %%
class PredTangent(Objective):
    """y = (α̇ x_0 + σ̇ ε)/√(α̇² + σ̇²)."""

    def coefficients(self, schedule, t):
        d_alpha, d_sigma = schedule.derivatives(t)
        length = (d_alpha.square() + d_sigma.square()).sqrt()
        return d_alpha / length, d_sigma / length


# %%
tangent = PredTangent()
t = torch.tensor([0.1, 0.4, 0.7, 0.999], dtype=torch.float64)
x0, noise = torch.randn(2, 4, 1, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
expected = {
    schedules.VP(): objectives.PredV().target(schedules.VP(), t, x0, noise),
    laplace: objectives.PredV().target(laplace, t, x0, noise),
    schedules.Flow(): (noise - x0) / math.sqrt(2),
    schedules.VE(): noise,
}
for schedule, y in expected.items():
    torch.testing.assert_close(tangent.target(schedule, t, x0, noise), y, rtol=1e-9, atol=1e-9)
    alpha, sigma = (v.reshape(-1, 1, 1, 1) for v in schedule.alpha_sigma(t))
    solved = tangent.solve(schedule, t, alpha * x0 + sigma * noise, y)  # the 2×2 solve is the base class's
    torch.testing.assert_close(solved, (x0, noise), rtol=1e-6, atol=1e-6)

torch.manual_seed(0)
third = Denoiser(Perceptron(1, 10), schedules.Flow(), tangent)
train(third)

fig, axes = plt.subplots(2, 1, figsize=(5.4, 2.6))
show(axes[0], sample(third, samplers.Heun(budget=20)), 12, "new data set, network and objective, schedule flow: heun")
show(axes[1], sample(third, samplers.DDPM(20)), 12, "the same network: ddpm")
plt.show()

# %% [markdown]
# ## On the command line
#
# With the four classes in `my_lab.py` in the working folder:
#
# ```bash
# export PYTHONPATH=.
# python src/train.py data=custom recipe=digits data.source._target_=my_lab.Shapes data.channels=1 data.image_size=[10,10] data.num_classes=2
# python src/train.py model=custom model._target_=my_lab.Perceptron +model.size=8
# python src/train.py schedule=custom schedule._target_=my_lab.Laplace +schedule.steps=500 +schedule.scale=1.5
# python src/train.py schedule=flow objective=custom objective._target_=my_lab.PredTangent
# python src/sample.py ckpt=latest trust=[my_lab] n=64
# ```
#
# A checkpoint may instantiate classes of this package only; `trust` allows those of your module. The options can be combined. A file
# `my_conf/objective/tangent.yaml` with `_target_: my_lab.PredTangent` makes `objective=tangent` an option for the command line
# (`--config-dir my_conf`) and for sweeps: `--multirun objective=pred_v,tangent`.
