"""Splits are disjoint, exhaustive and determined by the seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion_lab.data.splits import split


def is_partition(parts: dict[str, np.ndarray], n: int) -> bool:
    return sorted(np.concatenate(list(parts.values())).tolist()) == list(range(n))


@given(
    n=st.integers(10, 300),
    val=st.floats(0, 0.45),
    test=st.integers(0, 4),
    seed=st.integers(0, 5),
    classes=st.integers(0, 4),
)
def test_parts_are_disjoint_and_exhaustive(n, val, test, seed, classes):
    labels = np.arange(n) % classes if classes else None
    parts = split(n, val=val, test=test, seed=seed, labels=labels)
    assert is_partition(parts, n)
    assert len(parts["test"]) == test
    assert len(parts["val"]) == (max(1, round(val * n)) if val else 0)
    assert all((np.diff(part) > 0).all() for part in parts.values())


def test_official_parts_stay_and_val_is_cut_from_the_rest():
    official = np.arange(80, 100)
    parts = split(100, val=0.1, test=None, official={"test": official})
    assert is_partition(parts, 100)
    assert np.array_equal(parts["test"], official)
    assert len(parts["val"]) == 8
    both = split(100, val=None, test=None, official={"test": official, "val": np.arange(5)})
    assert np.array_equal(both["train"], np.arange(5, 80))


def test_the_key_decides():
    first, again, other = (split(1000, val=0.2, test=0.1, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["val"], other["val"])
    assert np.array_equal(first["test"], split(1000, val=50, test=0.1)["test"])  # test does not depend on val


def test_stratified_parts_hold_each_class_in_its_share():
    labels = np.repeat([0, 1, 2], [500, 300, 200])
    parts = split(1000, val=0.1, test=0.1, labels=labels)
    for name in ("val", "test"):
        assert np.abs(np.bincount(labels[parts[name]]) - [50, 30, 20]).max() <= 1


def test_limit_cuts_training_only_and_mixes_classes():
    labels = np.repeat(np.arange(10), 100)
    full, small = (split(1000, val=0.1, test=0.1, limit=limit) for limit in (None, 50))
    assert len(small["train"]) == 50
    assert set(small["train"]) <= set(full["train"])
    assert np.array_equal(small["val"], full["val"])
    assert len(set(labels[small["train"]])) > 5


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"val": 0.1, "test": None}, "data.test=null, but the data set has no official test part"),
        ({"val": 0.1, "test": 5, "official": {"test": np.arange(3)}}, "write data.test=null"),
        ({"val": 1.0, "test": 0}, "fraction in"),
        ({"val": -1, "test": 0}, "fraction in"),
        ({"val": 8, "test": 2}, "images for training"),
        ({"val": 0, "test": 0, "limit": 0}, "data.limit=0"),
    ],
)
def test_refusals_name_the_remedy(options, remedy):
    with pytest.raises(ValueError, match=remedy):
        split(10, **options)
