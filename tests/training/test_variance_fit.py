"""Fit of the optimal variance: second moments against closed forms, shares of processes; heads against the covariance."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from diffusion_lab.conditions import Label, Unconditional
from diffusion_lab.data.images import Examples
from diffusion_lab.data.stream import BatchStream
from diffusion_lab.denoiser import Denoiser
from diffusion_lab.models import VarianceHead
from diffusion_lab.models.base import UNetBase
from diffusion_lab.models.embeddings import Embedding
from diffusion_lab.objectives import PredNoise, PredV
from diffusion_lab.schedules import VP, Cosine, Linear
from diffusion_lab.time_samplers import TimeSampler
from diffusion_lab.training.variance_fit import fit_times, moments, second_moments, train_head
from diffusion_lab.variances import NPR, SN, Analytic

D = torch.float64
MEAN, VAR = 0.1, 0.2


class Drawn:
    """Gaussian images in place of a data set."""

    def __init__(self, count: int, size: tuple[int, int, int] = (1, 4, 4)) -> None:
        self.x0 = MEAN + VAR**0.5 * torch.randn(count, *size, generator=torch.Generator().manual_seed(0))
        self.taken: list[int] = []

    def __len__(self) -> int:
        return len(self.x0)

    def take(self, index: np.ndarray, flip: object = None) -> dict[str, torch.Tensor]:
        self.taken += index.tolist()
        return {"image": self.x0[index], "label": torch.from_numpy(index) % 3}


class Best(nn.Module):
    """ε̂ of the best network for N(0.1, 0.2) on Linear(40), plus `off`; its weights are float32."""

    def __init__(self, off: float = 0.0) -> None:
        super().__init__()
        self.off = nn.Parameter(torch.tensor(off))
        self.labels: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, c: torch.Tensor, label: torch.Tensor | None = None) -> torch.Tensor:
        if label is not None:
            self.labels.append(label)
        alpha, sigma = (v[:, None, None, None].to(x.dtype) for v in Linear(40).alpha_sigma((c.double() + 1) / 40))
        return sigma * (x - alpha * MEAN) / (alpha**2 * VAR + sigma**2) + self.off


def true_covariance(t: torch.Tensor) -> torch.Tensor:
    alpha, sigma = Linear(40).alpha_sigma(t)
    return VAR * sigma**2 / (alpha**2 * VAR + sigma**2)


def test_the_moments_recover_the_true_covariance() -> None:
    """Γ of N(m, v): c = vσ²/(α²v + σ²) within 4 standard errors of 300 images of 16 pixels for each of the 40 times. Without
    E ε² = 1 taken into account the error would be (σ²/α²)√(2/4800): 1 to 770 times as large."""
    den, data = Denoiser(Best(), Linear(40), PredNoise(), clip=0.1), Drawn(2000)
    fit = fit_times(Linear(40))
    got = Analytic(fit, moments(second_moments(den, data, fit, 300, Unconditional()))).covariance(Linear(40), fit)
    alpha, sigma = Linear(40).alpha_sigma(fit)
    # (σ²/α²)(ε² − ε̂²) of one element: Var = 2(σ²/α²)² (1 + r² − 2r²), r = E ε̂² = Cov[ε, ε̂]
    r = sigma**2 / (alpha**2 * VAR + sigma**2)
    error = (sigma / alpha) ** 2 * (2 * (1 - r**2) / 4800).sqrt()
    assert ((got - true_covariance(fit)).abs() < 4 * error + 1e-6).all()
    assert float(((sigma / alpha) ** 2 * math.sqrt(2 / 4800) / error).max()) > 700


def test_what_the_moments_see() -> None:
    """Every image as often as any other, every time n times, labels undropped, no gradient, no change of the network."""
    network, data = Best(), Drawn(50)
    before = network.off.clone()
    sums = second_moments(
        Denoiser(network, Linear(40), PredNoise()), data, fit_times(Linear(40)), 5, Label(3, drop=0.9), batch_size=7
    )
    assert (sums[1] == 5).all()
    assert np.bincount(data.taken, minlength=50).tolist() == [4] * 50
    assert set(torch.cat(network.labels).tolist()) == {0, 1, 2}
    assert network.off.grad is None
    assert torch.equal(network.off, before)
    with pytest.raises(ValueError, match="NaN or Inf"):
        moments(
            second_moments(
                Denoiser(Best(math.nan), Linear(40), PredNoise()), data, fit_times(Linear(40)), 1, Unconditional()
            )
        )


def test_fit_times() -> None:
    assert fit_times(Linear(40)).tolist() == [k / 40 for k in range(1, 41)]
    some = fit_times(Linear(1000), 7)
    assert len(some) == 7
    assert float(some[-1]) == 1
    assert ((some * 1000 - (some * 1000).round()).abs() < 1e-9).all()
    assert len(fit_times(VP())) == 1000
    assert fit_times(VP(), 4).tolist() == [0.25, 0.5, 0.75, 1.0]
    for schedule, count in ((Linear(40), 41), (Linear(40), 0), (VP(), 0)):
        with pytest.raises(ValueError, match=r"write null, or an integer in \[1, (40|100000)\]"):
            fit_times(schedule, count)


def share(rank: int, world: int, batch_size: int = 64) -> torch.Tensor:
    den = Denoiser(Best(), Linear(40), PredNoise())
    return second_moments(
        den, Drawn(50), fit_times(Linear(40)), 6, Unconditional(), batch_size=batch_size, rank=rank, world=world
    )


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_add_up_to_the_whole(world: int) -> None:
    whole, parts = share(0, 1, 100), sum(share(rank, world) for rank in range(world))
    assert torch.equal(parts[1], whole[1])  # type: ignore[index]
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------ heads


class Toy(UNetBase):
    """ε̂ = gain · x: the best network of Gaussian data at one time, or one with an error; four features."""

    def __init__(self, gain: float, off: float) -> None:
        super().__init__(
            channels=1, image_size=[4, 4], levels=1, feature_channels=4, embedding=Embedding(4, "sinusoidal", nn.SiLU, None),
            self_conditioning=False, learned_variance=False,
        )  # fmt: skip
        self.gain, self.off = gain, off

    def body(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x.square(), x.tanh(), torch.ones_like(x)], dim=1)

    def output_head(self, features: torch.Tensor) -> torch.Tensor:
        return self.gain * features[:, :1] + self.off


class At(TimeSampler):
    """One time only."""

    def __init__(self, t: float) -> None:
        super().__init__()
        self.t = t

    def times(self, schedule: object, u: torch.Tensor) -> torch.Tensor:
        return torch.full_like(u, self.t - 1e-6)


@pytest.mark.parametrize("kind", ["sn", "npr"])
@pytest.mark.parametrize("off", [0.0, 0.4])
def test_a_trained_head_recovers_the_covariance(kind: str, off: float) -> None:
    """250 steps of 64 images of N(0, 0.2) at one time: the mean over images of c within 5 % of vσ²/(α²v + σ²). With a mean that
    is wrong by 0.4 NPR finds what is best then, E (x_0 − x̂_0)², and SN does not: it is half off at least."""
    schedule, t = Linear(40), torch.tensor(0.2, dtype=D)
    alpha, sigma = (float(v) for v in schedule.alpha_sigma(t))
    gain = sigma / (alpha**2 * VAR + sigma**2)
    network = VarianceHead(Toy(gain, off), kind)
    den = Denoiser(network, schedule, PredNoise())
    data = Drawn(512)
    data.x0 -= MEAN
    stream = BatchStream(data, 64, seed=1)
    rows = train_head(den, kind, stream, At(0.2), Unconditional(), steps=250, lr=1e-2, decay=0.98, seed=1)
    assert [step for step, _ in rows] == [100, 200, 250]
    assert rows[-1][1] < rows[0][1]
    assert not network.training
    again = data.x0.repeat(10, 1, 1, 1)
    x = alpha * again + sigma * torch.randn(again.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        w = {"sn": SN(), "npr": NPR()}[kind].scaled_covariance(den(x, t))
    c = float(w.mean()) * (sigma / alpha) ** 2
    want = VAR * sigma**2 / (alpha**2 * VAR + sigma**2) + (off * sigma / alpha) ** 2
    if kind == "npr" or off == 0:
        assert c == pytest.approx(want, rel=0.05)
    else:
        assert abs(c - want) > 0.5 * want


def test_the_average_is_what_is_kept() -> None:
    """Without an average the head ends elsewhere; the same seed ends at the same place; the backbone never moves."""
    ends = []
    for decay in (None, None, 0.9):
        torch.manual_seed(0)
        network = VarianceHead(Toy(0.7, 0.0), "npr")
        stream = BatchStream(Drawn(64), 16, seed=2)
        train_head(
            Denoiser(network, Linear(40), PredNoise()),
            "npr",
            stream,
            At(0.5),
            Unconditional(),
            steps=12,
            lr=1e-2,
            decay=decay,
        )
        ends.append(network.head[-1].weight.detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_a_head_that_diverges_is_refused() -> None:
    network = VarianceHead(Toy(math.nan, 0.0), "npr")
    stream = BatchStream(Drawn(64), 16, seed=2)
    with pytest.raises(ValueError, match="lower lr="):
        train_head(Denoiser(network, Cosine(), PredV()), "npr", stream, At(0.5), Unconditional(), steps=2)


def test_the_moments_of_examples() -> None:
    """`Examples` in place of `Drawn`: bytes, labels."""
    images = np.random.default_rng(0).integers(0, 256, (30, 1, 4, 4), dtype=np.uint8)
    examples = Examples(images, np.arange(30) % 3)
    sums = second_moments(Denoiser(Best(), Linear(40), PredNoise()), examples, fit_times(Linear(40), 3), 10, Label(3))
    assert sums[1].tolist() == [10, 10, 10]
    assert moments(sums).isfinite().all()
