"""The training stream and the evaluation loaders."""

from itertools import islice

import numpy as np
import pytest
import torch

from diffusion_lab import noise
from diffusion_lab.data.images import Examples
from diffusion_lab.data.pictures import to_uint8
from diffusion_lab.data.stream import BatchStream, EvalBatches

SHARES = [(w, a) for w in (1, 2, 3, 4) for a in (1, 2)]


def numbered(n: int) -> Examples:
    """Images whose two pixels encode their number, which is also the label."""
    k = np.arange(n)
    return Examples(np.stack([k // 256, k % 256], axis=1).astype(np.uint8).reshape(n, 1, 1, 2), k)


def shown(batch) -> list[int]:
    pixels = to_uint8(batch["image"]).flatten(1).long()
    return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


@pytest.mark.parametrize(("n", "size"), [(100, 24), (24, 24), (7, 24), (1, 24), (1000, 24)])
def test_each_position_shows_the_keyed_example(n, size):
    stream = BatchStream(numbered(n), size, seed=3)
    for step, batch in zip(range(9), stream, strict=False):
        expected = [
            int(noise.permutation(n, seed=3, draw=p // n)[p % n]) for p in range(step * size, (step + 1) * size)
        ]
        assert shown(batch) == batch["label"].tolist() == expected
        assert batch["step"] == step
        assert batch["position"].tolist() == list(range(size))


@pytest.mark.parametrize(("world", "accumulate"), SHARES)
def test_shares_reassemble_to_the_global_batch(world, accumulate):
    examples, size = numbered(50), 48
    whole = BatchStream(examples, size, seed=1, flip=True)
    ranks = [
        BatchStream(examples, size, seed=1, world_size=world, rank=r, accumulate=accumulate, flip=True)
        for r in range(world)
    ]
    iterators = [iter(rank) for rank in ranks]
    for step in range(4):
        image, label = torch.full((size, 1, 1, 2), torch.nan), torch.full((size,), -1)
        for micro in range(accumulate):
            for r, iterator in enumerate(iterators):
                batch = next(iterator)
                assert batch["step"] == step
                stride = world * accumulate
                assert batch["position"].tolist() == list(range(micro * world + r, size, stride))
                image[batch["position"]], label[batch["position"]] = batch["image"], batch["label"]
        expected = whole.batch(step)
        assert torch.equal(image, expected["image"])
        assert torch.equal(label, expected["label"])


def test_every_epoch_shows_every_example_once():
    n, size = 60, 16
    seen = [k for batch in islice(BatchStream(numbered(n), size, seed=0), 4 * n // size) for k in shown(batch)]
    epochs = [seen[i : i + n] for i in range(0, len(seen), n)]
    assert len(epochs) == 4
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("accumulate", [1, 2])
def test_starting_late_equals_skipping(accumulate):
    def stream(start: int) -> BatchStream:
        return BatchStream(numbered(30), 8, seed=5, accumulate=accumulate, flip=True, start_step=start)

    skipped = list(islice(stream(0), 11 * accumulate, 13 * accumulate))
    late = stream(2)
    late.start_step = 11
    for a, b in zip(skipped, late, strict=False):
        assert a["step"] == b["step"]
        assert all(torch.equal(a[name], b[name]) for name in ("image", "label", "position"))


def test_far_starts_are_cheap_and_in_range():
    batch = BatchStream(numbered(30), 8, seed=0, flip=True, start_step=10**8).batch(10**8)
    assert batch["image"].shape == (8, 1, 1, 2)


def test_iterating_twice_gives_the_same():
    stream = BatchStream(numbered(30), 8, seed=0)
    assert [shown(b) for b in islice(stream, 9)] == [shown(b) for b in islice(stream, 9)]


def test_seeds_order_and_flip_differently():
    a, b = (BatchStream(numbered(300), 100, seed=seed).batch(0) for seed in (0, 1))
    assert shown(a) != shown(b)


def test_flips_are_keyed_by_seed_step_and_position():
    # A flip shows, the order does not
    ones = Examples(np.tile(np.array([0, 255], np.uint8), (4, 1)).reshape(4, 1, 1, 2))
    stream = BatchStream(ones, 1000, seed=2, flip=True)
    for step in (0, 1):
        key = {"seed": 2, "index": torch.arange(1000), "draw": step, "stream": noise.Stream.FLIP}
        expected = noise.uniform((), **key) < 0.5
        assert torch.equal(stream.batch(step)["image"][:, 0, 0, 0] > 0, expected)
        assert 400 < expected.sum() < 600
    assert not torch.equal(stream.batch(0)["image"], stream.batch(1)["image"])
    assert (BatchStream(ones, 1000, seed=2).batch(0)["image"][:, 0, 0, 0] == -1).all()


def test_unlabelled_sets_yield_no_label():
    examples = Examples(numbered(8).images)
    assert set(BatchStream(examples, 4, seed=0).batch(0)) == {"image", "position", "step"}
    assert set(next(iter(EvalBatches(examples, 4)))) == {"image", "index"}


def test_the_stream_has_no_length():
    with pytest.raises(TypeError):
        len(BatchStream(numbered(8), 4, seed=0))  # type: ignore[arg-type]


def test_indivisible_batch_is_refused_with_one_that_divides():
    with pytest.raises(ValueError, match=r"data\.batch_size=100 .* 3 process.* × 2 .* write data\.batch_size=102"):
        BatchStream(numbered(8), 100, seed=0, world_size=3, accumulate=2)
    with pytest.raises(ValueError, match="training split is empty"):
        BatchStream(numbered(0), 4, seed=0)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [0, 1, 10, 25])
def test_evaluation_drops_and_repeats_nothing(world, n):
    seen = []
    for rank in range(world):
        loader = EvalBatches(numbered(n), 4, world_size=world, rank=rank)
        batches = list(loader)
        assert len(batches) == len(loader)
        index = [i for batch in batches for i in batch["index"].tolist()]
        assert index == list(range(rank, n, world))
        assert [k for batch in batches for k in shown(batch)] == index
        seen += index
    assert sorted(seen) == list(range(n))
