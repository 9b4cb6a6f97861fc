"""Split a data set into train, val and test. The parts are disjoint and exhaustive, and do not depend on the seed of the run."""

from collections.abc import Mapping

import numpy as np

from diffusion_lab import noise
from diffusion_lab.data.images import Index
from diffusion_lab.errors import ConfigError

PARTS = ("train", "val", "test")


def split(
    n: int,
    *,
    val: float | int | None,
    test: float | int | None,
    official: Mapping[str, Index] | None = None,
    seed: int = 0,
    labels: Index | None = None,
    limit: int | None = None,
) -> dict[str, Index]:
    """Split the indices 0 … n − 1.

    Args:
        n: number of images.
        val, test: size of the part, as a fraction in [0, 1) of the images outside official parts, or a number of images; None
            for the official part.
        official: indices of the published parts "val" and "test".
        seed: seed of the random split. It is not the seed of the run, so that all runs train on the same images.
        labels: labels for a stratified split, int64 (n,): each part has the class proportions of the set, up to one image.
        limit: maximum number of training images, which are drawn with the same seed.

    Returns:
        The indices of "train", "val" and "test", int64 in ascending order. The test part does not depend on `val`.

    Raises:
        ConfigError: if the size of an official part is set, that of another part is not, or the training part is empty.
    """
    official = official or {}
    free = np.setdiff1d(np.arange(n), np.concatenate([np.empty(0, np.int64), *official.values()]))
    order = free[noise.permutation(len(free), seed=seed, stream=noise.Stream.SPLIT).numpy()]
    if labels is not None:
        order = _interleave(order, labels)
    parts = {}
    for name, amount in (("test", test), ("val", val)):
        if name in official:
            if amount is not None:
                raise ConfigError(
                    f"data.{name}={amount}, but the data set has an official {name} part: write data.{name}=null"
                )
            parts[name] = np.sort(official[name])
        else:
            count = _count(name, amount, len(free))
            parts[name], order = np.sort(order[:count]), order[count:]
    if limit is not None and limit < 1:
        raise ConfigError(f"data.limit={limit}: write at least 1, or null for all training images")
    if len(order) == 0:
        raise ConfigError(
            f"data.val={val} and data.test={test} leave none of {n} images for training: write smaller values"
        )
    return {"train": np.sort(order[:limit]), "val": parts["val"], "test": parts["test"]}


def _count(name: str, amount: float | int | None, n: int) -> int:
    if amount is None:
        raise ConfigError(
            f"data.{name}=null, but the data set has no official {name} part: write a fraction, a number of images, or 0"
        )
    if amount < 0 or (isinstance(amount, float) and amount >= 1):
        raise ConfigError(f"data.{name}={amount}: write a fraction in [0, 1) or a number of images")
    return max(round(amount * n), 1) if 0 < amount < 1 else int(amount)


def _interleave(order: Index, labels: Index) -> Index:
    """Sort by the relative rank within each class, so that every contiguous range has the class proportions of the set."""
    rank = np.empty(len(order))
    for label in np.unique(labels[order]):
        members = np.flatnonzero(labels[order] == label)
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)
    return order[np.argsort(rank, kind="stable")]
