"""The network's keyword arguments from a batch, and random dropping in training."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion_lab.conditions import Attributes, Label, LowResolution, Tensors, Unconditional
from diffusion_lab.data.images import Examples
from diffusion_lab.models import ClassicUNet, UNet

B = 4000


def batch(positions: Tensor, step: int = 7) -> dict[str, Any]:
    """Return the part of a global batch at some positions, as the stream yields it."""
    signs = torch.tensor([1.0, -1.0, 1.0])
    return {
        "image": torch.zeros(len(positions), 1, 4, 4),
        "label": positions % 3,
        "attributes": signs.expand(len(positions), 3),
        "position": positions,
        "step": step,
    }


def test_labels_are_dropped_independently() -> None:
    """4,000 labels at a rate of 0.2, to 4 standard deviations; none without a seed, and the others are unchanged."""
    positions = torch.arange(B)
    got = Label(3, drop=0.2)(batch(positions), seed=1)["label"]
    dropped = got == 3
    assert abs(int(dropped.sum()) - 0.2 * B) < 4 * (B * 0.2 * 0.8) ** 0.5
    assert torch.equal(got[~dropped], (positions % 3)[~dropped])
    assert torch.equal(Label(3, drop=0.2)(batch(positions))["label"], positions % 3)
    assert torch.equal(Label(3, drop=0.0)(batch(positions), seed=1)["label"], positions % 3)


@pytest.mark.parametrize("condition", [Label(3, drop=0.5), Attributes(3, drop=0.3, drop_each=0.5)])
def test_dropping_depends_on_seed_step_and_position_alone(condition: Label | Attributes) -> None:
    whole = condition(batch(torch.arange(64)), seed=1)["label"]
    for rank in range(2):
        positions = torch.arange(rank, 64, 2)
        assert torch.equal(condition(batch(positions), seed=1)["label"], whole[positions])
    assert not torch.equal(condition(batch(torch.arange(64), step=8), seed=1)["label"], whole)
    assert not torch.equal(condition(batch(torch.arange(64)), seed=2)["label"], whole)


def test_attributes_are_dropped_together_and_independently() -> None:
    """Each is 0 with probability 1 − 0.7 · 0.5, all are with 0.3 + 0.7/8, to 4 standard deviations."""
    got = Attributes(3, drop=0.3, drop_each=0.5)(batch(torch.arange(B)), seed=1)["label"]
    assert set(got.unique().tolist()) == {-1.0, 0.0, 1.0}
    for dropped, rate in ((got == 0, 0.65), ((got == 0).all(1), 0.3 + 0.7 / 8)):
        n = dropped.numel()
        assert abs(int(dropped.sum()) - rate * n) < 4 * (n * rate) ** 0.5
    assert torch.equal(got.sign() * got, got.abs())
    assert torch.equal(Attributes(3)(batch(torch.arange(5)))["label"], torch.tensor([[1.0, -1.0, 1.0]]).expand(5, -1))


def test_low_resolution_is_the_mean_of_blocks() -> None:
    image = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    got = LowResolution(3, 2)({"image": image})["given"]
    assert got.shape == image.shape
    for i in range(3):
        for j in range(2):
            block = (..., slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2))
            want = image[block].mean((2, 3), keepdim=True).expand(-1, -1, 2, 2)
            torch.testing.assert_close(got[block], want)
    torch.testing.assert_close(LowResolution(3, 2)({"image": got})["given"], got)  # idempotent


def test_tensors_of_a_data_set_are_passed_on_and_flip_with_the_image() -> None:
    images = np.arange(2 * 16, dtype=np.uint8).reshape(2, 1, 4, 4)
    depth = images.astype(np.float32)
    examples = Examples(images, more={"depth": depth, "age": np.array([30.0, 40.0], np.float32)})
    rows = examples.select(np.array([1, 0, 1])).take(np.array([0, 2]), flip=np.array([True, False]))
    assert torch.equal(rows["depth"], torch.from_numpy(np.stack([depth[1, :, :, ::-1], depth[1]])))
    arguments = Tensors(["depth", "age"])(rows)
    assert set(arguments) == {"depth", "age"}
    assert arguments["age"].tolist() == [40.0, 40.0]
    with pytest.raises(ValueError, match="names color, but the batch has image, depth, age"):
        Tensors(["color"])(rows)


@pytest.mark.parametrize(("network", "options"), [(UNet, {"attention": []}), (ClassicUNet, {})])
def test_a_network_reads_the_conditioning_image(network: type[nn.Module], options: dict[str, Any]) -> None:
    built = network(channels=1, image_size=[5, 6], width=32, given_channels=2, self_conditioning=True, **options)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, c, given = torch.randn(2, 1, 5, 6), torch.tensor([3.0, 400.0]), torch.randn(2, 2, 5, 6)
    assert built(x, c, given=given).shape == x.shape
    assert not torch.allclose(built(x, c, given=given), built(x, c, given=-given))
    for wrong in (None, given[:, :1]):
        with pytest.raises(ValueError, match="given_channels"):
            built(x, c, given=wrong)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: Label(0), "condition=none"),
        (lambda: Label(3, drop=1.0), "0.1"),
        (lambda: Attributes(0), "data=celeba"),
        (lambda: Attributes(2, drop_each=-0.1), "drop_each"),
        (lambda: Attributes(2, names=["smiling"]), "name each"),
        (lambda: Tensors([]), "condition=none"),
        (lambda: LowResolution(1, 1), r"factor=1: write an integer in \[2, 1024\]"),
        (lambda: LowResolution(1, 3)({"image": torch.zeros(1, 1, 8, 8)}), "divide"),
    ],
)
def test_errors_name_the_remedy(make: object, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        make()  # type: ignore[operator]


def test_conditions_of_samples_drawn_during_training() -> None:
    """Labels cycle through the classes; other conditions are those of real examples, or empty."""
    index = torch.arange(5)

    def real(i: Tensor) -> dict[str, Tensor]:
        return {"image": torch.ones(len(i), 1, 4, 4), "attributes": torch.ones(len(i), 2), "age": i.float()}

    assert Label(3).sampled(index, real)["label"].tolist() == [0, 1, 2, 0, 1]
    assert Unconditional().sampled(index, real) == {}
    assert Attributes(2).sampled(index, real)["label"].shape == (5, 2)
    assert Tensors(["age"]).sampled(index, real)["age"].tolist() == [0, 1, 2, 3, 4]
    assert LowResolution(1).sampled(index, real)["given"].shape == (5, 1, 4, 4)
