"""What of a batch reaches the network, and what is dropped while training."""

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
    """What the stream yields for some positions of one global batch."""
    signs = torch.tensor([1.0, -1.0, 1.0])
    return {
        "image": torch.zeros(len(positions), 1, 4, 4),
        "label": positions % 3,
        "attributes": signs.expand(len(positions), 3),
        "position": positions,
        "step": step,
    }


def test_labels_are_dropped_one_by_one_at_their_rate() -> None:
    """Binomial: 4,000 labels at 0.2, within 4 standard deviations; never without a seed, and never another label."""
    positions = torch.arange(B)
    got = Label(3, drop=0.2)(batch(positions), seed=1)["label"]
    dropped = got == 3
    assert abs(int(dropped.sum()) - 0.2 * B) < 4 * (B * 0.2 * 0.8) ** 0.5
    assert torch.equal(got[~dropped], (positions % 3)[~dropped])
    assert torch.equal(Label(3, drop=0.2)(batch(positions))["label"], positions % 3)
    assert torch.equal(Label(3, drop=0.0)(batch(positions), seed=1)["label"], positions % 3)


@pytest.mark.parametrize("condition", [Label(3, drop=0.5), Attributes(3, drop=0.3, drop_each=0.5)])
def test_what_is_dropped_depends_on_seed_step_and_position_alone(condition: Label | Attributes) -> None:
    whole = condition(batch(torch.arange(64)), seed=1)["label"]
    for rank in range(2):
        share = torch.arange(rank, 64, 2)
        assert torch.equal(condition(batch(share), seed=1)["label"], whole[share])
    assert not torch.equal(condition(batch(torch.arange(64), step=8), seed=1)["label"], whole)
    assert not torch.equal(condition(batch(torch.arange(64)), seed=2)["label"], whole)


def test_attributes_are_dropped_all_together_and_each_alone() -> None:
    """Zero with probability 1 − 0.7 · 0.5 each; all of them at 0.3 + 0.7 / 8. Margins: 4 standard deviations."""
    got = Attributes(3, drop=0.3, drop_each=0.5)(batch(torch.arange(B)), seed=1)["label"]
    assert set(got.unique().tolist()) == {-1.0, 0.0, 1.0}
    for silent, rate in ((got == 0, 0.65), ((got == 0).all(1), 0.3 + 0.7 / 8)):
        n = silent.numel()
        assert abs(int(silent.sum()) - rate * n) < 4 * (n * rate) ** 0.5
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
    torch.testing.assert_close(LowResolution(3, 2)({"image": got})["given"], got)  # a low resolution stays what it is


def test_tensors_of_a_data_set_reach_the_network_and_flip_with_the_image() -> None:
    images = np.arange(2 * 16, dtype=np.uint8).reshape(2, 1, 4, 4)
    depth = images.astype(np.float32)
    examples = Examples(images, more={"depth": depth, "age": np.array([30.0, 40.0], np.float32)})
    rows = examples.select(np.array([1, 0, 1])).take(np.array([0, 2]), flip=np.array([True, False]))
    assert torch.equal(rows["depth"], torch.from_numpy(np.stack([depth[1, :, :, ::-1], depth[1]])))
    given = Tensors(["depth", "age"])(rows)
    assert set(given) == {"depth", "age"}
    assert given["age"].tolist() == [40.0, 40.0]
    with pytest.raises(ValueError, match="names color, but the batch has image, depth, age"):
        Tensors(["color"])(rows)


@pytest.mark.parametrize(("network", "options"), [(UNet, {"attention": []}), (ClassicUNet, {})])
def test_a_network_reads_what_it_is_given(network: type[nn.Module], options: dict[str, Any]) -> None:
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
        (lambda: LowResolution(1, 1), "at least 2"),
        (lambda: LowResolution(1, 3)({"image": torch.zeros(1, 1, 8, 8)}), "divide"),
    ],
)
def test_refusals(make: object, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        make()  # type: ignore[operator]


def test_what_samples_are_asked_for_while_training() -> None:
    """Classes in turn; nothing; or the condition of real examples."""
    index = torch.arange(5)

    def real(i: Tensor) -> dict[str, Tensor]:
        return {"image": torch.ones(len(i), 1, 4, 4), "attributes": torch.ones(len(i), 2), "age": i.float()}

    assert Label(3).sampled(index, real)["label"].tolist() == [0, 1, 2, 0, 1]
    assert Unconditional().sampled(index, real) == {}
    assert Attributes(2).sampled(index, real)["label"].shape == (5, 2)
    assert Tensors(["age"]).sampled(index, real)["age"].tolist() == [0, 1, 2, 3, 4]
    assert LowResolution(1).sampled(index, real)["given"].shape == (5, 1, 4, 4)
