# %% [markdown]
# # Guidance and editing
#
# First, guidance in closed form: a labeled density in the plane with its optimal network and classifier. Then a
# small network of labeled digits, trained below in a quarter of a minute, and tasks that require no further training:
# labels, inpainting, SDEdit, interpolation, encoding.

# %%
import dataclasses
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffusion_lab import editing, guidance, objectives, samplers, schedules
from diffusion_lab.conditions import Label
from diffusion_lab.data.pictures import grid
from diffusion_lab.data.sources import Digits
from diffusion_lab.data.stream import BatchStream
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.losses import L2, diffusion_loss
from diffusion_lab.models import UNet
from diffusion_lab.noise import Stream, normal
from diffusion_lab.time_samplers import Stratified
from diffusion_lab.weightings import Native

plt.style.use("lab.mplstyle")

# %% [markdown]
# ## 1. Guidance, exactly
#
# Three arms that meet in the center, one for each class. An "image" is two channels of one pixel: a point. The network takes the label, or
# the null label 3 of a dropped label; the classifier returns $\log p(x_t \mid y)$ up to a constant.

# %%
reach = torch.linspace(0.0, 1.3, 14, dtype=torch.float64)
bend = 0.9 * reach + torch.arange(3)[:, None] * 2 * math.pi / 3
means = torch.stack([reach * bend.cos(), reach * bend.sin()], dim=-1).flatten(0, 1)  # (42, 2)
owner = torch.arange(3).repeat_interleave(14)
width, schedule = 0.16, schedules.VP()


def components(x_t, t):
    """Return log p(x_t, component k) up to a constant, (B, 42), with α, σ and n² = α²w² + σ²."""
    alpha, sigma = (v.reshape(-1, 1) for v in schedule.alpha_sigma(t))
    n2 = (alpha * width) ** 2 + sigma**2
    gap = x_t.flatten(1)[:, None] - alpha[..., None] * means
    return -gap.square().sum(2) / (2 * n2), alpha, sigma, n2


def optimal(x_t, c, label=None):
    """Return E[ε | x_t, label]; c = 999 t."""
    log, alpha, sigma, n2 = components(x_t, c / 999)
    if label is not None:
        log = log.masked_fill((label[:, None] != owner) & (label[:, None] < 3), -math.inf)
    mean = log.softmax(1) @ means
    x0 = (sigma**2 * mean + alpha * width**2 * x_t.flatten(1)) / n2
    return ((x_t.flatten(1) - alpha * x0) / sigma).reshape(x_t.shape)


def classifier(x_t, t):
    log = components(x_t, t)[0]
    return torch.stack([log[:, owner == y].logsumexp(1) for y in range(3)], dim=1)


denoiser = Denoiser(optimal, schedule, objectives.PredNoise())

# %% [markdown]
# Both forms of guidance follow from Bayes' rule, $\nabla\log p(y \mid x_t) = \nabla\log p(x_t \mid y) - \nabla\log p(x_t)$, with
# $\nabla \log p = -\hat\varepsilon/\sigma$:
#
# $$\underbrace{\hat\varepsilon_u - s\,\sigma_t \nabla\log p(y \mid x_t)}_{\text{classifier}} = \underbrace{\hat\varepsilon_u + s\,(\hat\varepsilon_c - \hat\varepsilon_u)}_{\text{classifier-free}}$$
#
# With the optimal network and classifier they are equal up to rounding:

# %%
x_t = normal((2, 1, 1), seed=0, index=torch.arange(300), dtype=torch.float64)
label = torch.arange(300) % 3
for t in torch.tensor([0.05, 0.3, 0.9], dtype=torch.float64):
    free = guidance.ClassifierFree(denoiser, scale=2.5, num_classes=3)(x_t, t, label=label)
    classified = guidance.ClassifierGuidance(denoiser, classifier, num_classes=3, scale=2.5, labeled=False)
    torch.testing.assert_close(free.noise, classified(x_t, t, label=label).noise, rtol=1e-8, atol=1e-8)

    sigma = schedule.alpha_sigma(t)[1]
    x = x_t.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(classifier(x, t).log_softmax(1)[torch.arange(300), label].sum(), x)
    by_hand = denoiser(x_t, t).noise - 2.5 * sigma * gradient
    torch.testing.assert_close(free.noise, by_hand, rtol=1e-8, atol=1e-8)

# %% [markdown]
# At each $t$ this is the score of the tilted density $p_t(x)\,p_t(y \mid x)^s \propto p_t(x \mid y)^s\,p_t(x)^{1-s}$. Samples follow the tilted density
# of the data, $t = 0$, for $s = 0$ and $1$ only: tilting and adding noise do not commute. For larger $s$ the samples concentrate, leave the
# inner part of the arm, where the tilted density is not small, and overshoot its end.

# %%
n = 1200
x_T = samplers.prior(schedule, normal((2, 1, 1), seed=1, index=torch.arange(n), dtype=torch.float64))
requested = {"label": torch.zeros(n, dtype=torch.long)}
axis = torch.linspace(-1.9, 1.9, 160, dtype=torch.float64)
plane = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).reshape(-1, 2, 1, 1)
each = components(plane, torch.zeros(1, dtype=torch.float64))[0]
log_p, log_py = each.logsumexp(1), each[:, owner == 0].logsumexp(1) - each.logsumexp(1)
scales = [0, 1, 2, 4, 8]
solver = samplers.DPMSolverPP(budget=25, grid="uniform_lambda")

fig, axes = plt.subplots(2, len(scales), figsize=(7.2, 3.0))
spread, tilted = [], []
for (above, below), s in zip(axes.T, scales, strict=True):
    density = (log_p + s * log_py).softmax(0)
    points = solver(guidance.ClassifierFree(denoiser, scale=s, num_classes=3), x_T, condition=requested).x.flatten(1)
    for ax in (above, below):
        ax.scatter(*means.T, s=3, color="0.75", lw=0)
        ax.set(xlim=(-1.7, 1.7), ylim=(-1.7, 1.9), xticks=[], yticks=[], aspect="equal")
        ax.spines[:].set_visible(False)
        ax.grid(False)
    image = (density / density.max()).sqrt().reshape(160, 160)
    above.imshow(
        image,
        extent=(-1.9, 1.9, -1.9, 1.9),
        origin="lower",
        cmap="Blues",
        interpolation="bilinear",
        alpha=image.clamp(0, 1),
    )
    below.scatter(*points.T, s=1.5, lw=0, color="C0")
    above.set_title(f"$s$ = {s}", loc="center")
    tilted.append((density[:, None] * plane.flatten(1)).sum(0))
    spread.append(points)
axes[0, 0].set_ylabel(r"$p(x)\,p(y|x)^s$")
axes[1, 0].set_ylabel("samples")
plt.show()

for s, points, mean in zip(scales, spread, tilted, strict=True):
    print(
        f"s = {s}: mean of the samples ({points[:, 0].mean():.2f}, {points[:, 1].mean():.2f}), of the tilted density ({mean[0]:.2f}, {mean[1]:.2f})"
    )
torch.testing.assert_close(spread[1].mean(0), tilted[1], rtol=0, atol=0.05)

# %% [markdown]
# ## 2. A network of digits
#
# A training loop from the library's objects, without a trainer: batches, times, keyed noise, randomly dropped labels, the
# loss. `python src/train.py condition=label` trains in the same way, with checkpoints, validation and logging.

# %%
examples = Digits().load(Path("data"), (1, 8, 8), download=False).examples
stream = BatchStream(examples, batch_size=64, seed=0)
draw_t, drop = Stratified(), Label(num_classes=10, drop=0.1)
steps = 320

torch.manual_seed(0)
network = UNet(
    channels=1,
    image_size=[8, 8],
    width=16,
    multipliers=[1, 1, 1],
    blocks=1,
    attention=[],
    groups=8,
    num_classes=10,
    channels_last=True,
)
average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.99))
optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
raw_denoiser = Denoiser(network, schedules.Cosine(), objectives.PredV())

history = []
for step in range(steps):
    batch = stream.batch(step)
    x0, position = batch["image"], batch["position"]
    t = draw_t(raw_denoiser.schedule, position, 64, seed=0, step=step)
    eps = normal(x0.shape[1:], seed=0, index=position, draw=step, stream=Stream.NOISE)
    loss = diffusion_loss(raw_denoiser, Native(), L2(), x0, eps, t, **drop(batch, seed=0)).weighted.mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    average.update_parameters(network)
    history.append(loss.item())

denoiser = Denoiser(average.module.eval(), raw_denoiser.schedule, raw_denoiser.objective, clip=1.0)
print(f"{sum(p.numel() for p in network.parameters()):,} parameters, loss {sum(history[-50:]) / 50:.3f}")


def show(ax, images, columns, title="", **labels):
    ax.imshow(grid(images, columns=columns))
    ax.set(xticks=[], yticks=[], **labels)
    ax.set_title(title, loc="center")
    ax.spines[:].set_visible(False)
    ax.grid(False)


# %% [markdown]
# ## 3. Labels
#
# Row $y$ has the label $y$; all panels start from the same noise. Guidance increases accuracy and decreases diversity. Accuracy is the share of
# samples whose nearest training image has the requested class; diversity is the mean distance between two samples of a class, relative to that
# between two training images.

# %%
labels = torch.arange(10).repeat_interleave(8)
start = normal((1, 8, 8), seed=1, index=torch.arange(80))
train, truth = torch.from_numpy(examples.images[:]).flatten(1).float() / 127.5 - 1, torch.from_numpy(examples.labels)


def diversity(images, y):
    return torch.stack([torch.pdist(images[y == k].flatten(1)).mean() for k in range(10)]).mean()


scales = [0.0, 1.0, 2.0, 3.0, 5.0]
pictures, accuracies, diversities = [], [], []
for s in scales:
    guided = guidance.ClassifierFree(denoiser, scale=s)
    images = samplers.DPMSolverPP(budget=12)(guided, start, condition={"label": labels}).x
    nearest = truth[torch.cdist(images.flatten(1), train).argmin(1)]
    pictures.append(images)
    accuracies.append(float((nearest == labels).float().mean()))
    diversities.append(float(diversity(images, labels) / diversity(train, truth)))

fig, axes = plt.subplots(1, 4, figsize=(7.2, 2.7), width_ratios=(1, 1, 1, 1))
for ax, k in zip(axes, (0, 1, 3), strict=False):
    show(ax, pictures[k], 8, f"$s$ = {scales[k]:g}")
axes[3].plot(scales, accuracies, "o-", label="accuracy")
axes[3].plot(scales, diversities, "o-", label="diversity")
axes[3].set(xlabel="$s$", ylim=(0, 1.4))
axes[3].legend(loc="lower right")
plt.show()
assert accuracies[3] > 0.8 > accuracies[0]

# %% [markdown]
# ## 4. Inpainting
#
# Known pixels replace those of $\hat x_0$, and every segment of the time grid is repeated `resample` times, with forward steps between the
# repetitions, so that the generated pixels become consistent with the known ones (RePaint). The condition is the null label, 10.

# %%
chosen = torch.tensor([0, 6, 8, 13])
originals = train[chosen].reshape(-1, 1, 8, 8)
mask = torch.zeros(1, 1, 8, 8)
mask[..., 4:, :] = 1  # 1 where pixels are generated
none = {"label": torch.full((32,), 10)}
known = originals.repeat_interleave(8, dim=0)
index = torch.arange(32)
x_T = samplers.prior(denoiser.schedule, normal((1, 8, 8), seed=0, index=index))
filled = editing.inpaint(
    samplers.DDPM(20), denoiser, x_T, known, mask, index=index, condition=none, jump_length=5, resample=5
).x
assert torch.equal(filled[..., :4, :], known[..., :4, :])  # bit for bit

half = torch.where(mask > 0, -0.4, originals)
rows = torch.cat([originals[:, None], half[:, None], filled.reshape(4, 8, 1, 8, 8)], dim=1)
fig, ax = plt.subplots(figsize=(5.2, 2.3))
show(ax, rows.flatten(0, 1), 10, "original, known half, eight completions")
plt.show()

# %% [markdown]
# ## 5. SDEdit
#
# $x_t = \alpha_t x_0 + \sigma_t\varepsilon$ for an intermediate $t$, then any sampler from there to data (`start=t`): the larger $t$, the less of the
# original remains. The input here is a drawing of straight lines.

# %%
drawing = torch.full((1, 1, 8, 8), -1.0)
drawing[..., 0:7, [2, 5]] = 1
drawing[..., [0, 3, 6], 2:6] = 1
strengths = [0.2, 0.35, 0.5, 0.65, 0.8, 0.95]
eps = normal((1, 8, 8), seed=3, index=torch.arange(4))
columns = [drawing.expand(4, -1, -1, -1)]
for t in strengths:
    x_t = denoiser.schedule.corrupt(drawing, eps, torch.tensor(t))
    columns.append(samplers.DDIM(20)(denoiser, x_t, start=t, condition={"label": torch.full((4,), 8)}).x)

fig, ax = plt.subplots(figsize=(4.2, 2.6))
sheet = torch.stack(columns, dim=1).flatten(0, 1)
show(ax, sheet, 7)
cell = grid(sheet, columns=7).shape[1] / 7
ax.set_xticks([(k + 0.5) * cell for k in range(7)], ["drawing", *(f"$t$ = {t:g}" for t in strengths)])
ax.tick_params(length=0)
plt.show()

# %% [markdown]
# ## 6. Encoding, decoding, interpolating
#
# A deterministic sampler integrates in both directions: `start=0, stop=1` encodes an image to the noise that decodes to it. The reconstruction
# error depends on the order of the solver. The ODE has no clipping, so the denoiser here has none.

# %%
flow = dataclasses.replace(denoiser, clip=None)
known_label = {"label": truth[chosen]}
errors = {}
for name, make in {"ddim": samplers.DDIM, "heun": samplers.Heun, "unipc": samplers.UniPC}.items():
    errors[name] = []
    for budget in (10, 20, 40, 80):
        latents = make(budget=budget)(flow, originals, start=0.0, stop=1.0, condition=known_label).x
        decoded = make(budget=budget)(flow, latents, condition=known_label).x
        errors[name].append(float((decoded - originals).square().mean().sqrt()))

fig, ax = plt.subplots(figsize=(4.2, 2.5))
for name, curve in errors.items():
    ax.loglog((10, 20, 40, 80), curve, "o-", label=name)
ax.set(xlabel="network evaluations in each direction", ylabel="reconstruction error")
ax.set_xticks([10, 20, 40, 80], ["10", "20", "40", "80"])
ax.minorticks_off()
ax.legend()
plt.show()

# %% [markdown]
# Interpolation between the latents of two images: points of the great circle (`slerp`) decode to images; points of the chord have a norm that is
# too small and decode to images of low contrast. Decoding with another label changes the digit and keeps slant and thickness.

# %%
solver = samplers.Heun(budget=40)
pair, none = originals[[1, 3]], torch.tensor([10])
a, b = solver(flow, pair, start=0.0, stop=1.0, condition={"label": none.expand(2)}).x
weights = torch.linspace(0, 1, 9)
latents = torch.cat([editing.slerp(a, b, weights), a + weights[:, None, None, None] * (b - a)])
between = solver(flow, latents, condition={"label": none.expand(18)}).x

latents = solver(flow, originals, start=0.0, stop=1.0, condition=known_label).x
guided = guidance.ClassifierFree(denoiser, scale=2.0)
every = {"label": torch.arange(10).repeat(4)}
decoded = solver(guided, latents.repeat_interleave(10, dim=0), condition=every).x
decodings = torch.cat([originals[:, None], decoded.reshape(4, 10, 1, 8, 8)], dim=1)

fig, axes = plt.subplots(2, 1, figsize=(6.0, 3.8), height_ratios=(2, 3.4))
show(axes[0], between, 9, "from one digit to another: great circle (above), chord (below)")
show(axes[1], decodings.flatten(0, 1), 11, "an original, and its latent decoded as 0 … 9")
plt.show()

# %% [markdown]
# On the command line, for any checkpoint: `task=inpaint`, `task=edit`, `task=interpolate`, `task=encode` and `task=decode` of `src/sample.py`,
# `guidance=cfg guidance.scale=2`. Next: [05_bring_your_own](05_bring_your_own.ipynb).
