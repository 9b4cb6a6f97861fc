"""VarianceHead: the output of the network is unchanged, the network is frozen and without dropout, any image size works."""

import pytest
import torch
from torch import nn

from diffusion_lab.models import ClassicUNet, UNet, VarianceHead

BUILD = {
    "unet": lambda **o: UNet(
        channels=2, image_size=[8, 8], width=8, multipliers=[1, 2], blocks=1, attention=[4], groups=4, **o
    ),
    "classic": lambda **o: ClassicUNet(channels=2, image_size=[8, 8], width=4, levels=2, **o),
}
every = pytest.mark.parametrize("build", list(BUILD))


def inputs(batch: int = 3, height: int = 8, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 2, height, width), torch.linspace(0, 900, batch)


@every
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 9)])
def test_output_of_the_network_comes_first_then_that_of_the_head(build, size):
    network = BUILD[build](zero_init=False) if build == "unet" else BUILD[build]()
    x, c = inputs(3, *size)
    expected = network.eval()(x, c)
    both = VarianceHead(network, "sn").eval()
    got = both(x, c)
    assert got.shape == (3, 4, *size)
    # Not bit-equal: on some processors the rounding of a convolution depends on the alignment of its input in memory.
    torch.testing.assert_close(got[:, :2], expected, rtol=0, atol=1e-6)
    assert (got[:, 2:] == 1).all(), "the head of sn is initialized to E ε² = 1"
    assert (VarianceHead(network, "npr").eval()(x, c)[:, 2:] == 0).all()
    nn.init.normal_(both.head[-1].weight)
    torch.testing.assert_close(both(x, c)[:, :2], expected, rtol=0, atol=1e-6)
    assert (both(x, c)[:, 2:] != 0).any()


@every
def test_only_the_head_is_trained_and_the_network_stays_in_eval_mode(build):
    network = BUILD[build](dropout=0.5) if build == "unet" else BUILD[build]()
    both = VarianceHead(network.train(), "npr").train()
    assert both.head.training
    assert not any(m.training for m in network.modules())
    x, c = inputs()
    assert torch.equal(both(x, c), both(x, c)), "no dropout"
    nn.init.normal_(both.head[-1].weight)
    before = {name: p.clone() for name, p in network.named_parameters()}
    optimizer = torch.optim.SGD([p for p in both.parameters() if p.requires_grad], 0.1)
    both(x, c).square().mean().backward()
    optimizer.step()
    assert all(p.grad is not None for p in both.head.parameters())
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in network.named_parameters())


@every
def test_attributes_and_dropped_learned_variance(build):
    plain, learned = BUILD[build](), BUILD[build](learned_variance=True)
    assert (plain.extra, learned.extra) == (None, "learned")
    both = VarianceHead(learned, "sn").eval()
    assert (both.extra, both.self_conditioning, both.channels) == ("sn", False, 2)
    x, c = inputs()
    assert both(x, c).shape == (3, 4, 8, 8)
    assert torch.equal(both(x, c)[:, :2], learned.eval()(x, c)[:, :2]), "the learned variance is dropped"


@every
def test_label_and_previous_reach_the_network(build):
    network = BUILD[build](num_classes=3, self_conditioning=True).eval()
    for p in network.parameters():  # no parameter is zero, so every input has an effect
        nn.init.normal_(p, std=0.3)
    both, (x, c) = VarianceHead(network, "sn").eval(), inputs()
    nn.init.normal_(both.head[-1].weight)
    condition = {"label": torch.tensor([0, 1, 3]), "previous": torch.randn_like(x)}
    got = both(x, c, **condition)
    assert torch.equal(got[:, :2], network(x, c, **condition))
    for name in condition:
        changed = both(x, c, **{**condition, name: torch.zeros_like(condition[name])})
        assert not torch.equal(changed[:, 2:], got[:, 2:]), name


def test_a_network_without_accessible_features_is_refused():
    with pytest.raises(ValueError, match="but the network is a Conv2d: write variance=analytic"):
        VarianceHead(nn.Conv2d(1, 1, 3), "npr")
