"""train, val and test: disjoint, exhaustive, and the same in every run whatever its seed."""

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
    """Cuts the indices 0 … n - 1 into parts.

    Args:
        n: images of the set.
        val, test: what to cut, a fraction in [0, 1) of the images outside official parts, or a count (0: an empty part);
            None where the set has that part officially.
        official: "val" and "test" → their indices, where the set's authors fixed them.
        seed: key of the cut. It is not the run's seed: runs of all seeds train on the same images.
        labels: int64 (n,); if given, each class gives its share of every part, to within one image.
        limit: train on only so many images, drawn with the same key.

    Returns:
        "train", "val", "test" → int64 indices in ascending order. A change of `val` leaves the test part as it is.

    Raises:
        ValueError: a part is both official and asked for, or neither; nothing is left to train on.
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
    """Reorders so that every stretch holds each class in its share: by the place within the class, as a fraction of it."""
    place = np.empty(len(order))
    for label in np.unique(labels[order]):
        of_class = np.flatnonzero(labels[order] == label)
        place[of_class] = (np.arange(len(of_class)) + 0.5) / len(of_class)
    return order[np.argsort(place, kind="stable")]
