"""The original U-Net: the layers of the paper, the scale of the output, conditioning, refusals."""

import pytest
import torch
from torch import nn

from diffusion_lab.models import ClassicUNet


def test_layers_match_the_paper():
    """Figure 1 of Ronneberger et al. 2015, with 16×16 images instead of 572×572."""
    network = ClassicUNet(channels=1, image_size=[16, 16])
    layers = []

    def record(layer, _, output):
        layers.append((type(layer).__name__, layer.kernel_size, *output.shape[1:]))

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.MaxPool2d):
            layer.register_forward_hook(record)
    network(torch.zeros(1, 1, 16, 16), torch.zeros(1))

    expected = []
    for i, channels in enumerate([64, 128, 256, 512, 1024]):
        if i:
            expected.append(("MaxPool2d", 2, channels // 2, 16 >> i, 16 >> i))
        expected += 2 * [("Conv2d", (3, 3), channels, 16 >> i, 16 >> i)]
    for i, channels in [(3, 512), (2, 256), (1, 128), (0, 64)]:
        expected.append(("ConvTranspose2d", (2, 2), channels, 16 >> i, 16 >> i))
        expected += 2 * [("Conv2d", (3, 3), channels, 16 >> i, 16 >> i)]
    expected.append(("Conv2d", (1, 1), 1, 16, 16))
    assert layers == expected
    assert [block.conv1.in_channels for block in network.up] == [1024, 512, 256, 128]
    assert not any(isinstance(layer, nn.GroupNorm | nn.BatchNorm2d) for layer in network.modules())


def test_activations_neither_vanish_nor_explode():
    torch.manual_seed(0)
    network = ClassicUNet(channels=3, image_size=[32, 32], width=16)
    x = torch.randn(4, 3, 32, 32)
    y = network(x, torch.full((4,), 500.0))
    assert 0.1 < y.std() < 10


def test_time_and_label_change_the_output():
    network = ClassicUNet(channels=1, image_size=[8, 8], width=8, levels=2, num_classes=3)
    x = torch.randn(1, 1, 8, 8)
    c = torch.tensor([1.0])
    base = network(x, c)
    assert not torch.allclose(network(x, c + 1), base)
    assert not torch.allclose(network(x, c, label=torch.tensor([0])), base)


def test_learned_variance_doubles_the_channels():
    network = ClassicUNet(channels=3, image_size=[8, 8], width=8, levels=1, learned_variance=True)
    assert network(torch.zeros(2, 3, 5, 3), torch.zeros(2)).shape == (2, 6, 5, 3)


@pytest.mark.parametrize(
    ("options", "remedy"), [({"levels": 0}, r"levels=0: write an integer in \[1, 12\]"), ({"width": 5}, "even")]
)
def test_refusals_name_the_remedy(options, remedy):
    with pytest.raises(ValueError, match=remedy):
        ClassicUNet(channels=1, image_size=[8, 8], **options)
