# %% [markdown]
# # Formulas and code
#
# DDPM step by step: one noise step, many steps at once, the reverse step, prediction targets, the bound, the two algorithms.
# Below each equation, PyTorch code computes it explicitly in float64 and compares the result with the library's function.
#
# | papers | here | meaning |
# |---|---|---|
# | $i \in \{1, \dots, T\}$ | $t = i/T \in (0, 1]$, $s < t$ | time; $t = 0$ is data |
# | $\sqrt{\bar\alpha_i}$, $\sqrt{1 - \bar\alpha_i}$ | $\alpha_t$, $\sigma_t$ | $x_t = \alpha_t x_0 + \sigma_t \varepsilon$ |
# | $\bar\alpha_i / (1 - \bar\alpha_i)$ | $\mathrm{SNR} = \alpha_t^2/\sigma_t^2$, $\lambda = \ln(\alpha_t/\sigma_t)$ | signal to noise |

# %%
import math

import matplotlib.pyplot as plt
import torch

from diffusion_lab import gaussian, likelihood, losses, objectives, samplers, schedules, variances, weightings
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.noise import Stream, normal

plt.style.use("lab.mplstyle")


def same(by_hand, library, tolerance=1e-9):
    """Raise AssertionError unless two results agree to `tolerance`, absolute plus relative."""
    torch.testing.assert_close(library.double(), by_hand.double(), rtol=tolerance, atol=tolerance)


# %% [markdown]
# ## 1. One step of noise
#
# $$q(x_i \mid x_{i-1}) = \mathcal N\big(\sqrt{1-\beta_i}\, x_{i-1},\ \beta_i I\big), \qquad \beta_i \text{ linear from } 10^{-4} \text{ to } 0.02$$
#
# The factor $\sqrt{1-\beta_i}$ preserves unit variance: $(1-\beta_i) \cdot 1 + \beta_i = 1$.

# %%
T = 1000
schedule = schedules.Linear(T)
beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
i = torch.arange(1, T + 1, dtype=torch.float64)
t, s = i / T, (i - 1) / T

step = gaussian.transition(schedule, t, s)
same((1 - beta).sqrt(), step.alpha)
same(beta, step.variance)

# %% [markdown]
# ## 2. Many steps at once
#
# $$q(x_i \mid x_0) = \mathcal N\big(\sqrt{\bar\alpha_i}\, x_0,\ (1-\bar\alpha_i) I\big), \qquad \bar\alpha_i = \prod_{j \le i} (1-\beta_j)$$
#
# Why does $\sqrt{(1-\beta_i)(1-\bar\alpha_{i-1})}\,\varepsilon' + \sqrt{\beta_i}\,\varepsilon''$ become a single
# $\sqrt{1-\bar\alpha_i}\,\varepsilon$? The two are independent Gaussians, whose *variances* add:
# $(1-\beta_i)(1-\bar\alpha_{i-1}) + \beta_i = 1-\bar\alpha_i$. The loop below adds them a thousand times.

# %%
mean, variance = torch.ones(T + 1, dtype=torch.float64), torch.zeros(T + 1, dtype=torch.float64)
for k in range(T):
    mean[k + 1] = (1 - beta[k]).sqrt() * mean[k]
    variance[k + 1] = (1 - beta[k]) * variance[k] + beta[k]

alpha, sigma = schedule.alpha_sigma(t)
same(mean[1:], alpha)
same(variance[1:].sqrt(), sigma)
same((1 - beta).cumprod(0), alpha**2)  # ᾱ

# %% [markdown]
# The figure uses a data set of three numbers: $q(x_t)$ is a mixture of three Gaussians that converges to a single one. The
# lines are individual chains, sampled step by step.

# %%
data, share = torch.tensor([-0.9, 0.2, 0.7]).double(), torch.tensor([0.5, 0.2, 0.3]).double()


def density(x, centre, deviation):
    return torch.exp(-0.5 * ((x - centre) / deviation) ** 2) / (deviation * math.sqrt(2 * math.pi))


x = torch.linspace(-2.6, 2.6, 400, dtype=torch.float64)[:, None]
marginal = sum(w * density(x, alpha * m, sigma) for w, m in zip(share, data, strict=True))  # (400, T)
paths = data[[0, 0, 1, 2]].clone()
chains = [paths]
for k, z in enumerate(normal((4,), seed=0, index=torch.arange(T), dtype=torch.float64)):
    paths = (1 - beta[k]).sqrt() * paths + beta[k].sqrt() * z
    chains.append(paths)

fig, ax = plt.subplots(figsize=(7.2, 2.9))
shade = (marginal / marginal.max(0).values).sqrt()
ax.imshow(
    shade, origin="lower", aspect="auto", extent=(0, 1, -2.6, 2.6), cmap="Blues", vmax=1.6, interpolation="bilinear"
)
ax.plot(torch.arange(T + 1) / T, torch.stack(chains), lw=0.7, color="C1", alpha=0.9)
ax.plot([0, 0, 0], data, "o", color="black", ms=4, clip_on=False, zorder=3)
ax.set(
    xlabel="$t$",
    ylabel="$x_t$",
    title="From three data points (black) to N(0, 1), and four chains",
    xlim=(0, 1),
)
ax.grid(False)
plt.show()

# %% [markdown]
# ## 3. The reverse step
#
# $q(x_{i-1} \mid x_i)$ requires the distribution of the data; given $x_0$ it does not. By Bayes' rule,
# $q(x_{i-1} \mid x_i, x_0) \propto q(x_i \mid x_{i-1})\, q(x_{i-1} \mid x_0)$, a product of two Gaussians in $x_{i-1}$. Precisions add,
# and so do precision-weighted means:
#
# $$\frac{1}{\tilde\beta_i} = \frac{\alpha_i}{\beta_i} + \frac{1}{1-\bar\alpha_{i-1}}, \qquad
# \tilde\mu_i = \tilde\beta_i \left( \frac{\sqrt{\alpha_i}}{\beta_i}\, x_i + \frac{\sqrt{\bar\alpha_{i-1}}}{1-\bar\alpha_{i-1}}\, x_0 \right)
# \qquad (\alpha_i = 1 - \beta_i)$$
#
# Solved for variance and mean:
#
# $$\tilde\beta_i = \frac{1-\bar\alpha_{i-1}}{1-\bar\alpha_i}\beta_i, \qquad
# \tilde\mu_i = \underbrace{\frac{\sqrt{\alpha_i}(1-\bar\alpha_{i-1})}{1-\bar\alpha_i}}_{c_1} x_i
# + \underbrace{\frac{\sqrt{\bar\alpha_{i-1}}\,\beta_i}{1-\bar\alpha_i}}_{c_0} x_0$$

# %%
a = 1 - beta
bar = a.cumprod(0)
before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])  # ᾱ_{i−1}
back = gaussian.posterior(schedule, t, s)

same((1 - before) / (1 - bar) * beta, back.variance)
same(a.sqrt() * (1 - before) / (1 - bar), back.c1)
same(before.sqrt() * beta / (1 - bar), back.c0)

precision = a[1:] / beta[1:] + 1 / (1 - before[1:])  # at i = 1 it is infinite: x_0 itself
same(1 / precision, back.variance[1:])
same(a[1:].sqrt() / beta[1:] / precision, back.c1[1:])

# %% [markdown]
# The library's form is valid for any pair $s < t$, so that a chain can skip steps: with $\alpha_{t|s} = \alpha_t/\alpha_s$ and
# $\sigma^2_{t|s} = \sigma_t^2 - \alpha_{t|s}^2\sigma_s^2$,
#
# $$q(x_s \mid x_t, x_0) = \mathcal N\Big(\tfrac{\alpha_{t|s}\sigma_s^2}{\sigma_t^2} x_t + \tfrac{\alpha_s\sigma^2_{t|s}}{\sigma_t^2} x_0,\ \tilde\sigma^2 I\Big),
# \qquad \tilde\sigma^2 = \frac{\sigma^2_{t|s}\sigma_s^2}{\sigma_t^2}.$$
#
# Left: Bayes' rule evaluated on a grid, compared with this formula. Right: $q(x_s \mid x_t)$ without $x_0$. For the three data
# points it has several modes if the step is long, and is nearly Gaussian for one step of a thousand, so Gaussian steps
# $p_\theta(x_s \mid x_t)$ can generate any distribution if there are enough of them.

# %%
t1, s1 = torch.tensor([0.35, 0.2], dtype=torch.float64)
x0_, xt_ = 0.7, -0.35
(alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t1), schedule.alpha_sigma(s1)
forward, reverse = gaussian.transition(schedule, t1, s1), gaussian.posterior(schedule, t1, s1)
grid = torch.linspace(-6, 6, 12001, dtype=torch.float64)
dx = grid[1] - grid[0]

prior = density(grid, alpha_s * x0_, sigma_s)
evidence = density(xt_, forward.alpha * grid, forward.variance.sqrt())
product = prior * evidence / (prior * evidence).sum() / dx
centre = reverse.c1 * xt_ + reverse.c0 * x0_
same(density(grid, centre, reverse.variance.sqrt()), product, 1e-8)


def without_x0(t, s, x_t):
    """Return q(x_s | x_t): the posteriors of the three points, weighted by q(x_0 | x_t)."""
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    q = gaussian.posterior(schedule, t, s)
    weight = share * density(x_t, alpha_t * data, sigma_t)
    each = density(grid[:, None], q.c1 * x_t + q.c0 * data, q.variance.sqrt())
    return (each * weight / weight.sum()).sum(1)


fig, axes = plt.subplots(1, 2, figsize=(7.2, 2.7))
axes[0].plot(grid, prior, label=r"$q(x_s\mid x_0)$")
axes[0].plot(grid, evidence, label=r"$q(x_t\mid x_s)$")
axes[0].plot(grid, product, color="C2", label="product, normalized")
axes[0].plot(
    grid[::120],
    density(grid[::120], centre, reverse.variance.sqrt()),
    "k.",
    ms=3,
    label=r"$\mathcal{N}(c_1x_t+c_0x_0,\tilde\sigma^2)$",
)
axes[0].set(xlim=(-3, 2), xlabel="$x_s$", ylabel="density", title="Given $x_0$: one Gaussian", ylim=(None, 1.1))
axes[0].legend(loc="upper left", ncols=2)
t2 = torch.tensor(0.3, dtype=torch.float64)
for gap in (0.25, 0.15, 0.05, 0.01):
    conditional = without_x0(t2, t2 - gap, 0.05)
    axes[1].plot(grid, conditional / conditional.max(), label=f"{gap:g}")
axes[1].set(
    xlim=(-1.7, 2.3), xlabel="$x_s$", ylabel="density / maximum", title="Without $x_0$: Gaussian for short steps only"
)
axes[1].legend(title="$t-s$", loc="upper right")
plt.show()

# %% [markdown]
# ## 4. Prediction targets
#
# The mean of the reverse step is a function of $x_0$ or of $\varepsilon$. From $x_t = \alpha x_0 + \sigma\varepsilon$:
#
# $$\tilde\mu_i(x_i, x_0) = c_1 x_i + c_0 x_0, \qquad
# \tilde\mu_i(x_i, \varepsilon) = \frac{1}{\sqrt{\alpha_i}}\left(x_i - \frac{\beta_i}{\sqrt{1-\bar\alpha_i}}\,\varepsilon\right)$$

# %%
shape = (1, 8, 8)
index = torch.arange(T)
x0 = normal(shape, seed=1, index=index, dtype=torch.float64) / 2
noise = normal(shape, seed=2, index=index, dtype=torch.float64)


def c(value):
    """Reshape one value per image for multiplication with images."""
    return value.reshape(-1, 1, 1, 1)


x_t = c(alpha) * x0 + c(sigma) * noise
mu = back.mean(x_t, x0)
same((x_t - c(beta / (1 - bar).sqrt()) * noise) / c(a.sqrt()), mu)

# %% [markdown]
# So a network can predict $\tilde\mu$ (A), $x_0$ (B) or $\varepsilon$ (C). All three are linear in $(x_0, \varepsilon)$, and so is
# $v = \alpha\varepsilon - \sigma x_0$, the velocity $dx/d\varphi$ of $x = \cos\varphi\, x_0 + \sin\varphi\, \varepsilon$:
#
# $$y = a_t x_0 + b_t \varepsilon, \qquad
# \begin{pmatrix} x_t \\ y \end{pmatrix} = \begin{pmatrix} \alpha & \sigma \\ a & b \end{pmatrix}\begin{pmatrix} x_0 \\ \varepsilon \end{pmatrix}
# \ \Rightarrow\ \hat x_0 = \frac{b x_t - \sigma y}{D}, \quad \hat\varepsilon = \frac{\alpha y - a x_t}{D}, \quad D = \alpha b - \sigma a$$

# %%
targets = {
    objectives.PredMean(): mu,
    objectives.PredX0(): x0,
    objectives.PredNoise(): noise,
    objectives.PredV(): c(alpha) * noise - c(sigma) * x0,
}
for objective, y in targets.items():
    same(y, objective.target(schedule, t, x0, noise))
    ca, cb = (c(v) for v in objective.coefficients(schedule, t))
    d = c(alpha) * cb - c(sigma) * ca
    guess_x0, guess_noise = objective.solve(schedule, t, x_t, y)
    same((cb * x_t - c(sigma) * y) / d, guess_x0)
    same(x0, guess_x0, 1e-8)  # D of the mean is 1e-4: eight digits of sixteen remain
    same(noise, guess_noise, 1e-8)

# %% [markdown]
# The targets differ in how errors propagate: $\Delta x_0 = -(\sigma/D)\,\Delta y$ and $\Delta\varepsilon = (\alpha/D)\,\Delta y$. For a
# network that predicts $\varepsilon$, the error of $\hat x_0$ at $t = 1$ is multiplied by $\sigma/\alpha \approx 160$; for one that predicts $x_0$,
# the error of $\hat\varepsilon$ is large near $t = 0$; for $v$ both factors are at most 1. The factors of $\tilde\mu$, which hardly differs from
# $x_t$, are the largest, which explains the poor results of DDPM's first option.

# %%
fig, axes = plt.subplots(1, 2, figsize=(7.2, 2.8), sharey=True)
names = {"PredMean": r"$\tilde\mu$", "PredX0": "$x_0$", "PredNoise": r"$\varepsilon$", "PredV": "$v$"}
for objective in targets:
    d = objective.determinant(schedule, t)
    name = names[type(objective).__name__]
    for ax, factor in zip(axes, (sigma / d, alpha / d), strict=True):
        ax.semilogy(t, factor.abs(), label=name, ls="--" if name == "$v$" else "-")
axes[0].set(xlabel="$t$", ylabel="error out / error in", title=r"Error of $\hat x_0$: $|\sigma/D|$", ylim=(3e-3, 3e4))
axes[1].set(xlabel="$t$", title=r"Error of $\hat\varepsilon$: $|\alpha/D|$")
axes[1].legend(title="prediction", ncols=2, loc="upper right")
plt.show()

# %% [markdown]
# ## 5. The bound
#
# $$-\log p_\theta(x_0) \le \underbrace{\mathrm{KL}\big(q(x_T|x_0)\,\|\,p(x_T)\big)}_{L_T}
# + \sum_{i=2}^{T} \underbrace{\mathrm{KL}\big(q(x_{i-1}|x_i,x_0)\,\|\,p_\theta(x_{i-1}|x_i)\big)}_{L_{i-1}}
# \underbrace{-\log p_\theta(x_0|x_1)}_{L_0}$$
#
# All terms except the last are KL divergences of Gaussians:
#
# $$\mathrm{KL}\big(\mathcal N(\mu_1, \sigma_1^2)\,\|\,\mathcal N(\mu_2, \sigma_2^2)\big)
# = \ln\frac{\sigma_2}{\sigma_1} + \frac{\sigma_1^2 + (\mu_1-\mu_2)^2}{2\sigma_2^2} - \frac12$$

# %%
m1, m2, v1, v2 = torch.tensor([0.3, -1.2, 0.5, 0.8]).double()
v1, v2 = v1.abs(), v2.abs()
same(0.5 * (v2 / v1).log() + (v1 + (m1 - m2) ** 2) / (2 * v2) - 0.5, gaussian.kl(m1, v1.log(), m2, v2.log()))

# %% [markdown]
# If both have the variance $\tilde\beta_i$, only the means matter. For a network that predicts $\varepsilon$,
#
# $$L_{i-1} = \frac{1}{2\tilde\beta_i}\|\tilde\mu_i - \hat\mu_i\|^2 = \frac{\beta_i^2}{2\tilde\beta_i\,\alpha_i(1-\bar\alpha_i)}\,\|\varepsilon - \hat\varepsilon\|^2
# = \tfrac12\Big(\tfrac{\mathrm{SNR}_{i-1}}{\mathrm{SNR}_i} - 1\Big)\|\varepsilon - \hat\varepsilon\|^2 .$$
#
# That factor is the weighting `vlb`. Ho et al. drop it, $L_\text{simple} = \|\varepsilon - \hat\varepsilon\|^2$: the weighting `eps`, which for this
# objective is also `native`.

# %%
eps = objectives.PredNoise()
weight = beta**2 / (2 * back.variance * a * (1 - bar))
snr = schedule.lam(t).mul(2).exp()
same(weight[1:], weightings.VLB()(schedule, eps, t)[1:])  # at i = 1 the term is L_0
same(weight[1:], 0.5 * (snr[:-1] / snr[1:] - 1))
same(torch.ones(T), weightings.Eps()(schedule, eps, t))


def toy_network(x_t, c):
    """Return a function of the state and the time-conditioning input c = i − 1, as any network does."""
    return 0.9 * torch.tanh(x_t) + 0.1 * torch.cos(c / 100).reshape(-1, 1, 1, 1)


denoiser = Denoiser(toy_network, schedule, eps)
per_image = losses.diffusion_loss(denoiser, weightings.VLB(), losses.L2(), x0, noise, t)
same((weight * (noise - toy_network(x_t, i - 1)).square().mean((1, 2, 3)))[1:], per_image.weighted[1:])
same((noise - toy_network(x_t, i - 1)).square().mean((1, 2, 3)), per_image.error)  # algorithm 1, line 5

# %% [markdown]
# ## 6. The optimal variance
#
# The variance of $p_\theta(x_s \mid x_t)$ is $\tilde\sigma^2$ (`fixed_small`) for known $x_0$, and $\sigma^2_{t|s}$ (`fixed_large`) for $x_0$
# that is white noise of variance 1. The optimal one adds the variance of $x_0$ given $x_t$, which is estimated from the network's output
# (Analytic-DPM):
#
# $$\sigma^2_\star = \tilde\sigma^2 + c_0^2\, \mathrm{Var}[x_0 | x_t], \qquad
# \mathrm{Var}[x_0 | x_t] = \frac{\sigma_t^2}{\alpha_t^2}\Big(1 - \tfrac1N \mathbb E\|\hat\varepsilon\|^2\Big)$$
#
# The following data have closed forms: $x_0 \sim \mathcal N(0, r^2 I)$, $r = 0.1$. Then $x_t \sim \mathcal N(0, n_t^2 I)$ with
# $n_t^2 = \alpha_t^2r^2 + \sigma_t^2$, the optimal network is $\hat x_0 = \alpha_t r^2 x_t/n_t^2$, and $q(x_s \mid x_t)$ is Gaussian with variance
# $n_s^2 - \alpha_{t|s}^2 n_s^4/n_t^2$, which $\sigma^2_\star$ must equal.

# %%
r = 0.1


def optimal(x_t, c):
    """E[ε | x_t] = σ_t x_t/n_t²."""
    alpha, sigma = schedule.alpha_sigma((c + 1) / T)
    return (sigma / (alpha**2 * r**2 + sigma**2)).reshape(-1, 1, 1, 1) * x_t


denoiser = Denoiser(optimal, schedule, eps)
alpha_s, sigma_s = schedule.alpha_sigma(s)
n2_t, n2_s = alpha**2 * r**2 + sigma**2, alpha_s**2 * r**2 + sigma_s**2
analytic = variances.Analytic(t, sigma**2 / n2_t)  # E ε̂² = σ_t²/n_t²

prediction = denoiser(x_t, t)
reverse_variance = analytic(schedule, t, s, prediction, floor=back.variance).flatten()
same(n2_s[1:] - step.alpha[1:] ** 2 * n2_s[1:] ** 2 / n2_t[1:], reverse_variance[1:])
same(back.variance + back.c0**2 * sigma**2 / alpha**2 * (1 - sigma**2 / n2_t), reverse_variance)

# %% [markdown]
# ## 7. The bound in numbers
#
# A chain of $K$ of the 1000 steps, for 16 images of levels 0 … 255. The decoder $p_\theta(x_0 | x_1)$ is a Gaussian integrated over
# bins around the levels $k/127.5 - 1$, with open outermost bins:
#
# $$L_0 = -\log\left[\Phi\Big(\tfrac{x_0 - \mu + 1/255}{\sigma}\Big) - \Phi\Big(\tfrac{x_0 - \mu - 1/255}{\sigma}\Big)\right]$$
#
# Every term computed explicitly, with the noise that the library draws (noise is a function of a key):

# %%
pixels = (normal(shape, seed=3, index=torch.arange(16), dtype=torch.float64) * r).clamp(-1, 1)
pixels = ((pixels + 1) * 127.5).round() / 127.5 - 1
bound = likelihood.vlb(denoiser, pixels, steps=20)
chain = torch.cat([torch.zeros(1).double(), bound.times])  # 0 = t_0 < t_1 < … < t_20 = 1


def bits(nats):
    return nats.mean((1, 2, 3)) / math.log(2)


def gaussian_kl(m1, v1, m2, v2):
    return 0.5 * (v2 / v1).log() + (v1 + (m1 - m2) ** 2) / (2 * v2) - 0.5


alpha_1, sigma_1 = schedule.alpha_sigma(chain[-1])
L_T = bits(gaussian_kl(alpha_1 * pixels, sigma_1**2, 0 * pixels, sigma_1**2))
L = []
for k in range(1, len(chain)):
    alpha_t, sigma_t = schedule.alpha_sigma(chain[k])
    z = normal(shape, seed=0, index=torch.arange(16), draw=k + 1, stream=Stream.LIKELIHOOD, dtype=torch.float64)
    noisy = alpha_t * pixels + sigma_t * z
    guess = alpha_t * r**2 / (alpha_t**2 * r**2 + sigma_t**2) * noisy
    if k == 1:
        v = gaussian.posterior(schedule, chain[2], chain[1]).variance  # of the next pair; that of this pair is 0
        low, high = ((pixels - guess + edge) / v.sqrt() for edge in (-1 / 255, 1 / 255))
        upper = torch.where(pixels > 0.999, 1.0, torch.special.ndtr(high))
        lower = torch.where(pixels < -0.999, 0.0, torch.special.ndtr(low))
        L_0 = bits(-(upper - lower).clamp(min=1e-12).log())
    else:
        q = gaussian.posterior(schedule, chain[k], chain[k - 1])
        L.append(bits(gaussian_kl(q.mean(noisy, pixels), q.variance, q.mean(noisy, guess), q.variance)))

same(L_T, bound.terms["L_T"])
same(torch.stack(L, 1), bound.terms["L"])
same(L_0, bound.terms["L_0"])
same(L_T + sum(L) + L_0, bound.bpd)

# %% [markdown]
# The exact number of bits is known, which shows the gap of a chain of few steps. `fixed_small` underestimates the variance and has
# the largest gap; `fixed_large` overestimates it; the fitted variance has the smallest gap at every length, and all converge to the
# entropy with many steps. (Bao et al. 2022 show the same three curves for CIFAR-10.)

# %%
levels = torch.special.ndtr((pixels + 1 / 255) / r) - torch.special.ndtr((pixels - 1 / 255) / r)
exact = bits(-levels.log()).mean()
lengths = [5, 10, 20, 50, 100, 200]
kinds = {"fixed_small": variances.FixedSmall(), "fixed_large": variances.FixedLarge(), "analytic": analytic}
curves = {
    name: [likelihood.vlb(denoiser, pixels, steps=n, variance=kind).bpd.mean() for n in lengths]
    for name, kind in kinds.items()
}
terms = likelihood.vlb(denoiser, pixels, steps=112)  # 999 = 111 · 9: equal strides

fig, axes = plt.subplots(1, 2, figsize=(7.2, 2.8))
for name, curve in curves.items():
    axes[0].loglog(lengths, curve, "o-", label=name)
axes[0].axhline(exact, color="black", lw=0.9, ls=":")
axes[0].text(lengths[0], exact * 0.96, f"$-\\log_2 p(x_0)$ = {exact:.2f}", va="top", fontsize=8)
axes[0].set(
    xlabel="steps $K$", ylabel="bits per dimension", title="The bound, three variances", ylim=(exact * 0.78, 150)
)
axes[0].set_xticks(lengths, [str(n) for n in lengths])
axes[0].set_yticks([5, 10, 20, 50, 100], ["5", "10", "20", "50", "100"])
axes[0].minorticks_off()
axes[0].legend()
axes[1].semilogy(terms.times[1:], terms.terms["L"].mean(0), color="C0")
axes[1].plot(terms.times[0], terms.terms["L_0"].mean(), "o", color="C1")
axes[1].annotate("$L_0$", (terms.times[0], terms.terms["L_0"].mean()), (8, -3), textcoords="offset points", color="C1")
axes[1].plot(1, terms.terms["L_T"].mean(), "o", color="C2")
axes[1].annotate("$L_T$", (1, terms.terms["L_T"].mean()), (-16, 4), textcoords="offset points", color="C2")
axes[1].set(xlabel="$t$", ylabel="bits per dimension", title="Its terms, $K = 112$")
plt.show()

# %% [markdown]
# ## 8. Sampling
#
# Algorithm 2 of Ho et al., and DDIM, which preserves $q(x_t \mid x_0)$ for any noise of a step between $0$ and $\tilde\sigma$:
#
# $$x_{i-1} = \frac{1}{\sqrt{\alpha_i}}\left(x_i - \frac{\beta_i}{\sqrt{1-\bar\alpha_i}}\hat\varepsilon\right) + \sigma z, \qquad
# x_s = \alpha_s \hat x_0 + \sqrt{\sigma_s^2 - \eta^2\tilde\sigma^2}\;\hat\varepsilon + \eta\tilde\sigma z$$

# %%
few = schedules.Linear(100)  # a table of 100 steps, all of them used
betas = torch.linspace(1e-3, 0.2, 100, dtype=torch.float64)
bars = (1 - betas).cumprod(0)


def smooth(x_t, c):
    return torch.tanh(x_t)


index = torch.arange(4)
start = samplers.prior(few, normal(shape, seed=5, index=index, dtype=torch.float64))
by_hand = start
for k in reversed(range(100)):
    by_hand = (by_hand - betas[k] / (1 - bars[k]).sqrt() * smooth(by_hand, k)) / (1 - betas[k]).sqrt()
    if k > 0:
        z = normal(shape, seed=5, index=index, draw=100 - k, dtype=torch.float64)
        by_hand += ((1 - bars[k - 1]) / (1 - bars[k]) * betas[k]).sqrt() * z
same(by_hand, samplers.DDPM()(Denoiser(smooth, few, eps), start, seed=5).x, 1e-8)

eta, by_hand = 0.5, start
times = samplers.DDIM(steps=10).time_grid(Denoiser(smooth, few, eps))
for k in range(10):
    (alpha_t, sigma_t), (alpha_s, sigma_s) = few.alpha_sigma(times[k]), few.alpha_sigma(times[k + 1])
    noise_hat = smooth(by_hand, None)
    x0_hat = (by_hand - sigma_t * noise_hat) / alpha_t
    tilde = gaussian.posterior(few, times[k], times[k + 1]).variance
    z = normal(shape, seed=5, index=index, draw=k + 1, dtype=torch.float64)
    by_hand = alpha_s * x0_hat + (sigma_s**2 - eta**2 * tilde).sqrt() * noise_hat + eta * tilde.sqrt() * z
same(by_hand, samplers.DDIM(steps=10, eta=eta)(Denoiser(smooth, few, eps), start, seed=5).x, 1e-8)

# %% [markdown]
# ## 9. Infinitely many steps
#
# For $T \to \infty$ the chain is an SDE $dx = f x\,dt + g\,dw$ with $f = \frac{d\ln\alpha}{dt}$ and
# $g^2 = \frac{d\sigma^2}{dt} - 2f\sigma^2$ for any curve $(\alpha, \sigma)$; on `vp` these are $-\frac12\beta(t)$ and $\beta(t)$. The ODE with the same
# marginals simplifies to a form without $f$ and $g$:
#
# $$\frac{dx}{dt} = f x - \tfrac12 g^2\, \nabla\log q(x) = \dot\alpha\,\hat x_0 + \dot\sigma\,\hat\varepsilon, \qquad \nabla\log q(x_t) = -\hat\varepsilon/\sigma_t$$

# %%
vp = schedules.VP(beta_min=0.1, beta_max=20)
at = torch.linspace(0.01, 1, 100, dtype=torch.float64)
f, g2 = vp.drift_diffusion(at)
same(-0.5 * (0.1 + at * 19.9), f)
same(0.1 + at * 19.9, g2)

for curve in (vp, schedules.SubVP(), schedules.VE(), schedules.EDM(), schedules.Cosine()):
    (ca, cs), (da, ds), (f, g2) = curve.alpha_sigma(at), curve.derivatives(at), curve.drift_diffusion(at)
    data_, noise_ = x0[: len(at), 0, 0, 0], noise[: len(at), 0, 0, 0]
    state, score = ca * data_ + cs * noise_, -noise_ / cs
    same(da * data_ + ds * noise_, f * state - 0.5 * g2 * score, 1e-8)

# %% [markdown]
# The score is the gradient of the log density; autograd computes it for the data of section 6:

# %%
state = x_t.clone().requires_grad_()
log_density = (-0.5 * state.square() / c(n2_t)).sum()
(score,) = torch.autograd.grad(log_density, state)
same(score, -prediction.noise / c(sigma))

# %% [markdown]
# Source: [`schedules/`](../src/diffusion_lab/schedules), [`gaussian.py`](../src/diffusion_lab/gaussian.py),
# [`objectives.py`](../src/diffusion_lab/objectives.py), [`weightings.py`](../src/diffusion_lab/weightings.py),
# [`variances/`](../src/diffusion_lab/variances), [`likelihood/`](../src/diffusion_lab/likelihood),
# [`samplers/ancestral.py`](../src/diffusion_lab/samplers/ancestral.py). Next: [02_schedules](02_schedules.ipynb).
