"""Image i is a function of (seed, i), whatever the batches; a batch that is refused names the image."""

import pytest
import torch
from torch import nn

from diffusion_lab.denoiser import Denoiser
from diffusion_lab.errors import ConfigError
from diffusion_lab.generation import batch_of, batches, decode, encode, generate, initial_noise, initial_state, join
from diffusion_lab.noise import normal
from diffusion_lab.objectives import PredNoise, PredV
from diffusion_lab.samplers import DDIM, DDPM
from diffusion_lab.schedules import VE, Cosine

SHAPE = (1, 4, 4)


class Small(nn.Module):
    """A denoising network whose images do not influence each other; NaN for label 7."""

    def forward(self, x, c, label=None):
        shift = torch.zeros(len(x)) if label is None else torch.where(label == 7, float("nan"), 0.02 * label)
        return 0.3 * x + shift[:, None, None, None]


def denoiser(schedule=None):
    return Denoiser(Small(), schedule or Cosine(50), PredNoise(), clip=1.0)


def test_batches_hold_every_image_once_with_its_condition():
    label = torch.arange(7) * 10
    parts = list(batches(7, 3, {"label": label}))
    assert [part.indices.tolist() for part in parts] == [[0, 1, 2], [3, 4, 5], [6]]
    assert torch.equal(torch.cat([part.condition["label"] for part in parts]), label)
    assert [part.indices.tolist() for part in batches(3)] == [[0, 1, 2]]
    assert [part.progress for part in batches(4, 2, progress=True)] == [False, False]  # the bar is over batches
    assert [part.progress for part in batches(4, progress=True)] == [True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), r"n=0: write an integer in \[1, 1000000000\]"),
        ((3, 0), "batch_size=0"),
        ((3, 2, {"label": torch.arange(2)}), "one row for each"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ConfigError, match=message):
        list(batches(*arguments))


@pytest.mark.parametrize("sampler", [DDIM(4), DDPM(4)])
def test_images_do_not_depend_on_the_batches(sampler):
    one = join(generate(denoiser(), sampler, SHAPE, batch, seed=5) for batch in batches(6))
    two = join(generate(denoiser(), sampler, SHAPE, batch, seed=5) for batch in batches(6, 4))
    assert torch.equal(one.x, two.x)
    assert one.nfe == two.nfe == 4
    assert one.x.dtype == torch.float32
    assert one.x.abs().max() <= 1
    block = generate(denoiser(), sampler, SHAPE, batch_of(range(2, 5), None, "cpu"), seed=5)
    assert torch.equal(block.x, one.x[2:5])


def test_the_initial_state_is_scaled_noise():
    schedule, index = VE(sigma_max=50.0), torch.tensor([3, 1])
    noise = initial_noise(SHAPE, index, seed=2)
    assert torch.equal(noise, normal(SHAPE, seed=2, index=index))
    torch.testing.assert_close(initial_state(denoiser(schedule), SHAPE, index, seed=2), 50 * noise)


def test_generation_is_decoding_of_the_initial_state_and_undone_by_encoding():
    batch = batch_of(range(3), None, "cpu")
    free = Denoiser(Small(), Cosine(50), PredV())
    x_T = 0.1 * initial_state(free, SHAPE, batch.indices, 0)  # small, so that nothing is clamped
    images = decode(free, DDIM(50), x_T, batch).x
    again = encode(free, DDIM(50), images, batch).x
    assert (again - x_T).norm() < 0.1 * x_T.norm()  # of first order in 1/50
    whole = decode(free, DDIM(5), initial_state(free, SHAPE, batch.indices, 4), batch, seed=4)
    assert torch.equal(whole.x, generate(free, DDIM(5), SHAPE, batch, seed=4).x)


def test_a_refused_batch_names_its_image():
    condition = {"label": torch.arange(20) % 10}
    with pytest.raises(ConfigError, match="image 17: the network returned NaN or infinity"):
        generate(denoiser(), DDPM(4), SHAPE, batch_of(range(10, 20), condition, "cpu"))
