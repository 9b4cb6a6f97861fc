"""Self-conditioning while training (Chen et al. 2023, algorithm 1): which examples are told a first x̂_0, and what is learned."""

import torch
from torch import Tensor, nn

from diffusion_lab.conditions import Unconditional
from diffusion_lab.losses import L2
from diffusion_lab.objectives import PredV
from diffusion_lab.schedules import Cosine
from diffusion_lab.time_samplers import Uniform
from diffusion_lab.training.module import DiffusionModule
from diffusion_lab.training.optim import Constant, OptimizerConfig
from diffusion_lab.weightings import Native

N = 2000


class Remembers(nn.Module):
    """y = θ x + φ · previous, with what it was called with."""

    self_conditioning = True

    def __init__(self) -> None:
        super().__init__()
        self.theta, self.phi = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(-0.4))
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def forward(self, x: Tensor, c: Tensor, previous: Tensor | None = None) -> Tensor:
        self.calls.append((x, c, previous))
        return self.theta * x + (0 if previous is None else self.phi * previous)


def step(network: Remembers, position: Tensor, number: int = 3) -> Tensor:
    module = DiffusionModule(
        network, Cosine(), PredV(), Native(), L2(), Uniform(), Unconditional(),
        OptimizerConfig(torch.optim.SGD, Constant()), batch_size=N, seed=5,
    )  # fmt: skip
    image = torch.linspace(-1, 1, 4).reshape(1, 1, 2, 2).expand(len(position), -1, -1, -1)
    loss: Tensor = module.training_step({"image": image, "position": position, "step": number}, 0)["loss"]
    return loss


def told(position: Tensor, number: int = 3) -> Tensor:
    """Which examples got an estimate."""
    network = Remembers()
    step(network, position, number)
    return network.calls[1][2].flatten(1).any(1)  # type: ignore[union-attr]


def test_half_of_the_examples_are_told_a_first_estimate_through_which_no_gradient_flows() -> None:
    """Binomial: 2,000 coins within 4 standard deviations. The estimate is x̂_0 of the network told nothing, α x_t − σ y for v;
    the gradient is that of θ x + φ p with p a constant."""
    network = Remembers()
    loss = step(network, torch.arange(N))
    (x, c, nothing), (again, _, previous) = network.calls
    assert nothing is None
    assert previous is not None
    assert torch.equal(x, again)
    coin = previous.flatten(1).any(1)
    assert abs(int(coin.sum()) - N / 2) < 4 * (N / 4) ** 0.5
    alpha, sigma = (v.float()[:, None, None, None] for v in Cosine().alpha_sigma((c.double() + 1) / 1000))
    first = alpha * x - sigma * 0.7 * x
    torch.testing.assert_close(previous, torch.where(coin[:, None, None, None], first, 0), rtol=1e-5, atol=1e-6)
    x0 = torch.linspace(-1, 1, 4).reshape(1, 1, 2, 2)
    v = alpha * (x - alpha * x0) / sigma - sigma * x0
    gap = 0.7 * x - 0.4 * previous - v
    torch.testing.assert_close(loss, gap.square().mean(), rtol=1e-4, atol=1e-5)
    got = torch.autograd.grad(loss, [network.theta, network.phi])
    for slope, by in zip(got, (x, previous), strict=True):
        torch.testing.assert_close(slope, 2 * (gap * by).mean(), rtol=1e-3, atol=1e-4)


def test_who_is_told_depends_on_step_and_position_alone() -> None:
    whole = told(torch.arange(64))
    assert torch.equal(told(torch.arange(1, 64, 2)), whole[1::2])
    assert not torch.equal(told(torch.arange(64), number=4), whole)
