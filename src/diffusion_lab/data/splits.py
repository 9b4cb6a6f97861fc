"""Split a data set into train, val and test: disjoint, exhaustive, and independent of the run's seed."""

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
        val, test: size of the part, as a fraction in [0, 1) of the images outside official parts, or a count (0: an empty
            part); None takes the official part.
        official: "val" and "test" → indices of the published parts.
        seed: key of the random split. It is not the run's seed: runs of all seeds train on the same images.
        labels: int64 (n,); stratify: the classes of each part have the proportions of the set, to within one image.
        limit: maximum number of training images, drawn with the same key.

    Returns:
        "train", "val", "test" → int64 indices in ascending order. The test part does not depend on `val`.

    Raises:
        ConfigError: the size of an official part is configured, or that of another part is not; the training part is empty.
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
                    f"data.{name}={amount}, but the set has an official {name} part: write data.{name}=null"
                )
            parts[name] = np.sort(official[name])
        else:
            count = _count(name, amount, len(free))
            parts[name], order = np.sort(order[:count]), order[count:]
    if limit is not None and limit < 1:
        raise ConfigError(f"data.limit={limit}: give a positive number of training images, or null for all")
    if len(order) == 0:
        raise ConfigError(
            f"nothing is left to train on: of {n} images data.val={val} and data.test={test} take all; lower them"
        )
    return {"train": np.sort(order[:limit]), "val": parts["val"], "test": parts["test"]}


def _count(name: str, amount: float | int | None, n: int) -> int:
    if amount is None:
        raise ConfigError(
            f"data.{name}=null, but the set has no official {name} part: give a fraction, a count, or 0 for none"
        )
    if amount < 0 or (isinstance(amount, float) and amount >= 1):
        raise ConfigError(f"data.{name}={amount}: give a fraction in [0, 1) or a whole number of images")
    return max(round(amount * n), 1) if 0 < amount < 1 else int(amount)


def _interleave(order: Index, labels: Index) -> Index:
    """Reorder so that every contiguous range has the class proportions of the whole: sort by relative rank in the class."""
    rank = np.empty(len(order))
    for label in np.unique(labels[order]):
        members = np.flatnonzero(labels[order] == label)
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)
    return order[np.argsort(rank, kind="stable")]
