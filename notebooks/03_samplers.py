# %% [markdown]
# # Samplers
#
# All samplers on one denoiser. For a mixture of Gaussians the optimal $\hat\varepsilon$ has a closed form, so all errors of a sample are errors
# of the sampler. In the last section an error is added to the network, which reverses the order of the samplers.

# %%
import math

import matplotlib.pyplot as plt
import torch

from diffusion_lab import objectives, samplers, schedules, variances
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.noise import normal
from diffusion_lab.samplers import grids

plt.style.use("lab.mplstyle")

# %% [markdown]
# ## 1. Data and the optimal network
#
# Eighty Gaussians along two arms of a spiral. Samplers take images $(B, C, H, W)$; here an image has two channels, the coordinates, and each
# pixel is a point. For components of mean $m_k$ and standard deviation $w$, with $n^2 = \alpha^2w^2 + \sigma^2$,
#
# $$\hat x_0 = \sum_k p_k\,\frac{\sigma^2 m_k + \alpha w^2 x_t}{n^2}, \qquad p_k \propto \exp\left(-\frac{\|x_t - \alpha m_k\|^2}{2n^2}\right).$$

# %%
reach = torch.linspace(0.15, 1, 40, dtype=torch.float64)
angle = 3.2 * math.pi * reach
arm = torch.stack([reach * angle.cos(), reach * angle.sin()], dim=1)
means, width = torch.cat([arm, -arm]), 0.04
schedule = schedules.VP()


def optimal(x_t, c):
    """Return E[ε | x_t]; c = 999 t is the time-conditioning input on `vp`."""
    alpha, sigma = (v.reshape(-1, 1, 1, 1) for v in schedule.alpha_sigma(c / 999))
    n2 = (alpha * width) ** 2 + sigma**2
    logits = alpha * torch.einsum("kd,bdhw->bkhw", means, x_t) - alpha**2 / 2 * means.square().sum(1)[:, None, None]
    mean = torch.einsum("kd,bkhw->bdhw", means, (logits / n2).softmax(1))
    x0 = (sigma**2 * mean + alpha * width**2 * x_t) / n2
    return (x_t - alpha * x0) / sigma


denoiser = Denoiser(optimal, schedule, objectives.PredNoise())
side = 40
one = torch.tensor([0])


def data(seed):
    """Return 1600 points of the mixture as an image (1, 2, 40, 40), and the component of each."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randint(len(means), (side, side), generator=generator)
    return means[k].permute(2, 0, 1)[None] + width * normal(
        (2, side, side), seed=seed, index=one, dtype=torch.float64
    ), k


def points(ax, x, **style):
    """Plot the pixels of an image as points."""
    ax.scatter(*x[0].flatten(1), **{"s": 2, "lw": 0, "color": "0.75", **style})
    ax.set(xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set_visible(False)
    ax.grid(False)


# %% [markdown]
# From data to noise in two ways: the forward process, which adds independent noise to each point, and the probability-flow ODE,
# $dx/dt = \dot\alpha\hat x_0 + \dot\sigma\hat\varepsilon$, which is invertible. At each $t$ both rows have the same distribution; the color is the
# position on the spiral.

# %%
x0, k = data(0)
eps = normal((2, side, side), seed=7, index=one, dtype=torch.float64)
order = (k % 40).flatten() + 40 * (k >= 40).flatten()
stops = [0, 0.1, 0.2, 0.3, 0.5, 1.0]

fig, axes = plt.subplots(2, len(stops), figsize=(7.2, 2.5))
state = x0
for column, (before, t) in zip(axes.T, zip([0, *stops], stops, strict=False), strict=True):
    alpha, sigma = schedule.alpha_sigma(torch.tensor(t, dtype=torch.float64))
    if t > 0:
        state = samplers.ODE(rtol=1e-4, atol=1e-4)(denoiser, state, start=before, stop=t).x
    for ax, x in zip(column, (alpha * x0 + sigma * eps, state), strict=True):
        points(ax, x, color=None, c=order, cmap="viridis")
        ax.set(xlim=(-2.3, 2.3), ylim=(-2.3, 2.3))
    column[0].set_title(f"$t$ = {t:g}", loc="center")
axes[0, 0].set_ylabel("forward")
axes[1, 0].set_ylabel("ODE")
plt.show()

# %% [markdown]
# ## 2. Trajectories
#
# Every sampler has the same signature, `sampler(denoiser, x_T, seed=, callback=)`, and `budget` limits the number of network
# evaluations. Twenty evaluations from the same five points (rings); gray: the data; in parentheses: the evaluations used.

# %%
turn = torch.arange(5, dtype=torch.float64) * 2 * math.pi / 5 + 0.4
start = 1.4 * torch.stack([turn.cos(), turn.sin()])[None, :, :, None]  # (1, 2, 5, 1): five pixels
shown = {
    "ODE, adaptive": samplers.ODE(),
    "ddim": samplers.DDIM(budget=20),
    "heun": samplers.Heun(budget=20, grid="uniform_lambda"),
    "dpm_solver_pp": samplers.DPMSolverPP(budget=20, grid="uniform_lambda"),
    "ddpm": samplers.DDPM(budget=20, grid="uniform_lambda"),
    "ddim, η = 0.5": samplers.DDIM(budget=20, eta=0.5, grid="uniform_lambda"),
    "dpm_solver_pp, sde": samplers.DPMSolverPP(budget=20, sde=True, grid="uniform_lambda"),
    "heun, churn": samplers.Heun(budget=20, s_churn=8, grid="uniform_lambda"),
}

fig, axes = plt.subplots(2, 4, figsize=(7.2, 3.9))
ends = {}
for ax, (name, sampler) in zip(axes.flat, shown.items(), strict=True):
    path = []
    ends[name], nfe, _ = sampler(
        denoiser, start, seed=4, callback=lambda i, t, x, prediction, path=path: path.append(x)
    )
    path = torch.cat([*path, ends[name]]).flatten(2)  # (steps, 2, 5)
    points(ax, x0, s=1, color="0.8")
    for n in range(5):
        ax.plot(*path[:, :, n].T, ".-", color=f"C{n}", lw=0.8, ms=0 if nfe > 20 else 2.5)
        ax.plot(*path[0, :, n], "o", color=f"C{n}", ms=5, mfc="white")
        ax.plot(*path[-1, :, n], "o", color=f"C{n}", ms=5)
    ax.set(xlim=(-1.9, 1.9), ylim=(-1.9, 1.9))
    ax.set_title(f"{name} ({nfe})", loc="center", fontsize=8.5)
plt.show()
for name, end in ends.items():
    if shown[name].deterministic:
        print(
            f"{name:15} {(end - ends['ODE, adaptive']).square().sum(1).sqrt().mean():.4f} from the end point of the ODE"
        )

# %% [markdown]
# The upper four approximate the solution of the ODE; the lower four return a different point of the data for every seed.
#
# ## 3. Time grids
#
# The grids distribute the same number of steps differently. Solvers in $\lambda = \ln(\alpha/\sigma)$ (`dpm_solver_pp`, `unipc`) are most
# accurate with equal steps in $\lambda$; `trailing` on `vp` has most of its steps at high noise.

# %%
fig, axes = plt.subplots(1, 2, figsize=(7.2, 2.4), sharey=True)
for row, name in enumerate(reversed(grids.NAMES)):
    at = grids.make_grid(name, schedule, 15)[:-1]
    for ax, where in zip(axes, (at, schedule.lam(at)), strict=True):
        ax.plot(where, [row] * len(where), "o", ms=3.5, color="C0")
axes[0].set_yticks(range(len(grids.NAMES)), reversed(grids.NAMES))
axes[0].set(xlabel="$t$", ylim=(-0.6, len(grids.NAMES) - 0.4), title="15 steps of each grid (without $t = 0$)")
axes[1].set(xlabel=r"$\lambda = \ln(\alpha/\sigma)$")
for ax in axes:
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
plt.show()

# %% [markdown]
# ## 4. Order
#
# From $t = 1$ to $t = 0.1$, compared with the ODE solved to 11 digits. A method of order $p$ has error $\propto N^{-p}$ if all steps are of the
# same kind: equal steps in $\lambda$, no last step into data, no lower order in the last steps (`lower_last=False`).
# The published third-order rule of DPM-Solver++ uses half of the second difference and has slope 2; `corrected=True` uses all of it.
# The corrector of UniPC-2 raises its order by one.

# %%
few = normal((2, 6, 6), seed=3, index=one, dtype=torch.float64)
exact = samplers.ODE(rtol=1e-11, atol=1e-11)(denoiser, few, stop=0.1).x
even = {"grid": "uniform_lambda"}
solvers = {
    "ddim": (1, lambda n: samplers.DDIM(n, **even)),
    "heun": (2, lambda n: samplers.Heun(budget=n, **even)),
    "dpm_solver_pp, 2M": (2, lambda n: samplers.DPMSolverPP(n, corrected=True, lower_last=False, **even)),
    "3M, published": (2, lambda n: samplers.DPMSolverPP(n, order=3, lower_last=False, **even)),
    "3M, corrected": (3, lambda n: samplers.DPMSolverPP(n, order=3, corrected=True, lower_last=False, **even)),
    "unipc-2": (3, lambda n: samplers.UniPC(n, lower_last=False, **even)),
}
budgets = [16, 32, 64, 128, 256, 512]
errors = {}
for name, (_, make) in solvers.items():
    errors[name] = []
    for n in budgets:
        end = make(n)(denoiser, few, stop=0.1).x
        errors[name].append(float((end - exact).square().mean().sqrt()))

fig, ax = plt.subplots(figsize=(7.2, 3.4))
for name, curve in errors.items():
    ax.loglog(budgets, curve, "o-", label=name)
for slope, end in ((1, 2 * errors["ddim"][-1]), (2, 2.2 * errors["heun"][-1]), (3, 0.45 * errors["unipc-2"][-1])):
    ax.loglog(budgets[-3:], [end * (n / budgets[-1]) ** -slope for n in budgets[-3:]], color="0.5", lw=0.9, ls="--")
    ax.text(budgets[-1] * 1.06, end, f"slope {slope}", color="0.4", fontsize=8, va="center")
ax.set(xlabel="network evaluations", ylabel="distance from the exact solution", xlim=(14, 760))
ax.set_xticks(budgets, [str(n) for n in budgets])
ax.minorticks_off()
ax.legend(loc="lower left")
plt.show()

for name, (p, _) in solvers.items():
    slope = -math.log2(errors[name][-1] / errors[name][-2])
    print(f"{name:18} order {p}, measured {slope:.2f}")
    assert abs(slope - p) < 0.3

# %% [markdown]
# ## 5. Quality against network evaluations
#
# From noise to data: 1600 samples, and the sliced Wasserstein distance between their distribution and that of the data (the root mean square
# over 32 directions of the distance between sorted projections). The dotted line is the distance of 1600 data points. Right: the same with an
# error of a tenth of a standard deviation added to the network, smooth in $x$.

# %%
directions = torch.arange(32, dtype=torch.float64) * math.pi / 32
directions = torch.stack([directions.cos(), directions.sin()])
truth = torch.cat([data(100 + i)[0][0].flatten(1) for i in range(10)], dim=1).T @ directions
truth = truth.sort(0).values[5::10]  # the quantiles of 1600 sorted points


def distance(x):
    return float((x[0].flatten(1).T @ directions).sort(0).values.sub(truth).square().mean().sqrt())


def inexact(x_t, c):
    return optimal(x_t, c) + 0.1 * torch.sin(2.5 * x_t.flip(1) + 1)


compared = {
    "ddim": lambda n: samplers.DDIM(budget=n, **even),
    "heun": lambda n: samplers.Heun(budget=n, **even),
    "unipc": lambda n: samplers.UniPC(budget=n, **even),
    "ddpm, fixed_small": lambda n: samplers.DDPM(budget=n, **even),
    "ddpm, fixed_large": lambda n: samplers.DDPM(budget=n, variance=variances.FixedLarge(), **even),
    "dpm_solver_pp, sde": lambda n: samplers.DPMSolverPP(budget=n, sde=True, **even),
    "predictor_corrector": lambda n: samplers.PredictorCorrector(budget=n, **even),
}
budgets = [6, 10, 20, 50, 100]
x_T = samplers.prior(schedule, normal((2, side, side), seed=0, index=one, dtype=torch.float64))
floor = distance(data(50)[0])

fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.4), sharey=True)
final = {}
for ax, network, title in zip(axes, (optimal, inexact), ("Optimal network", "Network with error"), strict=True):
    tested = Denoiser(network, schedule, objectives.PredNoise())
    for name, make in compared.items():
        distances = [distance(make(n)(tested, x_T).x) for n in budgets]
        final[title, name] = distances[-1]
        ax.loglog(budgets, distances, "o-" if make(6).deterministic else "s--", label=name)
    ax.axhline(floor, color="black", lw=0.9, ls=":")
    ax.set_xticks(budgets, [str(n) for n in budgets])
    ax.minorticks_off()
    ax.set(xlabel="network evaluations", title=title)
axes[0].set_ylabel("distance from the data")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
plt.show()

# %% [markdown]
# With the optimal network, UniPC reaches the distance of data points after ten evaluations, Heun after twenty, the stochastic samplers
# after fifty to a hundred. With an error in the network, all deterministic samplers converge to the *same wrong* distribution, that of the
# network's ODE. Stochastic steps partly remove earlier errors, and the stochastic samplers end closer to the data. This motivates churn,
# correctors, and DDPM with a thousand steps.

# %%
with_error = {name: value for (title, name), value in final.items() if title == "Network with error"}
worst_noisy = max(value for name, value in with_error.items() if not compared[name](6).deterministic)
best_exact = min(value for name, value in with_error.items() if compared[name](6).deterministic)
print(f"network with error: stochastic {worst_noisy:.3f} at most, deterministic {best_exact:.3f} at least")
assert worst_noisy < best_exact

samples = {
    "data": data(50)[0],
    "ddim": compared["ddim"](10)(denoiser, x_T).x,
    "unipc": compared["unipc"](10)(denoiser, x_T).x,
    "ddpm, fixed_small": compared["ddpm, fixed_small"](10)(denoiser, x_T).x,
    "ddpm, fixed_large": compared["ddpm, fixed_large"](10)(denoiser, x_T).x,
}
fig, axes = plt.subplots(1, len(samples), figsize=(7.2, 1.75))
for ax, (name, x) in zip(axes, samples.items(), strict=True):
    points(ax, x, color="C0", s=2.5)
    ax.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15))
    ax.set_title(name, loc="center", fontsize=8.5)
fig.suptitle("Ten evaluations, optimal network", fontsize=9.5)
plt.show()

# %% [markdown]
# At ten steps `fixed_small` underestimates the variance and contracts the samples; `fixed_large` spreads them. The fitted variance of
# [01_formulas](01_formulas.ipynb), `variance=analytic`, lies between.
#
# On the command line, for any checkpoint: `python src/evaluate.py ckpt=latest samplers=[ddim,unipc,ddpm] steps=[10,20,50]` draws the figure of
# section 5. Next: [04_guidance_and_editing](04_guidance_and_editing.ipynb).
