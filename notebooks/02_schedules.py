# %% [markdown]
# # Schedules and weightings
#
# A schedule is a curve $(\alpha_t, \sigma_t)$ with $x_t = \alpha_t x_0 + \sigma_t \varepsilon$. The information about $x_0$ in $x_t$ depends only
# on $\ln\mathrm{SNR} = 2\ln(\alpha_t/\sigma_t)$; schedules differ in the time that they spend at each value of it.
# The figures show the curves, the weightings, and the distribution of the training loss that follows from both.

# %%
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from diffusion_lab import objectives, schedules, time_samplers, weightings
from diffusion_lab.data.images import to_float
from diffusion_lab.data.pictures import grid
from diffusion_lab.data.sources import Digits
from diffusion_lab.noise import normal

plt.style.use("lab.mplstyle")
t = torch.linspace(0, 1, 1001, dtype=torch.float64)[1:]

# %% [markdown]
# ## 1. The curves
#
# Top: tables (a thousand $\beta_i$, which determine $\bar\alpha$). Bottom: curves with a formula for every $t$. `vp` is the
# limit of `linear` for many steps; `ve` and `edm` do not scale the image and add noise up to 50 and 80 times its range, hence
# the logarithmic axis of $\sigma$.

# %%
tables = {
    "linear": schedules.Linear(),
    "scaled_linear": schedules.ScaledLinear(),
    "cosine": schedules.Cosine(),
    "sigmoid": schedules.Sigmoid(),
}
curves = {
    "vp": schedules.VP(),
    "sub_vp": schedules.SubVP(),
    "ve": schedules.VE(),
    "edm": schedules.EDM(),
    "flow": schedules.Flow(),
}

fig, axes = plt.subplots(2, 3, figsize=(7.2, 4.6), sharex=True)
for row, group in zip(axes, (tables, curves), strict=True):
    for name, schedule in group.items():
        alpha, sigma = schedule.alpha_sigma(t)
        row[0].plot(t, alpha, label=name)
        row[1].plot(t, sigma)
        row[2].plot(t, 2 * schedule.lam(t))
    row[0].legend(loc="lower left", labelspacing=0.25)
    row[2].set_ylim(-18, 14)
axes[1, 1].set_yscale("log")
for ax, title in zip(axes[0], (r"$\alpha_t$", r"$\sigma_t$", r"$\ln\,$SNR"), strict=True):
    ax.set_title(title)
for ax in axes[1]:
    ax.set_xlabel("$t$")
plt.show()

# %% [markdown]
# The same digit and the same noise along four of them, each image divided by its root mean square (the pixels of this digit have mean
# square ½). `linear` removes most of the image in the first half and spends the second half on noise, which motivated `cosine`.

# %%
digit = to_float(Digits().load(Path("data"), (1, 8, 8), download=False).examples.images[4:5])
noise = normal((1, 8, 8), seed=0, index=torch.tensor([0]))
stops = torch.tensor([0.02, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], dtype=torch.float64)
shown = {name: {**tables, **curves}[name] for name in ("linear", "cosine", "flow", "edm")}

fig, axes = plt.subplots(len(shown), 1, figsize=(7.2, 3.1), sharex=True)
for ax, (name, schedule) in zip(axes, shown.items(), strict=True):
    alpha, sigma = (v.float().reshape(-1, 1, 1, 1) for v in schedule.alpha_sigma(stops))
    x_t = (alpha * digit + sigma * noise) / (0.5 * alpha**2 + sigma**2).sqrt()
    ax.imshow(grid(x_t * 0.6, columns=len(stops)), aspect="equal")
    ax.set_yticks([])
    ax.set_ylabel(name, rotation=0, ha="right", va="center")
    ax.tick_params(bottom=False)
    ax.spines[:].set_visible(False)
    ax.grid(False)
width = grid(x_t, columns=len(stops)).shape[1] / len(stops)
axes[-1].set_xticks([(k + 0.5) * width for k in range(len(stops))], [f"{v:g}" for v in stops])
axes[-1].set_xlabel("$t$")
plt.show()

# %% [markdown]
# Two options of every table. `shift` multiplies $\sigma/\alpha$, $\ln\mathrm{SNR} \to \ln\mathrm{SNR} - 2\ln s$: averaging neighboring
# pixels removes noise, so at twice the resolution twice the noise is needed for the same loss of information.
# `zero_terminal_snr` rescales the table so that $\alpha_1 = 0$: sampling then starts from the distribution of training at $t = 1$.

# %%
s = 4
plain, shifted = schedules.Cosine(), schedules.Cosine(shift=s)
torch.testing.assert_close(shifted.lam(t), plain.lam(t) - math.log(s), rtol=0, atol=1e-9)

fig, axes = plt.subplots(1, 2, figsize=(7.2, 2.5))
for shift in (1, 2, 4, 8):
    axes[0].plot(t, 2 * schedules.Cosine(shift=shift).lam(t), label=f"{shift}", color=plt.cm.Blues(0.35 + 0.08 * shift))
axes[0].set(xlabel="$t$", ylabel=r"$\ln\,$SNR", title="cosine, shifted", ylim=(-16, 12))
axes[0].legend(title="shift", ncols=2)
end = t > 0.8
for name, zero in (("as published", False), ("zero_terminal_snr", True)):
    axes[1].plot(t[end], schedules.Linear(zero_terminal_snr=zero).alpha_sigma(t[end])[0], label=name)
axes[1].set(xlabel="$t$", ylabel=r"$\alpha_t$", title="linear, its end", ylim=(0, None))
axes[1].legend()
plt.show()

# %% [markdown]
# ## 2. Density of ln SNR
#
# With $t$ uniform, $\ln\mathrm{SNR}$ has the density
#
# $$p(\ell) = \left|\frac{dt}{d\ell}\right|, \qquad \frac{d\ell}{dt} = 2\left(\frac{\dot\alpha}{\alpha} - \frac{\dot\sigma}{\sigma}\right).$$
#
# For the straight line of flow matching that is $\frac18\operatorname{sech}^2\frac{\ell}{4}$, for the cosine without its offset
# $\frac{1}{2\pi}\operatorname{sech}\frac{\ell}{2}$. `time_sampler` changes the density independently of the schedule: EDM
# draws $\ln(\sigma/\alpha) \sim \mathcal N(-1.2, 1.2^2)$ on any curve.


# %%
def density(schedule, t):
    """Return ln SNR and its density for uniform t."""
    (alpha, sigma), (d_alpha, d_sigma) = schedule.alpha_sigma(t), schedule.derivatives(t)
    return 2 * schedule.lam(t), 1 / (2 * (d_alpha / alpha - d_sigma / sigma)).abs()


fine = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
ell, p = density(schedules.Flow(), fine)
torch.testing.assert_close(p, 1 / (8 * (ell / 4).cosh() ** 2), rtol=1e-9, atol=0)
ell, p = density(schedules.Cosine(), t)
inner = ell.abs() < 4
torch.testing.assert_close(p[inner], 1 / (2 * math.pi * (ell[inner] / 2).cosh()), rtol=0.03, atol=0)

drawn = time_samplers.LogNormal(-1.2, 1.2)(schedules.Flow(), torch.arange(20_000), 20_000, seed=0, step=0)
drawn = 2 * schedules.Flow().lam(drawn)

fig, ax = plt.subplots(figsize=(7.2, 2.7))
for name in ("linear", "cosine", "sigmoid", "flow", "edm"):
    ax.plot(*density({**tables, **curves}[name], t[5:-1]), label=f"{name}, uniform $t$")
ax.hist(
    drawn,
    bins=80,
    density=True,
    histtype="stepfilled",
    color="#dddddd",
    zorder=0,
    label="flow, time_sampler=log_normal",
)
ax.set(
    xlim=(-16, 16), ylim=(0, 0.25), xlabel=r"$\ln\,$SNR   (noise $\leftarrow$   $\rightarrow$ data)", ylabel="density"
)
ax.legend(loc="upper left")
plt.show()

# %% [markdown]
# ## 3. Weightings
#
# A weighting $w$ is defined on the error of $\varepsilon$: the loss is $w\,\|\varepsilon - \hat\varepsilon\|^2$. An error $\Delta y$ of
# the network's output is $\Delta\varepsilon = (\alpha/D)\Delta y$, so the same loss has the weight $w(\alpha/D)^2$ on $y$; for $x_0$ that is
# $w\cdot\mathrm{SNR}$, for $v$ it is $w\,\alpha^2$ where $\alpha^2+\sigma^2=1$. The three panels show the *same* weightings for the three errors; a flat
# line is the unweighted squared error of that panel's quantity. (`p2` with its published $k = \gamma = 1$ is `sigmoid` with $b = 0$.)

# %%
vp = schedules.VP()
near = torch.linspace(-7, 7, 281, dtype=torch.float64)  # ln SNR
tau = vp.time(near / 2)
kinds = {
    "eps": weightings.Eps(),
    "x0": weightings.X0(),
    "truncated_snr": weightings.TruncatedSNR(),
    "min_snr": weightings.MinSNR(),
    "p2": weightings.P2(),
    "sigmoid, b = 2": weightings.Sigmoid(bias=2),
    "edm": weightings.EDM(),
}
units = {
    r"on $\varepsilon$": objectives.PredNoise(),
    "on $x_0$": objectives.PredX0(),
    "on $v$": objectives.PredV(),
}
for kind in kinds.values():
    w, on_x0, on_v = (kind(vp, objective, tau) for objective in units.values())
    torch.testing.assert_close(on_x0, w * near.exp(), rtol=1e-9, atol=0)
    torch.testing.assert_close(on_v, w * near.sigmoid(), rtol=1e-9, atol=0)  # α² = sigmoid(ln SNR)

fig, axes = plt.subplots(1, 3, figsize=(7.2, 3.1), sharey=True)
for ax, (unit, objective) in zip(axes, units.items(), strict=True):
    for k, (name, kind) in enumerate(kinds.items()):
        ax.semilogy(near, kind(vp, objective, tau), label=name, ls="--" if k in (2, 6) else "-")
    ax.set(title=unit, xlabel=r"$\ln\,$SNR", ylim=(2e-3, 5e2))
axes[0].set_ylabel("weight")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, columnspacing=1.2)
plt.show()

# %% [markdown]
# `native` has weight 1 on the error of $y$ for any $y$. On $\varepsilon$ it is a different weighting for each objective,
# $w = (D/\alpha)^2$:
#
# | objective | native $w$ | |
# |---|---|---|
# | `pred_noise` | $1$ | DDPM's $L_\text{simple}$ |
# | `pred_x0` | $1/\mathrm{SNR}$ | most weight at high noise |
# | `pred_v` | $1 + 1/\mathrm{SNR}$ | "SNR + 1" on $x_0$ |
# | `pred_flow` | $(1 + \mathrm{SNR}^{-1/2})^2$ | on every curve |
# | `edm` | $1 + 1/(\sigma_d^2\,\mathrm{SNR})$ | `weighting=edm`, by the definition of $c_\text{out}$ |

# %%
snr = near.exp()
native = {
    "pred_noise": (objectives.PredNoise(), torch.ones_like(snr)),
    "pred_x0": (objectives.PredX0(), 1 / snr),
    "pred_v": (objectives.PredV(), 1 + 1 / snr),
    "pred_flow": (objectives.PredFlow(), (1 + snr**-0.5) ** 2),
    "edm": (objectives.EDM(0.5), 1 + 4 / snr),
}
fig, ax = plt.subplots(figsize=(7.2, 2.6))
for name, (objective, by_hand) in native.items():
    w = weightings.Native()(vp, objective, tau) / weightings.Eps()(vp, objective, tau)
    torch.testing.assert_close(w, by_hand, rtol=1e-9, atol=0)
    ax.semilogy(near, w, label=name)
ax.set(xlabel=r"$\ln\,$SNR", ylabel=r"native weight on $\varepsilon$", ylim=(1e-2, 1e3))
ax.legend()
plt.show()

# %% [markdown]
# ## 4. Distribution of the loss
#
# $$\mathbb E_t\, w\,\|\varepsilon - \hat\varepsilon\|^2 = \int p(\ell)\; w(\ell)\; \mathrm{err}(\ell)\, d\ell$$
#
# $\mathrm{err}$ depends on the data and on the network. For the digits, the optimal *linear* denoiser, which depends on their mean and
# covariance, is an approximation in closed form. In the eigenbasis, with eigenvalues $c_n$, $\mathrm{err} = \frac1N\sum_n \frac{\alpha^2 c_n}{\alpha^2 c_n + \sigma^2}$
# for $\varepsilon$.

# %%
images = to_float(Digits().load(Path("data"), (1, 8, 8), download=False).examples.images[:]).flatten(1).double()
eigenvalues = torch.linalg.eigvalsh(images.T.cov()).clamp(min=0)


def error(ell):
    """Return the mean squared error of ε at ln SNR of the optimal linear denoiser of the digits."""
    return (ell[:, None].exp() * eigenvalues / (ell[:, None].exp() * eigenvalues + 1)).mean(1)


uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
recipes = {
    "linear, ε (DDPM)": (schedules.Linear(), objectives.PredNoise(), weightings.Native()),
    "cosine, ε": (schedules.Cosine(), objectives.PredNoise(), weightings.Native()),
    "cosine, v": (schedules.Cosine(), objectives.PredV(), weightings.Native()),
    "cosine, min_snr": (schedules.Cosine(), objectives.PredV(), weightings.MinSNR()),
    "flow matching": (schedules.Flow(), objectives.PredFlow(), weightings.Native()),
}

fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.0), width_ratios=(1, 1.6))
for unit, factor in ((r"$\varepsilon$", 0 * near), ("$x_0$", -near), ("$v$", -torch.nn.functional.logsigmoid(near))):
    axes[0].semilogy(near, error(near) * factor.exp(), label=unit)
axes[0].set(xlabel=r"$\ln\,$SNR", ylabel="error of the optimal linear denoiser", title="Error")
axes[0].legend(title="error of")
ell_grid = torch.linspace(-14, 14, 561, dtype=torch.float64)
for name, (schedule, objective, weighting) in recipes.items():
    at = schedule.time(ell_grid / 2)
    at = at[(at > 1e-3) & (at < 1)]
    ell, p = density(schedule, at)
    w = weighting(schedule, objective, at) / weightings.Eps()(schedule, objective, at)
    loss = p * w * error(ell)
    loss = loss / torch.trapezoid(loss, ell).abs()
    axes[1].plot(ell, loss, label=name)
    data_side = torch.trapezoid(loss * (ell > 0), ell).abs()
    print(f"{name:17} {data_side:.0%} of the loss at SNR > 1")
sigma_d = math.sqrt(float(images.var(0).mean()))
w = weightings.EDM(sigma_d)(vp, objectives.PredNoise(), vp.time(ell_grid / 2))
loss = torch.exp(-0.5 * ((ell_grid - 2.4) / 2.4) ** 2) * w * error(ell_grid)
axes[1].plot(ell_grid, loss / torch.trapezoid(loss, ell_grid), label="EDM: log_normal, edm")
axes[1].set(
    xlim=(-9, 15), ylim=(0, None), xlabel=r"$\ln\,$SNR", ylabel="density of the loss", title="Distribution of the loss"
)
axes[1].legend(loc="upper right")
plt.show()

# %% [markdown]
# With target $\varepsilon$, five sixths of the loss are at $\mathrm{SNR} > 1$, with $v$ and flow matching three fifths; `min_snr` removes the part at
# high SNR. `cosine` with $v$ and flow matching are nearly identical: only the product $p\,w$ matters. The loss along one schedule equals that along
# another if the weight is multiplied by the ratio of the densities:

# %%
ell_flow, p_flow = density(schedules.Flow(), uniform)
inside = ell_flow.abs() < 8  # the range of both curves
along_flow = (error(ell_flow) * inside).mean()

ell_vp, p_vp = density(schedules.VP(), uniform)
line = 1 / (8 * (ell_vp / 4).cosh() ** 2)  # flow's density, at these ln SNR
along_vp = (error(ell_vp) * line / p_vp * (ell_vp.abs() < 8)).mean()
print(f"E err along flow {along_flow:.4f}, along vp with the weight p_flow/p_vp {along_vp:.4f}")
torch.testing.assert_close(along_vp, along_flow, rtol=1e-3, atol=0)

# %% [markdown]
# In training, a schedule therefore determines only how samples are distributed (the variance of the gradient); in *sampling*, it determines the
# steps: see the next notebook, [03_samplers](03_samplers.ipynb).
#
# On the command line: `schedule=linear objective=pred_v weighting=min_snr weighting.gamma=5 time_sampler=log_normal`, in any combination.
