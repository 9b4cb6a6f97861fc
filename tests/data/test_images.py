"""Conversion between bytes and floats; examples."""

import numpy as np
import pytest
import torch

from diffusion_lab.data.images import Examples, Rows, to_float
from diffusion_lab.data.pictures import to_uint8

LEVELS = np.arange(256, dtype=np.uint8)


def test_levels_are_the_nearest_floats_of_the_grid():
    exact = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    x = to_float(LEVELS)
    assert x.dtype == torch.float32
    assert torch.equal(x, exact.float())
    assert torch.equal(x, -x.flip(0))


def test_to_float_leaves_its_argument_alone():
    levels = torch.from_numpy(LEVELS.copy())
    to_float(levels)
    assert torch.equal(levels, torch.arange(256, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_uint8_inverts_rounds_and_clamps(dtype):
    x = to_float(LEVELS).to(dtype)
    half = 1 / 255  # half a level
    for offset in (0, 0.98 * half, -0.98 * half):
        assert torch.equal(to_uint8(x + offset), torch.from_numpy(LEVELS))
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_rows_read_the_indexed_rows():
    array = np.arange(24, dtype=np.uint8).reshape(6, 1, 2, 2)
    rows = Rows(array, np.array([4, 0, 5]))
    assert (len(rows), rows.shape, rows.dtype) == (3, (3, 1, 2, 2), np.uint8)
    assert np.array_equal(np.asarray(rows), array[[4, 0, 5]])
    assert np.array_equal(rows[1:], array[[0, 5]])
    assert np.array_equal(rows[np.array([2, 0])], array[[5, 4]])
    assert np.array_equal(rows[0], array[4])


def test_selections_of_selections_compose_and_keep_rows_together():
    n = 10
    images = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1)
    attributes = np.stack([np.arange(n), -np.arange(n)], axis=1).astype(np.int8)
    chosen = Examples(images, np.arange(n), attributes).select(np.array([9, 3, 5, 7])).select(np.array([3, 1]))
    batch = chosen.take(np.array([1, 0]))
    assert to_uint8(batch["image"]).flatten().tolist() == [3, 7]
    assert batch["label"].tolist() == [3, 7]
    assert batch["attributes"].tolist() == [[3, -3], [7, -7]]
    assert batch["label"].dtype == torch.int64
    assert batch["attributes"].dtype == torch.float32


def test_flips_mirror_the_batch_and_not_the_set():
    images = np.arange(12, dtype=np.uint8).reshape(2, 1, 2, 3)
    before = images.copy()
    image = to_uint8(Examples(images).take(np.array([0, 1]), np.array([True, False]))["image"]).numpy()
    assert np.array_equal(image[0], before[0, :, :, ::-1])
    assert np.array_equal(image[1], before[1])
    assert np.array_equal(images, before)
