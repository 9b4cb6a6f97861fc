"""The U-Net: options, sizes and padding, memory format, conditioning, gradients, refusals."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from diffusion_lab.models import ClassicUNet, UNet

tiny = partial(
    UNet, channels=1, image_size=[8, 8], width=8, multipliers=[1, 2], blocks=1, attention=[4], groups=4, zero_init=False
)
OPTIONS = [
    {},
    {"conditioning": "scale_shift"},
    {"features": "fourier"},
    {"downsample": "average"},
    {"downsample": "max"},
    {"upsample": "transposed"},
    {"activation": "relu"},
    {"activation": "gelu"},
    {"attention": [], "middle_attention": False},
    {"attention": [8, 4], "heads": 2},
    {"head_channels": 4},
    {"dropout": 0.5},
    {"blocks": 2, "multipliers": [1, 1, 3]},
    {"multipliers": [2], "attention": [8]},
    {"channels_last": True},
    {"channels": 3, "learned_variance": True, "self_conditioning": True, "num_classes": 4},
]


def inputs(network, batch, height, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, network.channels, height, width, generator=generator, dtype=dtype)
    return x, torch.linspace(0, 999, batch, dtype=dtype)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_runs_forwards_and_backwards(options):
    network = tiny(**options)
    x, c = inputs(network, 2, 8, 8)
    y = network(x, c)
    assert y.shape == (2, network.out_channels, 8, 8)
    y.square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    used = [
        p for name, p in network.named_parameters() if "attention.qkv" not in name
    ]  # biases of the keys cancel in the softmax
    assert all(p.grad.any() for p in used)


@pytest.mark.parametrize(
    "build",
    [partial(tiny, multipliers=[1, 1, 2]), partial(ClassicUNet, channels=1, image_size=[8, 8], width=4, levels=3)],
)
@pytest.mark.parametrize("size", [(8, 8), (28, 28), (50, 34), (5, 7), (1, 1), (1, 9)])
def test_output_has_the_size_of_the_input(build, size):
    network = build()
    x, c = inputs(network, 2, *size)
    y = network(x, c)
    assert y.shape == x.shape
    assert y.isfinite().all()
    y.mean().backward()


def test_padding_is_centered_zeros_and_only_if_needed():
    network = tiny(multipliers=[1, 1, 2]).eval()
    x, c = inputs(network, 1, 5, 6)
    padded = F.pad(x, (1, 1, 1, 2))
    assert torch.equal(network(x, c), network(padded, c)[:, :, 1:6, 1:7])
    x, c = inputs(network, 1, 8, 12)
    assert torch.equal(network(x, c), network.output_head(network.body(x, network.embedding(c))))


def test_channels_last_returns_the_same_values_in_channels_last_format():
    network = tiny(conditioning="scale_shift", attention=[8, 4]).eval()
    x, c = inputs(network, 2, 8, 8)
    expected = network(x, c)
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    got = last(x.to(memory_format=torch.channels_last), c)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_zero_init_output_is_zero_and_has_gradients():
    network = tiny(zero_init=True)
    x, c = inputs(network, 2, 8, 8)
    y = network(x, c)
    assert not y.any()
    (y - x).square().mean().backward()
    assert network.output.weight.grad.any()


def test_time_changes_the_output():
    network = tiny()
    x, _ = inputs(network, 1, 8, 8)
    assert not torch.allclose(network(x, torch.tensor([0.0])), network(x, torch.tensor([1.0])))


def test_no_label_is_the_null_label():
    network = tiny(num_classes=3).eval()
    x, c = inputs(network, 2, 8, 8)
    torch.testing.assert_close(network(x, c), network(x, c, label=torch.tensor([3, 3])))
    assert not torch.allclose(network(x, c), network(x, c, label=torch.tensor([0, 3])))


@pytest.mark.parametrize("build", [tiny, partial(ClassicUNet, channels=1, image_size=[8, 8], width=4, levels=2)])
def test_previous_is_an_input_of_a_self_conditioning_network_only(build):
    network = build(self_conditioning=True).eval()
    x, c = inputs(network, 2, 8, 8)
    assert network.self_conditioning
    torch.testing.assert_close(network(x, c), network(x, c, previous=torch.zeros_like(x)))
    assert not torch.allclose(network(x, c), network(x, c, previous=x))
    with pytest.raises(ValueError, match="self_conditioning=true"):
        build()(x, c, previous=x)


def test_gradients_agree_with_finite_differences():
    network = tiny(width=4, groups=2, conditioning="scale_shift").double()
    x, c = inputs(network, 1, 3, 4, torch.float64)
    assert torch.autograd.gradcheck(network, (x.requires_grad_(), c.requires_grad_()))


def test_gradient_checkpointing_changes_no_gradient():
    plain = tiny(dropout=0.2)
    saving = tiny(dropout=0.2, gradient_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    x, c = inputs(plain, 2, 8, 8)
    for network in (plain, saving):
        torch.manual_seed(1)
        network(x, c).square().mean().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_dropout_acts_in_training_only():
    network = tiny(dropout=0.5)
    x, c = inputs(network, 2, 8, 8)
    assert not torch.allclose(network(x, c), network(x, c))
    network.eval()
    assert torch.equal(network(x, c), network(x, c))


@pytest.mark.parametrize("conditioning", ["additive", "scale_shift"])
def test_bfloat16_autocast_is_close_to_float32(conditioning):
    network = tiny(conditioning=conditioning).eval()
    x, c = inputs(network, 2, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        half = network(x, c)
    expected = network(x, c)
    assert (half.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("options", [{}, {"num_classes": 3, "self_conditioning": True, "gradient_checkpointing": True}])
def test_compilation_yields_one_graph(options):
    network = tiny(**options)
    x, c = inputs(network, 2, 7, 8)
    label = torch.tensor([0, 1]) if options else None
    got = torch.compile(network, backend="eager", fullgraph=True)(x, c, label)
    torch.testing.assert_close(got, network(x, c, label))


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"attention": [16, 4]}, r"attention=\[16\] never occurs with 8×8 images: write some of \[8, 4\]"),
        ({"groups": 32}, r"groups=32 does not divide 8 channels: write one of \[1, 2, 4, 8\]"),
        ({"heads": 3}, "heads=3 does not divide"),
        ({"heads": 0}, r"heads=0: write an integer in \[1, 65536\]"),
        ({"head_channels": 5}, "head_channels=5 does not divide"),
        ({"conditioning": "film"}, "additive, scale_shift"),
        ({"features": "learned"}, "sinusoidal, fourier"),
        ({"downsample": "stride"}, "conv, average, max"),
        ({"upsample": "bilinear"}, "nearest, transposed"),
        ({"activation": "tanh"}, "silu, relu, gelu"),
        ({"channels": 0}, r"channels=0: write an integer in \[1, 1024\]"),
        ({"image_size": [8]}, r"\[height,width\]"),
        ({"multipliers": []}, "1 to 12"),
        ({"blocks": 0}, r"blocks=0: write an integer in \[1, 64\]"),
        ({"groups": 0}, "groups=0"),
        ({"dropout": 1.0}, r"\[0, 1\)"),
    ],
)
def test_refusals_name_the_remedy(options, remedy):
    with pytest.raises(ValueError, match=remedy) as error:
        tiny(**options)
    assert "\n" not in str(error.value)


def test_attention_refers_to_the_longer_side_of_the_padded_image():
    tiny(image_size=[50, 34], multipliers=[1, 1, 1], attention=[13])
    with pytest.raises(ValueError, match=r"\[52, 26, 13\]"):
        tiny(image_size=[50, 34], multipliers=[1, 1, 1], attention=[25])


@pytest.mark.parametrize(
    ("shape", "times", "remedy"),
    [
        ((2, 3, 8, 8), 2, "number of channels"),
        ((1, 8, 8), 1, "number of channels"),
        ((2, 1, 8, 8), 1, "one value for each"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_wrong_inputs_are_refused(shape, times, remedy):
    with pytest.raises(ValueError, match=remedy):
        tiny()(torch.zeros(shape), torch.zeros(times))
