"""The networks in conf/model, and UNetForImageSize."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from diffusion_lab.models import UNet, UNetForImageSize

CONF = Path(__file__).resolve().parents[2] / "conf"
PRESETS = {  # preset: channels, image size, parameters without labels
    "base/unet": (3, [32, 32], 34_427_907),
    "unet_digits": (1, [8, 8], 215_185),
    "unet_mnist": (1, [28, 28], 686_769),
    "unet_fashion_mnist": (1, [28, 28], 686_769),
    "unet_cifar10": (3, [32, 32], 35_746_307),
    "unet_celeba": (3, [64, 64], 78_700_803),
    "unet_celeba64": (3, [64, 64], 78_700_803),
    "unet_image_folder": (3, [50, 34], 23_986_563),
    "unet_classic": (1, [28, 28], 527_969),
}


def build(name, channels, size, *more):
    data = [f"+data.channels={channels}", f"+data.image_size={size}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return instantiate(compose(overrides=[f"+model@model={name}", *data, *more]).model)


def test_every_preset_is_listed():
    assert {path.stem for path in (CONF / "model").glob("unet*.yaml")} == {name for name in PRESETS if "/" not in name}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_composes(name):
    channels, size, parameters = PRESETS[name]
    with torch.device("meta"):  # shapes and counts without the cost of initializing weights
        network = build(name, channels, size)
    assert network.channels == channels
    assert network.image_size == tuple(size)
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("name", ["unet_digits", "unet_mnist", "unet_classic"])
def test_small_preset_runs(name):
    channels, size, _ = PRESETS[name]
    network = build(name, channels, size, "+model.num_classes=10", "+model.learned_variance=true")
    y = network(torch.randn(2, channels, *size), torch.zeros(2), torch.tensor([0, 10]))
    assert y.shape == (2, 2 * channels, *size)
    y.mean().backward()


def test_any_argument_can_be_overridden():
    network = build("unet_digits", 1, [8, 8], "model.attention=[4]", "model.conditioning=scale_shift")
    assert isinstance(network, UNet)
    with pytest.raises(Exception, match="attention=\\[16\\] never occurs"):
        build("unet_digits", 1, [8, 8], "model.attention=[16]")


@pytest.mark.parametrize("size", [[8, 8], [16, 20], [32, 32], [64, 48]])
def test_the_default_of_a_data_set_fits_its_image_size(size):
    with torch.device("meta"):
        network = UNetForImageSize(channels=2, image_size=size, num_classes=3, learned_variance=True)
    assert network.image_size == tuple(size)
    assert max(size) // network.side >= 2  # the lowest level is at least 2 pixels wide
    assert UNetForImageSize(channels=1, image_size=[8, 8], width=16, groups=4).feature_channels == 16
